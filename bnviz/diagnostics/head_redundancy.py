"""Which heads of a layer do what another does: by how alike their outputs are, token by token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from bnviz import quantities as q
from bnviz.errors import SchemaError
from bnviz.schema import Finding, Judgement, Variable, diagnostic, stamp

_HEADS = ("layer", "head")
_PLACES = 64  # heads that a finding names
RELIABLE = 256  # queries below which a likeness of unrelated heads strays far from 0


@diagnostic(
    question="Which heads do what another head of their layer does?",
    needs=("head_outputs.hsic", "head_outputs.rows"),
    gives=(
        Variable("similarity", ("layer", "head", "head_to"), "1", "CKA of the outputs of two heads, about 0 to 1"),
        Variable("nearest", _HEADS, "1", "the largest similarity with another head of the layer; NaN: there is none"),
        Variable("nearest_head", _HEADS, "id", "that head; -1: there is none"),
        Variable("group", _HEADS, "id", "first head of the group it is in: all pairs of it are alike; -1: not known"),
        Variable("tokens", ("layer",), "count", "queries that were compared"),
    ),
    order=24,
)
def head_redundancy(head_outputs: xr.Dataset, *, alike: float = 0.9) -> xr.Dataset:
    """Similarity of the outputs of all pairs of heads of a layer, and groups of heads that do the same.

    Read `nearest` first: a head near 1 gives, for every token, what `nearest_head` gives but for a rotation, a shift and a scale,
    which the output projection can undo: one of the two would do. Heads near 0 do something of their own.

    Parameters
    ----------
    head_outputs : Dataset
        Record of the probe `head_outputs`.
    alike : float
        Similarity from which two heads do the same, above 0.

    Returns
    -------
    Dataset
        See `head_redundancy.spec.gives`. attrs: model, alike, heads, groups (of more than one head), spare (heads beyond the
        first of each).

    Raises
    ------
    SchemaError
        `alike` is not above 0 and up to 1.

    Notes
    -----
    similarity_ab = hsic_ab / sqrt(hsic_aa hsic_bb) of the unbiased HSIC averaged over steps, weighted by their queries. Unrelated
    heads are about 0, also below. Groups are by complete linkage, so that every pair in one is alike. NaN where a head does not
    vary. Cost O(steps x layers x heads²).

    Sources: Kornblith et al. 2019, arXiv:1905.00414; Nguyen et al. 2021, arXiv:2010.15327; heads that attend alike, CHAI,
    arXiv:2403.08058. The limit is a choice.

    Examples
    --------
    >>> hsic = [[[[4.0, 3.9, 0.1], [3.9, 4.0, 0.2], [0.1, 0.2, 1.0]]]]
    >>> dims = ("step", "layer", "head", "head_to")
    >>> record = xr.Dataset({"hsic": (dims, hsic), "rows": (("step", "layer"), [[500.0]])}, {"layer": [0]})
    >>> result = head_redundancy(record)
    >>> result["group"].values.tolist(), result["nearest"].values.round(3).tolist()
    ([[0, 0, 2]], [[0.975, 0.975, 0.1]])
    """
    if not 0 < alike <= 1:
        raise SchemaError(f"head_redundancy: alike is {alike}, expected a similarity above 0 and up to 1.")
    rows = head_outputs["rows"].values.astype(float)
    hsic = head_outputs["hsic"].values.astype(float)
    weight = np.where(np.isfinite(hsic).any(axis=(2, 3)), np.nan_to_num(rows), 0.0)
    total = weight.sum(axis=0)
    mean = (np.nan_to_num(hsic) * weight[..., None, None]).sum(axis=0)
    mean = np.where(np.isfinite(hsic).any(axis=0), mean, np.nan) / np.where(total > 0, total, np.nan)[:, None, None]
    own = np.sqrt(np.maximum(np.diagonal(mean, axis1=1, axis2=2), 0.0))
    own = np.where(own > 0, own, np.nan)
    similarity = mean / own[:, :, None] / own[:, None, :]
    nearest, which = _nearest(similarity)
    group = np.array([_groups(one, alike) for one in similarity]).reshape(nearest.shape)
    result = xr.Dataset(
        {
            "similarity": (("layer", "head", "head_to"), similarity),
            "nearest": (_HEADS, nearest),
            "nearest_head": (_HEADS, which),
            "group": (_HEADS, group),
            "tokens": ("layer", total.astype(np.int64)),
        },
        coords={name: head_outputs.coords[name] for name in ("layer", "path") if name in head_outputs.coords},
    )
    sizes = [np.unique(row[row >= 0], return_counts=True)[1] for row in group]
    many = np.concatenate([*sizes, np.zeros(0, np.int64)])
    result.attrs = {"model": str(head_outputs.attrs.get("model", "model")), "alike": float(alike)}
    result.attrs |= {"heads": int(many.sum()), "groups": int((many > 1).sum()), "spare": int((many - 1).sum())}
    return stamp(result, head_redundancy.spec.gives)  # type: ignore[attr-defined]


def _nearest(similarity: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """(layer, head) the largest of the others, and whose."""
    others = np.where(np.eye(similarity.shape[1], dtype=bool), np.nan, similarity)
    filled = np.where(np.isnan(others), -np.inf, others)
    most = filled.max(axis=2, initial=-np.inf)
    which = filled.argmax(axis=2) if filled.shape[2] else np.zeros(most.shape, np.int64)
    return np.where(np.isneginf(most), np.nan, most), np.where(np.isneginf(most), -1, which).astype(np.int64)


def _groups(similarity: npt.NDArray[Any], alike: float) -> npt.NDArray[np.int64]:
    """(head,) the first head of the group of each; every pair of a group is alike."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    known = np.flatnonzero(np.isfinite(np.diagonal(similarity)))
    made = np.full(len(similarity), -1, np.int64)
    if len(known) < 2:
        made[known] = known
        return made
    inside = similarity[np.ix_(known, known)]
    apart = np.clip(1 - (inside + inside.T) / 2, 0.0, None)
    np.fill_diagonal(apart, 0.0)
    label = fcluster(linkage(squareform(apart, checks=False), "complete"), 1 - alike + 1e-9, "distance")
    for one in np.unique(label):
        made[known[label == one]] = known[label == one].min()
    return made


def judge(result: xr.Dataset) -> Judgement:
    """Counts heads that do what another does, and names the most alike."""
    attrs, nearest = result.attrs, result["nearest"].values
    tokens = int(result["tokens"].values.max(initial=0))
    subtitle = (
        f"similarity (CKA) of a head's outputs with those of the most similar other head of its layer · {attrs['model']}, "
        f"{q.counted(attrs['heads'], 'head')} · {q.counted(tokens, 'token')}"
    )
    if not np.isfinite(nearest).any():
        return Judgement("No two heads could be compared", subtitle)
    row, head = (int(at) for at in np.unravel_index(int(np.nanargmax(nearest)), nearest.shape))
    layer, other = int(result["layer"].values[row]), int(result["nearest_head"].values[row, head])
    best = f"layer {layer} heads {min(head, other)} and {max(head, other)} ({q.ratio(float(nearest[row, head]))})"
    limit = q.setting(attrs["alike"])
    title = f"No two heads do the same (limit {limit}); nearest are {best}"
    if attrs["spare"]:
        of = q.counted(attrs["heads"], "head")
        verb = "does" if attrs["spare"] == 1 else "do"
        title = f"{q.count(attrs['spare'])} of {of} {verb} what another does, most alike {best}"
    median = float(np.nanmedian(nearest))
    summary = f"{title}; the median head's nearest is {q.ratio(median)}."
    caveats = [
        "Alike on this text; heads that differ elsewhere look alike where the text does not ask for the difference."
    ]
    if tokens < RELIABLE:
        caveats.append(
            f"{q.counted(tokens, 'token')} compared: below {RELIABLE}, unrelated heads can look alike by chance."
        )
    findings = (_finding(result, best),) if attrs["spare"] else ()
    return Judgement(title, subtitle, summary, tuple(caveats), findings)


def _finding(result: xr.Dataset, best: str) -> Finding:
    attrs, group = result.attrs, result["group"].values
    spare = (group >= 0) & (group != np.arange(group.shape[1]))
    order = np.argwhere(spare)[np.argsort(-result["nearest"].values[spare], kind="stable")][:_PLACES].tolist()
    layers = result["layer"].values
    paths = result["path"].values if "path" in result.coords else [""] * len(layers)
    value = float(np.nanmax(result["nearest"].values[spare])) if spare.any() else math.nan
    alone = attrs["spare"] == 1
    return Finding(
        code="head_redundancy/alike",
        sentence=f"{q.counted(attrs['spare'], 'head')} of {attrs['heads']} {'gives' if alone else 'give'} what another of "
        f"{'its' if alone else 'their'} layer gives (similarity {q.setting(attrs['alike'])} or more), in "
        f"{q.counted(attrs['groups'], 'group')}; most alike {best}",
        severity="low",
        where={
            "layer": [int(layers[row]) for row, _ in order],
            "head": [head for _, head in order],
            "path": [str(paths[row]) for row, _ in order],
        },
        value=value,
        limit=attrs["alike"],
        advice="Drop all but one head of each group in report['head_redundancy']['group'], fit the layer's output projection "
        "again on a few batches, and compare the loss.",
    )
