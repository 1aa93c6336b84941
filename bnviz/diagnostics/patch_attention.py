"""Which patches of a picture get the attention: layer by layer, and step by step where a picture is made in steps."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from bnviz import quantities as q
from bnviz.errors import NotCaptured, SchemaError
from bnviz.schema import Judgement, Variable, diagnostic, stamp

from ._patch_findings import findings
from ._patch_maps import Asked, PatchMap, of_one_model, on, patch_map, pooled
from ._patch_written import written_maps

_PLACE = ("step", "layer")
_USUAL = 5  # tokens before the patches that need no words: a class token and four registers
_SIZES = ("height", "width", "frames", "batch")


@diagnostic(
    question="Which patches of the picture get the attention?",
    needs=("attention.mass", "pictures.picture"),
    wants=("decode_attention.cells",),
    gives=(
        Variable(
            "attention",
            (*_PLACE, "row", "column"),
            "1",
            "attention a patch gets, mean over heads, as a multiple of an even share; NaN: no such patch",
        ),
        Variable("attention_mean", ("step", "row", "column"), "1", "attention, mean over layers"),
        Variable("largest", _PLACE, "1", "largest multiple of an even share that one patch gets"),
        Variable("outlier_share", _PLACE, "1", "share of all attention on patches above `outlier` times an even share"),
        Variable("outliers", _PLACE, "count", "patches above `outlier` times an even share"),
        Variable("other_share", _PLACE, "1", "share of all attention on tokens that are no patches; NaN: no map"),
        Variable("others", _PLACE, "count", "tokens that are no patches: class token, registers, text; -1: no map"),
        Variable("likeness", _PLACE, "1", "correlation of a map with that of the step before, over patches"),
        Variable("picture_likeness", ("step",), "1", "correlation of the picture with that of the step before"),
        Variable(
            "picture",
            ("step", "pixel_row", "pixel_column", "channel"),
            "1",
            "small copy of the picture, 0 to 255; none where nothing was kept",
            optional=True,
        ),
    ),
    order=24,
)
def patch_attention(
    attention: xr.Dataset,
    pictures: xr.Dataset,
    decode_attention: xr.Dataset | None = None,
    *,
    sequence: int = 0,
    grid: tuple[int, int] | None = None,
    first: int | None = None,
    outlier: float = 10.0,
    side: int = 64,
) -> xr.Dataset:
    """Attention that each patch of one picture gets from all tokens, as a multiple of an even share, by step and layer.

    1 is even, 2 twice as much. It says where heads read, not what the answer depends on: a patch that most attention goes to may
    hold nothing of the picture, as outlier patches do.

    Parameters
    ----------
    attention : Dataset
        Record of the probe `attention`.
    pictures : Dataset
        Record of the probe `pictures`: which steps saw a picture, and how large it was.
    decode_attention : Dataset, optional
        Record of the probe `decode_attention`, whose cells are one key each: where the model was given no picture, that of the
        tokens it wrote, in at most 16 stretches, each of which is a step.
    sequence : int
        Picture of the batch.
    grid : (int, int), optional
        Rows and columns of patches; None: told from the size of the picture and the number of tokens.
    first : int, optional
        Place of the first patch in the sequence; None: tokens that are no patches stand before them.
    outlier : float
        Multiple of an even share from which a patch counts as an outlier.
    side : int
        Rows and columns of the maps, at most: beyond, a cell is the mean of 2 x 2 patches, 3 x 3 and so on.

    Returns
    -------
    Dataset
        See `patch_attention.spec.gives`. Coordinates: step, layer with path. attrs: model, sequence, height, width, rows,
        columns, moments (of a video, of which maps are the mean), cell (patches along a cell), before (tokens before the
        patches), first_told, outlier, unmapped (layers without a map: how many, and why the first of them has none),
        written (steps are stretches of written tokens, named by their first, counted from 0).

    Raises
    ------
    NotCaptured
        No layer's tokens are a grid of patches; or no step with a picture is in both records.
    SchemaError
        An option below 1.
    UnknownName
        The batch has no such picture.

    Notes
    -----
    With m_j the attention on token j summed over queries, mean over heads: multiple_j = (m_j / sum_k m_k) / (e_j / sum_k e_k),
    e_j the same for queries that spread their attention evenly over what they see. A video's maps are means over its moments.

    The grid is of squares that cut the picture, row by row, behind as few other tokens as possible, at most 17; each layer has
    its own, that of most layers or one that is by a power of two finer or coarser, and coarser ones are drawn with larger cells.
    `likeness` is Pearson's, NaN at the first step and where a map is flat.

    Cost O(steps x layers x heads x tokens). Sources: outlier patches and registers, Darcet et al. 2023, arXiv:2309.16588;
    attention that stays alike between steps of diffusion, Zhao et al. 2024, arXiv:2408.12588.

    Examples
    --------
    >>> record = xr.Dataset({"mass": (("step", "layer", "head", "key"), [[[[1.0, 2.0, 0.5, 0.5, 1.0]]]])})
    >>> size = {name: ("step", [value]) for name, value in dict(height=8, width=8, frames=1, batch=1).items()}
    >>> small = ("step", "image", "pixel_row", "pixel_column", "channel"), np.zeros((1, 1, 8, 8, 1), np.int16)
    >>> result = patch_attention(record, xr.Dataset({"picture": small, **size}))
    >>> result["attention"].values[0, 0].tolist(), result["other_share"].item(), result["others"].item()
    ([[2.0, 0.5], [0.5, 1.0]], 0.2, 1)
    """
    for name, value in {"outlier": outlier, "side": side}.items():
        if value < 1:
            raise SchemaError(f"patch_attention: {name} is {value}, expected 1 or more.")
    asked = Asked(sequence, grid, first)
    seen = _seen(attention, pictures, decode_attention, asked)
    found, maps = [one for some in seen.maps for one in some if isinstance(one, PatchMap)], seen.maps
    shape = max(one.grid.rows for one in found), max(one.grid.columns for one in found)
    cell = -(-max(shape) // side)
    of_layers = np.stack([np.stack([_drawn(one, shape, cell) for one in some]) for some in maps])
    picture = _pictures(pictures, seen.rows, sequence)
    result = xr.Dataset(
        {
            "attention": ((*_PLACE, "row", "column"), of_layers.astype(np.float32)),
            "attention_mean": (("step", "row", "column"), _mean(of_layers).astype(np.float32)),
            **_numbers(maps, outlier),
            "picture_likeness": (("step",), _likenesses(list(picture))),
        },
        coords=_coordinates(attention, seen.steps) | {n: np.arange(k) * cell for n, k in _sides(of_layers)},
    )
    if picture.any():
        result["picture"] = (("step", "pixel_row", "pixel_column", "channel"), picture)
    options = {"sequence": int(sequence), "outlier": float(outlier), "first_told": first is not None or seen.written}
    result.attrs = _attrs(attention, maps, seen.size, cell) | options | {"written": seen.written}
    return stamp(result, patch_attention.spec.gives)  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class _Seen:
    """Maps by step and layer, the steps' labels, their rows in `pictures`, and the size of the first picture."""

    steps: list[int]
    rows: list[int]
    maps: list[list[PatchMap | str]]
    size: dict[str, int]
    written: bool = False


def _seen(attention: xr.Dataset, pictures: xr.Dataset, decode: xr.Dataset | None, asked: Asked) -> _Seen:
    """The maps of passages; where no picture was given, and tokens were written, of those."""
    steps = _steps(attention, pictures)
    sizes = [{name: int(pictures[name].values[at]) for name in _SIZES} for _, _, at in steps]
    if not 0 <= asked.sequence < sizes[0]["batch"]:
        raise SchemaError(f"patch_attention: sequence is {asked.sequence}, expected 0 to {sizes[0]['batch'] - 1}.")
    of_steps = [label for label, _, _ in steps], [at for _, _, at in steps]
    layers = range(attention.sizes["layer"])
    given = bool((pictures["picture"].values > 0).any())
    if not given and decode is not None and decode.sizes.get("step") and decode.sizes["layer"] == len(layers):
        written = written_maps(decode, sizes[0], asked)
        if isinstance(written, str):
            raise NotCaptured(f"patch_attention: {written}.")
        return _Seen(written[0], of_steps[1][:1] * len(written[0]), written[1], sizes[0], True)
    maps = [
        [patch_map(attention, row, n, size, asked) for n in layers]
        for (_, row, _), size in zip(steps, sizes, strict=True)
    ]
    if asked.grid is None:
        maps = [of_one_model(some) for some in maps]
    if not any(isinstance(one, PatchMap) for some in maps for one in some):
        raise NotCaptured(
            f"patch_attention: {maps[0][0]}. Name the grid: options={{'patch_attention': {{'grid': (rows, columns), 'first': "
            "place}}."
        )
    return _Seen(*of_steps, maps, sizes[0])


def _sides(of_layers: np.ndarray) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("row", of_layers.shape[2]), ("column", of_layers.shape[3])


def _steps(attention: xr.Dataset, pictures: xr.Dataset) -> list[tuple[int, int, int]]:
    """Label, row in `attention` and row in `pictures` of the steps that are in both."""
    labels = [_labels(record) for record in (attention, pictures)]
    found = [(label, row, labels[1].index(label)) for row, label in enumerate(labels[0]) if label in labels[1]]
    if not found:
        raise NotCaptured("patch_attention: no step has a picture and attention; capture both in one call.")
    return found


def _labels(record: xr.Dataset) -> list[int]:
    if "step" not in record.coords:
        return list(range(record.sizes["step"]))
    return [int(step) for step in np.atleast_1d(record["step"].values)]


def _pictures(pictures: xr.Dataset, rows: list[int], sequence: int) -> np.ndarray:
    """(step, row, column, channel) int16; empty where the picture of this sequence was not kept."""
    dims = ("step", "image", "pixel_row", "pixel_column", "channel")
    kept: np.ndarray = pictures["picture"].transpose(*dims).values[rows, sequence : sequence + 1].clip(0)
    return kept[:, 0].astype(np.int16) if kept.shape[1] else np.zeros((len(rows), 0, 0, 0), np.int16)


def _drawn(one: PatchMap | str, shape: tuple[int, int], cell: int) -> np.ndarray:
    """On the finest grid, cells joined."""
    values = np.full(shape, np.nan) if isinstance(one, str) else on(one.map, *shape)
    return pooled(values, cell)


def _mean(of_layers: np.ndarray) -> np.ndarray:
    """(step, row, column): over the layers that have a map."""
    there = np.isfinite(of_layers)
    count = there.sum(1)
    total = np.where(there, of_layers, 0).sum(1)
    mean: np.ndarray = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean


def _numbers(maps: list[list[PatchMap | str]], outlier: float) -> dict[str, Any]:
    """What is told of each layer's own grid."""
    shape = len(maps), len(maps[0])
    found = {name: np.full(shape, np.nan) for name in ("largest", "outlier_share", "other_share", "likeness")}
    counts = {name: np.full(shape, -1, np.int64) for name in ("outliers", "others")}
    for at in np.ndindex(shape):
        one = maps[at[0]][at[1]]
        if isinstance(one, str):
            continue
        above = one.shares.ravel() > outlier
        found["largest"][at] = np.nanmax(one.shares)
        found["outlier_share"][at] = one.of_patches[above].sum()
        found["other_share"][at] = one.of_others.sum()
        counts["outliers"][at], counts["others"][at] = above.sum(), one.of_others.size
    for layer in range(shape[1]):
        of_steps = [some[layer] for some in maps]
        found["likeness"][:, layer] = _likenesses([np.zeros(0) if isinstance(o, str) else o.shares for o in of_steps])
    return {name: (_PLACE, values) for name, values in {**found, **counts}.items()}


def _likenesses(values: list[np.ndarray]) -> np.ndarray:
    """Pearson's correlation of each with the one before, over what both have; NaN where either is flat, or of another shape."""
    found = np.full(len(values), np.nan)
    for at, (before, now) in enumerate(itertools.pairwise(values), 1):
        if before.shape != now.shape:
            continue
        pair = np.stack([before.ravel(), now.ravel()]).astype(np.float64)
        pair = pair[:, np.isfinite(pair).all(0)]
        if pair.shape[1] > 1 and (np.ptp(pair, axis=1) > 0).all():
            found[at] = np.corrcoef(pair[0], pair[1])[0, 1]
    return found


def _coordinates(attention: xr.Dataset, steps: list[int]) -> dict[str, Any]:
    layers = attention.sizes["layer"]
    labels = attention["layer"].values if "layer" in attention.coords else np.arange(layers)
    paths = attention["path"].values if "path" in attention.coords else np.array([""] * layers)
    return {
        "step": np.array(steps, np.int64),
        "layer": labels.astype(np.int64),
        "path": ("layer", paths.astype(object)),
    }


def _attrs(attention: xr.Dataset, maps: list[list[PatchMap | str]], size: dict[str, int], cell: int) -> dict[str, Any]:
    found = [one.grid for some in maps for one in some if isinstance(one, PatchMap)]
    without = [one for one in maps[0] if isinstance(one, str)]
    return {
        "model": str(attention.attrs.get("model", "model")),
        "height": size["height"],
        "width": size["width"],
        "rows": max(one.rows for one in found),
        "columns": max(one.columns for one in found),
        "moments": max(one.moments for one in found),
        "cell": int(cell),
        "before": max(one.first for one in found),
        "unmapped": [len(without), without[0] if without else ""],
    }


def judge(
    result: xr.Dataset,
    *,
    taken: float = 0.2,
    few: float = 0.05,
    others: float = 0.3,
    alike: float = 0.95,
    same: float = 0.5,
    even: float = 1.5,
) -> Judgement:
    """Outlier patches, tokens that take attention and are no patches, and maps that stay as they are from step to step.

    Parameters
    ----------
    result : Dataset
        From `patch_attention`.
    taken : float
        Share of all attention on outlier patches, from which they are found.
    few : float
        Share of the patches above which they are no outliers.
    others : float
        Share of all attention on tokens that are no patches, where an even share is at most half of it.
    alike : float
        Correlation of maps of neighbouring steps, mean over steps, from which a layer's attention may be reused.
    same : float
        Correlation of the pictures of neighbouring steps, from which they are states of one picture.
    even : float
        Multiple of an even share below which no patch is named.
    """
    attrs = result.attrs
    limits = {"taken": taken, "few": few, "others": others, "alike": alike, "same": same}
    told = findings(result, limits)
    patches = f"{attrs['rows']} x {attrs['columns']} patches"
    of = f"{attrs['model']}, {q.counted(result.sizes['step'], 'step')}, {q.counted(result.sizes['layer'], 'layer')}"
    subtitle = (
        f"attention on {patches} of {attrs['height']} x {attrs['width']} pixels, multiple of an even share · {of}"
    )
    mean = result["attention_mean"].values
    step, row, column = np.unravel_index(int(np.nanargmax(mean)), mean.shape)
    where = f"row {row * attrs['cell']}, column {column * attrs['cell']}"
    most = f"{q.factor(round(float(mean[step, row, column]), 2))} an even share"
    label = int(result["step"].values[step])
    when = "The" if len(mean) == 1 else f"From token {label} on the" if attrs["written"] else f"In step {label} the"
    gets = f"gets {'most attention: ' if len(mean) == 1 else ''}{most}"
    title = f"{when} {'patch' if attrs['cell'] == 1 else 'cell'} at {where} {gets}"
    if mean[step, row, column] < even:
        times = q.significant(round(float(mean[step, row, column]), 2))
        title = f"No patch gets more than {times} times an even share of attention"
    return Judgement(title, subtitle, f"{title}, mean over layers.", _caveats(attrs), tuple(told))


def _caveats(attrs: dict[str, Any]) -> tuple[str, ...]:
    said = ["Attention says where heads read, not what the answer depends on."]
    if attrs["written"]:
        said.append(
            "A step is a stretch of written tokens, named by its first; a patch that was not there yet is empty."
        )
    if attrs["cell"] > 1:
        said.append(f"A cell is the mean of {attrs['cell']} x {attrs['cell']} patches.")
    if attrs["moments"] > 1:
        said.append(f"A map is the mean over {attrs['moments']} moments of the video; the picture is its middle frame.")
    if attrs["before"] > _USUAL and not attrs["first_told"]:
        said.append(
            f"The first {attrs['before']} tokens are taken for no patches; where patches begin elsewhere, name the place: "
            "options={'patch_attention': {'first': place}}."
        )
    many, why = attrs["unmapped"]
    if many:
        said.append(f"{q.counted(many, 'layer')} {'has' if many == 1 else 'have'} no map: {why}.")
    return tuple(said)
