"""Small models with random weights, and watching them in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import bnviz
from tests.traces import traces

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "pad_token_id": 0}


def llama(**given: Any) -> Any:
    """A llama of three layers, four heads and two key-value heads, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**(SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2} | given))
    return LlamaForCausalLM(config).eval()


def mixtral() -> Any:
    """A mixtral of two layers with four experts, in eval mode."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes)).eval()


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.arange(3, 3 + batch * length).reshape(batch, length) % 61 + 3


def alike(one: Any, other: Any, records: tuple[str, ...] = ("activations", "attention")) -> None:
    """Every number of two runs is the same."""
    for record in records:
        assert set(one[record].data_vars) == set(other[record].data_vars)
        for name in one[record].data_vars:
            assert np.array_equal(one[record][name].values, other[record][name].values, equal_nan=True), (record, name)


def captured(model: nn.Module, call: Callable[[], Any], *probes: str, **options: Any) -> Any:
    """The run of one watched call, whose output is bit-identical and which leaves nothing behind."""
    with torch.no_grad():
        expected = output_of(call())
        before = traces(model)
        with bnviz.capture(model, probes=probes or ("activations", "attention"), strict=True, **options) as recorder:
            found = output_of(call())
        after = traces(model)
    assert torch.equal(found, expected)
    changed = [key for key in before if after.get(key) != before[key]]
    assert not changed, changed
    return recorder.run


def output_of(value: Any) -> torch.Tensor:
    """The tensor a model gave, or its logits."""
    found: torch.Tensor = getattr(value, "logits", value)
    return found


def block_bytes(run: Any) -> list[int]:
    """Bytes of the parameters of each block, in order."""
    held = run["activations"].attrs["parameter_bytes"]["block"]
    return [int(size) for size in (held.values() if isinstance(held, dict) else held)]
