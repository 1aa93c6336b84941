"""How evenly the router spreads the work: load of every expert, balance of every layer, idle and overloaded experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from bnviz.errors import NotCaptured
from bnviz.quantities import count, counted, factor, ratio
from bnviz.schema import Finding, Judgement, Variable, diagnostic, stamp

from ._balance import BALANCE, balance
from ._expert_extremes import Layers, extremes
from ._routed import by_layer, in_use, over_mean, past_the_experts, select, tables, together_lift

_CELL = ("layer", "expert")
_LAYER = ("layer",)


@diagnostic(
    question="Which experts do the work, which are idle, and how uneven is it?",
    needs=("routing.expert", "routing.weight", "routing.experts"),
    wants=("routing.skip", "routing.shared", "routing.entropy", "routing.top_probability", "routing.probability"),
    gives=(
        Variable("count", _CELL, "count", "(token, slot) pairs sent to the expert; 0 beyond the layer's last expert"),
        Variable("mass", _CELL, "token", "sum of the router's weights of these pairs"),
        Variable("load", _CELL, "1", "count over the fair share; 1 is fair, NaN beyond the layer's last expert"),
        Variable("mass_load", _CELL, "1", "mass over its mean; NaN beyond the layer's last expert"),
        Variable("state", _CELL, "1", "-1 idle, 1 overloaded, 0 neither, or too few tokens to say"),
        *(Variable(name, _LAYER, unit, f"of the counts: {doc}") for name, (unit, doc) in BALANCE.items()),
        *(Variable(f"mass_{n}", _LAYER, unit, f"of the mass: {doc}") for n, (unit, doc) in BALANCE.items()),
        Variable("cv_floor", _LAYER, "1", "cv that fair sampling of as many tokens gives: below it nothing is claimed"),
        Variable("experts", _LAYER, "count", "experts of the layer"),
        Variable("tokens", _LAYER, "count", "tokens routed"),
        Variable("tokens_needed", _LAYER, "count", "tokens from which on an unused expert means something"),
        Variable("dropped", _LAYER, "count", "(token, slot) pairs that no expert got: a capacity was full"),
        Variable("skipped", _LAYER, "count", "pairs that chose to pass no expert, where the router may", optional=True),
        Variable("shared", _LAYER, "count", "experts every token passes, in no other number here", optional=True),
        Variable(
            "together_lift", (*_CELL, "expert_to"), "1", "how often two share a token; 1 by chance", optional=True
        ),
        Variable(
            "router_entropy", _LAYER, "1", "mean entropy of the router over ln experts, 0 sure to 1", optional=True
        ),
        Variable("confidence", _LAYER, "1", "mean of the router's largest probability", optional=True),
        Variable(
            "aux_loss", _LAYER, "1", "Switch auxiliary loss of the layer; the number of slots when even", optional=True
        ),
    ),
    order=40,
)
def expert_load(
    routing: xr.Dataset,
    *,
    step: int | None = None,
    phase: str | None = None,
    dead: float = 0.05,
    hot: float = 4.0,
    together: bool = True,
) -> xr.Dataset:
    """Load of each expert against its fair share, and how uneven each layer is.

    Read `load` first: 1 is the fair share T k / E, 0 an expert that got no token. Then `cv` against `cv_floor`: T tokens
    sent at random already give a cv of about `cv_floor`. `mass` weighs each token by how much its expert contributes: a
    layer whose mass is more even than its counts sends its surplus with small weights.

    Parameters
    ----------
    routing : Dataset
        Record `routing` (or `further_routing`): `expert`, `weight` (step, layer, token, slot), `experts` (step, layer). Ids
        of the last `skip` (step, layer) are no experts: who chose them passes none, and is in no load.
    step : int, optional
        One step; default all of the phase, pooled.
    phase : {"prompt", "decode", "all"}, optional
        Prompts (whole forwards and prefills) and decode steps load experts differently and are kept apart: default is
        the prompt, or decode when nothing else was seen. What was left out is in `attrs["left_out"]`.
    dead, hot : float
        Load below which an expert is idle, above which it is overloaded.
    together : bool
        Also `together_lift`, 4 B x layers x experts^2.

    Returns
    -------
    Dataset
        Variables as declared. NaN: the layer routed no token, or has fewer experts than the widest layer.

    Raises
    ------
    NotCaptured
        No routed token, no such step, or no step of that phase.

    Notes
    -----
    With c_e the pairs of expert e, T tokens, E experts, k = sum c / T and f = c / sum c:
    cv = std(c) / mean(c); max(c) / mean(c); Jain (sum c)^2 / (E sum c^2); entropy H(f) / ln E and exp H(f); Gini
    sum_ij abs(c_i - c_j) / (2 E sum c); floor sqrt((E/k - 1) / T). An unused expert is claimed from
    T >= (E/k) ln(E / 0.01) on: by then fair routing leaves an expert out in fewer than one layer of a hundred.
    Lift = O_ij T / (c_i c_j) over its value for a fair draw without replacement, E (k-1) / (k (E-1)).
    `aux_loss` = E sum_e (c_e / T) P_e with P the mean router probability; per layer, as pooling layers hides imbalance.

    Cost: O(T L k), with `together` O(T L E^2).

    Source: Switch Transformer (arXiv 2101.03961) for the loss and the capacity factor; the null of `cv` and of the lift
    are those of a uniform draw of k of E experts.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> dims = ("step", "layer", "token", "slot")
    >>> routing = xr.Dataset({"expert": (dims, np.array([[[[0], [1], [0], [0]]]], np.int16)),
    ...                       "weight": (dims, np.ones((1, 1, 4, 1), np.float32)),
    ...                       "experts": (("step", "layer"), [[2]])})
    >>> result = expert_load(routing)
    >>> result["load"].values.tolist(), float(result["cv"][0])
    ([[1.5, 0.5]], 0.5)
    """
    chosen, phase, left_out = select(routing, step, phase)
    weights = by_layer(chosen["weight"])
    choices = np.maximum(chosen["experts"].max("step").values, 0).astype(np.int64)
    ids, experts, skipped = past_the_experts(by_layer(chosen["expert"]), choices, chosen.get("skip"))
    width = int(experts.max(initial=0))
    if width == 0 or not (ids >= 0).any():
        raise NotCaptured("expert_load: the record 'routing' holds no routed token; run a forward inside the capture.")
    counts, mass = tables(ids, weights, width)
    coords = {name: routing.coords[name] for name in ("layer", "path") if name in routing.coords}
    result = xr.Dataset(coords={"layer": np.arange(len(ids))} | coords | {"expert": np.arange(width)})
    result["count"], result["mass"] = (_CELL, counts), (_CELL, mass)
    result["load"], result["mass_load"] = (_CELL, over_mean(counts, experts)), (_CELL, over_mean(mass, experts))
    for prefix, table in (("", counts), ("mass_", mass)):
        rows = [balance(amount[:own]) for amount, own in zip(table, experts, strict=True)]
        for name in BALANCE:
            result[prefix + name] = ("layer", np.array([row[name] for row in rows]))
    tokens = (ids >= 0).any(-1).sum(-1)
    _claims(result, experts, tokens, dead, hot)
    pairs = in_use(chosen).reshape(1, -1, 1) & np.isfinite(weights)
    result["dropped"] = ("layer", (pairs & (ids == -1)).sum((-1, -2)) * (experts > 0))
    if skipped is not None:
        result["skipped"] = ("layer", skipped)
    if "shared" in chosen:
        result["shared"] = ("layer", np.maximum(chosen["shared"].max("step").values, 0).astype(np.int64))
    slots = int(pairs.sum(-1).max(initial=0))
    if together and slots > 1:
        result["together_lift"] = ((*_CELL, "expert_to"), together_lift(ids, experts, width))
    _router(result, chosen, choices, tokens)
    result.attrs = {
        "model": str(routing.attrs.get("model", "")),
        "phase": phase,
        "left_out": left_out,
        "slots": slots,
        "dead": dead,
        "hot": hot,
    }
    if "unverified" in chosen:
        result.attrs["unverified"] = int((chosen["unverified"].max("step") > 0).sum())
    for name in ("expert_bytes", "model_bytes"):
        if name in routing.attrs:
            result.attrs[name] = routing.attrs[name]
    return stamp(result, expert_load.spec.gives)  # type: ignore[attr-defined]


def _claims(result: xr.Dataset, experts: np.ndarray, tokens: np.ndarray, dead: float, hot: float) -> None:
    """What may be said at all: the floor of cv, the tokens needed, and from there on who is idle and who overloaded."""
    load = result["load"].values
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = experts * tokens / result["count"].values.sum(-1)  # E / k
        needed = np.ceil(apart * np.log(experts / 0.01))
        result["cv_floor"] = ("layer", np.sqrt(np.maximum(apart - 1, 0) / tokens))
    enough = (tokens >= needed)[:, None]
    result["state"] = (_CELL, np.where(enough, (load > hot).astype(np.int8) - (load < dead), 0).astype(np.int8))
    result["experts"], result["tokens"] = ("layer", experts), ("layer", tokens)
    result["tokens_needed"] = ("layer", needed)


def _router(result: xr.Dataset, chosen: xr.Dataset, choices: np.ndarray, tokens: np.ndarray) -> None:
    """How sure the router was, and the loss that was to balance it, where its probabilities were seen."""
    experts, counts = result["experts"].values, result["count"].values
    with np.errstate(divide="ignore", invalid="ignore"):
        if "entropy" in chosen:
            result["router_entropy"] = ("layer", chosen["entropy"].mean(("step", "token")).values / np.log(choices))
        if "top_probability" in chosen:
            result["confidence"] = ("layer", chosen["top_probability"].mean(("step", "token")).values)
        if "probability" in chosen:
            mass = chosen["probability"].sum("step").transpose("layer", "candidate").values[:, : counts.shape[1]]
            mean = mass / mass.sum(-1, keepdims=True)
            result["aux_loss"] = ("layer", experts * (counts / tokens[:, None] * mean).sum(-1))


def judge(result: xr.Dataset, *, noise: float = 3.0, capacity: float = 1.25) -> Judgement:
    """Names idle and overloaded experts by layer, and layers less even than chance allows.

    Parameters
    ----------
    result : Dataset
        From `expert_load`; its limits `dead` and `hot` are in `attrs`.
    noise : float
        A layer's cv is called uneven from this many times `cv_floor` on.
    capacity : float
        ... and when its busiest expert passes this factor: the one Switch trains with, beyond which tokens are dropped.

    Notes
    -----
    The saving of idle experts is the share of all experts' weights they hold, counted as equal in size within a layer.
    """
    layers = Layers(result)
    findings = extremes(layers)
    uneven = [
        at
        for at in range(layers.number)
        if layers.of("cv", at) > noise * layers.of("cv_floor", at) and layers.of("max_over_mean", at) > capacity
    ]
    if uneven:
        findings.append(_unevenness(layers, uneven, noise, capacity))
    title = _title(layers, uneven)
    routed = int(result["tokens"].max()) if layers.number else 0
    subtitle = (
        f"tokens an expert gets over its fair share · {result.attrs.get('model') or 'model'}, {layers.number} layers × "
        f"{int(result['experts'].max()) if layers.number else 0} experts, {result.attrs.get('slots', 0)} a token · "
        f"{count(routed)} tokens, {result.attrs.get('phase', 'prompt')}"
    )
    caveats = _caveats(result, layers)
    return Judgement(
        title, subtitle, f"Expert load: {title}. {' '.join(f'{c}.' for c in caveats)}", caveats, tuple(findings)
    )


def _unevenness(layers: Layers, uneven: Sequence[int], noise: float, capacity: float) -> Finding:
    """One finding for all layers that are less even than chance: their cause is one, the router."""
    worst = max(uneven, key=lambda at: layers.of("cv", at))
    spread = [layers.of("cv", at) for at in uneven]
    place = layers.place(worst)
    if len(uneven) > 1:
        place = {"layer": [layers.layer(at) for at in uneven]}
    busiest = layers.of("max_over_mean", worst)
    which = f"layer {layers.layer(worst)}" if len(uneven) == 1 else f"{len(uneven)} of {layers.number} layers"
    values = ratio(spread[0]) if len(uneven) == 1 else f"{ratio(min(spread))} to {ratio(max(spread))}"
    return Finding(
        "expert_load/uneven",
        f"The load of {which} varies by {values} of its mean (fair sampling gives {ratio(layers.of('cv_floor', worst))}); "
        f"the busiest expert gets {factor(busiest)} its share",
        "medium" if busiest > 2 else "low",
        place,
        max(spread),
        noise * layers.of("cv_floor", worst),
        advice=f"Where experts have a capacity, set its factor above {factor(busiest)} or raise the router's balancing loss.",
    )


def _title(layers: Layers, uneven: Sequence[int]) -> str:
    whole = int(layers.result["experts"].sum()) if layers.number else 0
    if not whole:
        return "No token was routed"
    loads = layers.result["load"].values
    idle = int((layers.result["state"].values == -1).sum())
    busiest = float(np.nanmax(loads))
    layer = layers.layer(int(np.nanargmax(np.nanmax(np.nan_to_num(loads, nan=-1.0), axis=1))))
    if idle:
        verb = "is" if idle == 1 else "are"
        return f"{idle} of {whole} experts {verb} idle; the busiest, in layer {layer}, gets {factor(busiest)} its share"
    if uneven:
        return f"No expert is idle; the busiest, in layer {layer}, gets {factor(busiest)} its fair share"
    if (layers.result["tokens"] < layers.result["tokens_needed"]).any():
        return "Too few tokens to tell an idle expert from chance"
    return f"Load is even: every expert gets {factor(float(np.nanmin(loads)))} to {factor(busiest)} its fair share"


def _caveats(result: xr.Dataset, layers: Layers) -> tuple[str, ...]:
    said = ["Load depends on the text: an expert idle here may serve other text"]
    short = [at for at in range(layers.number) if layers.of("tokens", at) < layers.of("tokens_needed", at)]
    if short:
        worst = max(short, key=lambda at: layers.of("tokens_needed", at))
        said.append(
            f"Needs at least {count(layers.of('tokens_needed', worst))} tokens to call an expert idle, has "
            f"{count(layers.of('tokens', worst))} in layer {layers.layer(worst)}"
        )
    dropped = int(result["dropped"].sum()) if layers.number else 0
    if dropped:
        said.append(f"{count(dropped)} (token, slot) pairs were given to no expert")
    if layers.number and "skipped" in result and int(result["skipped"].sum()):
        said.append(f"{count(int(result['skipped'].sum()))} pairs chose to pass no expert and are in no load")
    if layers.number and "shared" in result and int(result["shared"].max()):
        said.append("Shared experts, which every token passes, are in no load")
    if result.attrs.get("unverified"):
        where = counted(result.attrs["unverified"], "layer")
        said.append(f"In {where} the choice was seen where it is made, not where experts use it")
    for phase, tokens in result.attrs.get("left_out", {}).items():
        said.append(f"{count(tokens)} tokens of phase {phase!r} are left out; phase={phase!r} shows them")
    return tuple(said)
