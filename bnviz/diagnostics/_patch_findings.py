"""What the maps of attention over patches say: outlier patches, other tokens that take attention, maps that stay alike."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

from bnviz import quantities as q
from bnviz.schema import Finding

_IDENTICAL = 0.9999  # correlation of pictures that are one and the same


def findings(result: xr.Dataset, limits: Mapping[str, float]) -> list[Finding]:
    """Findings of `patch_attention`, by the limits of its judge."""
    made = [_outliers(result, limits), _others(result, limits), _alike(result, limits)]
    return [one for one in made if one is not None]


def _outliers(result: xr.Dataset, limits: Mapping[str, float]) -> Finding | None:
    """The layer whose few outlier patches take most."""
    share, count = _mean(result["outlier_share"].values), _mean(result["outliers"].values)
    patches = result.attrs["rows"] * result.attrs["columns"] * result.attrs["moments"]
    there = np.where(np.isfinite(share) & (count <= limits["few"] * patches), share, -1.0)
    layer = int(there.argmax())
    if not there[layer] >= limits["taken"]:
        return None
    many = f"{q.setting(round(float(count[layer]), 1))} of {q.count(patches)} patches"
    sentence = (
        f"Layer {_label(result, layer)} gives {q.share(float(there[layer]))} of its attention to {many} above "
        f"{q.factor(result.attrs['outlier'])} an even share (outliers from {q.share(limits['taken'])})"
    )
    advice = (
        "Look whether these patches hold anything of the picture; where they lie in plain background the model uses them as "
        "registers: compare a checkpoint with registers (arXiv:2309.16588), and keep them out of maps that explain."
    )
    return Finding(
        "patch_attention/outliers",
        sentence,
        "medium",
        _where(result, layer),
        float(there[layer]),
        limits["taken"],
        advice=advice,
    )


def _others(result: xr.Dataset, limits: Mapping[str, float]) -> Finding | None:
    """The layer whose class token, registers or text take most, where that is twice what an even share would be."""
    share, count = _mean(result["other_share"].values), _mean(result["others"].values)
    patches = result.attrs["rows"] * result.attrs["columns"] * result.attrs["moments"]
    even = count / (count + patches)
    there = np.where(np.isfinite(share) & (count > 0) & (share >= 2 * even), share, -1.0)
    layer = int(there.argmax())
    if not there[layer] >= limits["others"]:
        return None
    many = q.counted(round(float(count[layer])), "token")
    sentence = (
        f"Layer {_label(result, layer)} gives {q.share(float(there[layer]))} of its attention to {many} that "
        f"{'is' if count[layer] == 1 else 'are'} no patch{'' if count[layer] == 1 else 'es'} "
        f"(sinks from {q.share(limits['others'])})"
    )
    advice = (
        "Keep these tokens whenever tokens are merged, pruned or quantised, and read the map as shares of what is left: "
        "report['patch_attention']['other_share'] says how much that is."
    )
    return Finding(
        "patch_attention/others",
        sentence,
        "low",
        _where(result, layer),
        float(there[layer]),
        limits["others"],
        advice=advice,
    )


def _alike(result: xr.Dataset, limits: Mapping[str, float]) -> Finding | None:
    """Layers whose maps hardly change from step to step: attention to reuse, or maps that do not depend on the picture."""
    likeness = _mean(result["likeness"].values)
    layers = np.flatnonzero(np.nan_to_num(likeness, nan=-1.0) >= limits["alike"])
    pictures = float(_mean(result["picture_likeness"].values[:, None])[0])
    if not len(layers) or not np.isfinite(pictures) or pictures > _IDENTICAL:
        return None
    least = float(likeness[layers].min())
    of = f"{q.count(len(layers))} of {q.counted(len(likeness), 'layer')}"
    limit = f"(alike from {q.ratio(limits['alike'])})"
    where = {"layer": [_label(result, int(one)) for one in layers]}
    if pictures >= limits["same"]:
        sentence = f"Maps of neighbouring steps correlate at {q.ratio(least)} or more in {of} {limit}"
        advice = (
            "Try to compute the attention of these layers in every second step only (Pyramid Attention Broadcast, "
            "arXiv:2408.12588): in diffusers transformer.enable_cache(PyramidAttentionBroadcastConfig(...)); compare pictures."
        )
        return Finding("patch_attention/alike", sentence, "low", where, least, limits["alike"], advice=advice)
    between = f"between pictures that correlate at {q.ratio(pictures)}"
    sentence = f"Maps of {of} correlate at {q.ratio(least)} or more {between} {limit}"
    advice = "Do not read these maps as what the picture shows: they follow the place of a patch; compare two pictures' maps."
    return Finding("patch_attention/place", sentence, "note", where, least, limits["alike"], advice=advice)


def _mean(values: np.ndarray) -> np.ndarray:
    """(layer,): over the steps that have a number; counts of -1 are none."""
    told = np.isfinite(values) & (values != -1 if values.dtype.kind == "i" else True)
    count = told.sum(0)
    total = np.where(told, values, 0).sum(0, dtype=np.float64)
    mean: np.ndarray = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean


def _label(result: xr.Dataset, layer: int) -> int:
    return int(result["layer"].values[layer])


def _where(result: xr.Dataset, layer: int) -> dict[str, object]:
    return {"layer": _label(result, layer), "path": str(result["path"].values[layer])}
