"""When memory peaks, what it is spent on then, and which modules hold it."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from bnviz.errors import NotCaptured
from bnviz.quantities import counted, duration, share, size
from bnviz.schema import Finding, Judgement, Saving, Severity, Variable, diagnostic, stamp

_KEPT = ("peak", "largest", "after_calls", "device", "allocated", "calls", "trained", "notes")
_RECOMPUTED = "computed: activations of all blocks but the largest, their inputs not counted"
_WORDS = {
    "parameter": "parameters",
    "buffer": "buffers",
    "gradient": "gradients",
    "optimizer": "optimizer state",
    "activation": "activations",
    "output": "outputs and caches",
    "temporary": "temporary results",
    "other": "other tensors",
}


@diagnostic(
    question="When is the peak of memory, what is in it, and which module holds it?",
    needs=("memory.bytes", "memory.module_bytes"),
    wants=("memory.activation_bytes",),
    gives=(
        Variable("bytes", ("time", "category"), "B", "held from this moment to the next, by what for"),
        Variable("total", ("time",), "B", "sum over categories"),
        Variable("peak_bytes", ("category",), "B", "held at the peak of the total"),
        Variable("peak_share", ("category",), "1", "of the total at the peak, 0 to 1; NaN when nothing is held"),
        Variable("most", ("category",), "B", "the category's own maximum, at whatever moment"),
        Variable("module_bytes", ("module", "category"), "B", "held at the peak by module, largest first"),
        Variable("module_share", ("module",), "1", "of the total at the peak, 0 to 1"),
        Variable("activation_bytes", ("module",), "B", "activations when there are most of them", optional=True),
        Variable("peak_time", (), "s", "moment of the peak since the first operator"),
    ),
    order=65,
)
def memory_timeline(memory: xr.Dataset) -> xr.Dataset:
    """Bytes held over time by category, with the peak taken apart by category and module.

    Read `peak_share` first: what has to shrink for the peak to shrink. `most` of a category beside its `peak_bytes` says
    whether it peaks together with the whole. `module_bytes` names the modules.

    Parameters
    ----------
    memory : Dataset
        Record `memory`.

    Returns
    -------
    Dataset
        Along `time` [s], `category` and `module` (path, largest at the peak first).

    Raises
    ------
    NotCaptured
        No allocation was recorded.

    Notes
    -----
    Categories come from lifetimes, see `bnviz.hardware.lifetimes.blocks`: an activation is what a forward made and the
    backward pass freed. Memory that libraries ask for outside torch's allocator is not seen.

    Cost: O(time x category).

    Examples
    --------
    >>> memory = xr.Dataset({"bytes": (("time", "category"), [[8.0, 0.0], [8.0, 24.0], [8.0, 0.0]]),
    ...                      "module_bytes": (("module", "category"), [[4.0, 24.0], [4.0, 0.0]])},
    ...                     {"time": [0.0, 1.0, 2.0], "category": ["parameter", "activation"], "module": ["up", "down"]})
    >>> result = memory_timeline(memory)
    >>> float(result["peak_time"]), result["peak_share"].values.tolist(), result["module_share"].values.tolist()
    (1.0, [0.25, 0.75], [0.875, 0.125])
    """
    held = np.asarray(memory["bytes"].values, float)
    if not len(held):
        raise NotCaptured("memory_timeline: no allocation was recorded; run the model inside the capture.")
    total = held.sum(1)
    at = int(total.argmax())
    modules = np.asarray(memory["module_bytes"].values, float)
    result = xr.Dataset(coords={n: memory.coords[n] for n in ("time", "category", "module") if n in memory.coords})
    result["bytes"], result["total"] = (("time", "category"), held), ("time", total)
    result["peak_bytes"] = ("category", held[at])
    result["peak_share"] = ("category", held[at] / total[at] if total[at] else np.full(held.shape[1], np.nan))
    result["most"] = ("category", held.max(0))
    result["module_bytes"] = (("module", "category"), modules)
    result["module_share"] = ("module", modules.sum(1) / total[at] if total[at] else np.full(len(modules), np.nan))
    if "activation_bytes" in memory:
        result["activation_bytes"] = ("module", np.asarray(memory["activation_bytes"].values, float))
    result["peak_time"] = ((), float(memory["time"].values[at]) if "time" in memory.coords else np.nan)
    result.attrs = {"model": str(memory.attrs.get("model", ""))} | {
        k: memory.attrs[k] for k in _KEPT if k in memory.attrs
    }
    return stamp(result, memory_timeline.spec.gives)  # type: ignore[attr-defined]


def judge(
    result: xr.Dataset,
    *,
    activations: float = 0.3,
    optimizer: float = 0.3,
    growth: float = 0.05,
    calls: int = 4,
    large: float = 64 * 2.0**20,
) -> Judgement:
    """Names the peak, the largest category in it, and what would make it smaller.

    Parameters
    ----------
    result : Dataset
        From `memory_timeline`.
    activations, optimizer : float
        Share of the peak from which on activations (optimizer state) are a finding, in training.
    growth : float
        Growth from the second to the last forward, as a share of the peak, from which on it is one.
    calls : int
        Forwards needed to speak of growth.
    large : float
        Bytes below which nothing is more than low, whatever its share: there is little to gain.
    """
    peak = float(result["total"].max()) if result.sizes.get("time") else 0.0
    if not peak:
        return Judgement("No memory was held by torch", _subtitle(result), "Memory timeline: nothing was held.")
    table = _by_category(result, "peak_bytes")
    largest = max(table, key=lambda c: table[c])
    event = dict(result.attrs.get("peak", {}))
    phase = f" in the {event['phase']} pass" if event.get("phase") in ("forward", "backward") else ""
    if event.get("phase") == "optimizer":
        phase = " in the optimizer"
    title = f"Memory peaks at {size(peak)}{phase}: {share(table[largest] / peak)} is {_WORDS[largest]}"
    found = [
        _peak_finding(result, table, peak, event),
        _activations(result, table, (peak, large), activations),
        _optimizer(table, (peak, large), optimizer),
        _growth(result, (peak, large), growth, calls),
    ]
    caveats = (
        "Only torch's allocator is seen: memory of libraries and of the allocator's own reserve is not in it",
        *(str(n).rstrip(".") for n in result.attrs.get("notes", ())),
    )
    rest = ", ".join(f"{_WORDS[c]} {size(b)}" for c, b in sorted(table.items(), key=lambda i: -i[1]) if b)
    return Judgement(
        title[:90],
        _subtitle(result),
        f"Memory timeline: {title}. {rest}.",
        caveats,
        tuple(f for f in found if f is not None),
    )


def _subtitle(result: xr.Dataset) -> str:
    device = str(result.attrs.get("device", "cpu"))
    done = "training" if result.attrs.get("trained") else "inference"
    return (
        f"bytes by category over time · {result.attrs.get('model') or 'model'} on {device} · "
        f"{counted(result.attrs.get('calls', 0), 'forward')}, {done}"
    )


def _by_category(result: xr.Dataset, name: str) -> dict[str, float]:
    return {str(c): float(b) for c, b in zip(result["category"].values, result[name].values, strict=True)}


def _severity(held: float, peak: float, large: float) -> Severity:
    part = held / peak if held >= large else 0.0
    return "high" if part >= 0.5 else "medium" if part >= 0.3 else "low"


def _module(path: str) -> str:
    """A module as a sentence names it: a path that is a number alone would read as one.

    Examples
    --------
    >>> _module("3"), _module("blocks.3"), _module("")
    ('module 3', 'blocks.3', 'the model itself')
    """
    return f"module {path}" if path.isdigit() else {"": "the model itself", "outside": "no module"}.get(path, path)


def _holders(result: xr.Dataset, category: str | None, top: int = 3) -> tuple[list[str], list[float]]:
    """Modules that hold most at the peak, of one category or of all."""
    held = result["module_bytes"]
    values = (held.sum("category") if category is None else held.sel(category=category)).values
    order = [i for i in np.argsort(-values, kind="stable")[:top] if values[i] > 0]
    return [str(result["module"].values[i]) for i in order], [float(values[i]) for i in order]


def _peak_finding(result: xr.Dataset, table: dict[str, float], peak: float, event: dict[str, Any]) -> Finding:
    names, held = _holders(result, None)
    largest = dict(next(iter(result.attrs.get("largest", [])), {}))
    after = f", as {event['op'].removeprefix('aten::')} runs" if event.get("op") else ""
    most = f"; most is in {_module(names[0])}, {size(held[0])}" if names else ""
    advice = "Look at the largest blocks: run['memory'].attrs['largest']."
    if largest:
        made = largest["op"].removeprefix("aten::")
        block = f"made by {made}" if made else f"of {_WORDS.get(largest['category'], 'tensors')}"
        advice = f"Start with the largest block: {size(largest['bytes'])} {block} in {_module(largest['path'])}."
    return Finding(
        "memory_timeline/peak",
        f"The peak is {size(peak)} at {duration(float(result['peak_time']))}{after}{most}",
        "note",
        {"path": event["path"]} if event.get("path") not in (None, "outside") else {},
        peak,
        unit="B",
        advice=advice,
    )


def _activations(
    result: xr.Dataset, table: dict[str, float], sizes: tuple[float, float], limit: float
) -> Finding | None:
    peak, large = sizes
    held = table.get("activation", 0.0)
    if not result.attrs.get("trained") or held < limit * peak:
        return None
    names, parts = _holders(result, "activation")
    where = [n for n in names if n not in ("", "outside")]
    block, gain = _recomputed(result)
    target = f"the modules of {block}" if block else "the blocks"
    listed = ", ".join(f"{size(s)} in {_module(n)}" for n, s in zip(names, parts, strict=True))
    return Finding(
        "memory_timeline/activations",
        f"Activations kept for the backward pass are {share(held / peak)} of the peak (limit {share(limit)}): {listed}",
        _severity(held, peak, large),
        {"path": where} if where else {},
        held / peak,
        limit,
        "1",
        f"Recompute instead: call {target} through torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).",
        Saving(gain, "B", gain / peak, _RECOMPUTED) if gain > 0 else None,
    )


def _recomputed(result: xr.Dataset) -> tuple[str, float]:
    """The list of blocks whose checkpointing frees most, and how much at most: all of its blocks but the one recomputed."""
    held = result["module_bytes"].sel(category="activation").values
    lists: dict[str, dict[str, float]] = {}
    for path, nbytes in zip(result["module"].values, held, strict=True):
        parts = str(path).split(".")
        for at in (i for i, part in enumerate(parts) if part.isdigit()):
            blocks = lists.setdefault(".".join(parts[:at]), {})
            blocks[parts[at]] = blocks.get(parts[at], 0.0) + float(nbytes)
    gains = {name: sum(blocks.values()) - max(blocks.values()) for name, blocks in lists.items()}
    best = max(gains, key=lambda name: gains[name], default="")
    return best, gains.get(best, 0.0)


def _optimizer(table: dict[str, float], sizes: tuple[float, float], limit: float) -> Finding | None:
    peak, large = sizes
    held, weights = table.get("optimizer", 0.0), table.get("parameter", 0.0)
    if held < limit * peak:
        return None
    times = f", {held / weights:.1f} times the parameters" if weights else ""
    return Finding(
        "memory_timeline/optimizer",
        f"Optimizer state is {share(held / peak)} of the peak (limit {share(limit)}){times}",
        _severity(held, peak, large),
        {"path": ""},
        held / peak,
        limit,
        "1",
        "Use an optimizer that keeps less, e.g. torch.optim.Adafactor(model.parameters()), and compare the loss.",
        None,
    )


def _growth(result: xr.Dataset, sizes: tuple[float, float], limit: float, calls: int) -> Finding | None:
    """What is held after each forward; the first one may still build what stays."""
    peak, large = sizes
    after = np.asarray(result.attrs.get("after_calls", ()), float)
    if len(after) < calls:
        return None
    steps = np.diff(after[1:])
    grown = float(after[-1] - after[1])
    if grown < limit * peak or not (steps > 0).all():
        return None
    return Finding(
        "memory_timeline/growth",
        f"What is held after a forward grows with each: {size(grown)} over {counted(len(after) - 2, 'forward')}",
        "medium" if grown >= large else "low",
        {"path": ""},
        grown / peak,
        limit,
        "1",
        "Keep numbers, not graphs, between steps: loss.item() or output.detach(); a growing key-value cache is meant to grow.",
        Saving(grown, "B", grown / peak, "measured after each forward"),
    )
