"""Every error bnviz raises on purpose: one sentence that says where, what was found, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BnvizError(Exception):
    """Something a person can mend; the message says how."""


class CaptureError(BnvizError):
    """A model could not be watched, or nothing was seen while it was."""


class SchemaError(BnvizError):
    """Data, a probe, a diagnostic or a view does not keep what its declaration promises."""


class StoreError(BnvizError):
    """A run could not be written or read."""


class NotCaptured(BnvizError):
    """A diagnostic needs a record, a variable or labels that this run does not hold."""


class UnknownName(BnvizError, KeyError):
    """A name that is not among the valid choices."""

    def __str__(self) -> str:  # KeyError would show the repr of the sentence
        return str(self.args[0])


class MissingDependency(BnvizError, ImportError):
    """An optional package is needed here and not installed."""


def words_of(error: BaseException) -> str:
    """What an error says: its own words where they are meant for a person, else with the name of its kind.

    Examples
    --------
    >>> words_of(StoreError("run.zip exists.")), words_of(ZeroDivisionError("by zero"))
    ('run.zip exists.', 'ZeroDivisionError: by zero')
    """
    return str(error) if isinstance(error, BnvizError) else f"{type(error).__name__}: {error}"


def unknown(what: str, name: str, choices: Iterable[str]) -> UnknownName:
    """The error for `name`, with the valid choices and the nearest one.

    Examples
    --------
    >>> print(unknown("probe", "atention", ["attention", "routing"]))
    Unknown probe 'atention'; did you mean 'attention'? Valid: attention, routing.
    """
    valid = sorted(set(choices))
    near = difflib.get_close_matches(str(name), valid, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return UnknownName(f"Unknown {what} {name!r}{hint} Valid: {', '.join(valid) or 'none'}.")


def missing(package: str, extra: str, purpose: str) -> MissingDependency:
    """The error for an optional package that is not installed.

    Examples
    --------
    >>> print(missing("py_spy", "host", "sampling Python stacks"))
    Sampling Python stacks needs 'py_spy', which is not installed; run: pip install 'bnviz[host]'
    """
    sentence = purpose[:1].upper() + purpose[1:]
    return MissingDependency(f"{sentence} needs {package!r}, which is not installed; run: pip install 'bnviz[{extra}]'")
