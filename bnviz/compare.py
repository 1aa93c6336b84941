"""What changed between two runs: of a model before and after a change, of two checkpoints, of two models of one shape."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .aligned import Quantity, Unshared, aligned
from .comparison import NAME, SPEC, TIMED, comparison, judge, same
from .errors import BnvizError, NotCaptured
from .matching import CLOCK, matched
from .needs import sort_of, split
from .overview import Overview, facts
from .quantities import counted, share
from .report import Outcome, Progress, Report, diagnose
from .run import Run
from .schema import Judgement

if TYPE_CHECKING:
    import xarray as xr

_TELLING = (
    "class",
    "parameters",
    "dtype",
    "device",
    "accelerator",
    "training",
    "calls",
    "versions: torch",
    "options: ",
)
_NAMED = 6  # places or variables that a caveat names


def compare(
    a: Run | Report | str | os.PathLike[str],
    b: Run | Report | str | os.PathLike[str],
    *names: str,
    moved: float = 0.1,
    called: tuple[str, str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
    strict: bool = False,
) -> Comparison:
    """What changed from run `a` to run `b`, as a report: findings that are new, moved or gone, and every quantity's change.

    Read the findings first: each stands at its place and selects it. Then the figure: quantities that moved most, layer by layer.
    `report["comparison"]` has all of them, the farthest first; `report.before` and `report.after` are the two reports in full.
    Times differ between two captures of one model; they are in the numbers, but not drawn.

    Parameters
    ----------
    a, b : Run, Report or path-like
        What was captured, where it was saved, or what was diagnosed already.
    *names : str
        Diagnostics to compare; none named: all that both runs answer, and the report says which only one does.
    moved : float
        Relative change from which a value counts as moved: 0.1 is 10 %.
    called : (str, str), optional
        What to call the two; default is the names of their models, of where they are saved, or (1) and (2).
    options : mapping of str to mapping, optional
        As for `diagnose`; not for a report, which is diagnosed already.
    progress : callable, optional
        As for `diagnose`, over both runs.
    strict : bool
        Raise the first error instead of keeping it in `report.failures`.

    Returns
    -------
    Comparison
        A `Report` with one outcome, `"comparison"`, and the attributes `before` and `after`.

    Raises
    ------
    NotCaptured
        A run is empty or lacks what a named diagnostic needs, or the two answer no question in common.
    UnknownName
        No such diagnostic, or no such option of it.
    StoreError
        There is no run at a path.
    BnvizError
        `a` or `b` is neither run, report nor path, or `moved` is no positive number.

    Notes
    -----
    Places are matched by their coordinates, layers by their number; what the runs do not share is in the caveats and never in a
    number. Findings are matched by code and place (see `bnviz.matching.matched`). Cost: that of two diagnoses, and O(size of
    their results).

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> dims = ("step", "kind", "layer", "token")
    >>> def run(cosine):
    ...     record = xr.Dataset({"cosine": (dims, np.reshape(cosine, (1, 1, 2, 1)))}, {"kind": ["block"], "layer": [0, 1]})
    ...     return Run({"activations": record}, {"model": "net"})
    >>> report = compare(run([0.5, 0.6]), run([0.5, 0.2]))
    >>> row = report["comparison"].isel(quantity=list(report["comparison"]["variable"].values).index("block_influence"))
    >>> str(row["place"].values), row["place_before"].item(), row["place_after"].item()
    ('layer 1', 0.4, 0.8)
    """
    if not moved > 0:
        raise BnvizError(f"compare got moved={moved}, expected a positive share such as 0.1; give one.")
    steps = _Steps(progress)
    reports = [_report(one, at, names, options, steps.of(at), strict) for at, one in enumerate((a, b))]
    steps.end()
    before, after = reports
    common = [name for name in before.names if name in after and (not names or name in names)]
    if not common:
        own = (f"{at} answers {', '.join(one.names) or 'nothing'}" for at, one in zip("ab", reports, strict=True))
        raise NotCaptured(f"The two runs share no diagnostic: {'; '.join(own)}. Capture both with the same probes.")
    titles = _titles(before, after, called)
    found, unshared, failures = _quantities(before, after, common, strict)
    timed = [name for name in common if {split(need)[0] for need in before.outcomes[name].spec.needs} & set(TIMED)]
    result = comparison(found, moved=moved, timed=timed)
    result.attrs |= {"before": titles[0], "after": titles[1]}
    told = [f for one in reports for f in _findings(one, common)]
    half = len(_findings(before, common))
    changes = matched(told[:half], told[half:], moved=moved, timed=timed)
    said = (_differing(before, after, titles), *_unshared(unshared, titles), *_clock(timed, moved))
    judgement = judge(result, changes, [each for each in said if each])
    return Comparison(before, after, result, judgement, titles=titles, failures=failures)


class Comparison(Report):
    """What changed from one report to another; made by `compare`.

    Parameters
    ----------
    before, after : Report
        In full, also where only one of them answers.
    result : Dataset
        From `comparison.comparison`.
    judgement : Judgement
    titles : (str, str)
        What the two are called.
    failures : mapping of str to str
        Diagnostics whose results could not be compared.
    """

    def __init__(
        self,
        before: Report,
        after: Report,
        result: xr.Dataset,
        judgement: Judgement,
        *,
        titles: tuple[str, str],
        failures: Mapping[str, str] | None = None,
    ) -> None:
        self.before, self.after, self.titles = before, after, titles
        notes = _notes(before, after, titles)
        run = Run({NAME: result}, {"model": f"{titles[0]} to {titles[1]}", "notes": notes})
        absent = dict(_one_sided(before, after, titles))
        super().__init__(run, {NAME: Outcome(SPEC, result, judgement)}, failures=failures, absent=absent)

    @property
    def compared(self) -> tuple[str, ...]:
        """Diagnostics that were compared."""
        return tuple(dict.fromkeys(map(str, self[NAME]["diagnostic"].values)))

    def overview(self) -> Overview:
        """Title, how much changed, and what differs in how the two came about."""
        result, found, ran = self[NAME], self.findings, counted(len(self.compared), "diagnostic")
        far = int((result["distance"].values > result.attrs["limit"]).sum())
        kinds = {word: sum(f.code == f"{NAME}/{word}" for f in found) for word in ("new", "moved", "gone")}
        numbers = [(f"findings {word}", str(n)) for word, n in kinds.items()]
        numbers += [
            ("quantities compared", str(result.sizes["quantity"])),
            ("of them moved", str(far)),
            ("diagnostics", ran.split()[0]),
        ]
        words = "Nothing differs" if same(result) else f"Nothing moved by more than {share(result.attrs['limit'])}"
        about = [f"{title}: {_line(one)}" for title, one in zip(self.titles, (self.before, self.after), strict=True)]
        return Overview(
            f"What changed from {self.titles[0]} to {self.titles[1]}",
            ran,
            tuple(about),
            numbers,
            f"{words}. {ran} compared in {counted(result.sizes['quantity'], 'quantity', 'quantities')}",
            _facts(self.before, self.after),
            "The two runs",
            "Not compared",
        )

    def _subject(self) -> str:
        return self.overview().title

    def _unanswered(self) -> Iterator[tuple[str, list[str]]]:
        some = [name for name, why in self.absent.items() if not sort_of(why)]
        if some:
            yield "not compared", some

    def _outcome(self, name: str) -> Outcome:
        if name != NAME and (name in self.before or name in self.after):
            raise NotCaptured(
                f"{name} is not in a comparison but in its two reports; write .before[{name!r}] or .after[{name!r}]."
            )
        return super()._outcome(name)


# ----------------------------------------------------------------------------------------------------------- the two reports
class _Steps:
    """Progress of two diagnoses as one: done never falls."""

    def __init__(self, tell: Progress | None) -> None:
        self._tell, self._totals, self._done = tell, [0, 0], 0

    def of(self, at: int) -> Progress | None:
        """For the diagnosis of one of the two."""

        def told(done: int, total: int, name: str) -> None:
            self._totals[at] = total
            rest = total if at == 0 else 0  # as many again, until it is known
            if name and self._tell is not None:
                self._tell(done + at * self._totals[0], sum(self._totals) + rest, name)

        return None if self._tell is None else told

    def end(self) -> None:
        if self._tell is not None:
            self._tell(sum(self._totals), sum(self._totals), "")


def _report(
    one: Any,
    at: int,
    names: Sequence[str],
    options: Mapping[str, Mapping[str, Any]] | None,
    progress: Progress | None,
    strict: bool,
) -> Report:
    """The report itself, or the diagnosis of a run."""
    which = "ab"[at]
    if isinstance(one, Comparison):
        raise BnvizError(
            f"compare takes runs and their reports, got a comparison as {which}; give its .before or .after."
        )
    if not isinstance(one, (Run, Report, str, os.PathLike)):
        made = type(one).__name__
        hint = "; give its .run" if hasattr(type(one), "run") else ""
        raise BnvizError(f"compare takes a run, a report or the path of a saved run as {which}, got a {made}{hint}.")
    try:
        if not isinstance(one, Report):
            return diagnose(one, *names, options=options, progress=progress, strict=strict)
        for name in names:
            one.judgement(name)  # says which there are
        return one
    except NotCaptured as error:
        raise NotCaptured(f"Of run {which}: {error}") from error


def _titles(before: Report, after: Report, called: tuple[str, str] | None) -> tuple[str, str]:
    """What the two are called: different names, as short as they can be."""
    models, paths = (before.model, after.model), (before.run.path, after.run.path)
    if called is not None:
        return f"{models[0]} ({called[0]})", f"{models[1]} ({called[1]})"
    if models[0] != models[1]:
        return models
    if paths[0] is not None and paths[1] is not None and paths[0].stem != paths[1].stem:
        return f"{models[0]} ({paths[0].stem})", f"{models[1]} ({paths[1].stem})"
    return f"{models[0]} (1)", f"{models[1]} (2)"


def _quantities(
    before: Report, after: Report, common: Sequence[str], strict: bool
) -> tuple[list[Quantity], Unshared, dict[str, str]]:
    """Of every diagnostic; one's error is its own."""
    found: list[Quantity] = []
    unshared, failures = Unshared(), {}
    for name in common:
        try:
            found += aligned(before.outcomes[name].spec, before[name], after[name], unshared)
        except Exception as error:
            if strict:
                raise
            failures[name] = f"{type(error).__name__}: {error}"
    return found, unshared, failures


def _findings(report: Report, common: Sequence[str]) -> list[Any]:
    return [f for f in report.findings if f.code.partition("/")[0] in common]


# ------------------------------------------------------------------------------------------------------------------ in words
def _one_sided(before: Report, after: Report, titles: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """Diagnostics that not both answer, and why."""
    reports = (before, after)
    for name in dict.fromkeys(
        (*before.names, *after.names, *before.absent, *after.absent, *before.failures, *after.failures)
    ):
        whys = [
            one.absent.get(name) or (f"did not finish: {w}" if (w := one.failures.get(name)) else "") for one in reports
        ]
        has = [name in one for one in reports]
        if all(has):
            continue
        if any(has):
            there, other = (0, 1) if has[0] else (1, 0)
            yield name, f"Only {titles[there]} answers. {titles[other]}: {whys[other] or 'not in its report'}"
        elif whys[0] == whys[1]:
            yield name, whys[0]
        else:
            yield (
                name,
                ". ".join(f"{title}: {why or 'not in its report'}" for title, why in zip(titles, whys, strict=True)),
            )


def _notes(before: Report, after: Report, titles: tuple[str, str]) -> list[str]:
    """Notes of both runs; one of both once."""
    first, second = before.run.notes, after.run.notes
    both = [note for note in first if note in second]
    own = [f"{title}: {n}" for title, some in zip(titles, (first, second), strict=True) for n in some if n not in both]
    return [*both, *own]


def _line(report: Report) -> str:
    given = report.run.provenance
    words = (given.get("dtype"), given.get("accelerator") or given.get("device"), given.get("started"))
    return ", ".join(str(word) for word in words if word) or "no more is known of it"


def _facts(before: Report, after: Report) -> list[tuple[str, str]]:
    """What differs in how the two came about, first; then what does not."""
    pairs = _both(before, after)
    differs = [(label, f"{one or '–'} → {other or '–'}") for label, (one, other) in pairs.items() if one != other]
    changed = {label.partition(": ")[0] for label, (one, other) in pairs.items() if one != other}
    alike = ", ".join(dict.fromkeys(name for label in pairs if (name := label.partition(": ")[0]) not in changed))
    return [*differs, *([("the same in both", alike)] if alike else [])]


def _both(before: Report, after: Report) -> dict[str, tuple[str, str]]:
    first, second = dict(facts(before)), dict(facts(after))
    return {label: (first.get(label, ""), second.get(label, "")) for label in dict.fromkeys((*first, *second))}


def _differing(before: Report, after: Report, titles: tuple[str, str]) -> str:
    """What differs in the captures themselves, and may be why a number does."""
    pairs = _both(before, after).items()
    said = [
        f"{label.rpartition(': ')[2]} ({one or 'none'}, then {other or 'none'})"
        for label, (one, other) in pairs
        if one != other and any(label == t or (t.endswith(": ") and label.startswith(t)) for t in _TELLING)
    ]
    return f"The two captures differ in {_list(said)}" if said else ""


def _unshared(unshared: Unshared, titles: tuple[str, str]) -> Iterator[str]:
    """What was not compared, a sentence each."""
    for title, places, variables in zip(titles, unshared.places, unshared.variables, strict=True):
        said = [_places(dim, list(labels)) for dim, labels in places.items()]
        if said:
            yield f"Only in {title}: {_list(said)}; compared is where both have values"
        if variables:
            yield f"Only in {title}: {_list(sorted(variables))}"
    for dim, names in unshared.averaged.items():
        words = "the runs have other steps" if dim == "step" else "the texts differ"
        yield f"Averaged over {dim}s in each run first, as {words}: {_list(names)}"
    if unshared.unlike:
        said = [f"{_list(names)} ({dim})" for dim, names in unshared.unlike.items()]
        yield f"Not compared, as nothing says which place of one run is which of the other: {'; '.join(said)}"


def _places(dim: str, labels: list[Any]) -> str:
    """Labels along a dim, or how many there are."""
    word = {"kv_head": "KV head"}.get(dim, dim.replace("_", " "))
    if len(labels) > _NAMED or any(len(str(label)) > 24 for label in labels):
        return counted(len(labels), word)
    return f"{word}{'s' if len(labels) > 1 else ''} {', '.join(map(str, labels))}"


def _clock(timed: Sequence[str], moved: float) -> Iterator[str]:
    if timed:
        yield (
            f"Times of two captures differ by chance: findings of {_list(timed)} count as moved from "
            f"{share(min(1.0, CLOCK * moved))} on, and what is new there is certain when a second pair of captures agrees"
        )


def _list(words: Sequence[str]) -> str:
    rest = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
    return f"{', '.join(words[:_NAMED])}{rest}"


__all__: Sequence[str] = ("Comparison", "compare")
