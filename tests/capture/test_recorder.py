"""The recorder on real models: what is seen is what the model computed, and life goes on after every fault."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bnviz
from bnviz.errors import CaptureError, StoreError, UnknownName

from .test_sites import Body, PreNorm


def eager_maps(load_model: Any, name: str, ids: torch.Tensor, **inputs: Any) -> np.ndarray:
    """(layer, batch, head, query, key) as transformers' eager attention returns them."""
    with torch.no_grad():
        found = load_model(name, "eager")(ids, output_attentions=True, **inputs).attentions
    return torch.stack(found).double().numpy()


def test_attention_mass_is_the_models_own(load_model: Any) -> None:
    ids = torch.arange(3, 51).reshape(2, 24)
    maps = eager_maps(load_model, "llama-bard", ids)
    model = load_model("llama-bard")
    with torch.no_grad(), bnviz.capture(model, probes=["attention"], strict=True) as recorder:
        model(ids)
    record = recorder.run["attention"].isel(step=0)
    expected = np.concatenate(list(maps.sum(-2).swapaxes(0, 1)), -1)  # packed: sequences one after the other
    assert np.allclose(record["mass"].values, expected, atol=1e-5)
    entropy = -np.where(maps > 0, maps * np.log(np.where(maps > 0, maps, 1)), 0).sum(-1)
    assert np.allclose(record["entropy"].values, np.concatenate(list(entropy.swapaxes(0, 1)), -1), atol=1e-5)


def test_padding_and_position_in_the_batch_change_no_number(load_model: Any) -> None:
    model, short, long = load_model("llama-bard"), torch.arange(3, 13), torch.arange(40, 60)
    alone = {}
    for name, ids in (("short", short), ("long", long)):
        with torch.no_grad(), bnviz.capture(model, probes=["attention", "activations"], strict=True) as recorder:
            model(ids[None])
        alone[name] = recorder.run
    padded = torch.stack([torch.cat([torch.zeros(10, dtype=torch.long), short]), long])
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :10] = 0
    with torch.no_grad(), bnviz.capture(model, probes=["attention", "activations"], strict=True) as recorder:
        model(padded, attention_mask=mask)
    both = recorder.run["attention"].isel(step=0)
    assert both.sizes["key"] == 30
    for sequence, name in enumerate(("short", "long")):
        mine = both.isel(key=both.key_sequence.values == sequence)
        other = alone[name]["attention"].isel(step=0)
        assert np.array_equal(mine.key_position.values, other.key_position.values)
        assert np.allclose(mine["mass"].values, other["mass"].values, atol=1e-5)
        cosine = recorder.run["activations"].isel(step=0)
        cosine = cosine["cosine"].isel(token=cosine.sequence.values == sequence)
        assert np.allclose(cosine.values, alone[name]["activations"].isel(step=0)["cosine"].values, atol=1e-5)


def test_decode_steps_of_a_generation_share_a_row(load_model: Any) -> None:
    model, ids = load_model("mixtral-bard"), torch.arange(5, 25)[None]
    with torch.no_grad(), bnviz.capture(model, probes=["attention", "routing", "keys_values"], strict=True) as recorder:
        out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    maps = eager_maps(load_model, "mixtral-bard", out[:, :-1])
    run = recorder.run
    assert list(run["attention"].phase.values) == ["prefill", "decode"]
    decode = run["attention"].isel(step=1)
    assert np.array_equal(decode.query_position.values[:5], np.arange(20, 25))
    assert np.allclose(decode["mass"].values, maps[:, 0, :, 20:].sum(-2), atol=1e-4)
    assert np.allclose(decode["peak"].values, maps[:, 0, :, 20:].max(-2), atol=1e-4)
    routing = run["routing"]
    assert (routing["expert"].isel(step=1) >= 0).sum() == 4 * 5 * 2
    assert np.array_equal(routing.position.isel(step=1).values[:5], np.arange(20, 25))


def test_captured_routes_rebuild_the_experts_output(load_model: Any) -> None:
    model = load_model("mixtral-bard")
    block = model.model.layers[1].mlp
    seen: dict[str, torch.Tensor] = {}

    def keep(_: nn.Module, args: Any, output: torch.Tensor) -> None:
        seen["in"], seen["out"] = args[0].detach().clone(), output.detach().clone()

    handle = block.register_forward_hook(keep)
    with torch.no_grad(), bnviz.capture(model, probes=["routing"], strict=True) as recorder:
        model(torch.arange(5, 53).reshape(2, 24))
    handle.remove()
    route = recorder.run["routing"].isel(step=0).sel(layer=1)
    ids = torch.from_numpy(route["expert"].values.astype(np.int64))
    weights = torch.from_numpy(route["weight"].values)
    with torch.no_grad():
        again = block.experts(seen["in"].reshape(48, -1), ids, weights)
    assert torch.allclose(again, seen["out"].reshape(48, -1), atol=1e-5)


def test_plain_torch_attention_is_seen_and_unchanged() -> None:
    model, x = Body(PreNorm), torch.randn(2, 9, 8)
    expected = model(x)
    with bnviz.capture(model, probes=["attention"], strict=True) as recorder:
        found = model(x)
    assert torch.equal(found, expected)
    mass = recorder.run["attention"]["mass"].isel(step=0)
    assert np.allclose(mass.sum("key").values, 18, atol=1e-4)  # each of 2 x 9 queries spends one


def test_the_native_fast_path_of_an_encoder_stays_on() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        expected = model(x)
        with bnviz.capture(model) as recorder:
            found = model(x)
    assert torch.equal(found, expected)
    assert recorder.run["activations"].sizes["layer"] == 2


def test_a_block_that_writes_into_its_input_is_still_measured_right() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(self.f(x))

    model, x = Body(InPlace), torch.randn(2, 5, 8)
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        model(x)
        model(x)
    with torch.no_grad():
        before = model.stem(x)
        after = model.blocks[0](before.clone())
    expected = nn.functional.cosine_similarity(before, after, dim=-1).flatten().numpy()
    found = recorder.run["activations"]["cosine"].sel(kind="block", layer=0).isel(step=-1)
    assert np.allclose(found.values, expected, atol=1e-5)


def test_steps_when_and_every() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    with bnviz.capture(model, probes=["activations"], every=3) as recorder:
        for _ in range(7):
            model(torch.ones(2, 3))
    assert recorder.run["activations"].sizes["step"] == 3
    model.eval()
    with bnviz.capture(model, probes=["activations"], when="eval") as recorder:
        model(torch.ones(2, 3))
        model.train()
        model(torch.ones(2, 3))
    assert recorder.run["activations"].sizes["step"] == 1
    with bnviz.capture(model, probes=["activations"], step="manual") as recorder:
        for _ in range(2):
            model(torch.ones(2, 3))
            model(torch.ones(2, 3))
            recorder.step()
    assert recorder.run["activations"].sizes["step"] == 2


def test_the_budget_is_a_ceiling_and_says_so() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    with bnviz.capture(model, probes=["activations"], budget=2000) as recorder:
        for _ in range(50):
            model(torch.ones(8, 3))
    assert recorder.run.nbytes < 4000
    assert any("budget of 2000 reached at step" in note for note in recorder.run.notes)
    with (
        pytest.raises(CaptureError, match="expected bytes or a text like '512 MiB'"),
        bnviz.capture(model, budget="much"),
    ):
        pass


def test_a_run_keeps_neither_the_model_nor_its_tensors() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    with bnviz.capture(model, probes=["activations"]) as recorder:
        model(torch.ones(2, 3))
    run, alive = recorder.run, weakref.ref(model)
    del model, recorder
    gc.collect()
    assert alive() is None
    assert run["activations"].sizes["layer"] == 2


def test_streaming_leaves_whole_steps_behind(tmp_path: Path) -> None:
    model, path = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)), tmp_path / "run.zarr"
    recorder = bnviz.capture(model, probes=["activations"], path=path).attach()
    for _ in range(4):
        model(torch.ones(2, 3))
    cut = bnviz.open(path)  # as another process would after a kill
    assert "cut short" in cut.notes[-1]
    run = recorder.detach()
    assert run is not None
    steps = cut["activations"].sizes["step"]
    assert 1 <= steps < 4  # the fourth forward had not been followed by another
    assert cut["activations"].equals(run["activations"].isel(step=slice(steps)))
    assert bnviz.open(path)["activations"].equals(run["activations"])
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(StoreError, match="exists"):
        bnviz.capture(model, path=path).attach()


def test_nothing_captured_is_refused_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    with pytest.raises(CaptureError, match="was not called"), bnviz.capture(model):
        pass
    with pytest.raises(CaptureError, match="none of them watched"), bnviz.capture(model, when="eval"):
        model(torch.ones(2, 3))
    with pytest.raises(CaptureError, match="no attention found in Sequential"):
        bnviz.capture(model, probes=["attention"]).attach()
    with pytest.raises(CaptureError, match=r"expected a torch\.nn\.Module"):
        bnviz.capture("model")  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="did you mean 'attention'"):
        bnviz.capture(model, probes=["atention"])
    with pytest.raises(CaptureError, match="meta device"):
        bnviz.capture(nn.Linear(2, 2, device="meta")).attach()
    with pytest.raises(CaptureError, match="labels"):
        bnviz.capture(model, labels=[[1, 2]]).attach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_recorder_is_used_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    recorder = bnviz.capture(model, probes=["activations"])
    with recorder:
        model(torch.ones(2, 3))
    with pytest.raises(CaptureError, match="make a new one"):
        recorder.attach()


def test_two_captures_at_once_see_the_same(load_model: Any) -> None:
    model, ids = load_model("llama-induction-byte"), torch.arange(3, 33)[None]
    with (
        torch.no_grad(),
        bnviz.capture(model, probes=["attention"]) as outer,
        bnviz.capture(model, probes=["attention"]) as inner,
    ):
        model(ids)
    assert np.array_equal(outer.run["attention"]["mass"], inner.run["attention"]["mass"])


def test_autocast_does_not_lower_the_sums(load_model: Any) -> None:
    model, ids = load_model("llama-bard"), torch.arange(3, 63)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(ids).logits
        with bnviz.capture(model, probes=["attention", "activations"], strict=True) as recorder:
            found = model(ids).logits
    assert torch.equal(found, expected)
    mass = recorder.run["attention"]["mass"].isel(step=0).sum("key")
    assert np.allclose(mass.values, 60, atol=1e-3)


def test_inference_mode_and_training_under_no_grad(load_model: Any) -> None:
    model, ids = load_model("llama-induction-byte"), torch.arange(3, 33)[None]
    with torch.inference_mode(), bnviz.capture(model, probes=["attention", "activations"], strict=True) as recorder:
        model(ids)
    assert recorder.run["activations"].sizes["layer"] == 2


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("window", [5, 64])
def test_a_cache_that_drops_or_reserves_columns_moves_no_key(cache: str, window: int) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
    model = MistralForCausalLM(
        MistralConfig(num_attention_heads=4, num_key_value_heads=2, sliding_window=window, **sizes)
    ).eval()
    ids, mask = torch.randint(3, 9, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    plain = model.generate(ids, cache_implementation=cache, **options)
    with bnviz.capture(model, probes=["attention", "keys_values"], sinks=2, strict=True) as recorder:
        assert torch.equal(plain, model.generate(ids, cache_implementation=cache, **options))
    whole = torch.cat([mask, mask.new_ones(2, 4)], 1)
    with torch.no_grad(), bnviz.capture(model, probes=["attention"], sinks=2, strict=True) as recorded:
        model.set_attn_implementation("eager")
        maps = model(plain[:, :-1], attention_mask=whole, output_attentions=True, use_cache=False).attentions
    rows = torch.stack(maps).double()[:, :, :, -4:].numpy()  # the decode queries: (layer, batch, head, 4, key)
    packed = [rows[:, b, :, :, whole[b].bool().numpy()] for b in (0, 1)]  # numpy puts the chosen keys first
    record, norms = (recorder.run[name].isel(step=1) for name in ("attention", "keys_values"))
    mass = np.concatenate([np.moveaxis(one.sum(-1), 0, -1) for one in packed], -1)
    assert np.allclose(record["mass"].values, mass, atol=1e-5)
    sinks = np.concatenate([one[:2].sum(0) for one in packed], -1)
    assert np.allclose(record["sink_mass"].values[..., :8], sinks, atol=1e-5)
    again = recorded.run["attention"].isel(step=0)
    for name in ("echo_mass", "induction_mass"):
        late = [again[name].values[..., again.query_sequence.values == b][..., -4:] for b in (0, 1)]
        assert np.allclose(record[name].values[..., :8], np.concatenate(late, -1), atol=1e-5, equal_nan=True)
    assert record.key_position.values.tolist() == [*range(15), *range(11)]
    held = np.isfinite(norms["key_norm"].values[0, 0])
    gone = max(0, 15 - window) if cache == "dynamic" or window < 15 else 0
    assert held.sum() == len(held) - gone - max(0, gone - 4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_dropout_that_serves_both_sublayers_is_seen_twice(dropout: float) -> None:
    class Shared(PreNorm):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(dropout)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.drop(self.attn(self.n1(x)))
            return x + self.drop(self.mlp(self.n2(x)))

    model, written = Body(Shared), []
    model.train(dropout > 0)
    for block in model.blocks:
        block.drop.register_forward_hook(lambda _, __, output: written.append(output.detach()))
        block.register_forward_pre_hook(lambda _, args: written.append(args[0].detach()))
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        model(torch.randn(2, 6, 8))
    record = recorder.run["activations"].isel(step=0)
    for layer in range(3):
        x, attention, mlp = (one.double() for one in written[3 * layer : 3 * layer + 3])
        for kind, before, after in (("attention", x, x + attention), ("mlp", x + attention, x + attention + mlp)):
            expected = torch.cosine_similarity(before, after, dim=-1).flatten()
            found = record["cosine"].sel(kind=kind, layer=layer).values
            assert np.allclose(found, expected.numpy(), atol=1e-5), (layer, kind)


def t5(attention: str) -> Any:
    """A small encoder-decoder with random weights: it has position biases, cross attention and two texts."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        attn_implementation=attention,
    )
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_position_biases_are_in_the_attention(attention: str) -> None:
    ids, mask = torch.arange(2, 26).reshape(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.arange(2, 12).reshape(2, 5)}
    with torch.no_grad():
        told = t5("eager")(**given, output_attentions=True)
        with bnviz.capture(t5(attention), probes=["attention", "activations"], strict=True) as recorder:
            recorder._model(**given)
    record = recorder.run["attention"].isel(step=0)
    for layer, maps in ((0, told.encoder_attentions), (2, told.decoder_attentions)):
        for at in range(2):
            rows, kept = maps[at].double(), mask.bool() if layer == 0 else torch.ones(2, 5, dtype=torch.bool)
            mass = [(rows[b][:, kept[b]] if layer == 0 else rows[b]).sum(1)[:, kept[b]] for b in range(2)]
            found = record["mass"].sel(layer=layer + at).values
            expected = torch.cat(mass, -1).numpy()
            assert np.allclose(found[:, : expected.shape[1]], expected, atol=1e-5), layer + at
    cosine = recorder.run["activations"]["cosine"].isel(step=0).sel(kind="block")
    assert [int(np.isfinite(cosine.sel(layer=layer)).sum()) for layer in range(4)] == [21, 21, 10, 10]


def test_a_decoder_that_generates_is_followed_and_its_encoder_is_in_the_same_step() -> None:
    model = t5("sdpa")
    with torch.no_grad(), bnviz.capture(model, probes=["attention", "activations"], strict=True) as recorder:
        model.generate(torch.arange(2, 26).reshape(2, 12), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    record = recorder.run["attention"]
    assert list(record.phase.values) == ["prefill", "decode"]
    assert list(record.layer.values) == [0, 1, 2, 3]
    assert list(record.query_position.isel(step=1).values[:5]) == [1, 2, 3, 4, 5]


def test_weights_of_the_parts_of_a_block_are_those_that_ran_for_them() -> None:
    class Inline(nn.Module):
        """Attention without a module of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv, self.o = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
            self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
            x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return x + self.mlp(x)

    model = Body(Inline, 2)
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        model(torch.randn(2, 5, 8))
    sizes = recorder.run["activations"].attrs["parameter_bytes"]
    attention, mlp = 4 * (32 + 16 * 48 + 48 + 16 * 16 + 16), 4 * (32 + 16 * 32 + 32 + 32 * 16 + 16)
    assert sizes == {"block": [attention + mlp] * 2, "attention": [attention] * 2, "mlp": [mlp] * 2}


def test_whole_run_records_keep_to_the_budget() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    with bnviz.capture(model, probes=["activations", "ops"], budget=700) as recorder:
        model(torch.ones(1, 3))
    assert "ops" not in recorder.run
    assert any(note.startswith("ops: ") and "the budget has no room" in note for note in recorder.run.notes)


def test_an_empty_streamed_capture_leaves_nothing(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    with pytest.raises(CaptureError, match="was not called"), bnviz.capture(model, path=tmp_path / "run.zarr"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_of_a_killed_capture_opens_by_both_names(tmp_path: Path) -> None:
    model, path = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)), tmp_path / "run.zarr"
    recorder = bnviz.capture(model, probes=["activations"], path=path).attach()
    for _ in range(3):
        model(torch.ones(2, 3))
    for name in ("run.zarr", "run.zarr.partial"):
        assert bnviz.open(tmp_path / name)["activations"].sizes["step"] in (1, 2)
    recorder.detach()


def test_what_is_no_model_and_no_probe_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"sites: found a int, expected a torch\.nn\.Module"):
        bnviz.sites(3)  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match=r"probes=\[\]: expected at least one name; valid: activations"):
        bnviz.capture(nn.Linear(2, 2), probes=[])
