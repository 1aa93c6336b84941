"""Attention on all earlier copies of a token, where a text is one block told several times."""

from __future__ import annotations

import inspect
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bnviz.capture.options import Options
from bnviz.capture.recorder import Recorder
from bnviz.errors import BnvizError
from bnviz.observation import AttentionSeen
from bnviz.reduce.attention_stats import Pattern, Statistics, attention_stats
from bnviz.schema import ProbeSpec, Variable, probe

_HEAD = ("step", "layer", "head")
_PAIR = Statistics(names=("echo_mass", "induction_mass"))


def watched(model: nn.Module, prompt: Tensor, block: int) -> dict[str, Any]:
    """What every head of `model` puts on earlier copies of `prompt` (1, tokens), whose last tokens are blocks; JSON-able.

    Raises
    ------
    BnvizError
        No attention was seen that reads the whole prompt at once.
    """
    seen = Copies(prompt, block)
    recorder = Recorder(model, Options(progress=False, strict=True), {"copies": seen}, named=("copies",))
    device = next(model.parameters()).device
    with recorder:
        _read(model, prompt.to(device))
    if "copies" not in recorder.run:
        raise BnvizError(
            f"retrieval_heads: no attention of {type(model).__name__} read all {prompt.shape[1]} tokens of the prompt at once."
        )
    record = recorder.run["copies"].isel(step=0)
    layers = [int(n) for n in record["layer"].values]
    shapes = [seen.shapes.get(layer, (0, None)) for layer in layers]
    lists = {name: _rows(record[name].values) for name in ("echo", "induction", "echo_latest", "induction_latest")}
    even = [None if not math.isfinite(value) else value for value in record["even"].values.astype(float).tolist()]
    paths = [str(path) for path in record["path"].values]
    return lists | {
        "even": even,
        "kv_heads": [heads for heads, _ in shapes],
        "bytes": [taken for _, taken in shapes],
        "layers": list(zip(layers, paths, strict=True)),
    }


def _read(model: nn.Module, ids: Tensor) -> None:
    """One forward, without a cache and without the logits of every token where the model can do without."""
    takes = inspect.signature(model.forward).parameters
    asked = {"use_cache": False, "logits_to_keep": 1}
    given = {name: value for name, value in asked.items() if name in takes}
    if "input_ids" in takes:
        model(input_ids=ids, **given)
    else:
        model(ids, **given)


def _rows(values: Any) -> list[list[float | None]]:
    """(layer, head) as JSON has it; a layer that was not seen is empty."""
    return [[value if math.isfinite(value) else None for value in row] for row in values.astype(float).tolist()]


@probe(
    sites=("attention",),
    variables=(
        *(Variable(name, _HEAD, "1", "share of attention") for name in ("echo", "induction")),
        *(Variable(f"{name}_latest", _HEAD, "1", "share of attention") for name in ("echo", "induction")),
        Variable("even", ("step", "layer"), "1", "the larger share of a head that attends evenly"),
    ),
    memory="4 x 4 B a head and layer",
    default=False,
)
class Copies:
    """Mean attention on earlier copies of a token and on what followed them, for a text of one block told several times.

    Parameters
    ----------
    prompt : Tensor (1, tokens)
    block : int
        Tokens of a block; the last of the prompt are whole blocks, what is before them is no copy.

    Notes
    -----
    `attention_stats` knows the latest copy by ids, so it is given ids under which only the copy m blocks before is one: the place
    in the block, and the number of the block modulo m.
    """

    spec: ClassVar[ProbeSpec]

    def __init__(self, prompt: Tensor, block: int) -> None:
        tokens = prompt.shape[1]
        self._repeats = tokens // block
        self._first = tokens - self._repeats * block
        place = torch.arange(tokens) - self._first
        inside, number = place % block, torch.div(place, block, rounding_mode="floor")
        self._ids = [
            torch.where(place < 0, -1 - torch.arange(tokens), inside + block * (number % m))[None]
            for m in range(1, self._repeats)
        ]
        self._again = self._first + block
        self._even: dict[tuple[Any, ...], tuple[Any, Tensor]] = {}
        self.shapes: dict[int, tuple[int, int | None]] = {}

    def observe(self, seen: AttentionSeen) -> dict[str, Tensor] | None:
        """Means over the queries of all blocks but the first; (head,)."""
        tokens = self._ids[0].shape[1]
        if seen.across or seen.query.shape[-2] != tokens or seen.key.shape[-2] < tokens:
            return None
        self.shapes[seen.site.layer] = _shape(seen)
        pattern = Pattern(seen.causal, seen.window, seen.allowed, seen.softcap, seen.sinks, seen.scale)
        whole, latest = self._shares(seen.query, seen.key, pattern)
        found = {f"{name}_latest": values for name, values in zip(("echo", "induction"), latest, strict=True)}
        return found | {"echo": whole[0], "induction": whole[1], "even": self._evenly(seen)}

    def _shares(self, query: Tensor, key: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """Echo and induction (2, heads) of all copies, and of the latest."""
        sums: list[Tensor] = []
        for ids in self._ids:
            columns = key.shape[-2] - ids.shape[1]  # columns before the tokens: a learned key, a key of zeros
            given = torch.nn.functional.pad(ids.to(query.device), (columns, 0), value=-ids.shape[1] - 1)
            masses = attention_stats(query, key, pattern=pattern, statistics=_PAIR, token_ids=given)
            pair = torch.stack([masses["echo_mass"][0], masses["induction_mass"][0]])[..., self._again :]
            sums.append(torch.nan_to_num(pair, nan=0.0).mean(-1))
        return torch.stack(sums).sum(0), sums[0]

    def _evenly(self, seen: AttentionSeen) -> Tensor:
        """The same of a head whose logits are all alike; one for layers that see alike."""
        name = (seen.causal, seen.window, id(seen.allowed), seen.key.shape[-2])
        if name not in self._even:
            allowed = seen.allowed
            if allowed is not None:
                allowed = allowed[:, :1]
                if allowed.dtype != torch.bool:
                    allowed = allowed > torch.finfo(allowed.dtype).min / 2
            query, key = (torch.zeros(1, 1, one.shape[-2], 1, device=one.device) for one in (seen.query, seen.key))
            whole, _ = self._shares(query, key, Pattern(seen.causal, seen.window, allowed))
            self._even[name] = seen.allowed, whole.max()  # the mask is held, so that its id stays its own
        return self._even[name][1]


def _shape(seen: AttentionSeen) -> tuple[int, int | None]:
    """Key-value heads, and the bytes of a token's keys and values; None where these were not seen."""
    (heads, dim), of_value = (seen.key.shape[1], seen.key.shape[3]), seen.value.shape[-1]
    if not dim or not of_value:
        return heads, None
    return heads, heads * dim * seen.key.element_size() + seen.value.shape[1] * of_value * seen.value.element_size()
