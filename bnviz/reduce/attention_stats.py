"""Statistics of softmax attention from one pass over query x key, in memory linear in the number of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnviz.errors import SchemaError, unknown

from . import _attention_native, _attention_row, _dispatch
from ._alone import alone
from ._attention_gather import gather
from ._attention_marks import bin_size
from ._attention_pairs import PAIRS, partners_again
from ._attention_pattern import BY_KEY, BY_QUERY, STATISTICS, Pattern, Statistics
from ._attention_sight import Tokens, tokens
from ._attention_strips import strips
from ._given import as_tensor, quiet

__all__ = ["BY_KEY", "BY_QUERY", "STATISTICS", "Pattern", "Statistics", "attention_stats", "bin_size"]

_FROM_IDS = ("echo_mass", "induction_mass")


def attention_stats(
    query: Any,
    key: Any,
    *,
    pattern: Pattern = Pattern(),  # noqa: B008 - frozen
    statistics: Statistics = Statistics(),  # noqa: B008 - frozen
    valid: Any = None,
    token_ids: Any = None,
    lse: Any = None,
) -> dict[str, Any]:
    """Column, row and block sums of the attention p = softmax(scale q.k), never holding queries x keys.

    With p (query i, key j) and rows that are padding or see no key left out:

    ================  ============================================================================  ==========
    name              definition                                                                    range
    ================  ============================================================================  ==========
    mass              sum_i p: attention a key has gathered; sums to the number of rows             0 to rows
    mass_squared      sum_i p**2                                                                    0 to rows
    peak              max_i p                                                                       0 to 1
    window_mass       sum of p over the last `snap` valid queries                                   0 to snap
    pivotal           number of rows with p > 1 / (keys the row sees), by more than rounding        0 to rows
    last_row          p of the last valid query                                                     0 to 1
    recent_mass       sum of p over the last `history` valid queries                                0 to history
    recent_pivotal    number of rows among those with p > 1 / (keys the row sees)                   0 to history
    ranged_mass       window_mass with each p times its row's position, counted from 0              0 to snap x rows
    entropy           -sum_j p ln p; 0: one key, ln(keys the row sees): uniform                     nat
    sink_mass         sum of p over the first `sink` valid keys                                     0 to 1
    local_mass        sum of p over keys with |i - j| < `local`                                     0 to 1
    previous_mass     p on the token before                                                         0 to 1
    echo_mass         p on the latest earlier copy of the same token                                0 to 1
    induction_mass    p on the token that followed that copy                                        0 to 1
    pooled            sum of p over bins of ceil(queries / bins) x ceil(keys / bins) whole tokens   0 to rows
    ================  ============================================================================  ==========

    Parameters
    ----------
    query : Tensor (batch, heads, queries, dim)
        Any float dtype; 16-bit input is computed in float32, a strip at a time.
    key : Tensor (batch, kv_heads, keys, dim)
        Head h reads key-value head h // (heads / kv_heads).
    pattern : Pattern
        What a query sees: causal, window, allowed, softcap, sinks, scale.
    statistics : Statistics
        names, snap, sink, local, bins, history. Fewer names cost less; those of last rows alone read only these.
    valid : Tensor (batch, queries) or (batch, keys) bool, optional
        Which tokens are not padding (left, right or anywhere). Padding rows add nothing; padding keys are hidden by
        `pattern`, as they are from the model; here they only shift where `sink_mass` starts and what counts as a copy.
    token_ids : Tensor (batch, keys) int, optional
        For `echo_mass` and `induction_mass`.
    lse : Tensor (batch, heads, queries), optional
        Log-sum-exp of each row's logits, sinks included, as the model's kernel returned it; None: made in the same pass.

    Returns
    -------
    dict of str to Tensor
        float32 (float64 for float64 input), on the input's device; NumPy for NumPy input.
        (batch, heads, keys): mass, mass_squared, peak, pivotal, last_row and those of last rows; 0 where no row looks.
        (batch, heads, queries): entropy, sink_mass, local_mass, previous_mass, echo_mass, induction_mass; NaN for padding, for
        rows that see nothing, and for the last three where there is no such token.
        (batch, heads, bins, bins): pooled; NaN beyond the last token.
        Of one query on a CPU, those that are the row of p itself (mass, peak, window_mass, last_row) share their memory.

    Raises
    ------
    SchemaError
        Shapes that do not fit each other.
    UnknownName
        A name that is not a statistic.

    Notes
    -----
    Cost: one product query x key and what follows from it in strips of 64 rows that stay in cache; peak memory O(tokens x dim).
    On a CPU with a C compiler what follows is compiled C, three sweeps of a row, for input that is computed in float32, masks
    that hide and do not add, and logits that are finite. Else it is about fifteen sweeps by torch, whose operations are kept
    for calls of at most 33 million pairs that differ in numbers alone, as those of a model's layers do, four kinds of calls a
    thread: on 1,024 tokens to make them takes as long as to run them.
    With `sinks` rows sum to less than one and `entropy` is of the keys' shares as they are, not renormalised. A NaN in a row
    that counts is seen in that row and in the sums per key of its head, never in other rows. Shares below 1e-14 of a row's
    largest are held there (float32 only: smaller ones cost a hundred times as much to compute with). On a GPU the Triton twin
    makes them, see `BNVIZ_KERNELS`; on a CPU the pass runs in one thread.

    `mass` is the score of H2O (arXiv 2306.14048), `window_mass` of SnapKV (2404.14469), `last_row` of TOVA (2401.06104),
    `pivotal` and `recent_pivotal` of Scissorhands (2305.17118), `ranged_mass` of FINCH (doi:10.1162/tacl_a_00716), `sink_mass` of
    StreamingLLM (2309.17453), `echo_mass` and `induction_mass` of RazorAttention (2407.15891).

    Examples
    --------
    >>> query = key = torch.zeros(1, 1, 4, 8)  # every row is uniform over what it sees
    >>> seen = attention_stats(query, key, statistics=Statistics(names=("mass", "entropy")))
    >>> [round(m, 3) for m in seen["mass"][0, 0].tolist()]
    [2.083, 1.083, 0.583, 0.25]
    >>> bool(torch.allclose(seen["entropy"][0, 0].exp(), torch.tensor([1.0, 2.0, 3.0, 4.0])))
    True
    """
    given = (query, key, valid, token_ids, lse)
    query, key, valid, token_ids, lse = (as_tensor(values) for values in given)
    names = _names(statistics, token_ids)
    _check(query, key, lse)
    pattern = _checked(pattern, query, key)
    queries, keys = query.shape[2], key.shape[2]
    valid, token_ids = _of_tokens(valid, token_ids, query.shape[0], queries, keys)
    options = (pattern, statistics, names)
    with quiet(query):
        out = _run(
            query.detach(),
            key.detach(),
            options,
            tokens(valid, pattern, (query.shape[0], queries, keys)),
            lse,
            token_ids,
        )
    if isinstance(given[0], np.ndarray):
        return {name: out[name].numpy() for name in names}
    return {name: out[name] for name in names}


def _run(
    query: Tensor,
    key: Tensor,
    options: tuple[Pattern, Statistics, tuple[str, ...]],
    of: Tokens,
    lse: Tensor | None,
    token_ids: Tensor | None,
) -> dict[str, Tensor]:
    """The Triton twin, which makes all names; else one product a row for shares of single keys, the plain strips for the rest."""
    pattern, sizes, names = options
    out: dict[str, Tensor] = {}
    twin = _dispatch.twin("attention_stats", query, pattern) if of.keys else None
    if twin is not None:
        of_rows = {"lse": lse, "partners": partners_again(names, of, token_ids, query.device)}
        asked = {"pattern": pattern, "statistics": sizes, "valid": (of.rows, of.keys_valid), **of_rows}
        out = _dispatch.tried("attention_stats", twin, query, key, **asked) or {}
        lse = out.pop("lse", lse)
    left = tuple(name for name in names if name not in out)
    if left and _attention_row.fits(query, of, left, lse):
        return _attention_row.row(query, key, (pattern, sizes, left), of, token_ids)
    single = tuple(name for name in left if name in PAIRS)
    # One product a row where no strip has to be made for the rest; with sinks, a row that sees nothing has a finite lse too.
    if lse is not None and pattern.sinks is None and set(left) <= {*PAIRS, "window_mass", "last_row"}:
        out |= gather(query, key, (pattern, single), of, lse, token_ids)
        left = tuple(name for name in left if name not in out)
    if not left:
        return out
    options, called = (pattern, sizes, left), _attention_native.functions(query, key, lse)
    found = None
    if called is not None:
        found = alone(lambda: _attention_native.native(called, query, key, options, of, token_ids))
    return out | (strips(query, key, options, of, lse, token_ids) if found is None else found)


def _names(statistics: Statistics, token_ids: Tensor | None) -> tuple[str, ...]:
    if statistics.names is None:
        return tuple(name for name in STATISTICS if token_ids is not None or name not in _FROM_IDS)
    for name in statistics.names:
        if name not in STATISTICS:
            raise unknown("attention statistic", name, STATISTICS)
        if name in _FROM_IDS and token_ids is None:
            raise SchemaError(f"Attention statistic {name!r} needs token_ids (batch, keys), which were not given.")
    return tuple(dict.fromkeys(statistics.names))


def _check(query: Tensor, key: Tensor, lse: Tensor | None) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}"
    if query.ndim != 4 or key.ndim != 4:
        raise SchemaError(
            f"attention_stats expects query (batch, heads, queries, dim) and key (batch, kv_heads, keys, dim); found {shapes}."
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise SchemaError(f"query and key must agree in batch and dim; found {shapes}.")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise SchemaError(f"The number of heads must be a multiple of the number of kv_heads; found {shapes}.")
    if lse is not None and lse.shape != query.shape[:3]:
        raise SchemaError(f"lse must be (batch, heads, queries) = {tuple(query.shape[:3])}; found {tuple(lse.shape)}.")


def _checked(pattern: Pattern, query: Tensor, key: Tensor) -> Pattern:
    """`pattern` with a mask of four dims and tensors on the query's device."""
    if pattern.window is not None and pattern.window < 1:
        raise SchemaError(f"window must be at least 1 (the query's own token); found {pattern.window}.")
    allowed, sinks = pattern.allowed, pattern.sinks
    if allowed is not None:
        allowed = torch.as_tensor(allowed, device=query.device)
        whole = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        while allowed.ndim < 4:
            allowed = allowed[None]
        fits = zip(allowed.shape, whole, strict=True)
        if allowed.ndim != 4 or not all(found in (1, wanted) for found, wanted in fits):
            raise SchemaError(
                f"allowed must broadcast to (batch, heads, queries, keys) = {whole}; found {tuple(allowed.shape)}."
            )
        allowed = allowed.expand(-1, -1, *whole[2:])
    if sinks is not None:
        sinks = torch.as_tensor(sinks, device=query.device).flatten()
        if sinks.numel() != query.shape[1]:
            raise SchemaError(f"sinks must hold one logit a head ({query.shape[1]}); found {sinks.numel()}.")
    return Pattern(pattern.causal, pattern.window, allowed, pattern.softcap, sinks, pattern.scale)


def _of_tokens(
    valid: Tensor | None, token_ids: Tensor | None, batch: int, queries: int, keys: int
) -> tuple[Tensor | None, Tensor | None]:
    if valid is not None and tuple(valid.shape) not in ((batch, queries), (batch, keys)):
        choices = f"(batch, queries) = ({batch}, {queries}) or (batch, keys) = ({batch}, {keys})"
        raise SchemaError(f"valid must be {choices}; found {tuple(valid.shape)}.")
    if token_ids is not None and tuple(token_ids.shape) != (batch, keys):
        raise SchemaError(f"token_ids must be (batch, keys) = ({batch}, {keys}); found {tuple(token_ids.shape)}.")
    return None if valid is None else valid.bool(), None if token_ids is None else token_ids.long()
