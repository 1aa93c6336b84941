"""Ways to keep a cache in fewer bytes: how many bits, or what share of the energy, for keys and for values."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

from bnviz.errors import SchemaError
from bnviz.quantities import setting

Kind = Literal["bits", "split", "energy"]
Level = tuple[float, ...]
_NUMBER = r"\d+(?:\.\d+)?"
_SIDES = re.compile(rf"(?:k({_NUMBER}))?(?:v({_NUMBER}))?")
_SPLIT = re.compile(rf"({_NUMBER})/({_NUMBER})")
MOST_BITS = 8


@dataclass(frozen=True, slots=True)
class Way:
    """One way.

    Parameters
    ----------
    name : str
    kind : {"bits", "split", "energy"}
        Codes of so many bits; more bits for the half of the tokens with most attention; a projection that keeps so much energy.
    key, value : tuple of float
        The level for each, two of a split; empty: as they are.
    """

    name: str
    kind: Kind
    key: Level
    value: Level

    @property
    def part(self) -> str:
        """Which of keys and values are kept so: both, keys or values."""
        return "both" if self.key and self.value else "keys" if self.key else "values"


def levels(bits: Any, energies: Any) -> dict[str, Way]:
    """The ways that are asked for, by name, in the order of the call.

    Parameters
    ----------
    bits : int, str, or sequence of them
        4; "4/2": 4 where attention is, 2 elsewhere; "k4v2": keys at 4, values at 2; "k4": keys alone.
    energies : float, str, or sequence of them
        0.99, "k0.9v0.99", "v0.99".

    Raises
    ------
    SchemaError
        One of them is none of these, or there are none.

    Examples
    --------
    >>> list(levels((3, "4/2", "k4v2"), (0.95, "k0.9")))
    ['3 bits', '4/2 bits', 'keys 4, values 2 bits', '95 % of energy', 'keys 90 % of energy']
    """
    found = [*(_bits(one) for one in _listed(bits)), *(_energy(one) for one in _listed(energies))]
    if not found:
        raise SchemaError("kv_compression: bits and energies are empty; expected one of them, as bits=(2, 4).")
    return {way.name: way for way in found}


def _listed(told: Any) -> Collection[Any]:
    return (told,) if isinstance(told, (int, float, str)) else tuple(told)


def _bits(told: Any) -> Way:
    wrong = SchemaError(
        f"kv_compression: bits holds {told!r}, expected a whole number from 1 to {MOST_BITS}, or as text "
        '"k4v2" (keys at 4, values at 2), "k4", "v2", or "4/2" (more for the tokens with attention).'
    )

    def fits(number: float) -> bool:
        return number == int(number) and 1 <= number <= MOST_BITS

    if isinstance(told, str) and (two := _SPLIT.fullmatch(told)):
        high, low = float(two[1]), float(two[2])
        if not (fits(high) and fits(low) and low < high):
            raise wrong
        return Way(f"{setting(high)}/{setting(low)} bits", "split", (high, low), (high, low))
    key, value = _sides(told, fits, wrong)
    return Way(f"{_words(key, value, 1)} {'bit' if {*key, *value} == {1.0} else 'bits'}", "bits", key, value)


def _energy(told: Any) -> Way:
    wrong = SchemaError(
        f"kv_compression: energies holds {told!r}, expected a share above 0 and up to 1, or as text "
        '"k0.9v0.99" (keys 0.9, values 0.99), "k0.99" or "v0.99".'
    )
    key, value = _sides(told, lambda share: 0 < share <= 1, wrong)
    return Way(f"{_words(key, value, 100)} % of energy", "energy", key, value)


def _sides(told: Any, fits: Callable[[float], bool], wrong: SchemaError) -> tuple[Level, Level]:
    """Levels of keys and of values."""
    if isinstance(told, str):
        found = _SIDES.fullmatch(told)
        pair = () if found is None else found.groups()
        key, value = ((float(one),) if one else () for one in (pair or (None, None)))
    elif isinstance(told, (int, float)) and not isinstance(told, bool):
        key = value = (float(told),)
    else:
        raise wrong
    if not (key or value) or not all(map(fits, (*key, *value))):
        raise wrong
    return key, value


def _words(key: Level, value: Level, times: int) -> str:
    of = {"keys": key, "values": value}
    if key == value:
        return setting(times * key[0])
    return ", ".join(f"{name} {setting(times * level[0])}" for name, level in of.items() if level)
