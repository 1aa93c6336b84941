"""The activations probe: what is kept when, padding, samples, a plain network and a transformer end to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import bnviz
from bnviz.errors import CaptureError, SchemaError
from bnviz.observation import BlockSeen, Context, Site
from bnviz.probes.activations import Activations

CHANNELS = {"mean", "variance", "max_abs", "kurtosis", "zero_fraction", "outlier_fraction"}


def seen(x, y, *, part: str = "block", phase: str = "forward", valid=None) -> BlockSeen:
    kind = "block" if part == "block" else "sublayer"
    return BlockSeen(Site(kind, "layers.0", 0, part), Context(0, 0, phase, valid=valid), x, y)


def test_token_statistics_by_hand():
    x = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]])
    y = torch.tensor([[[6.0, 8.0], [0.0, 1.0], [1.0, 0.0]]])
    kept = Activations().observe(seen(x, y))
    assert kept["norm_in"].tolist() == [[5, 1, 0]]
    assert kept["norm_out"].tolist() == [[10, 1, 1]]
    assert kept["cosine"][0, :2].tolist() == pytest.approx([1, 0])
    assert kept["relative_change"][0, :2].tolist() == pytest.approx([1, 2**0.5])
    assert torch.isnan(kept["cosine"][0, 2]) and torch.isnan(kept["relative_change"][0, 2])
    assert kept["mean"].tolist() == pytest.approx([7 / 3, 3])
    assert kept["zero_fraction"].tolist() == pytest.approx([1 / 3, 1 / 3])


def test_a_block_that_changes_the_width_keeps_what_is_defined():
    kept = Activations().observe(seen(torch.ones(2, 1, 3), torch.ones(2, 1, 4)))
    assert set(kept) == {"norm_out", "nonfinite"} | CHANNELS
    assert kept["norm_out"].tolist() == [[2], [2]]


def test_a_decode_step_adds_no_channel_statistics_and_no_sample():
    kept = Activations(sample=4).observe(seen(torch.ones(1, 1, 3), torch.ones(1, 1, 3), phase="decode"))
    assert not CHANNELS & set(kept) and "activation" not in kept and "cosine" in kept


def test_padding_does_not_count_in_channels():
    y = torch.tensor([[[100.0], [1.0], [3.0]]])
    kept = Activations().observe(seen(y, y, valid=torch.tensor([[False, True, True]])))
    assert (float(kept["mean"]), float(kept["max_abs"]), float(kept["variance"])) == (2, 3, 1)


def test_a_mask_of_other_rows_is_not_used():
    y = torch.ones(1, 4, 2)
    kept = Activations(sample=9).observe(seen(y, y, valid=torch.ones(1, 3, dtype=torch.bool)))
    assert kept["activation"].shape == (1, 4, 2) and not torch.isnan(kept["cosine"]).any()


@pytest.mark.parametrize(("asked", "expected"), [(2, [2, 3]), (3, [2, 3, 5]), (4, [2, 3, 5, np.nan])])
def test_samples_are_the_first_rows_that_are_not_padding(asked, expected):
    y = torch.arange(1.0, 7).reshape(2, 3, 1)
    valid = torch.tensor([[False, True, True], [False, True, False]])
    kept = Activations(sample=asked).observe(seen(y, y, valid=valid))
    assert kept["activation"].shape == (1, asked, 1)
    assert kept["activation"].flatten().tolist() == pytest.approx(expected, nan_ok=True)


def test_only_blocks_give_samples():
    assert "activation" not in Activations(sample=2).observe(seen(torch.ones(1, 3, 2), torch.ones(1, 3, 2), part="mlp"))


def test_a_negative_sample_is_refused():
    with pytest.raises(CaptureError, match="sample=-1: expected a number of rows"):
        Activations(sample=-1)


def test_a_plain_network_end_to_end():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    x = torch.randn(50, 6)
    with bnviz.capture(net, probes=["activations"], strict=True, sample=50) as recorder, torch.no_grad():
        net(x)
    record = recorder.run["activations"]
    hidden = net[1](net[0](x)).detach()
    assert record["activation"].isel(step=0, layer=0).values == pytest.approx(hidden.numpy(), abs=1e-6)
    assert np.isnan(record["activation"].values[0, 2, :, 2:]).all()  # the last layer is two wide
    expected = torch.cosine_similarity(x, hidden, dim=-1).numpy()
    assert record["cosine"].sel(kind="block").values[0, 0] == pytest.approx(expected, abs=1e-5)
    assert np.isnan(record["cosine"].sel(kind="block").values[0, 2]).all()  # 6 to 2: not defined
    assert record["variance"].sel(kind="block").values[0, 0] == pytest.approx(
        hidden.var(0, correction=0).numpy(), rel=1e-4
    )


def test_generation_keeps_one_row_a_phase_and_every_token(load_model):
    model = load_model("llama-induction-byte")
    prompt = torch.tensor([list(b"To be, or not to be")])
    with bnviz.capture(model, probes=["activations"], strict=True) as recorder, torch.no_grad():
        model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    record = recorder.run["activations"]
    assert record["phase"].values.tolist() == ["prefill", "decode"]
    decode = record["cosine"].sel(kind="block").values[1]
    assert np.isfinite(decode).sum(-1).tolist() == [4, 4]  # the last new token is not read again
    assert np.isnan(record["mean"].values[1]).all()
    assert (record["nonfinite"].values == 0).all()


def test_a_sublayer_is_seen_by_what_it_writes_and_has_no_channels():
    x, f = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[0.0, 5.0]]])
    site, context = Site("sublayer", "layers.0.mlp", 0, "mlp"), Context(0, 0, "forward")
    observation = BlockSeen(site, context, x, written=f)
    kept = Activations().observe(observation)
    assert (float(kept["norm_in"]), float(kept["relative_change"])) == (5, 1)
    assert float(kept["norm_out"]) == pytest.approx(90**0.5)
    assert float(kept["cosine"]) == pytest.approx((9 + 36) / (5 * 90**0.5))
    assert not CHANNELS & set(kept)
    assert observation.output.tolist() == [[[3.0, 9.0]]] and observation.shape == x.shape


def test_an_observation_has_an_output_or_what_was_written():
    with pytest.raises(SchemaError, match="either output or written"):
        BlockSeen(Site("block", "a", 0), Context(0, 0, "forward"), torch.ones(1, 1, 1))


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("tokens", [3, 400])
def test_parts_shown_with_their_block_are_what_they_are_alone(parallel, tokens):
    torch.manual_seed(0)
    x, attention, mlp = (torch.randn(2, tokens, 96) for _ in range(3))
    context = Context(0, 0, "forward")
    first = BlockSeen(Site("sublayer", "layers.0.attn", 0, "attention"), context, x, written=attention)
    reads = x if parallel else first
    second = BlockSeen(Site("sublayer", "layers.0.mlp", 0, "mlp"), context, reads, written=mlp)
    whole = seen(x, x + attention + mlp)
    alone = [Activations().observe(one) for one in (whole, first, second)]
    whole.parts = (first, second)
    probe = Activations()
    for one, want in zip((whole, first, second), alone, strict=True):
        got = probe.observe(one)
        assert set(got) == set(want)
        for name in got:
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)
