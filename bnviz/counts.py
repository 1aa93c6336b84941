"""How often each place of a model was seen, and what to say where that does not fit how often it ran."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .quantities import counted


@dataclass(frozen=True, slots=True)
class SiteCount:
    """What one place of the model gave in a capture.

    Parameters
    ----------
    kind : str
        "block", "sublayer", "attention", "cross_attention" or "router".
    path : str
        As in `model.named_modules()`.
    mechanism : str
        How it is seen; "" for hooks on the module itself.
    layer : int
        The block it lies in; -1 outside every block.
    observations : int
        Times it was shown to the probes. More than the forwards where it runs several times in one.
    forwards : int
        Watched forwards in which it was seen.
    ran : int
        Times its module ran inside watched forwards, told by a hook that only counts; -1: not counted.
    """

    kind: str
    path: str
    mechanism: str
    layer: int
    observations: int
    forwards: int
    ran: int = -1

    @property
    def unseen(self) -> bool:
        """It ran more often than it was seen: what was kept of it is not all of it."""
        return self.ran > self.observations

    def to_json(self) -> dict[str, Any]:
        """As it is kept in a run's provenance."""
        return asdict(self)


def counts_of(provenance: Mapping[str, Any]) -> tuple[SiteCount, ...]:
    """The counts a run's provenance holds; none where the capture was cut short."""
    return tuple(SiteCount(**one) for one in provenance.get("sites") or ())


def refusal(counts: Iterable[SiteCount], kinds: Sequence[str]) -> str:
    """Why a record of these kinds of site is not to be read as if it were whole; empty when it may.

    Examples
    --------
    >>> refusal([SiteCount("attention", "a.attn", "sdpa", 0, 3, 3, ran=8)], ["attention"])
    'Not complete: a.attn ran 8 times in watched forwards and was seen 3 times, as sdpa'
    """
    lost = [one for one in counts if one.kind in kinds and one.unseen]
    if not lost:
        return ""
    first = max(lost, key=lambda one: one.ran - one.observations)
    seen = "never seen" if first.observations == 0 else f"seen {counted(first.observations, 'time')}"
    how = f", as {first.mechanism}" if first.mechanism else ""
    more = f"; so did {counted(len(lost) - 1, 'more place')}" if len(lost) > 1 else ""
    return f"Not complete: {first.path} ran {counted(first.ran, 'time')} in watched forwards and was {seen}{how}{more}"


def caveats(counts: Iterable[SiteCount], kinds: Sequence[str], watched: int) -> list[str]:
    """A sentence where places of these kinds were not seen in every watched forward, which a model may well intend.

    Examples
    --------
    >>> one, two = (SiteCount("block", path, "", 0, n, n) for path, n in (("a.0", 8), ("a.1", 5)))
    >>> caveats([one, two], ["block"], 8)
    ['a.1 was seen in 5 of 8 forwards: it did not run in the others, or ran where no hook sees it.']
    """
    few = [one for one in counts if one.kind in kinds and one.kind != "sublayer" and one.forwards < watched]
    alike: dict[int, list[SiteCount]] = {}
    for one in few:
        alike.setdefault(one.forwards, []).append(one)
    said = []
    for forwards, some in sorted(alike.items()):
        many = len(some) > 1
        who = f"{some[0].path} and {counted(len(some) - 1, 'more place')} were" if many else f"{some[0].path} was"
        seen = "not seen in any of" if forwards == 0 else f"seen in {forwards} of"
        they, others = "they" if many else "it", "them" if forwards == 0 else "the others"
        said.append(
            f"{who} {seen} {counted(watched, 'forward')}: {they} did not run in {others}, or ran where no hook sees it."
        )
    return said if len(said) <= 3 else [*said[:2], f"{len(said) - 2} more groups of places ran in some forwards only."]


def summary(counts: Iterable[SiteCount]) -> list[str]:
    """A few words for each kind of place.

    Examples
    --------
    >>> summary([SiteCount("block", "0", "", 0, 3, 3), SiteCount("block", "1", "", 1, 3, 3)])
    ['2 block × 3']
    """
    by_kind: dict[str, list[int]] = {}
    for one in counts:
        by_kind.setdefault(one.kind, []).append(one.observations)
    shown = []
    for kind, times in by_kind.items():
        least, most = min(times), max(times)
        shown.append(f"{len(times)} {kind.replace('_', ' ')} × {most if least == most else f'{least} to {most}'}")
    return shown
