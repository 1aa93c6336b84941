"""From a run to a report: every diagnostic its records allow, judged, ranked on one list, and shown."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import catalog
from .errors import BnvizError, NotCaptured, StoreError, unknown
from .findings import place, rank, saving_words
from .needs import NOT_APPLICABLE, ON_REQUEST, holds, labels_record, lack, reservations, sort_of, split
from .overview import Overview, of_run
from .quantities import counted
from .schema import DiagnosticSpec, Finding, Judgement

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from .run import Run

Progress = Callable[[int, int, str], None]
_MARK = {"high": "■", "medium": "▲", "low": "●", "note": "○"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one diagnostic that ran: its Dataset and what its judge says of it."""

    spec: DiagnosticSpec
    result: xr.Dataset
    judgement: Judgement


def diagnose(
    run: Run | str | os.PathLike[str],
    *names: str,
    labels: Any = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
    strict: bool = False,
) -> Report:
    """Run every diagnostic this run's records allow, judge the results and rank the findings.

    Parameters
    ----------
    run : Run or path-like
        What was captured, or where it was saved.
    *names : str
        Diagnostics to run; none named: all whose records are there, and the report says which are not.
    labels : array (sample,), optional
        The class of each captured sample, for what measures information about the label; whole numbers or names.
    options : mapping of str to mapping, optional
        Options of a diagnostic or limits of its judge, by the diagnostic's name: `{"expert_load": {"dead": 0.1}}`.
    progress : callable, optional
        Called as `progress(done, total, name)` before each diagnostic, and once at the end with an empty name.
    strict : bool
        Raise the first error instead of keeping it in `report.failures`.

    Returns
    -------
    Report

    Raises
    ------
    NotCaptured
        The run is empty, or a diagnostic was named whose records the run does not hold.
    UnknownName
        No such diagnostic, or no such option of it.
    StoreError
        There is no run at the path.
    BnvizError
        The labels do not fit the samples, or `run` is no run.
    """
    run = _opened(run)
    if not run.kinds:
        raise NotCaptured(
            "This run is empty: no probe saw anything. Run the model inside bnviz.capture(model) and try again."
        )
    given = {name: dict(some) for name, some in (options or {}).items()}
    for name in (*names, *given):
        if name not in catalog.names("diagnostics"):
            raise unknown("diagnostic", name, catalog.names("diagnostics"))
    records = {kind: run[kind] for kind in run.kinds}
    if labels is not None:
        records["labels"] = labels_record(labels, records)
    chosen = {name: catalog.load("diagnostics", name) for name in dict.fromkeys(names or catalog.names("diagnostics"))}
    ordered = sorted(chosen.values(), key=lambda d: (d.spec.order, d.spec.name))
    absent = {d.spec.name: why for d in ordered if (why := lack(d.spec, records, run.provenance))}
    if names and absent:
        raise NotCaptured(f"{next(iter(absent))}: {next(iter(absent.values()))}.")
    for name, some in given.items():
        _check_options(catalog.load("diagnostics", name), some)
    ready = [d for d in ordered if d.spec.name not in absent]
    outcomes: dict[str, Outcome] = {}
    failures: dict[str, str] = {}
    for done, each in enumerate(ready):
        name = each.spec.name
        if progress is not None:
            progress(done, len(ready), name)
        try:
            outcomes[name] = _outcome(each, records, given.get(name, {}), reservations(each.spec, run.provenance))
        except Exception as error:  # one diagnostic's error is its own
            if strict:
                raise
            failures[name] = f"{type(error).__name__}: {error}"
    if progress is not None:
        progress(len(ready), len(ready), "")
    return Report(run, outcomes, failures=failures, absent=absent)


def _opened(run: Any) -> Run:
    """The run itself, or the one that was saved at a path."""
    from .run import Run
    from .store import open as open_run

    if isinstance(run, (str, os.PathLike)):
        return open_run(run)
    if isinstance(run, Run):
        return run
    made = type(run).__name__
    hint = "; give its .run" if hasattr(type(run), "run") else ""
    raise BnvizError(f"diagnose takes a run or the path of a saved one, got a {made}{hint}.")


class Report:
    """What the diagnostics of one run say, ranked.

    `report.findings` is the list to act on, `report["kv_importance"]` the numbers behind it, `report.view("kv_importance")`
    the drawing, `report.save("report.html")` all of it in one file that needs no network.

    Parameters
    ----------
    run : Run
    outcomes : mapping of str to Outcome
        In the order of the report.
    failures : mapping of str to str
        Diagnostics that raised: name and "ErrorName: message".
    absent : mapping of str to str
        Diagnostics whose records are not in the run: name and what to add, or that the model has nothing of the kind.
    """

    def __init__(
        self,
        run: Run,
        outcomes: Mapping[str, Outcome],
        *,
        failures: Mapping[str, str] | None = None,
        absent: Mapping[str, str] | None = None,
    ) -> None:
        self.run = run
        self.outcomes = dict(outcomes)
        self.failures = dict(failures or {})
        self.absent = dict(absent or {})

    @property
    def names(self) -> tuple[str, ...]:
        """Diagnostics that ran, in the order of the report."""
        return tuple(self.outcomes)

    @property
    def model(self) -> str:
        """Name of the model that was watched."""
        return str(self.run.provenance.get("model") or "the model")

    @property
    def findings(self) -> list[Finding]:
        """All findings: what saves a twentieth of the run's whole or more first, then by severity (see `findings.rank`)."""
        return rank(finding for each in self.outcomes.values() for finding in each.judgement.findings)

    def overview(self) -> Overview:
        """What is said around the diagnostics: title, numbers, where they came from."""
        return of_run(self)

    def _outcome(self, name: str) -> Outcome:
        if name in self.outcomes:
            return self.outcomes[name]
        if name in self.failures:
            raise BnvizError(
                f"{name} did not finish: {self.failures[name].rstrip('.')}. diagnose(run, {name!r}, strict=True) raises it."
            )
        if name in self.absent:
            raise NotCaptured(f"{name}: {self.absent[name]}.")
        if name in catalog.names("diagnostics"):
            raise NotCaptured(f"{name} is not in this report; run diagnose(run, {name!r}).")
        raise unknown("diagnostic", name, self.names)

    def __getitem__(self, name: str) -> xr.Dataset:
        return self._outcome(name).result

    def __contains__(self, name: object) -> bool:
        return name in self.outcomes

    def __iter__(self) -> Iterator[str]:
        return iter(self.outcomes)

    def judgement(self, name: str) -> Judgement:
        """Title, caveats and findings of one diagnostic."""
        return self._outcome(name).judgement

    def view(self, name: str, *, compact: bool = False) -> Any:
        """The drawing of one diagnostic with its title, subtitle and caveats, as a Bokeh model.

        Parameters
        ----------
        name : str
            A diagnostic, for all its views, or one view.
        compact : bool
            For a narrow place: the side panel.

        Raises
        ------
        UnknownName, NotCaptured, BnvizError
            There is no such drawing in this report, with the reason.
        """
        from .figures import drawing

        return drawing(self, name, compact=compact)

    def save(self, path: str | os.PathLike[str], *, beside: Sequence[Report] = (), overwrite: bool = False) -> Path:
        """Write the report as one HTML file that opens anywhere, without network and without Python.

        Parameters
        ----------
        path : path-like
            Ends in `.html`.
        beside : sequence of Report
            Reports of other runs to put in the same file, a chapter each, with one list of findings.
        overwrite : bool
            Replace what is there.

        Raises
        ------
        StoreError
            The file exists and `overwrite` is false, or it cannot be written.
        """
        from .page import page

        target = Path(path)
        if target.suffix.lower() not in (".html", ".htm"):
            raise StoreError(f"{target} is not named as a web page; name it {target.with_suffix('.html').name!r}.")
        if target.exists() and not overwrite:
            raise StoreError(f"{target} exists; choose another path or pass overwrite=True.")
        text = page(self, *beside)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        except OSError as error:
            raise StoreError(f"{target} could not be written ({error}); save the report elsewhere.") from error
        return target

    def to_frame(self) -> pd.DataFrame:
        """The findings as a pandas DataFrame, one row each, in their order.

        Raises
        ------
        MissingDependency
            pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            from .errors import MissingDependency

            raise MissingDependency(
                "A frame of findings needs 'pandas', which is not installed; run: pip install pandas"
            ) from error
        return pd.DataFrame([_row(f) for f in self.findings], columns=list(_row(Finding("", "", "note"))))

    def __repr__(self) -> str:
        found = self.findings
        said = self.overview()
        lines = [f"{self._subject()} · {said.ran} · {counted(len(found), 'finding')}"]
        for finding in found[:7]:
            at = place(finding.where)
            lines.append(
                f"  {_MARK[finding.severity]} {finding.severity:<6} {finding.sentence}{' · ' + at if at else ''}"
            )
            lines.append(f"           {saving_words(finding)} · {finding.advice}".rstrip(" ·"))
        if len(found) > 7:
            lines.append(f"  {len(found) - 7} more in .findings")
        if not found and self.outcomes:
            lines.append(f"  {said.nothing}")
        lines += [f"  {name} did not finish: {why}" for name, why in self.failures.items()]
        for words, some in self._unanswered():
            lines.append(f"  {words}: {', '.join(some)} (see .absent)")
        return "\n".join(lines)

    def _subject(self) -> str:
        return f"Report on {self.model}"

    def _unanswered(self) -> Iterator[tuple[str, list[str]]]:
        """Diagnostics without their records, by why that is."""
        sorts = (("not captured for", ""), ("on request", ON_REQUEST), ("not applicable to this model", NOT_APPLICABLE))
        for words, begins in sorts:
            some = [name for name, why in self.absent.items() if sort_of(why) == begins]
            if some:
                yield words, some

    def _repr_html_(self) -> str:
        display = importlib.import_module("bnviz.jupyter.display")  # above this room: only a notebook asks for it
        return str(display.report_html(self))


def _row(finding: Finding) -> dict[str, Any]:
    saving = finding.saving
    return {
        "code": finding.code,
        "severity": finding.severity,
        "sentence": finding.sentence,
        "place": place(finding.where),
        "where": dict(finding.where),
        "value": finding.value,
        "limit": finding.limit,
        "unit": finding.unit,
        "advice": finding.advice,
        "saving": saving.amount if saving else float("nan"),
        "saving_unit": saving.unit if saving else "",
        "saving_share": saving.share if saving else float("nan"),
        "saving_how": saving.how if saving else "",
    }


def _outcome(
    diagnostic: Any, records: Mapping[str, xr.Dataset], options: Mapping[str, Any], known: Sequence[str] = ()
) -> Outcome:
    """Run one diagnostic and its judge, each with the options that are its own; what is `known` of the records is said first."""
    spec: DiagnosticSpec = diagnostic.spec
    judge = catalog.judge_of(diagnostic)
    needed = {split(need)[0] for need in spec.needs}
    wanted = {split(want)[0] for want in spec.wants if holds(records, want)}
    own, limits = _accepts(diagnostic), _accepts(judge)
    further = set(records) - set(own) if _takes_any(diagnostic) else set()
    arguments = {name: records[name] for name in sorted(needed | wanted | further)}
    result = diagnostic(**arguments, **{k: v for k, v in options.items() if k in own})
    judgement = judge(result, **{k: v for k, v in options.items() if k in limits})
    return Outcome(spec, result, replace(judgement, caveats=(*known, *judgement.caveats)) if known else judgement)


def _accepts(function: Any) -> tuple[str, ...]:
    """Names of the keyword options of a diagnostic or a judge."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


def _takes_any(function: Any) -> bool:
    """Whether a diagnostic reads whatever records there are besides those it names."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def _check_options(diagnostic: Any, options: Mapping[str, Any]) -> None:
    valid = dict.fromkeys((*_accepts(diagnostic), *_accepts(catalog.judge_of(diagnostic))))
    for name in options:
        if name not in valid:
            raise unknown(f"option of diagnostic {diagnostic.spec.name!r}:", name, valid)


__all__: Sequence[str] = ("Outcome", "Report", "diagnose")
