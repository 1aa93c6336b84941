"""How little each block, attention and MLP changes the residual stream: what a model might do without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from bnviz.errors import NotCaptured
from bnviz.kinds import stream_and_part
from bnviz.quantities import counted, part, share, significant
from bnviz.schema import Finding, Judgement, Saving, Variable, diagnostic, stamp

_PLACE = ("kind", "layer")


@diagnostic(
    question="Which blocks, attentions and MLPs change the residual stream least?",
    needs=("activations.cosine",),
    wants=("activations.relative_change", "activations.norm_out"),
    gives=(
        Variable(
            "block_influence", _PLACE, "1", "1 - mean cosine of before and after; 0 leaves the direction as it was"
        ),
        Variable("cosine", _PLACE, "1", "mean cosine of before and after, -1 to 1"),
        Variable("cosine_lower", _PLACE, "1", "lower quartile of the cosine over tokens"),
        Variable("cosine_upper", _PLACE, "1", "upper quartile of the cosine over tokens"),
        Variable(
            "relative_change_median", _PLACE, "1", "median norm of what is added over the norm before", optional=True
        ),
        Variable("relative_change_lower", _PLACE, "1", "lower quartile of the relative change", optional=True),
        Variable("relative_change_upper", _PLACE, "1", "upper quartile of the relative change", optional=True),
        Variable("norm_out_median", _PLACE, "norm", "median norm of the residual stream after", optional=True),
        Variable("rank", _PLACE, "1", "place by influence within its kind, 1 least; NaN undefined"),
        Variable("tokens", _PLACE, "count", "tokens, or rows of a batch without tokens, that the numbers are over"),
        Variable("undefined", _PLACE, "count", "tokens or rows left out because a vector was zero"),
        Variable("parameter_bytes", _PLACE, "B", "weights of the part", optional=True),
    ),
    order=30,
)
def layer_redundancy(activations: xr.Dataset, *, step: int | None = None, skip: int = 0) -> xr.Dataset:
    """Block influence of every block and the same measure for its attention and MLP.

    Read `block_influence` along the layers, one kind at a time: the part with the least turns the residual stream least,
    and is the first candidate for skipping. It ranks; it does not say what skipping costs.

    Parameters
    ----------
    activations : Dataset
        Record `activations`: `cosine` (step, kind, layer, token), and where there `relative_change` and `norm_out`.
    step : int, optional
        One step; default all, every token once.
    skip : int
        Positions at the start of each sequence that are left out. Attention sinks sit there with norms far above all
        others; medians and cosines hardly feel them, and 0 is what the papers do.

    Returns
    -------
    Dataset
        Variables as declared, over (kind, layer). NaN: the kind was not seen in that layer, or the part changes the
        width of its input. `attrs["rows"]`: "token" where the blocks hold an attention, else "row"; `attrs["streams"]`: as what
        blocks take each stream, where they have several.

    Raises
    ------
    NotCaptured
        No block or sub-layer has a cosine: none was seen, or none keeps the shape of its input.

    Notes
    -----
    `block_influence` = 1 - mean over tokens of x.y / (|x| |y|), x before and y after; for a sub-layer y = x + f(x).
    `relative_change` = |y - x| / |x|. Tokens with a zero vector have no cosine; they are counted in `undefined`.

    Cost: O(kinds x layers x tokens).

    Source: ShortGPT (arXiv 2403.03853) for blocks, LLM-Drop (arXiv 2406.15786) for attention and MLP.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> dims = ("step", "kind", "layer", "token")
    >>> record = xr.Dataset({"cosine": (dims, np.array([[[[1.0, 0.5], [0.25, 0.75]]]]))}, {"kind": ["block"]})
    >>> layer_redundancy(record)["block_influence"].values.tolist()
    [[0.25, 0.5]]
    """
    if "cosine" not in activations or not activations["cosine"].size:
        raise NotCaptured(
            "layer_redundancy: the record 'activations' holds no cosine of before and after; "
            "it needs a model with at least one block whose output has its input's shape."
        )
    if step is not None:
        if step not in activations["step"].values:
            raise NotCaptured(
                f"Step {step} is not in the record 'activations'; it has {activations.sizes['step']} steps."
            )
        activations = activations.sel(step=[step])
    coords = {name: activations.coords[name] for name in ("kind", "layer", "path") if name in activations.coords}
    result = xr.Dataset(coords={"layer": np.arange(activations.sizes["layer"])} | coords)
    used = _used(activations, skip)
    cosine = _rows(activations["cosine"], used)
    result["cosine"] = (_PLACE, _each(cosine, np.mean))
    result["block_influence"] = 1 - result["cosine"]
    for name, at in (("cosine_lower", 0.25), ("cosine_upper", 0.75)):
        result[name] = (_PLACE, _each(cosine, np.quantile, at))
    result["rank"] = (_PLACE, np.array([_rank(row) for row in result["block_influence"].values]))
    result["tokens"] = (_PLACE, np.isfinite(cosine).sum((-1, -2)))
    result["undefined"] = (_PLACE, _undefined(cosine, _seen(activations, used)))
    if "relative_change" in activations:
        change = _rows(activations["relative_change"], used)
        result["relative_change_median"] = (_PLACE, _each(change, np.median))
        for name, at in (("relative_change_lower", 0.25), ("relative_change_upper", 0.75)):
            result[name] = (_PLACE, _each(change, np.quantile, at))
    if "norm_out" in activations:
        result["norm_out_median"] = (_PLACE, _each(_rows(activations["norm_out"], used), np.median))
    _weights(result, activations.attrs)
    rows = "token" if "attention" in _kinds(result) else "row"
    result.attrs |= {"model": str(activations.attrs.get("model", "")), "skip": skip, "rows": rows}
    result.attrs["streams"] = dict(activations.attrs.get("streams", {}))
    return stamp(result, layer_redundancy.spec.gives)  # type: ignore[attr-defined]


def _used(record: xr.Dataset, skip: int) -> np.ndarray:
    """(step, token): tokens that exist and are not among the first `skip` of their sequence."""
    if "position" not in record.coords:
        if skip:
            raise NotCaptured(
                "layer_redundancy: skip needs the coordinate 'position' (step, token) of a captured record."
            )
        return np.ones((record.sizes["step"], record.sizes["token"]), bool)
    position = record["position"].transpose("step", "token").values
    return np.asarray(position >= skip)


def _rows(variable: xr.DataArray, used: np.ndarray) -> np.ndarray:
    """(kind, layer, step, token), NaN where a token is not used."""
    table = variable.transpose("kind", "layer", "step", "token").values.astype(np.float64)
    return np.where(used, table, np.nan)


def _each(table: np.ndarray, reduce: Callable[..., Any], *options: float) -> np.ndarray:
    """`reduce` of the defined values of every (kind, layer); NaN where there are none."""
    found = np.full(table.shape[:2], np.nan)
    for at in np.ndindex(*found.shape):
        values = table[at][np.isfinite(table[at])]
        if values.size:
            found[at] = reduce(values, *options)
    return found


def _seen(record: xr.Dataset, used: np.ndarray) -> np.ndarray:
    """(kind, layer, step, token): used tokens that the place saw; a decoder does not see those of its encoder."""
    if "norm_out" in record:
        return np.asarray(np.isfinite(_rows(record["norm_out"], used)))
    return np.broadcast_to(used, (record.sizes["kind"], record.sizes["layer"], *used.shape))


def _undefined(cosine: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """(kind, layer): tokens seen without a cosine in steps where the place has one for others."""
    defined = np.isfinite(cosine)
    missing = np.where(defined.any(-1), (seen & ~defined).sum(-1), 0)
    return np.asarray(missing.sum(-1))


def _rank(values: np.ndarray) -> np.ndarray:
    """1 for the least; NaN where undefined; ties in the order of layers."""
    places = np.full(len(values), np.nan)
    order = np.argsort(values, kind="stable")
    order = order[np.isfinite(values[order])]
    places[order] = np.arange(1, len(order) + 1)
    return places


def _weights(result: xr.Dataset, attrs: Mapping[Any, Any]) -> None:
    """Bytes of every part, where the recorder knew them: {kind: [bytes of each layer]} and the model's own total."""
    known = attrs.get("parameter_bytes")
    if not isinstance(known, Mapping):
        return
    kinds, layers = [str(k) for k in result["kind"].values], result.sizes["layer"]
    table = [known.get(kind) or [np.nan] * layers for kind in kinds]
    if any(len(row) != layers for row in table):
        return
    result["parameter_bytes"] = (
        _PLACE,
        np.array([[np.nan if v is None else v for v in row] for row in table], np.float64),
    )
    if "model_bytes" in attrs:
        result.attrs["model_bytes"] = float(attrs["model_bytes"])
    result.attrs["shared_weights"] = [int(layer) for layer in attrs.get("shared_weights", ())]


def judge(result: xr.Dataset, *, influence: float = 0.1) -> Judgement:
    """Names the block, the attention and the MLP that change the residual stream least.

    Parameters
    ----------
    result : Dataset
        From `layer_redundancy`.
    influence : float
        The least of a kind becomes a finding below this. The papers rank and set no limit; 0.1 is a mean turn of about
        26 degrees.
    """
    least = {kind: at for kind in _kinds(result) if (at := _least(result, kind)) is not None}
    findings = tuple(_finding(result, *at, influence) for at in least.values() if _value(result, *at) < influence)
    title = _title(result, least, influence)
    tokens = int(result["tokens"].max()) if result["tokens"].size else 0
    subtitle = (
        f"1 − mean cosine of before and after · {result.attrs.get('model') or 'model'}, "
        f"{counted(result.sizes.get('layer', 0), 'layer')} · {counted(tokens, _what(result))}"
    )
    caveats = _caveats(result)
    whole = {at[1] for kind, at in least.items() if kind == "block" and _value(result, *at) < influence}
    if any(at[1] in whole and _value(result, *at) < influence for kind, at in least.items() if kind != "block"):
        caveats += ("A block holds its attention and MLP: their savings overlap and do not add up",)
    summary = f"Layer redundancy: {title}. {' '.join(f'{c}.' for c in caveats)}"
    compared = any(np.isfinite(row).sum() > 1 for row in result["block_influence"].values)
    asked = "" if compared else "How much does what keeps the shape of its input change it?"
    return Judgement(title, subtitle, summary, caveats, findings, asked)


def _what(result: xr.Dataset) -> str:
    """What a vector belongs to: a token, or a row of the batch where nothing says that there are tokens."""
    return str(result.attrs.get("rows", "row"))


def _kinds(result: xr.Dataset) -> list[str]:
    return [str(k) for k in result["kind"].values] if "kind" in result.coords else []


def _least(result: xr.Dataset, kind: str) -> tuple[int, int] | None:
    row = _kinds(result).index(kind)
    found = np.flatnonzero(result["rank"].values[row] == 1)
    return (row, int(found[0])) if found.size else None


def _value(result: xr.Dataset, row: int, at: int) -> float:
    return float(result["block_influence"].values[row, at])


def _name(result: xr.Dataset, row: int, at: int) -> str:
    kind = _kinds(result)[row]
    name = _own(kind)
    return f"{name[0].upper()}{name[1:]}{'' if _whole(kind) else ' of layer'} {int(result['layer'].values[at])}"


def _own(kind: str) -> str:
    """What a part is called among those of its stream: of what turns a stream as a whole, the block."""
    return part(stream_and_part(kind)[1] or "block")


def _whole(kind: str) -> bool:
    return not stream_and_part(kind)[1]


def _turned(kind: str) -> str:
    """The stream that a part turns, in words."""
    stream = stream_and_part(kind)[0]
    return f"the {part(stream)}" if stream else "the residual stream"


def _finding(result: xr.Dataset, row: int, at: int, limit: float) -> Finding:
    kind, value = _kinds(result)[row], _value(result, row, at)
    where: dict[str, Any] = {"layer": int(result["layer"].values[at])}
    if "path" in result.coords and str(result["path"].values[at]):
        where["path"] = str(result["path"].values[at])
    change = ""
    if "relative_change_median" in result:
        change = f" and adds {share(float(result['relative_change_median'].values[row, at]))} of its norm"
    return Finding(
        f"layer_redundancy/{kind}",
        f"{_name(result, row, at)} turns {_turned(kind)} least of all {_own(kind)}s{change}: "
        f"influence {significant(value, 2)} (limit {significant(limit, 2)})",
        "low",
        where,
        value,
        limit,
        advice=f"Skip {_what_to_skip(kind)} on your own batch and read the loss before you remove it.",
        saving=_saving(result, row, at),
    )


def _what_to_skip(kind: str) -> str:
    stream, own = stream_and_part(kind)
    return f"what it writes to the {part(stream)}" if stream and not own else "it"


def _saving(result: xr.Dataset, row: int, at: int) -> Saving | None:
    """The weights of the part, as a share of the model's; None when they are not known, or another layer uses them too."""
    if "parameter_bytes" not in result or result["layer"].values[at] in result.attrs["shared_weights"]:
        return None
    amount, whole = float(result["parameter_bytes"].values[row, at]), float(result.attrs.get("model_bytes", np.nan))
    if not (np.isfinite(amount) and whole > 0):
        return None
    return Saving(amount, "B", amount / whole, "computed from shapes")


def _title(result: xr.Dataset, least: Mapping[str, tuple[int, int]], limit: float) -> str:
    if not least:
        return "No block keeps the shape of its input, so influence is not defined"
    below = [kind for kind, at in least.items() if _value(result, *at) < limit]
    first = min(below, key=lambda kind: _value(result, *least[kind]), default=next(iter(least)))
    kind = "block" if "block" in below or ("block" in least and not below) else first
    row, at = least[kind]
    value = significant(_value(result, row, at), 2)
    values = result["block_influence"].values[row]
    others = np.sort(values[np.isfinite(values)])[1:]
    if not others.size:
        return f"{_name(result, row, at)} is the only one seen: influence {value}"
    rest = f"others {significant(others[0], 2)} to {significant(others[-1], 2)}"
    if _value(result, row, at) < limit:
        return f"{_name(result, row, at)} changes its input least: influence {value}, {rest}"
    return f"No {part(kind)} has an influence below {significant(limit, 2)}: least {value}, {rest}"


def _caveats(result: xr.Dataset) -> tuple[str, ...]:
    said = ["Influence ranks; what skipping costs must be measured, and the order can differ on other text"]
    undefined = int(result["undefined"].max()) if result["undefined"].size else 0
    if undefined:
        said.append(f"A zero vector has no cosine: up to {counted(undefined, _what(result))} of a layer left out")
    few = int(result["tokens"].where(result["tokens"] > 0).min().fillna(0)) if result["tokens"].size else 0
    if 0 < few < 100:
        said.append(f"Only {counted(few, _what(result))}: quartiles are rough")
    streams = result.attrs.get("streams", {})
    if "stream_2" in streams:
        said.append(f"The second stream is what blocks take as {streams['stream_2']}, the first as {streams['block']}")
    if skip := int(result.attrs.get("skip", 0)):
        said.append(f"The first {'position' if skip == 1 else f'{skip} positions'} of every sequence left out")
    return tuple(said)
