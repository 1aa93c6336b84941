"""Attention over a band of keys, in chunks that share tokens: shown over all keys, as the model mixes its values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnviz
from bnviz.capture.attention import moved

from .spied import spied, watched, weights_of

transformers = pytest.importorskip("transformers")
IDS = torch.arange(2, 26).reshape(2, 12)
PADDED = torch.ones(2, 12, dtype=torch.long)
PADDED[1, 9:] = 0


def longformer(**options: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.LongformerConfig(
        attention_window=4, vocab_size=64, max_position_embeddings=32, pad_token_id=0, **sizes, **options
    )
    torch.manual_seed(0)
    model = transformers.LongformerModel(config, add_pooling_layer=False).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def attending(model: Any, kind: type) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Each attention module of a kind with what it is given and what it gives, from now on."""
    kept: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        kept.append((module, args[0] if args else kwargs["hidden_states"], output[0]))

    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(keep, with_kwargs=True)
    return kept


def mixed(weights: Tensor, module: Any, given: Tensor) -> Tensor:
    values = module.value(given).unflatten(-1, (4, -1)).transpose(1, 2)
    return (weights.float() @ values).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("padded", [False, True])
def test_a_band_is_laid_out_over_all_keys(padded: bool) -> None:
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    model = longformer()
    given = {"input_ids": IDS, "attention_mask": PADDED if padded else torch.ones_like(IDS)}
    kept = attending(model, LongformerSelfAttention)
    with torch.no_grad(), spied(model) as seen:
        model(**given)
    assert [(s.site.kind, s.site.layer, s.across) for s in seen] == [("attention", 0, False), ("attention", 1, False)]
    near = (torch.arange(12)[:, None] - torch.arange(12)).abs() <= 2
    for one, (module, hidden, output) in zip(seen, kept, strict=True):
        found = weights_of(one)
        assert found.shape == (2, 4, 12, 12)
        assert not found[..., ~near].any()
        real = given["attention_mask"].bool()
        assert (mixed(found, module, hidden) - output)[real].abs().max() < 1e-5
        assert torch.allclose(found.sum(-1).transpose(1, 2)[real], torch.ones(1, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("more", [False, True])
def test_tokens_that_see_all_are_a_second_attention(more: bool) -> None:
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    model = longformer()
    everywhere = torch.zeros_like(IDS)
    everywhere[:, 0], everywhere[0, 5] = 1, int(more)
    kept = attending(model, LongformerSelfAttention)
    with torch.no_grad(), spied(model) as seen:
        model(IDS, attention_mask=torch.ones_like(IDS), global_attention_mask=everywhere)
    assert [(s.site.kind, s.query.shape[2], s.key.shape[2]) for s in seen] == [
        ("attention", 12, 12),
        ("cross_attention", 1 + more, 12),
    ] * 2
    with torch.no_grad(), spied(model) as alone:
        model(IDS, global_attention_mask=everywhere)
    assert alone[0].context.valid is None  # who sees all is no padding
    local = [s for s in seen if s.site.kind == "attention"]
    for one, (module, hidden, output) in zip(local, kept[:2], strict=True):
        found = weights_of(one)
        others = everywhere == 0
        assert (mixed(found, module, hidden) - output)[others].abs().max() < 1e-5
        assert not found.transpose(1, 2)[~others].any()  # the band of these is never used
        assert found[0, :, 11, [0, 5] if more else [0]].gt(0).all()


def test_outputs_stay_and_dropout_takes_nothing() -> None:
    model = longformer(attention_probs_dropout_prob=0.5).train()
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad():
        seen = watched(model, lambda m: dict(m(**given)))
    for one in seen:
        assert torch.allclose(weights_of(one).sum(-1), torch.ones(1, dtype=torch.float64), atol=1e-6)


def test_an_encoder_that_attends_over_a_band_beside_a_decoder() -> None:
    config = transformers.LEDConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=64,
        encoder_ffn_dim=48, decoder_ffn_dim=48, attention_window=4, max_encoder_position_embeddings=32,
        max_decoder_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LEDModel(config).eval()
    with torch.no_grad(), spied(model) as seen:
        model(input_ids=IDS, decoder_input_ids=IDS[:, :5], use_cache=False)
    assert [(s.site.kind, tuple(s.query.shape[1:3]), s.key.shape[2]) for s in seen] == [
        ("attention", (4, 12), 12),
        ("attention", (4, 5), 5),
        ("cross_attention", (4, 5), 12),
    ]


def test_what_is_too_large_to_lay_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moved, "MOST", 100)
    model = longformer()
    with torch.no_grad(), bnviz.capture(model, probes=["attention", "activations"]) as recorder:
        model(IDS, attention_mask=torch.ones_like(IDS))
    assert "attention" not in recorder.run.kinds
    assert sum("over a band of 12 keys" in note for note in recorder.run.notes) == 2
