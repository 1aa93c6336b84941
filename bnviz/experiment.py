"""Experiments: run a model again on the user's own batch, changed in one stated way, and measure what changes."""

from __future__ import annotations

import inspect
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, catalog, quantities
from .errors import BnvizError, StoreError, unknown, words_of
from .run import Run
from .schema import stamp

if TYPE_CHECKING:
    from torch import nn

Told = Callable[[int, int, str], None]


def experiment(
    model: nn.Module,
    batch: Any,
    *names: str,
    path: str | os.PathLike[str] | None = None,
    progress: bool | Told | None = None,
    **options: Any,
) -> Run:
    """Run `model` on `batch` under each case of the named experiments; the run holds what every case changed.

    Nothing here runs unless it is called, and the model is as it was when it ends, also after an error or an interrupt: weights,
    modes, random numbers. It is measured without dropout.

    Parameters
    ----------
    model : torch.nn.Module
    batch : Tensor (tokens,) or (batch, tokens), or mapping, optional
        Token ids; a mapping as a tokenizer gives it, whose padding is left out. None for an experiment that makes its own text.
    *names : str
        Experiments, from `bnviz.experiments`; none named: all.
    path : path-like, optional
        Where to store the run. What is measured is written beside it at once, so that an experiment that was interrupted goes on
        where it stopped when it is called again in the same way.
    progress : bool or callable, optional
        As in `bnviz.capture`; or called as `progress(done, total, case)`.
    **options
        Of the experiments.

    Returns
    -------
    Run
        A record for each experiment; `bnviz.diagnose` judges it.

    Raises
    ------
    UnknownName
        No such experiment, or no such option of those.
    BnvizError
        The batch or the model does not fit, with the reason.
    StoreError
        There is something at `path`, or the beginnings of another experiment.

    Examples
    --------
    >>> from bnviz.demo.models import load
    >>> model, tokenizer = load("llama-bard")
    >>> ids = tokenizer("Shall I compare thee to a summer's day? Thou art more lovely and more temperate.")["input_ids"]
    >>> run = experiment(model, ids, "kv_eviction", methods=["random"], budgets=[1.0], greedy=2)
    >>> round(run["kv_eviction"]["divergence"].item(), 6)
    0.0
    """
    from .capture.provenance import provenance
    from .experiments._subject import still, subject

    chosen = _made(names, options)
    of = subject(model, batch)
    told = {"experiments": list(chosen), **{name: value for name, value in options.items() if _plain(value)}}
    held = _Held(None if path is None else Path(path), {"told": told, "digest": of.digest, "version": __version__})
    begun = time.perf_counter()
    facts = provenance(model, None, told)
    records, notes = {}, list[str]()
    with still(model):
        for name, one in chosen.items():
            found = _measured(name, one, of, held, progress)
            if not found:
                lacks = "" if of.texts else "; give a batch of token ids"
                raise BnvizError(f"{name}: nothing could be measured{lacks}.")
            records[name] = stamp(one.record(of, found), one.spec.variables).assign_attrs(
                model=facts["model"], model_bytes=facts["parameter_bytes"]
            )
            notes += [f"{name}: {why}" for why in records[name].attrs.get("skipped", ())]
    run = Run(records, {**facts, "notes": notes, "seconds": time.perf_counter() - begun})
    return held.stored(run)


def _made(names: tuple[str, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """The experiments, each with the options it knows; an option none knows is refused."""
    classes = {name: catalog.load("experiments", name) for name in dict.fromkeys(names or catalog.names("experiments"))}
    takes = {name: set(inspect.signature(one).parameters) for name, one in classes.items()}
    for option in options:
        if not any(option in some for some in takes.values()):
            raise unknown("option of experiment", option, set[str]().union(*takes.values()))
    return {name: one(**{k: v for k, v in options.items() if k in takes[name]}) for name, one in classes.items()}


def _plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _measured(name: str, one: Any, of: Any, held: _Held, progress: bool | Told | None) -> dict[Any, Mapping[str, Any]]:
    """Every case of one experiment, those that were measured before read from where they are held."""
    found: dict[Any, Mapping[str, Any]] = {}
    with _Shown(name, progress) as tell:
        try:
            for case in one.cases(of):
                tell(len(found), one.many(of), " · ".join(map(str, case)))
                known = held.get(name, case)
                found[case] = one.measure(of, case) if known is None else known
                if known is None:
                    held.put(name, case, found[case])
        except KeyboardInterrupt as error:
            done = quantities.counted(len(found), "case")
            error.add_note(f"{name} was interrupted after {done}; {held.words}")
            raise
    return found


@dataclass(frozen=True, slots=True)
class _Done:
    """How far an experiment is, as a progress bar reads it."""

    held: int
    ceiling: int
    words: str


class _Shown:
    """A bar, or the user's function, told before each case."""

    def __init__(self, name: str, progress: bool | Told | None) -> None:
        from .capture.progress import Progress

        self._name, self._told = name, progress if callable(progress) else None
        self._state = _Done(0, 1, name)
        wanted = None if callable(progress) else progress
        self._bar = Progress(False if self._told else wanted, lambda: self._state)  # type: ignore[arg-type,return-value]

    def __enter__(self) -> Told:
        return self._tell

    def __exit__(self, *_: object) -> None:
        self._bar.end()

    def _tell(self, done: int, total: int, case: str) -> None:
        self._state = _Done(done, max(total, 1), f"{self._name}: {done} of {total} · {case}")
        if self._told is not None:
            self._told(done, total, case)
        self._bar.tick()


class _Held:
    """What was measured, beside the path where the run will be: a line a case."""

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self._path, self._file = path, None if path is None else path.with_name(path.name + ".partial")
        self._known: dict[str, Any] = {}
        if path is None or self._file is None:
            return
        if path.exists():
            raise StoreError(f"{path} exists; choose another path, or open it with bnviz.open.")
        first = json.dumps(header, sort_keys=True)
        if not self._file.exists():
            self._write(first, "x")
            return
        lines = list(self._lines())
        if not lines or lines[0] != json.loads(first):
            raise StoreError(
                f"{self._file} holds the beginnings of another experiment (other options, texts or weights); remove it, or "
                "choose another path."
            )
        self._known = {json.dumps(key): value for key, value in lines[1:]}

    def _lines(self) -> Iterator[Any]:
        assert self._file is not None
        for line in self._file.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:  # the last one, of a process that died in writing it
                return

    def _write(self, line: str, mode: str = "a") -> None:
        assert self._file is not None
        try:
            with self._file.open(mode, encoding="utf-8") as file:
                file.write(f"{line}\n")
        except OSError as error:
            raise StoreError(f"{self._file} could not be written ({words_of(error)}); choose another path.") from error

    def get(self, name: str, case: Any) -> Any:
        """What is known of a case; None where it was not measured."""
        return self._known.get(json.dumps([name, *case]))

    def put(self, name: str, case: Any, found: Mapping[str, Any]) -> None:
        """Keep what a case gave."""
        if self._file is not None:
            self._write(json.dumps([[name, *case], found]))

    def stored(self, run: Run) -> Run:
        """The run, stored where it was asked for."""
        if self._path is not None and self._file is not None:
            run.path = run.save(self._path)
            self._file.unlink()
        return run

    @property
    def words(self) -> str:
        """What becomes of what was measured."""
        if self._file is None:
            return "it is lost: give path=, and another call goes on where this one stopped."
        return f"it is in {self._file}, and the same call goes on where this one stopped."
