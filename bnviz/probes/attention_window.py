"""The weights themselves, of a window of queries and keys: what a map of the whole text shows from afar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from bnviz.errors import SchemaError
from bnviz.observation import AttentionSeen
from bnviz.schema import ProbeSpec, Variable, probe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MOST = 512  # queries or keys of a window


@probe(
    sites=("attention",),
    variables=(
        Variable(
            "weight",
            ("step", "layer", "head", "row", "column"),
            "1",
            "weight that a query of the window gives a key of it, 0 to 1; NaN: no such token, or the query sees no key",
            optional=True,
        ),
        Variable("row_position", ("step", "layer", "row"), "id", "position of each query of the window", optional=True),
        Variable("column_position", ("step", "layer", "column"), "id", "position of each key of it", optional=True),
    ),
    memory="rows x columns x 4 B a head and layer of a passage",
    default=False,
)
class AttentionWindow:
    """Every weight between some queries and some keys of one sequence, exactly as the model has them.

    Asked for where the pooled map of `attention` shows something: it holds a window and nothing else, so that its memory does not
    grow with the text.

    Parameters
    ----------
    rows, columns : pair of int
        First token and the one after the last: of the queries, and of the keys. At most 512.
    layers : sequence of int
        Whose attention is kept; none named: of all.
    sequence : int
        Of the batch.

    Raises
    ------
    SchemaError
        A window that is none, or too large.

    Notes
    -----
    weight_ij = exp(s_ij - ln sum_k exp(s_ik)), s the model's own logits under its mask, the sum over all keys that query i sees.
    Tokens are counted from 0 without padding. Of a text that is read in one call: decode steps and calls that go on with a cache
    have none, and neither has attention to another text. Cost: one product of the window's queries with all keys.

    Examples
    --------
    >>> import torch
    >>> from bnviz.observation import AttentionSeen, Context, Site
    >>> q = torch.zeros(1, 1, 4, 2)
    >>> seen = AttentionSeen(Site("attention", "attn", 0), Context(0, 0, "forward"), q, q, q, None, True, 1.0)
    >>> AttentionWindow(rows=(1, 3), columns=(0, 2)).observe(seen)["weight"][0].tolist()
    [[0.5, 0.5], [0.3333333432674408, 0.3333333432674408]]
    """

    spec: ClassVar[ProbeSpec]

    def __init__(
        self,
        *,
        rows: Sequence[int] = (0, 128),
        columns: Sequence[int] = (0, 128),
        layers: Sequence[int] = (),
        sequence: int = 0,
    ) -> None:
        self.rows, self.columns = _window("rows", rows), _window("columns", columns)
        self.layers = tuple(int(one) for one in ((layers,) if isinstance(layers, int) else layers))
        if sequence < 0:
            raise SchemaError(f"Probe {self.spec.name}: sequence is {sequence}, expected 0 or more.")
        self.sequence = sequence

    def observe(self, seen: AttentionSeen) -> dict[str, Tensor]:
        """Weights (head, row, column) of one call, and what the window is."""
        import torch

        if seen.context.phase == "decode" or seen.across or (self.layers and seen.site.layer not in self.layers):
            return {}
        heads, height, width = seen.query.shape[1], self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]
        found = torch.full((heads, height, width), torch.nan, device=seen.query.device)
        kept = {"weight": found, **self._positions(found.device)}
        if self.sequence >= len(seen.query) or not seen.query.shape[2]:
            return kept
        one = _Sequence(seen, self.sequence)
        (row, is_row), (column, is_column) = one.places(self.rows), one.places(self.columns)
        behind = row - (seen.key.shape[2] - seen.query.shape[2])  # among the queries of this call
        is_row &= (behind >= 0) & (behind < seen.query.shape[2])
        for some, weights in one.weights(behind.clamp(0, seen.query.shape[2] - 1), row):
            found[:, some] = weights[0].index_select(-1, column).to(found.dtype)
        found.masked_fill_(~(is_row[:, None] & is_column), torch.nan)
        return kept

    def _positions(self, device: torch.device) -> dict[str, Tensor]:
        import torch

        windows = {"row_position": self.rows, "column_position": self.columns}
        return {name: torch.arange(*window, device=device) for name, window in windows.items()}


class _Sequence:
    """One sequence of a call."""

    def __init__(self, seen: AttentionSeen, at: int) -> None:
        self._seen, self._at, keys = seen, at, seen.key.shape[2]
        valid = seen.context.valid if seen.valid_keys is None else seen.valid_keys
        self._valid = valid[at] if valid is not None and valid.shape[1] == keys else None

    def places(self, window: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Where the tokens of a window lie among the keys, and which of them there are."""
        import torch

        keys, device = self._seen.key.shape[2], self._seen.key.device
        wanted = torch.arange(*window, device=device)
        if self._valid is None:
            return wanted.clamp(max=keys - 1), wanted < keys
        order = self._valid.logical_not().int().argsort(stable=True)  # tokens first
        return order[wanted.clamp(max=keys - 1)], wanted < self._valid.sum()

    def weights(self, behind: Tensor, place: Tensor) -> Any:
        """Slices of the queries, and their weights (1, heads, those, keys)."""
        from bnviz.reduce._attention_shares import attention_shares
        from bnviz.reduce.attention_stats import Pattern

        seen, at = self._seen, slice(self._at, self._at + 1)
        query = seen.query[at].index_select(2, behind)
        sees = self._sees(behind, place)
        pattern = Pattern(False, None, sees, seen.softcap, seen.sinks, seen.scale)
        return attention_shares(query, seen.key[at], pattern)

    def _sees(self, behind: Tensor, place: Tensor) -> Tensor:
        """(1, heads or 1, rows, keys) additive or boolean: causality, window, padding and mask in one."""
        import torch

        seen, keys = self._seen, torch.arange(self._seen.key.shape[2], device=behind.device)
        sees = torch.ones(len(place), len(keys), dtype=torch.bool, device=behind.device)
        if seen.causal:
            sees &= keys <= place[:, None]
        if seen.window is not None:
            sees &= (place[:, None] - keys).abs() < seen.window
        if self._valid is not None:
            sees &= self._valid
        if seen.allowed is None:
            return sees[None, None]
        mask = seen.allowed[self._at if len(seen.allowed) > 1 else 0][None]
        mask = mask.expand(-1, -1, seen.query.shape[2], -1).index_select(2, behind)
        return mask & sees if mask.dtype == torch.bool else mask.masked_fill(~sees, -torch.inf)


def _window(name: str, given: Sequence[int]) -> tuple[int, int]:
    whole = (
        isinstance(given, Sequence)
        and len(given) == 2
        and all(isinstance(one, int) and not isinstance(one, bool) for one in given)
    )
    if not whole or not 0 <= given[0] < given[1] <= given[0] + MOST:
        raise SchemaError(
            f"Probe attention_window: {name} is {given}, expected the first token and the one after the last, at most "
            f"{MOST} tokens."
        )
    return int(given[0]), int(given[1])
