"""Who attends to what, reduced on the device while the model runs: column, row and block sums of the attention."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, ClassVar

from bnviz.errors import SchemaError
from bnviz.observation import AttentionSeen
from bnviz.schema import ProbeSpec, Variable, probe

if TYPE_CHECKING:
    from torch import Tensor

OF_PASSAGES = ("recent_mass", "recent_pivotal", "ranged_mass")
_KEY = ("step", "layer", "head", "key")
_QUERY = ("step", "layer", "head", "query")


@probe(
    sites=("attention",),
    variables=(
        Variable("mass", _KEY, "query", "attention a key received, summed over the queries that see it", "add"),
        Variable("mass_squared", _KEY, "query", "sum over queries of the squared weight on a key", "add"),
        Variable("peak", _KEY, "1", "largest weight any query gave a key, 0 to 1", "max"),
        Variable(
            "window_mass", _KEY, "query", "attention a key received from the last `window` queries of a call", "add"
        ),
        Variable("pivotal", _KEY, "query", "queries that gave a key more than an even share of what they see", "add"),
        Variable("last_row", _KEY, "1", "weight the last query gives a key, 0 to 1", "last"),
        Variable(
            "recent_mass", _KEY, "query", "attention a key received from the last `history` queries", "last", True
        ),
        Variable(
            "recent_pivotal", _KEY, "query", "of the last `history` queries, those that are pivotal", "last", True
        ),
        Variable(
            "ranged_mass", _KEY, "query", "window_mass with each query's weight times its position from 0", "last", True
        ),
        Variable("entropy", _QUERY, "nat", "entropy of a query's weights, 0 (one key) to ln visible", "append"),
        Variable("sink_mass", _QUERY, "1", "weight on the first `sinks` keys of the sequence", "append"),
        Variable("local_mass", _QUERY, "1", "weight on keys nearer than `local`, itself included", "append"),
        Variable("previous_mass", _QUERY, "1", "weight on the token before; NaN for the first token", "append"),
        Variable("echo_mass", _QUERY, "1", "weight on the latest earlier copy of the token; NaN: none", "append", True),
        Variable("induction_mass", _QUERY, "1", "weight on what followed that copy; NaN: none", "append", True),
        Variable("visible", ("step", "layer", "query"), "count", "keys a query may attend to", "append", True),
        Variable(
            "pooled",
            ("step", "layer", "head", "query_bin", "key_bin"),
            "query",
            "attention summed over cells of whole tokens and over the sequences of the batch; not kept for decoding",
            optional=True,
        ),
    ),
    memory="(9 x 4 B a key + 6 x 4 B a query) x heads x layers, + bins^2 x 4 B a head, layer and step",
)
class Attention:
    """Attention of every head on every token, summed as the model runs, whichever kernel it uses.

    Nothing of size queries x keys is held, and the model keeps its own kernel (eager, SDPA, flash): the weights are made
    again from the queries and keys the kernel was given, block by block, and only their sums stay.

    Parameters
    ----------
    window : int
        Queries at the end of a call that `window_mass` counts (SnapKV's observation window). A call with fewer counts all.
    history : int
        Queries at the end of a passage that `recent_mass` and `recent_pivotal` count (Scissorhands' history).
    sinks : int
        Keys at the start of a sequence that `sink_mass` counts.
    local : int
        `local_mass` counts keys at a distance below this, the token itself included.
    bins : int
        Side of `pooled`, at most; a cell spans ceil(queries / bins) x ceil(keys / bins) tokens of the (padded) batch.

    Raises
    ------
    SchemaError
        An option below 1.

    Notes
    -----
    With p_ij the weight of query i on key j: `mass` = sum_i p_ij, `mass_squared` = sum_i p_ij^2, `peak` = max_i p_ij,
    `window_mass` = sum over the last `window` queries, `pivotal` = number of i with p_ij > 1 / visible_i (Scissorhands,
    arXiv:2305.17118), `last_row` = p_Nj; `entropy` = -sum_j p_ij ln p_ij. The masses of a head add up to its number of
    queries (less where the model has learned sink logits).

    Padding is left out of every sum. A query that sees nothing is NaN, as is a query for which a quantity does not exist.
    `induction_mass` is also NaN where what followed the copy is the token itself or the one before it, and `echo_mass` where
    the copy is the token before: there a previous-token head would look the same.

    `recent_mass` and `recent_pivotal` are those sums over the last `history` queries of a passage, `ranged_mass` = sum_i i p_ij
    over its last `window` queries; decoding and keys of another text have none.

    Decode steps of one generation become one row: sums add up over them (so `window_mass` there is all decode queries),
    `peak` is the largest, `last_row` the last.

    Cost: one more product of queries and keys and one exponential a pair: about one attention forward on a CPU.

    Sources: H2O arXiv:2306.14048 (mass), SnapKV arXiv:2404.14469 (window), TOVA arXiv:2401.06104 (last row), StreamingLLM
    arXiv:2309.17453 (sinks), RazorAttention arXiv:2407.15891 (echo and induction), FINCH doi:10.1162/tacl_a_00716 (position).

    Examples
    --------
    >>> import torch
    >>> from bnviz.observation import AttentionSeen, Context, Site
    >>> q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 3, 4)
    >>> seen = AttentionSeen(Site("attention", "attn", 0), Context(0, 0, "forward"), q, k, k, None, True, 0.5)
    >>> [round(x, 3) for x in Attention().observe(seen)["mass"][0, 0].tolist()]
    [1.833, 0.833, 0.333]
    """

    spec: ClassVar[ProbeSpec]

    def __init__(
        self, *, window: int = 64, sinks: int = 4, local: int = 128, bins: int = 64, history: int = 400
    ) -> None:
        given = {"window": window, "sinks": sinks, "local": local, "bins": bins, "history": history}
        for name, value in given.items():
            if value < 1:
                raise SchemaError(f"Probe {self.spec.name}: {name} is {value}, expected 1 or more.")
        self.window, self.sinks, self.local, self.bins, self.history = window, sinks, local, bins, history
        self._known: tuple[weakref.ref[Tensor], tuple[int, int], dict[str, Tensor]] | None = None
        self._rows: tuple[tuple[object, ...], Tensor] | None = None
        from bnviz.reduce._native import library

        library("attention_strip")  # compiled now, not in the middle of a forward

    def observe(self, seen: AttentionSeen) -> dict[str, Tensor]:
        """Sums of one call; see `observation.Probe` for the axes."""
        import torch

        from bnviz.reduce.attention_stats import Pattern, Statistics, attention_stats

        rows = seen.query.shape[-2]  # of several decode steps in one call all count, as of each by itself
        window = max(self.window, rows) if seen.context.phase == "decode" else self.window
        pattern = Pattern(seen.causal, seen.window, seen.allowed, seen.softcap, seen.sinks, seen.scale)
        valid = seen.context.valid if seen.valid_keys is None or seen.across else seen.valid_keys
        kept = dict(
            attention_stats(
                seen.query,
                seen.key,
                pattern=pattern,
                statistics=Statistics(self._names(seen), window, self.sinks, self.local, self.bins, self.history),
                valid=valid,
                token_ids=seen.token_ids,
            )
        )
        if seen.context.phase == "decode" and rows > 1:
            _blank_last(kept["last_row"], seen)
        if "pooled" in kept:
            kept["pooled"] = _over_batch(kept["pooled"])
        if seen.across:
            for name in ("local_mass", "previous_mass"):
                kept[name] = torch.full_like(kept[name], torch.nan)
        if seen.token_ids is not None:
            for name, blank in self._ambiguous(seen, seen.token_ids).items():
                if name in kept:
                    kept[name].masked_fill_(blank, torch.nan)
        kept["visible"] = self._visible(seen)
        return kept

    def _visible(self, seen: AttentionSeen) -> Tensor:
        """As `_visible`, which is one for layers whose rows see alike."""
        if seen.allowed is not None or seen.context.valid is not None:
            return _visible(seen)
        batch, _, rows, _ = seen.query.shape
        key = (batch, rows, seen.key.shape[-2], seen.window, seen.causal, seen.query.device)
        known = self._rows
        if known is None or known[0] != key:
            self._rows = known = key, _visible(seen).contiguous()
        return known[1]

    def _ambiguous(self, seen: AttentionSeen, ids: Tensor) -> dict[str, Tensor]:
        """As `_ambiguous`, which is one for all layers of a forward that read the same ids."""
        call, queries = seen.context.call, seen.query.shape[-2]
        if self._known is None or self._known[0]() is not ids or self._known[1] != (call, queries):
            self._known = (weakref.ref(ids), (call, queries), _ambiguous(ids, queries))
        return self._known[2]

    def _names(self, seen: AttentionSeen) -> tuple[str, ...]:
        from bnviz.reduce.attention_stats import BY_KEY, BY_QUERY

        by_query = BY_QUERY if seen.token_ids is not None else BY_QUERY[:4]
        if seen.context.phase == "decode":
            return (*(name for name in BY_KEY if name not in OF_PASSAGES), *by_query)
        by_key = (name for name in BY_KEY if not (seen.across and name in OF_PASSAGES))
        return (*by_key, *by_query, "pooled")


def _blank_last(last: Tensor, seen: AttentionSeen) -> None:
    """Of a sequence whose last step is padding the last row is that of no token, as it is where steps come one by one."""
    real = seen.context.valid if seen.valid_keys is None or seen.across else seen.valid_keys
    if real is not None and real.shape[1] in (seen.query.shape[-2], seen.key.shape[-2]):
        last.masked_fill_(~real[:, -1, None, None], 0.0)


def _over_batch(pooled: Tensor) -> Tensor:
    """(batch, head, bin, bin) summed over the batch; NaN only where every sequence is."""
    import torch

    if len(pooled) == 1:
        return pooled[0]
    absent = pooled.isnan().all(0)
    return torch.where(absent, torch.nan, pooled.nan_to_num(0.0).sum(0))


def _ambiguous(ids: Tensor, queries: int) -> dict[str, Tensor]:
    """(batch, 1, queries) where an echo or an induction target is the previous token or the token itself."""
    import torch

    ids = ids[:, -queries - 2 :]
    repeats, alternates = (torch.nn.functional.pad(ids[:, by:] == ids[:, :-by], (by, 0)) for by in (1, 2))
    blank = {"echo_mass": repeats, "induction_mass": repeats | alternates}
    return {name: where[:, None, -queries:] for name, where in blank.items()}


def _visible(seen: AttentionSeen) -> Tensor:
    """(batch, queries) float32: keys a query may attend to; of heads that differ, the one that sees most."""
    import torch

    batch, _, rows, _ = seen.query.shape
    columns, device = seen.key.shape[-2], seen.query.device
    valid = seen.context.valid
    if seen.allowed is None and valid is None:
        if rows == 1:
            return torch.full((batch, 1), float(min(columns, seen.window or columns)), device=device)
        if not seen.causal and seen.window is None:
            count = torch.full((rows,), float(columns), device=device)
        else:
            count = _span(rows, columns, seen.window, causal=seen.causal, device=device)
        return count.expand(batch, rows)
    place = torch.arange(columns, device=device)
    here = torch.arange(columns - rows, columns, device=device)[:, None]
    sees = torch.ones(1, 1, rows, columns, dtype=torch.bool, device=device)
    if seen.causal:
        sees = sees & (place <= here)
    if seen.window is not None:
        sees = sees & ((here - place).abs() < seen.window)
    if seen.allowed is not None:
        sees = sees & _as_bool(seen.allowed)
    if valid is not None and valid.shape[1] == columns and not seen.across:
        sees = sees & valid[:, None, None, :]
    return sees.sum(-1).amax(1).float().expand(batch, rows)


def _span(rows: int, columns: int, window: int | None, *, causal: bool, device: object) -> Tensor:
    """Keys a query sees when only causality and a sliding window limit it."""
    import torch

    here = torch.arange(columns - rows, columns, device=device)  # type: ignore[call-overload]
    first = torch.zeros_like(here) if window is None else (here - window + 1).clamp_min(0)
    beyond = here + 1 if causal else torch.full_like(here, columns)
    if window is not None and not causal:
        beyond = (here + window).clamp_max(columns)
    return (beyond - first).float()


def _as_bool(allowed: Tensor) -> Tensor:
    """An additive mask hides at or below half the most negative number of its type, as in `attention_stats`."""
    import torch

    return allowed if allowed.dtype == torch.bool else allowed > torch.finfo(allowed.dtype).min / 2
