"""Likeness of heads in models: against what really goes into the output projection, with padding, and what is not looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import bnviz
from bnviz.errors import SchemaError
from bnviz.observation import AttentionSeen, Context, Site
from bnviz.probes.head_outputs import HeadOutputs
from tests.reduce.test_head_likeness import unbiased


def seen_by(model: Any, ids: torch.Tensor, options: dict[str, Any] | None = None, **given: Any) -> xr.Dataset:
    with torch.no_grad(), bnviz.capture(model, probes=["head_outputs"], strict=True, **(options or {})) as recorder:
        model(ids, **given)
    return recorder.run["head_outputs"]


def into_projection(model: Any, ids: torch.Tensor, **given: Any) -> list[torch.Tensor]:
    """By layer (heads, batch, tokens, dim): what the output projection is given."""
    found: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: found.append(args[0].detach().double()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids, **given)
    for hook in hooks:
        hook.remove()
    heads = model.config.num_attention_heads
    return [one.unflatten(-1, (heads, -1)).permute(2, 0, 1, 3) for one in found]


def close(found: np.ndarray, wanted: torch.Tensor) -> None:
    scale = wanted.diagonal().sqrt()
    np.testing.assert_allclose(
        torch.from_numpy(found) / scale / scale[:, None], wanted / scale / scale[:, None], atol=1e-4
    )


@pytest.mark.parametrize("name", ["llama-bard", "mixtral-bard"])
def test_against_what_the_output_projection_is_given(load_model: Any, name: str) -> None:
    model, ids = load_model(name), torch.arange(5, 165).reshape(2, 80)
    record = seen_by(model, ids)
    for layer, outputs in enumerate(into_projection(model, ids)):
        close(record["hsic"].values[0, layer], unbiased(outputs.flatten(1, 2)))
    assert (record["rows"] == 160).all()


def test_padding_is_left_out(load_model: Any) -> None:
    model, ids = load_model("llama-bard"), torch.arange(5, 105).reshape(2, 50)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    record = seen_by(model, ids, **given)
    for layer, outputs in enumerate(into_projection(model, ids, **given)):
        close(record["hsic"].values[0, layer], unbiased(outputs[:, mask.bool()]))
    assert (record["rows"] == 87).all()


def test_decoding_is_not_looked_at(load_model: Any) -> None:
    model, ids = load_model("llama-bard"), torch.arange(5, 45)[None]
    with torch.no_grad(), bnviz.capture(model, probes=["head_outputs"], strict=True) as recorder:
        model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    record = recorder.run["head_outputs"]
    assert record["phase"].values.tolist() == ["prefill"] and (record["rows"] == 40).all()


def test_some_rows_of_a_long_text(load_model: Any) -> None:
    record = seen_by(load_model("llama-bard"), torch.arange(5, 405)[None], {"rows": 100})
    assert (record["rows"] >= 64).all() and (record["rows"] <= 192).all()
    with pytest.raises(SchemaError, match="rows is 3, expected a whole number from 4"):
        HeadOutputs(rows=3)


@pytest.mark.parametrize(("across", "dim"), [(True, 4), (False, 0)])
def test_what_cannot_be_compared_is_not_kept(across: bool, dim: int) -> None:
    query = torch.ones(1, 2, 6, 4)
    seen = AttentionSeen(
        Site("attention", "a", 0),
        Context(0, 0, "forward"),
        query,
        query,
        query[..., :dim],
        None,
        True,
        0.5,
        across=across,
    )
    assert HeadOutputs().observe(seen) is None
