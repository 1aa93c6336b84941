"""What a model makes of a router's scores, followed from call to call while one block runs.

A choice names experts; the weights come later: softmax, normalisation, a scale, a capacity that drops some. So every tensor made
of scores or of chosen ids is remembered until the block ends, and the weights are those that at last multiply something that is
not made of scores: what the experts read or wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .choice import CHOICES, Choice, choice

SCORE, IDS, CODE, MARK, PICK, OWN = "score", "ids", "code", "mark", "pick", "own"
_CONTRACT = frozenset(
    ["matmul", "mm", "bmm", "einsum", "tensordot", "baddbmm", "addbmm", "addmm", "mv", "dot", "linear"]
)
_MULTIPLY = frozenset(["mul", "mul_", "multiply", "multiply_", "addcmul"]) | _CONTRACT
_MOVE = frozenset(["index_select", "take", "index", "index_add", "index_add_", "index_copy", "masked_select"])
_FLIP = frozenset(["t", "transpose", "swapaxes", "swapdims", "permute", "movedim"])
_PICK = frozenset(("eq", "__eq__"))
_VIEW = frozenset(
    [
        "to",
        "long",
        "int",
        "short",
        "type",
        "type_as",
        "clone",
        "contiguous",
        "detach",
        "reshape",
        "view",
        "squeeze",
        "narrow",
        "unsqueeze",
        "flatten",
        "expand",
        "unbind",
        "split",
        "chunk",
        "select",
        "permute",
        "transpose",
        "cat",
        "stack",
    ]
)
_ARITHMETIC = frozenset(["add", "mul", "sub", "rsub", "add_", "mul_", "sub_"]) | _VIEW
_DROPS = frozenset(["masked_fill", "masked_fill_", "where", "clamp", "clamp_"])
_LOOK_UP = frozenset(("gather", "take_along_dim", "__getitem__"))
_WRITES = frozenset(("__setitem__", "index_put_", "scatter_", "scatter_add_"))
_FRESH = frozenset(
    [
        "zeros_like",
        "ones_like",
        "rand_like",
        "randn_like",
        "empty_like",
        "full_like",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "rand",
        "randn",
        "zeros",
        "ones",
        "arange",
        "full",
        "tensor",
        "empty",
    ]
)


@dataclass(slots=True)
class Node:
    """One remembered tensor.

    Parameters
    ----------
    tensor : Tensor
        Held, so that no other gets its identity.
    kind : str
        "score", "ids" (chosen), "code" (arithmetic of ids), "mark" (one-hot, positions, masks), "pick" (who chose one expert),
        "own" (of the block's parameters alone).
    full : Tensor, optional
        The nearest ancestor, or itself, that holds a weight for every choice in the order of the rows.
    moved, flipped : bool
        Its rows, its dimensions, are in another order than the router's.
    picked : bool
        Only of those who chose one expert.
    """

    tensor: Tensor
    kind: str
    full: Tensor | None = None
    moved: bool = False
    flipped: bool = False
    picked: bool = False


class Lineage:
    """Follows the scores of one router through one call of its block.

    Parameters
    ----------
    count : int
        Experts; 0 when not known.
    own, scoring : frozenset of int
        Identities of the block's parameters and buffers, and of those that make scores of what the router reads.
    read : int
        Rows that the block was given; 0 when not known.

    Attributes
    ----------
    rows : int
        What was routed.
    choices : list of Choice
        Among experts, in order.
    ids : Tensor, optional
        What became of the last choice's ids: fewer, dropped, looked up in a table. None: they stayed.
    made, used : list of Tensor
        Weights of every choice, in order of being computed; those that met what the experts read or wrote.
    logits : Tensor, optional
    renamed : bool
        The ids were looked up in a table: columns of the scores are none of theirs.
    indexed : int
        Rows of the parameters that ids picked; 0: none.
    picked : bool
        Weights in use were of those who chose one expert.
    error : Exception, optional
    """

    def __init__(self, count: int, own: frozenset[int], scoring: frozenset[int], read: int = 0) -> None:
        self.count, self._own, self._scoring, self._read = count, own, scoring, read
        self.rows = self.indexed = 0
        self.choices: list[Choice] = []
        self.ids: Tensor | None = None
        self.made: list[Tensor] = []
        self.used: list[Tensor] = []
        self.logits: Tensor | None = None
        self.renamed = self.picked = False
        self.error: Exception | None = None
        self._nodes: dict[int, Node] = {}
        self._tentative: dict[int, Choice] = {}

    # ------------------------------------------------------------------ what happens

    def told(self, output: Any) -> None:
        """What the router's module returned: scores, weights and ids told apart by dtype and shape."""
        values = list(tensors(output))
        wide = [v for v in values if v.is_floating_point() and v.dim() >= 2 and 0 < self.count <= v.shape[-1]]
        if wide and not self.rows:
            self.rows = wide[0].numel() // wide[0].shape[-1]
        if self.logits is None:
            self.logits = wide[-1] if wide else None
        for value in values if self.rows else ():
            if id(value) in self._nodes:
                continue
            if value.is_floating_point():
                self._keep(value, SCORE, self._own_full(value))
            elif value.dtype != torch.bool and self._fits(value):
                self._keep(value, IDS, None)
                self.ids = value if self.ids is None and not self.choices else self.ids

    def called(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """A torch function was called."""
        first = args[0] if args else None
        known = self._nodes.get(id(first))
        if name in CHOICES and (known is None or known.kind == SCORE):
            found = choice(name, args, kwargs, output, self.count, known is not None and known.flipped)
            if found is not None:
                self._chosen(found, known, output)
                return
        if not self._concerns(name, args, kwargs):
            return
        if name in _WRITES and isinstance(first, Tensor):
            output = first
        given = [*tensors(args), *tensors(tuple(kwargs.values()))]
        nodes = [n for t in given if (n := self._nodes.get(id(t))) is not None]
        if any(n.kind != OWN for n in nodes) and name not in _FRESH:
            for result in tensors(output):
                self._derive(name, result, given, nodes)
        elif name in _FRESH or all(self._is_own(t) for t in given):
            for result in tensors(output):
                if id(result) not in self._nodes:
                    self._keep(result, OWN, None)
        elif name in _CONTRACT and isinstance(output, Tensor):
            self._root(output, given)

    def _concerns(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call may have to do with scores: most of those inside experts have not, and are let go at once."""
        if name in _FRESH:
            return True
        nodes, own = self._nodes, self._own if name not in _CONTRACT else self._scoring
        for value in args:
            if id(value) in nodes or id(value) in own or isinstance(value, list | tuple):
                return True
        return any(id(value) in nodes or id(value) in own for value in kwargs.values())

    def _root(self, result: Tensor, given: list[Tensor]) -> None:
        """The router's own product: features times the parameters that score them."""
        scored = any(id(t) in self._scoring for t in given)
        if scored and self.count and result.dim() >= 2 and result.shape[-1] == self.count:
            self.rows, self.logits = result.numel() // self.count, result
            self._keep(result, SCORE, result)

    def _chosen(self, found: Choice, known: Node | None, output: Any) -> None:
        whole = self.count or found.scores.shape[found.dim]
        rows = self.rows or self._read or found.scores.numel() // whole
        among = found.experts >= 0 and (found.scores.numel() == rows * whole or known is not None)
        if among:
            self.rows = self.rows or found.scores.numel() // whole
            self.choices.append(found)
            self.ids = None
        else:
            self._tentative |= {id(t): found for t in tensors(output)}
        if known is None:
            self._keep(found.scores, SCORE, self._own_full(found.scores))
        for made in tensors(output):
            scored = made.is_floating_point()
            self._keep(made, SCORE if scored else IDS, made if scored and among else None)
            self.made += [made] if scored and among else []

    # ------------------------------------------------------------------ what follows

    def _derive(self, name: str, result: Tensor, given: list[Tensor], nodes: list[Node]) -> None:
        kinds = {n.kind for n in nodes}
        closed = all(id(t) in self._nodes or self._is_own(t) for t in given)
        if SCORE in kinds and result.is_floating_point():
            self._of_scores(name, result, given, nodes)
        elif SCORE in kinds:
            self._keep(result, MARK, None)
        elif kinds & {IDS, CODE} and not result.is_floating_point():
            self._of_ids(name, result, given, nodes)
        elif kinds & {IDS, CODE} and name in ("embedding", "__getitem__", "index_select"):
            self._indexes(given, nodes)
            if closed:
                self._keep(result, OWN, None)
        elif closed:
            self._keep(result, PICK if PICK in kinds else MARK, None)

    def _of_scores(self, name: str, result: Tensor, given: list[Tensor], nodes: list[Node]) -> None:
        scores = [n for n in nodes if n.kind == SCORE]
        if name == "embedding_bag":
            self._indexes(given, nodes)
            self._use(scores)
            return
        if name in _MULTIPLY and self._meets(name, result, scores, given):
            self._use(scores)
            return
        full = next((n.full for n in reversed(scores) if n.full is not None), None)
        moved = any(n.moved for n in scores) or name in _MOVE or (name == "__getitem__" and len(given) > 1)
        turned = name in _FLIP or (name == "__get__" and result.stride() != given[0].stride())
        flipped = any(n.flipped for n in scores) != turned
        picked = any(n.picked or n.kind == PICK for n in nodes)
        if not moved and not flipped and not picked:
            own = self._own_full(result)
            self.made += [own] if own is not None else []
            full = full if own is None else own
        self._nodes[id(result)] = Node(result, SCORE, full, moved, flipped, picked)

    def _meets(self, name: str, result: Tensor, scores: list[Node], given: list[Tensor]) -> bool:
        """Scores meet what is not made of them."""
        others = [t for t in given if t.is_floating_point() and id(t) not in self._nodes and not self._is_own(t)]
        if name not in _CONTRACT:
            each = any(
                self.like(n.tensor, c) and t.shape == n.tensor.shape
                for n in scores
                for c in self.choices
                for t in others
            )
            wider = each or all(
                result.numel() > n.tensor.numel() or result.shape[-1:] != n.tensor.shape[-1:] for n in scores
            )
            return bool(others) and wider
        stacked = any(self._is_own(t) and t.dim() >= 3 and t.shape[0] == self.count for t in given)
        return bool(others) or stacked

    def _use(self, scores: list[Node]) -> None:
        self.picked = self.picked or any(n.picked for n in scores)
        for full in (n.full for n in scores if n.full is not None):
            self.used = [*(t for t in self.used if t is not full), full]

    def _of_ids(self, name: str, result: Tensor, given: list[Tensor], nodes: list[Node]) -> None:
        kinds = {n.kind for n in nodes}
        ids = next((n.tensor for n in nodes if n.kind == IDS), None)
        part = name in _VIEW or (name == "__getitem__" and len(given) == 1)
        if name in _LOOK_UP and len(given) > 1 and ids is not None and ids is not given[0]:
            self._looked_up(result, given[0], ids)
        elif name in _PICK and (len(given) == 1 or given[1].dim() == 0):
            self._keep(result, PICK, None)
        elif name in _DROPS and ids is not None and self._fits(result):
            self._keep(result, IDS, None)
            self.ids = result
        elif part and kinds == {IDS} and ids is not None and self._fits(result):
            self._keep(result, IDS, None)
            self.ids = result if result.numel() < ids.numel() else self.ids
        else:
            arithmetic = (part or name in _ARITHMETIC) and kinds <= {IDS, CODE, OWN} and result.dtype != torch.bool
            self._keep(result, CODE if arithmetic else MARK, None)

    def _looked_up(self, result: Tensor, table: Tensor, ids: Tensor) -> None:
        """Chosen places in a table of ids (product keys, a map of experts to devices)."""
        node = self._nodes.get(id(table))
        if not (node.kind == CODE if node is not None else self._is_own(table)):
            self._keep(result, MARK, None)
            return
        self._promote(ids)
        self._keep(result, IDS, None)
        if self._fits(result):
            self.ids, self.renamed = result, True

    def _promote(self, ids: Tensor) -> None:
        """A choice over another number than that of the experts was one among them, as its ids turn out."""
        found = self._tentative.get(id(ids))
        if found is not None and all(found is not c for c in self.choices):
            self.rows = found.scores.numel() // found.scores.shape[found.dim]
            self.choices.append(found)
            for value in (self._nodes[at].tensor for at, of in self._tentative.items() if of is found):
                if value.is_floating_point():
                    self._nodes[id(value)].full = value
                    self.made.append(value)

    def _indexes(self, given: list[Tensor], nodes: list[Node]) -> None:
        """Chosen ids pick parameters: those of the experts."""
        table = next((t for t in given if t.is_floating_point() and self._is_own(t) and t.dim() >= 2), None)
        if table is not None and self.count in (0, table.shape[0]):
            self.indexed = table.shape[0]
            for node in nodes:
                self._promote(node.tensor) if not self.choices else None

    # ------------------------------------------------------------------ shapes

    def is_dense(self, value: Tensor) -> bool:
        """A column an expert."""
        wide = self.count > 0 and value.dim() >= 2 and value.shape[-1] == self.count
        return wide and value.numel() == self.rows * self.count

    def is_combine(self, value: Tensor) -> bool:
        """A row an expert, a column a place of its capacity."""
        if self.count == 0 or value.dim() < 3 or value.shape[-2] != self.count or self.is_dense(value):
            return False
        return value.numel() == self.rows * self.count * value.shape[-1]

    def like(self, value: Tensor, made: Choice) -> bool:
        """A weight for each of what was chosen."""
        if made.by_experts:
            return value.shape == made.indices.shape
        ends = value.shape[-1:] == (made.slots,) or made.slots == 1
        return ends and value.numel() == self.rows * made.slots

    def _own_full(self, value: Tensor) -> Tensor | None:
        if not self.rows or not value.is_floating_point():
            return None
        holds = self.is_dense(value) or self.is_combine(value) or any(self.like(value, c) for c in self.choices)
        return value if holds else None

    def _fits(self, ids: Tensor) -> bool:
        """Could be ids: a few for every row."""
        if not self.rows or ids.dim() < 1 or ids.numel() % self.rows:
            return False
        slots = ids.numel() // self.rows
        most = max((c.slots for c in self.choices), default=self.count or slots)
        return 1 <= slots <= most and (ids.shape[-1] == slots or slots == 1)

    def _is_own(self, value: Tensor) -> bool:
        node = self._nodes.get(id(value))
        if node is not None:
            return node.kind == OWN
        return id(value) in self._own or isinstance(value, nn.Parameter) or value.dim() == 0

    def _keep(self, value: Tensor, kind: str, full: Tensor | None) -> None:
        self._nodes[id(value)] = Node(value, kind, full)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what a function took or gave, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)
