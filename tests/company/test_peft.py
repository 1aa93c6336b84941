"""Adapters of PEFT: on linear layers, on experts, merged, taken off, and trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnviz

from .models import alike, captured, llama, mixtral, tokens

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # what peft says of itself


def adapted(model: Any, **options: Any) -> Any:
    """With adapters that change what the model computes."""
    return peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **options)).eval()


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_an_adapted_model_is_watched_whole_and_from_inside(targets: Any) -> None:
    model, ids = adapted(llama(), target_modules=targets), tokens()
    outside = captured(model, lambda: model(input_ids=ids))
    assert list(outside["activations"].path.values) == [f"base_model.model.model.layers.{i}" for i in range(3)]
    assert list(outside["activations"].kind.values) == ["block", "attention", "mlp"]
    inside = captured(model.base_model.model, lambda: model(input_ids=ids))
    alike(inside, outside)
    plain = llama()
    without = captured(plain, lambda: plain(ids))
    assert not np.allclose(without["activations"]["cosine"].values, outside["activations"]["cosine"].values)


def test_merged_parted_switched_off_and_unloaded() -> None:
    plain, ids = llama(), tokens()
    alone = captured(plain, lambda: plain(ids))
    model = adapted(llama(), target_modules=["q_proj", "down_proj"])
    apart = captured(model, lambda: model(input_ids=ids))
    model.merge_adapter()
    merged = captured(model, lambda: model(input_ids=ids))
    model.unmerge_adapter()
    for name in ("cosine", "norm_out"):
        assert np.allclose(merged["activations"][name], apart["activations"][name], atol=1e-4), name
    with model.disable_adapter():
        off = captured(model, lambda: model(input_ids=ids))
    assert np.allclose(off["activations"]["norm_out"], alone["activations"]["norm_out"], atol=1e-4)
    bare = model.merge_and_unload()
    unloaded = captured(bare, lambda: bare(ids))
    assert list(unloaded["activations"].path.values) == [f"model.layers.{i}" for i in range(3)]


@pytest.mark.parametrize("targets", [["mlp.experts.down_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]])
def test_adapters_around_experts_hide_no_route(targets: list[str]) -> None:
    plain, ids = mixtral(), tokens()
    alone = captured(plain, lambda: plain(ids), "routing")
    model = adapted(mixtral(), target_modules=["q_proj"], target_parameters=targets)
    run = captured(model, lambda: model(input_ids=ids), "routing")
    assert run.kinds == ("routing",)
    assert (run["routing"]["unverified"].values == 0).all()
    assert run["routing"]["expert"].shape == alone["routing"]["expert"].shape
    assert [str(p) for p in run["routing"].path.values] == [
        f"base_model.model.model.layers.{i}.mlp.experts{'.base_layer' * len(targets)}" for i in range(2)
    ]
    for _, site in bnviz.sites(model).routers:
        assert site.router is not None


def test_a_prompt_that_is_learnt_has_keys_and_no_tokens() -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, ids = peft.get_peft_model(llama(), config).eval(), tokens()
    attention = captured(model, lambda: model(input_ids=ids))["attention"]
    assert attention.sizes["query"] == 24
    assert attention.sizes["key"] == 24 + 2 * 3
    assert np.allclose(attention["mass"].isel(step=0).sum("key").values, 24, atol=1e-4)


def test_only_the_adapters_are_trained_and_only_their_gradients_seen() -> None:
    model, ids = adapted(llama(), target_modules=["q_proj"]).train(), tokens()
    with bnviz.capture(model, probes=["gradients"], strict=True) as recorder:
        model(input_ids=ids, labels=ids).loss.backward()
    record = recorder.run["gradients"].isel(step=0)
    expected = [
        sum(float(p.grad.square().sum()) for p in layer.parameters() if p.grad is not None) ** 0.5
        for layer in model.base_model.model.model.layers
    ]
    assert record["gradient_norm"].sel(kind="block").values == pytest.approx(expected, rel=1e-5)
    assert record["gradient_norm"].sel(kind="attention").values == pytest.approx(expected, rel=1e-5)
    assert np.isnan(record["gradient_norm"].sel(kind="mlp")).all()
    assert (record["reached"].sel(kind="block").values == 1).all()
    assert np.isfinite(record["output_mean"]).all()
