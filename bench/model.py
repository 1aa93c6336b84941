"""The model that is measured: a llama with random weights, whole forwards and decode steps."""

from __future__ import annotations

from typing import Any

import torch


def build(layers: int, hidden: int, tokens: int, device: str = "cpu", **config: Any) -> tuple[Any, torch.Tensor]:
    """The model and its input (1, tokens); in bfloat16 on a GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=int(hidden * 8 / 3) // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2 * max(tokens, 1024),
        **config,
    )
    model, ids = LlamaForCausalLM(settings).eval(), torch.randint(0, 1024, (1, tokens))
    return (model, ids) if device == "cpu" else (model.to(device, torch.bfloat16), ids.to(device))


class Decoding:
    """Decode steps behind a prompt: each adds a token to the same cache.

    Parameters
    ----------
    model : nn.Module
    ids : Tensor (1, tokens)
    forward : callable, optional
        Runs the model on (ids, past_key_values) in its own way; None: the model itself.
    """

    def __init__(self, model: Any, ids: torch.Tensor, forward: Any = None) -> None:
        self._one, self._forward = ids[:, :1], forward or model
        self.cache = model(ids, use_cache=True).past_key_values

    def step(self) -> None:
        self._forward(self._one, past_key_values=self.cache, use_cache=True)
