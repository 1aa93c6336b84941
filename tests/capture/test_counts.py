"""How often each place was seen: what does not fit how often it ran is refused or said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bnviz
from bnviz.errors import NotCaptured
from bnviz.page import page

from .test_sites import Body, PlainAttention, PreNorm


def test_each_place_says_how_often_it_was_seen(load_model: Any) -> None:
    model = load_model("mixtral-bard")
    with torch.no_grad(), bnviz.capture(model, probes=["activations", "attention", "routing"]) as recorder:
        for _ in range(3):
            model(torch.arange(5, 17)[None])
    counts = {(one.kind, one.path): one for one in recorder.run.sites}
    for layer in range(4):
        for kind, path in (("block", ""), ("attention", ".self_attn"), ("router", ".mlp.experts")):
            one = counts[kind, f"model.layers.{layer}{path}"]
            assert (one.layer, one.observations, one.forwards) == (layer, 3, 3)
            assert one.ran in (3, -1)
    assert sum(kind == "sublayer" for kind, _ in counts) == 8
    assert "4 attention × 3" in repr(recorder.run)
    assert "Where it was seen" in page(bnviz.diagnose(recorder.run, "expert_load"))


class Either(PlainAttention):
    """Attention by the kernel, or by a product that no mechanism takes for attention."""

    hidden = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = torch.sigmoid(q @ k.mT) @ v if Either.hidden else nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Sometimes(PreNorm):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Either()


def test_what_ran_unseen_is_refused() -> None:
    model, x = Body(Sometimes, 2).eval(), torch.randn(1, 6, 8)
    with torch.no_grad(), bnviz.capture(model, probes=["attention", "activations"]) as recorder:
        for Either.hidden in (False, True, False):
            model(x)
    Either.hidden = False
    one = next(site for site in recorder.run.sites if site.kind == "attention")
    assert (one.ran, one.observations) == (3, 2)
    with pytest.raises(NotCaptured, match=r"Not complete: blocks\.0\.attn ran 3 times .* was seen 2 times"):
        bnviz.diagnose(recorder.run, "attention_heads")
    report = bnviz.diagnose(recorder.run)
    assert report.absent["attention_heads"].startswith("Not complete")
    assert "layer_redundancy" in report.names  # its blocks were seen each time
    assert any(note.startswith("attention: Not complete: blocks.0.attn ran 3 times") for note in recorder.run.notes)


def test_a_place_that_is_never_seen_is_missing_and_said() -> None:
    model, x = Body(Sometimes, 2).eval(), torch.randn(1, 6, 8)
    model.blocks[0].attn = PlainAttention().eval()
    Either.hidden = True
    with torch.no_grad(), bnviz.capture(model, probes=["attention"]) as recorder:
        model(x)
    Either.hidden = False
    said = "blocks.1.attn ran and was never seen: how it computes is not read, and it is missing here."
    assert f"attention: {said}" in recorder.run.notes
    report = bnviz.diagnose(recorder.run, "attention_heads")
    assert said in report.judgement("attention_heads").caveats


def test_a_layer_that_is_skipped_is_no_error_and_is_said() -> None:
    class Exits(Body):
        depth = 3

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for block in self.blocks[: self.depth]:
                x = block(x)
            return self.head(x)

    model = Exits(PreNorm, 3).eval()
    with torch.no_grad(), bnviz.capture(model, probes=["activations"]) as recorder:
        for model.depth in (3, 2, 3, 1):
            model(torch.randn(1, 5, 8))
    counts = {one.path: one.forwards for one in recorder.run.sites if one.kind == "block"}
    assert counts == {"blocks.0": 4, "blocks.1": 3, "blocks.2": 2}
    report = bnviz.diagnose(recorder.run, "layer_redundancy")
    said = report.judgement("layer_redundancy").caveats
    assert any(line.startswith("blocks.2 was seen in 2 of 4 forwards") for line in said)
    assert any(line.startswith("blocks.1 was seen in 3 of 4 forwards") for line in said)


def test_an_encoder_that_runs_once_a_text_is_no_caveat() -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0, eos_token_id=1)
    ).eval()
    ids = torch.randint(3, 61, (1, 9))
    with bnviz.capture(model, probes=["activations", "attention"], strict=True) as recorder:
        for _ in range(2):
            model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    run = recorder.run
    encoder = [one for one in run.sites if one.path.startswith("encoder.")]
    assert encoder and all(one.once and one.forwards == 2 for one in encoder)
    assert not any(one.once for one in run.sites if one.path.startswith("decoder."))
    assert not any(" forwards: " in note for note in run.notes)
