"""What a cache loses when keys are dropped in a given order; plain arrays, one sequence, all layers."""

from __future__ import annotations

import inspect
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from bnviz.catalog import every, load, names
from bnviz.errors import NotCaptured, SchemaError, UnknownName
from bnviz.scores import AGGREGATES, Floats, Statistics, keep_order

from ._passage import phases, places, step_row

Ints = npt.NDArray[np.integer[Any]]
_BY_KEY = (("step", "layer", "head", "key"), ("step", "layer", "kv_head", "key"))


@dataclass(frozen=True, slots=True)
class Passage:
    """One sequence of one step: statistics by layer, and the attention its keys are judged by.

    Parameters
    ----------
    row : int
        Of the step axis.
    where : array (key,)
        Of the record's key axis.
    layers : tuple of Statistics
    mass : array (layer, head, key)
        In queries: of later decode queries where the record has them, else of the passage's own.
    mass_of : str
        Which of the two.
    bytes_per_token : float
        Over all layers; NaN when keys and values were not captured.
    spread : float
        Of noisy scores over draws, as a share of their mean, median over layers, heads and keys; NaN: none known.
    draws : int
        Of the noise; 0: none.
    """

    row: int
    where: Ints
    layers: tuple[Statistics, ...]
    mass: Floats
    mass_of: str
    bytes_per_token: float
    spread: float = float("nan")
    draws: int = 0


class _Cuts(Mapping[str, Floats]):
    """The variables by key of one layer, step and sequence, read from records when they are asked for.

    Parameters
    ----------
    parts : sequence of Dataset, int and array
        A record, a row of its step axis, and where on its key axis the sequence lies.
    layer : int
        Of the layer axis.
    """

    def __init__(self, parts: Sequence[tuple[xr.Dataset, int, Ints]], layer: int) -> None:
        self._layer = layer
        self._from = {  # of a name that two records have, the first counts
            str(name): part
            for part in reversed(parts)
            for name, one in part[0].variables.items()
            if one.dims in _BY_KEY
        }

    def __getitem__(self, name: str) -> Floats:
        record, row, where = self._from[name]
        return np.asarray(record.variables[name].values[row, self._layer][..., where])

    def __iter__(self) -> Iterator[str]:
        return iter(self._from)

    def __len__(self) -> int:
        return len(self._from)


def passage(
    attention: xr.Dataset,
    keys_values: xr.Dataset | None,
    step: int | None,
    sequence: int,
    further: Mapping[str, xr.Dataset | None] = MappingProxyType({}),
) -> Passage:
    """Cut one sequence out of the records; of `further` ones, by name, those that hold this step and these layers."""
    row = step_row(attention, step)
    where = places(attention, row, sequence)
    mass = _cut(attention, "mass", row, where)
    if mass is None:
        raise NotCaptured('kv_importance needs attention.mass; add probes=["attention"] and run again.')
    heads = kv_heads = attention.sizes["head"]
    taken, parts = float("nan"), [(attention, row, where)]
    if keys_values is not None:
        kv_heads = int(keys_values.sizes["kv_head"])
        parts.append(_of_keys(attention, keys_values, row, sequence, len(where)))
        if "bytes_per_token" in keys_values:
            taken = float(parts[-1][0]["bytes_per_token"].values[parts[-1][1]].sum())
    others = _further(attention, further, row, sequence, len(where))
    parts += others.values()
    window = int(attention.attrs.get("window", 64))  # of the probe; its default where the record does not say
    told = dict(ChainMap(dict(attention.attrs), *(dict(record.attrs) for record, *_ in parts[1:])))
    layers = tuple(
        Statistics(
            keys=len(where),
            heads=heads,
            kv_heads=kv_heads,
            window=min(window, len(where)),
            layer=layer,
            options=told,
            variables=_Cuts(parts, layer),
            seen=_seen(attention, row, sequence, (layer, len(where))),
        )
        for layer in range(attention.sizes["layer"])
    )
    judged, mass_of = _judged_by(attention, row, sequence, mass)
    return Passage(row, where, layers, judged, mass_of, taken, *_noise(others.get("keyformer")))


def _further(
    attention: xr.Dataset, records: Mapping[str, xr.Dataset | None], row: int, sequence: int, keys: int
) -> dict[str, tuple[xr.Dataset, int, Ints]]:
    """Parts of records that only some scores read; one that was not kept for this step, or for a layer, is left out."""
    specs = [score.spec for _, score in every("scores")]
    read = {variable.partition(".")[0] for spec in specs for variable in (*spec.needs, *spec.wants)}
    found = {}
    for name, record in records.items():
        if record is None or name not in read:
            continue
        with suppress(
            NotCaptured, UnknownName, SchemaError
        ):  # of another step, of other layers, or of a part of the passage
            found[name] = _of_keys(attention, record, row, sequence, keys, name=name)
    return found


def _noise(part: tuple[xr.Dataset, int, Ints] | None) -> tuple[float, int]:
    """How much a noisy score differs from draw to draw, as a share of its mean, and how many draws there were."""
    if part is None or not {"noisy_mass", "noisy_mass_spread"} <= set(part[0].data_vars):
        return float("nan"), 0
    record, row, where = part
    mean, spread = (record[name].values[row][..., where] for name in ("noisy_mass", "noisy_mass_spread"))
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = spread / mean
    shares = shares[np.isfinite(shares)]
    return (float(np.median(shares)) if len(shares) else float("nan")), int(record.attrs.get("seeds", 3))


def _cut(record: xr.Dataset, name: str, row: int, where: Ints) -> Floats | None:
    """(layer, head, key) of one sequence, float64; None where the variable is absent."""
    if name not in record:
        return None
    return np.asarray(record[name].values[row][..., where], dtype=np.float64)


def _seen(attention: xr.Dataset, row: int, sequence: int, of: tuple[int, int]) -> Floats | None:
    """(key,): queries that see each key, from the keys that each query sees; None where that does not tell.

    A query that sees no more keys than there are up to its own is taken to see the last of those, one that sees all, all.
    """
    layer, keys = of
    if "visible" not in attention:
        return None
    queries = places(attention, row, sequence, dim="query")
    if len(queries) != keys:
        return None
    visible = attention["visible"].values[row, layer][queries]
    if not np.isfinite(visible).all():
        return None
    count, last = visible.astype(np.int64), np.arange(keys)
    everything = count == keys
    if not ((count <= last + 1) | everything).all():
        return None
    steps = np.zeros(keys + 1)
    np.add.at(steps, np.where(everything, 0, last + 1 - count), 1)
    np.add.at(steps, np.where(everything, keys, last + 1), -1)
    return np.asarray(steps.cumsum()[:keys])


def _of_keys(
    attention: xr.Dataset, record: xr.Dataset, row: int, sequence: int, keys: int, *, name: str = "keys_values"
) -> tuple[xr.Dataset, int, Ints]:
    """What lies by key in a record for the same step and layers as `attention`: it, a row, and where on its key axis."""
    step = int(attention["step"].values[row]) if "step" in attention.coords else None
    row = step_row(record, step, name=name) if "step" in record.coords else row
    if "layer" in attention.coords and "layer" in record.coords:
        absent = np.setdiff1d(attention["layer"].values, record["layer"].values)
        if len(absent):
            raise NotCaptured(
                f"Layers {', '.join(map(str, absent))} are in the record attention and not in {name}; "
                f"capture both with the same sites."
            )
        if not np.array_equal(attention["layer"].values, record["layer"].values):
            record = record.sel(layer=attention["layer"].values)
    where = places(record, row, sequence)
    if len(where) != keys:
        raise SchemaError(
            f"Sequence {sequence} has {keys} keys in attention and {len(where)} in {name}; expected the same step."
        )
    return record, row, where


def _judged_by(attention: xr.Dataset, row: int, sequence: int, own: Floats) -> tuple[Floats, str]:
    """Mass of the decode queries that follow, over the passage's keys; without decoding, of its own queries."""
    later, keys = phases(attention), own.shape[-1]
    if row + 1 < len(later) and later[row + 1] == "decode" and later[row] != "decode":
        where = places(attention, row + 1, sequence)
        mass = _cut(attention, "mass", row + 1, where[:keys])
        if mass is not None and mass.shape == own.shape and np.isfinite(mass).all():
            return mass, "decode queries"
    return own, "queries of the passage itself"


@dataclass(frozen=True, slots=True)
class Ranked:
    """Scores and orders of several methods, and why others are missing."""

    names: tuple[str, ...]
    scores: Floats  # (method, layer, kv_head, key)
    ranks: npt.NDArray[np.int32]
    skipped: dict[str, str] = field(default_factory=dict)
    on_request: dict[str, str] = field(default_factory=dict)  # by the probe that would have to be asked for


def ranked(of: Passage, methods: Sequence[str] | Mapping[str, Mapping[str, Any]] | None, aggregate: str) -> Ranked:
    """Score and rank every key by every method; with None, by all methods that these records allow.

    Raises
    ------
    UnknownName, NotCaptured, SchemaError
        Only for a method that was asked for by name.
    """
    asked = names("scores") if methods is None else methods
    options = {name: dict(asked[name]) if isinstance(asked, Mapping) else {} for name in asked}
    found: dict[str, Floats] = {}
    skipped: dict[str, str] = {}
    on_request: dict[str, str] = {}
    for name, given in options.items():
        score = load("scores", name)
        if "aggregate" in inspect.signature(score).parameters:
            given.setdefault("aggregate", aggregate)
        try:
            found[name] = np.stack([np.asarray(score(layer, **given), dtype=np.float64) for layer in of.layers])
        except (NotCaptured, SchemaError) as error:
            if methods is not None:
                raise
            asked_for = _on_request(score.spec.needs, of)
            if asked_for:
                on_request[name] = asked_for
            else:
                skipped[name] = str(error)
    if not found:
        raise SchemaError(f"kv_importance: no method to rank by. Valid: {', '.join(names('scores'))}.")
    scores = np.stack(list(found.values()))
    return Ranked(tuple(found), scores, keep_order(scores), skipped, on_request)


def _on_request(needs: Sequence[str], of: Passage) -> str:
    """The probe that was not asked for and that no capture has unasked; empty where that is not why a score is missing."""
    absent = [need.partition(".") for need in needs if need.partition(".")[2] not in of.layers[0].arrays]
    return next((record for record, _, _ in absent if not load("probes", record).spec.default), "")


def check_budgets(budgets: Sequence[float], aggregate: str) -> npt.NDArray[np.float64]:
    """Budgets in ascending order, once each."""
    from bnviz.errors import unknown

    if aggregate not in AGGREGATES:
        raise unknown("aggregate", aggregate, AGGREGATES)
    shares = np.unique(np.asarray(budgets, dtype=np.float64))
    if not len(shares) or not (shares > 0).all() or not (shares <= 1).all():
        raise SchemaError(
            f"kv_importance: budgets are {list(budgets)}, expected shares of the cache above 0 and up to 1."
        )
    return shares


def tokens_kept(budgets: Floats, keys: int) -> Ints:
    """Whole tokens a share of the cache holds, at least one.

    Examples
    --------
    >>> tokens_kept(np.array([0.1, 0.3, 1.0]), 10).tolist(), tokens_kept(np.array([0.1]), 3).tolist()
    ([1, 3, 10], [1])
    """
    return np.asarray(np.maximum(1, np.floor(budgets * keys + 1e-9).astype(np.int64)))


def mass_kept(mass: Floats, ranks: Ints, kept: Ints, kv_heads: int) -> Floats:
    """(method, budget, layer, kv_head): share of the mass of a group's query heads that lies on the kept keys.

    NaN for a head whose queries put nothing on these keys.
    """
    layers, _, keys = mass.shape
    grouped = mass.reshape(layers, kv_heads, -1, keys).sum(axis=2)
    total = grouped.sum(axis=-1)
    held = np.empty((len(ranks), len(kept), layers, kv_heads))
    for method, rank in enumerate(ranks):
        ordered = np.zeros(grouped.shape)
        np.put_along_axis(ordered, rank.astype(np.intp), grouped, axis=-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = ordered.cumsum(axis=-1)[..., kept - 1] / total[..., None]
        held[method] = np.moveaxis(shares, -1, 0)
    return np.clip(held, 0.0, 1.0)


def agreement(ranks: Ints) -> Floats:
    """(method, method, layer): Spearman's correlation of two orders of eviction, mean over key-value heads; NaN for one key."""
    methods, layers, _, keys = ranks.shape
    if keys < 2:
        return np.full((methods, methods, layers), np.nan)
    centred = ranks - (keys - 1) / 2
    products = np.einsum("algn,blgn->ablg", centred, centred, optimize=True)
    return np.asarray(products.mean(axis=-1) * 12 / (keys * (keys**2 - 1)))


def overlap(ranks: Ints, kept: Ints) -> Floats:
    """(method, method, budget, layer): Jaccard index of two kept sets, mean over key-value heads."""
    methods, layers = ranks.shape[:2]
    found = np.empty((methods, methods, len(kept), layers))
    for i, count in enumerate(kept):
        inside = (ranks < count).astype(np.float32)
        shared = np.einsum("algn,blgn->ablg", inside, inside, optimize=True)
        found[:, :, i] = (shared / (2 * count - shared)).mean(axis=-1)
    return found


def needed(ranks: Ints) -> npt.NDArray[np.int32]:
    """(method, key): smallest number of kept tokens at which at least half of all layers' key-value heads keep the token.

    Examples
    --------
    >>> needed(np.array([[[[0, 1, 2]], [[0, 2, 1]]]])).tolist()
    [[1, 2, 2]]
    """
    flat = ranks.reshape(len(ranks), -1, ranks.shape[-1])
    middle = (flat.shape[1] + 1) // 2 - 1
    return (np.partition(flat, middle, axis=1)[:, middle] + 1).astype(np.int32)
