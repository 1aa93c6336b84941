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
    once : bool
        It was seen in every forward but the decode steps, and in none of those: an encoder runs once a text.
    """

    kind: str
    path: str
    mechanism: str
    layer: int
    observations: int
    forwards: int
    ran: int = -1
    once: bool = False

    @property
    def partly(self) -> bool:
        """It ran more often than it was seen: numbers over all that was kept of it are numbers over a part."""
        return self.ran > self.observations > 0

    @property
    def missed(self) -> bool:
        """It ran and was never seen: it is missing from its record."""
        return self.ran > self.observations == 0

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
    'Not complete: a.attn ran 8 times in watched forwards and was seen 3 times (as sdpa)'
    """
    lost = [one for one in counts if one.kind in kinds and one.partly]
    if not lost:
        return ""
    first = max(lost, key=lambda one: one.ran - one.observations)
    how = f" (as {first.mechanism})" if first.mechanism else ""
    more = f"; {counted(len(lost) - 1, 'more place')} likewise" if len(lost) > 1 else ""
    return (
        f"Not complete: {first.path} ran {counted(first.ran, 'time')} in watched forwards and was seen "
        f"{counted(first.observations, 'time')}{how}{more}"
    )


def caveats(counts: Iterable[SiteCount], kinds: Sequence[str], watched: int) -> list[str]:
    """A sentence where places of these kinds are missing, or were not seen in every watched forward, which a model may intend.

    Examples
    --------
    >>> one, two = (SiteCount("block", path, "", 0, n, n) for path, n in (("a.0", 8), ("a.1", 5)))
    >>> caveats([one, two], ["block"], 8)
    ['a.1 was seen in 5 of 8 forwards: it did not run in the others, or ran where no hook sees it.']
    >>> caveats([SiteCount("attention", "a.attn", "sdpa", 0, 0, 0, ran=8)], ["attention"], 8)
    ['a.attn ran and was never seen: how it computes is not read, and it is missing here.']
    """
    own = [one for one in counts if one.kind in kinds and one.kind != "sublayer"]
    said = _missed([one for one in own if one.missed])
    alike: dict[int, list[SiteCount]] = {}
    for one in own:
        if one.forwards < watched and not one.missed and not one.once:
            alike.setdefault(one.forwards, []).append(one)
    few = [_few(forwards, some, watched) for forwards, some in sorted(alike.items())]
    return said + (
        few if len(few) <= 3 else [*few[:2], f"{len(few) - 2} more groups of places ran in some forwards only."]
    )


def _missed(places: list[SiteCount]) -> list[str]:
    if not places:
        return []
    they = f"{_who(places)} ran and {'were' if len(places) > 1 else 'was'} never seen"
    return [
        f"{they}: how they compute is not read, and they are missing here."
        if len(places) > 1
        else f"{they}: how it computes is not read, and it is missing here."
    ]


def _few(forwards: int, places: list[SiteCount], watched: int) -> str:
    many = len(places) > 1
    seen = f"{'were' if many else 'was'} " + ("not seen in any of" if forwards == 0 else f"seen in {forwards} of")
    they, others = "they" if many else "it", "them" if forwards == 0 else "the others"
    return f"{_who(places)} {seen} {counted(watched, 'forward')}: {they} did not run in {others}, or ran where no hook sees it."


def _who(places: list[SiteCount]) -> str:
    more = f" and {counted(len(places) - 1, 'more place')}" if len(places) > 1 else ""
    return f"{places[0].path}{more}"


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
