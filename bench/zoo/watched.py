"""One model, watched: is it the same, is nothing left on it, and did the capture see what was there?"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

import bnviz
from bench.routers import check
from bnviz import catalog
from bnviz.capture.options import Options
from bnviz.schema import SITE_KINDS, Variable, probe

from .census import Census, Seen, census
from .compare import left_behind, same, state_of
from .experts import experts_that_ran
from .handmade.made import Made
from .layers import layers_of, reason, unmatched
from .table import EXACT
from .weights import Rows, captured, differences

SEED = 1234


@dataclass(slots=True)
class Result:
    """What a sweep keeps of one model; plain values only, so that it can be stored."""

    name: str
    model: str = ""
    parameters: int = 0
    modules: int = 0
    blocks: int = 0
    blocks_seen: int = 0
    layers: int = 0
    layers_lost: list[str] = field(default_factory=list)
    writers: int = 0
    attention: int = 0
    attention_expected: int = 0
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    mixed: int = 0
    weights: int = 0
    weights_error: float = 0.0
    weights_wrong: list[str] = field(default_factory=list)
    mechanisms: list[str] = field(default_factory=list)
    routers: int = 0
    routers_expected: int = 0
    routers_missing: list[str] = field(default_factory=list)
    rebuilt: int = 0
    rebuilt_error: float = 0.0
    not_rebuilt: list[str] = field(default_factory=list)
    equal: bool = False
    repeats: bool = True
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    idle: str = ""
    unknown: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""
    reason: str = ""

    @property
    def row(self) -> dict[str, Any]:
        """As stored."""
        return asdict(self)


@probe(
    sites=tuple(
        k for k in SITE_KINDS if k.endswith("attention") or k in ("router", "further_router", "block", "sublayer")
    ),
    variables=(Variable("none", ("step",), "1", "never kept", optional=True),),
    memory="0",
    default=False,
)
class Shapes:
    """Writes down what a capture shows its probes, and keeps no tensor."""

    def __init__(self) -> None:
        self.attention: list[tuple[str, int, int, int, int]] = []
        self.weights: list[Rows] = []
        self.routers: list[str] = []
        self.blocks: list[str] = []

    def observe(self, seen: Any) -> None:
        """Shapes of one observation."""
        kind = seen.site.kind
        if kind.endswith("attention"):
            self.weights.append(captured(seen))
            query, key = seen.query, seen.key
            self.attention.append(
                (seen.site.path, query.shape[0] * query.shape[1], query.shape[1], query.shape[2], key.shape[2])
            )
        elif kind in ("router", "further_router"):
            self.routers.append(seen.site.path)
        elif kind == "block":
            self.blocks.append(seen.site.path)


def site_probes() -> dict[str, Any]:
    """Every probe that is on by default and looks at places in the model."""
    classes = {n: catalog.load("probes", n) for n in catalog.names("probes")}
    return {n: c() for n, c in classes.items() if c.spec.default and c.spec.sites and not c.spec.uses}


def watch(name: str, model: nn.Module, call: Callable[[], Any], made: Made | None = None) -> Result:
    """Run `call()` plain, counted and captured, and compare.

    Parameters
    ----------
    name : str
    model : nn.Module
        In eval mode; what `call()` runs.
    call : callable
        Calls the model once and returns its output.
    made : Made, optional
        What the model's own source says must be seen; None: it is counted.
    """
    started = time.perf_counter()
    result = Result(name, type(model).__name__, sum(p.numel() for p in model.parameters()))
    result.modules = sum(1 for _ in model.modules())
    with torch.no_grad():
        seeded(call)  # what a first call sets up (rotary tables, lazy masks) is the model's own
        plain = seeded(call)
        result.repeats = same(plain, seeded(call))
        counter = census(model, lambda: seeded(call)) if made is None else _if_it_can(model, call)
        before = state_of(model)
        shapes = _captured(model, call, plain, result)
        result.left = left_behind(before, state_of(model))[:8]
        result.equal = result.equal and same(plain, seeded(call))
    result.notes += filter(None, [counter.failed])
    _attention(result, counter, shapes, made)
    _weights(result, counter, shapes)
    _routers(result, model, counter, shapes, made)
    if shapes.routers:
        _experts(result, model, call)
    result.seconds = time.perf_counter() - started
    return result


def _if_it_can(model: nn.Module, call: Callable[[], Any]) -> Census:
    """The census of a model whose source says what must be seen: its weights; without any where it compiles what it calls."""
    try:
        return census(model, lambda: seeded(call))
    except Exception as error:
        torch._dynamo.reset()  # it remembers what it could not compile
        none = Census(model)
        none.failed = f"weights not counted ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
        return none


def seeded(call: Callable[[], Any]) -> Any:
    """`call()` with the random numbers it always gets."""
    torch.manual_seed(SEED)
    return call()


def _captured(model: nn.Module, call: Callable[[], Any], plain: Any, result: Result) -> Shapes:
    shapes, stated = Shapes(), layers_of(getattr(model, "config", None))
    plan = bnviz.sites(model)
    result.blocks, result.unknown = len(plan.blocks), [str(line) for line in plan.unknown][:6]
    result.mechanisms = sorted({a.mechanism for a in plan.attention})
    recorder = bnviz.Recorder(model, Options(), site_probes() | {"shapes": shapes})
    with recorder:
        output = seeded(call)
        generator = torch.random.get_rng_state()
    seeded(call)
    result.equal = same(plain, output)
    if not torch.equal(generator, torch.random.get_rng_state()):
        result.left.append("torch: random numbers")
    result.notes = [n for n in recorder.notes if "stopped at call" in n or "attention of" in n]
    result.blocks_seen, result.layers = len(set(shapes.blocks)), len(stated)
    lost = unmatched(stated, (site.path for site, _ in plan.blocks), shapes.blocks)
    result.layers_lost = [f"{one}: {reason(result.name, one)}" for one in lost]
    result.writers = _with_writers(recorder)
    return shapes


def _with_writers(recorder: bnviz.Recorder) -> int:
    """Blocks of which a part was seen, by the rows of its verified residual writers."""
    if "activations" not in recorder.run.kinds:
        return 0
    norm = recorder.run["activations"]["norm_out"]
    parts = [k for k in norm.kind.values if k != "block"]
    if not parts:
        return 0
    spare = [d for d in norm.dims if d != "layer"]
    return int(norm.sel(kind=parts).notnull().any(spare).sum())


def _attention(result: Result, counter: Census, shapes: Shapes, made: Made | None) -> None:
    """Match what was captured with what was counted: rows, queries and keys, and the heads where they can be told."""
    real = [s for s in counter.seen if s.logits] if made is None else [Seen("", 0, *a) for a in made.attention]
    other = [s for s in counter.seen if not s.logits] if made is None else []
    left = list(shapes.attention)
    result.attention, result.attention_expected = len(left), len(real)
    lost = []
    for seen in real:
        fitting = [c for c in left if _matches(c, seen)]
        match = next((c for c in fitting if _under(seen.path, c[0])), fitting[0] if fitting else None)
        if match is None:
            lost.append(seen)
        else:
            left.remove(match)
    for whole in list(left):  # one attention that the model computes in pieces is shown whole
        pieces = _pieces(whole, [s for s in lost if s.path and _under(s.path, whole[0])])
        if pieces:
            left.remove(whole)
            lost = [s for s in lost if not any(s is p for p in pieces)]
            result.attention += len(pieces) - 1
    result.missing = [_sentence(s) for s in lost]
    for seen in other:
        match = next((c for c in left if _matches(c, seen)), None)
        if match is not None:
            left.remove(match)
            result.mixed += 1
    result.extra = [f"{p}: {heads} heads, {q} x {k}" for p, _, heads, q, k in left]
    result.missing, result.extra = _short(result.missing), _short(result.extra)


def _weights(result: Result, counter: Census, shapes: Shapes) -> None:
    """What the probes were shown against what the operators computed."""
    found = differences(shapes.weights, counter.weights)
    result.weights, result.weights_error = len(found), max(found.values(), default=0.0)
    result.weights_wrong = _short([f"{path} by {off:.0e}" for path, off in found.items() if not off <= EXACT])


def _matches(captured: tuple[str, int, int, int, int], seen: Seen) -> bool:
    _, rows, heads, queries, keys = captured
    shaped = (queries, keys) == (seen.queries, seen.keys) and seen.heads in (0, heads)
    return shaped and seen.rows in (0, rows)


def _pieces(whole: tuple[str, int, int, int, int], parts: list[Seen]) -> list[Seen]:
    """The parts of one place that are `whole` together: by sequence, by rows of queries, by heads, or by windows of keys."""
    _, rows, _, queries, keys = whole
    band = [s for s in parts if s.rows * s.queries == rows * queries and s.queries < queries and s.keys < keys]
    band += [
        s for s in parts if rows % s.rows == 0 and s.rows * s.queries == rows * queries and s.keys == keys
    ]  # windows
    if band:
        return band[:1]
    for size in range(2, len(parts) + 1):
        some = parts[:size]
        by_queries = {s.rows for s in some} == {rows} and sum(s.queries for s in some) == queries
        by_keys = sum(s.keys for s in some) == keys or {s.keys for s in some} == {keys}
        by_heads = sum(s.rows for s in some) == rows and {(s.queries, s.keys) for s in some} == {(queries, keys)}
        if (by_queries and by_keys) or by_heads:
            return some
    return []


def _under(path: str, owner: str) -> bool:
    return path == owner or path.startswith(f"{owner}.")


def _sentence(seen: Seen) -> str:
    heads = f"{seen.heads} heads" if seen.heads else f"{seen.rows} rows"
    return f"{seen.path}: {heads}, {seen.queries} x {seen.keys}"


def _short(lines: list[str], most: int = 6) -> list[str]:
    return lines[:most] + ([f"and {len(lines) - most} more"] if len(lines) > most else [])


def _routers(result: Result, model: nn.Module, counter: Census, shapes: Shapes, made: Made | None) -> None:
    homes = experts_that_ran(model, Counter(counter.ran))
    seen = set(shapes.routers)
    result.routers, result.routers_expected = len(seen), len(homes)
    lost = [h for h in homes if not any(_under(s, h) or _under(h, s) for s in seen)]
    result.routers_missing = _short(lost)
    if made is not None:
        result.routers_expected, result.routers_missing = made.routers, []
        if result.blocks_seen < made.blocks:
            result.layers_lost = [f"its source has {made.blocks} blocks: "]


def _experts(result: Result, model: nn.Module, call: Callable[[], Any]) -> None:
    """Experts computed once more from captured ids and weights, against what the model's own gave in that forward."""
    _lively(model)
    found = check(model, lambda: seeded(call))
    result.rebuilt, result.rebuilt_error = len(found.errors), max(found.errors.values(), default=0.0)
    result.not_rebuilt = _short([*found.wrong, *found.unread])


def _lively(model: nn.Module) -> None:
    """Random weights in every mixture: of many classes the first ones are zero, or so small that all experts seem alike."""
    mixtures = {id(m): m for _, router in bnviz.sites(model).routers for m in (router.block, *router.experts)}
    with torch.no_grad():
        for parameter in {id(p): p for m in mixtures.values() for p in m.parameters()}.values():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
