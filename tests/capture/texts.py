"""Small models that generate, and what their rows should be: teacher-forced eager passes over the finished texts."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bnviz


def tiny(kind: str, **options: Any) -> Any:
    """A small decoder with random weights, in eval mode, whose texts differ from row to row."""
    import transformers

    torch.manual_seed(options.pop("seed", 0))
    sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "eos_token_id": None,
        "bos_token_id": 1,
    }
    sizes |= {"head_dim": 8} if kind.startswith("Gemma") else {}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def maps_of(model: Any, ids: Tensor, mask: Tensor | None = None) -> np.ndarray:
    """(layer, batch, head, query, key): attention of one eager forward over whole texts."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return (
            torch.stack(model(ids, attention_mask=mask, output_attentions=True, use_cache=False).attentions)
            .double()
            .numpy()
        )


def entropy_of(maps: np.ndarray) -> np.ndarray:
    return -np.where(maps > 0, maps * np.log(np.where(maps > 0, maps, 1)), 0).sum(-1)


def of_sequence(record: Any, sequence: int) -> tuple[Any, Any]:
    """The keys and the queries of one sequence of a record of one step."""
    return (
        record.isel(key=record.key_sequence.values == sequence),
        record.isel(query=record.query_sequence.values == sequence),
    )


def check_rows(record: Any, maps: np.ndarray, sequence: int, first: int, real: np.ndarray | None = None) -> None:
    """The queries of one text from token `first` on, as recorded in one row, against whole `maps` (layer, head, query, key)."""
    real = np.ones(maps.shape[-1], bool) if real is None else real
    maps = maps[..., real, :][..., real]
    first -= int((~real[:first]).sum())
    keys, queries = of_sequence(record, sequence)
    assert queries.query_position.values.tolist() == list(range(first, maps.shape[-1]))
    assert keys.key_position.values.tolist() == list(range(maps.shape[-1]))
    rows = maps[..., first:, :]
    assert np.allclose(keys["mass"].values, rows.sum(-2), atol=1e-5)
    assert np.allclose(keys["peak"].values, rows.max(-2), atol=1e-5)
    assert np.allclose(keys["last_row"].values, rows[..., -1, :], atol=1e-5)
    assert np.allclose(queries["entropy"].values, entropy_of(rows), atol=1e-4)


def holding(cache: Any) -> dict[str, Any]:
    """The argument of a model's forward that gives it a cache; its name changed with releases."""
    from transformers import LlamaForCausalLM

    return {"cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values": cache}


def captured(model: Any, *probes: str, **options: Any) -> Any:
    return bnviz.capture(model, probes=list(probes or ("attention",)), strict=True, **options)


def row_of(record: Any, maps: np.ndarray, first: int) -> int:
    """The sequence of a record that has the statistics of one text, whose attention is `maps` (layer, head, query, key)."""
    for sequence in np.unique(record.key_sequence.values):
        keys, _ = of_sequence(record, sequence)
        if np.allclose(keys["mass"].values, maps[..., first:, :].sum(-2), atol=1e-5):
            check_rows(record, maps, sequence, first)
            return int(sequence)
    raise AssertionError("no sequence of the record has the statistics of this text")


def check_same(got: Any, want: Any) -> None:
    """Two runs hold the same records, up to rounding, of the same places."""
    assert got.kinds == want.kinds
    for name in got.kinds:
        assert set(got[name].variables) == set(want[name].variables)
        for variable, one in want[name].variables.items():
            other = got[name][variable]
            assert (other.dims, other.shape, other.dtype) == (one.dims, one.shape, one.dtype), variable
            if one.dtype.kind == "f":
                assert np.allclose(other.values, one.values, rtol=2e-4, atol=2e-5, equal_nan=True), variable
            else:
                assert np.array_equal(other.values, one.values), variable
    assert [(s.path, s.observations) for s in got.sites] == [(s.path, s.observations) for s in want.sites]


def token_by_token(model: Any, cache: Any, ids: Tensor, start: int, stop: int) -> None:
    """Give a model the tokens from `start` to `stop` one at a time, behind a cache that holds those before."""
    for at in range(start, stop):
        model(ids[:, at : at + 1], **holding(cache))
