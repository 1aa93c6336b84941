"""The record of operators on real models, through the recorder."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bnviz
from bnviz.events import EventTable
from bnviz.probes.ops import Ops


def captured(model: nn.Module, run: Any, **options: Any) -> Any:
    with bnviz.capture(model, probes=["ops"], strict=True, **options) as recorder:
        run()
    return recorder.run


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))


def test_each_linear_forward_and_backward_with_its_flops() -> None:
    model, x = mlp(), torch.rand(8, 16)

    def run() -> None:
        for _ in range(2):
            model(x).sum().backward()

    table = captured(model, run, ceilings=False).events("ops")
    products = table.where(work="matmul")
    found = Counter(zip(products.names("path"), products.names("phase"), products["flops"], strict=True))
    first, second = 2 * 8 * 16 * 32, 2 * 8 * 32 * 4
    assert found == {
        ("0", "forward", first): 2,
        ("0", "backward", first): 2,  # of the weight; the input needs no gradient
        ("2", "forward", second): 2,
        ("2", "backward", second): 4,
    }


def test_time_adds_up_and_stays_inside_the_wall() -> None:
    model, x = mlp(), torch.rand(8, 16)
    run = captured(model, lambda: [model(x) for _ in range(5)], ceilings=False)
    table = run.events("ops")
    assert (table["self_time"] <= table["duration"] + 1e-12).all()
    assert table["self_time"].sum() <= run["ops"].attrs["wall"]
    assert table.attrs["calls"] == 5 and table["call"].max() == 4
    inside = table.take(table["path"] >= 0)
    assert inside["self_time"].sum() <= table.attrs["call_time"]


def test_transformer_is_covered(load_model: Any) -> None:
    model = load_model("llama-bard")
    ids = torch.arange(64).reshape(2, 32) % 1000

    def run() -> None:
        with torch.no_grad():
            model(ids)

    record = captured(model, run, ceilings=False)["ops"]
    assert record.attrs["coverage"] > 0.95
    table = EventTable.from_dataset(record)
    config = model.config
    rows, heads, width = 64, config.num_attention_heads, config.head_dim
    kv = config.num_key_value_heads * width
    block = config.hidden_size * (2 * heads * width + 2 * kv + 3 * config.intermediate_size)
    linear = 2 * rows * (config.num_hidden_layers * block + config.hidden_size * config.vocab_size)
    scores = config.num_hidden_layers * 2 * 2 * heads * (32 * 33 // 2) * 2 * width
    seen = table.where(work="matmul")
    names = {n.removeprefix("aten::") for n in seen.names("op")}
    rotary = sum(
        f for f, p in zip(seen["flops"], seen.names("path"), strict=True) if p.endswith("rotary_emb")
    )  # positions times frequencies, as a product
    assert seen["flops"].sum() - rotary == pytest.approx(linear + scores, rel=1e-12)
    assert names <= {"mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu"}


def test_survives_the_store_and_json(tmp_path: Any) -> None:
    model, x = mlp(), torch.rand(8, 16)
    run = captured(model, lambda: model(x))
    again = bnviz.open(run.save(tmp_path / "run"))
    record = again["ops"]
    json.dumps(dict(record.attrs), allow_nan=False)
    assert record.attrs["ceilings"][0]["flops"]["float32"] > 0
    assert EventTable.from_dataset(record).tables == EventTable.from_dataset(run["ops"]).tables
    np.testing.assert_array_equal(record["flops"], run["ops"]["flops"])


def test_allocations_belong_to_the_counted_operator() -> None:
    model, x = mlp(), torch.rand(8, 16)
    table = captured(model, lambda: model(x), ceilings=False).events("ops")
    assert table.where(op="aten::gelu")["allocated"].tolist() == [4 * 8 * 32]


def test_outputs_are_bit_identical(load_model: Any) -> None:
    model = load_model("mixtral-bard")
    ids = torch.arange(24).reshape(1, 24)
    with torch.no_grad():
        plain = model(ids).logits
        seen: list[torch.Tensor] = []
        captured(model, lambda: seen.append(model(ids).logits), ceilings=False)
    assert torch.equal(plain, seen[0])


def test_kernels_of_an_accelerator_are_summed_into_the_counted_operator() -> None:
    """Profiles as CUDA gives them: kernel time on the operator that launched it, here inside addmm."""
    from dataclasses import replace

    from bnviz.capture.profiler import Profiler

    model = nn.Linear(4, 4)
    profiler = Profiler(model)
    profiler.start()
    model(torch.ones(2, 4))
    profile = profiler.stop()
    kernels = np.zeros(len(profile.name), np.int64)
    inner = [i for i, p in enumerate(profile.parent) if p >= 0 and profile.names[profile.name[p]] == "aten::addmm"]
    kernels[inner[0]] = 700
    record = Ops(ceilings=False).profiled(replace(profile, kernel_time=kernels))
    names = np.array(record["tables"]["op"])[record["op"]]
    assert record["device_time"][names == "aten::addmm"].tolist() == [pytest.approx(7e-7)]
    assert record["device_time"].sum() == pytest.approx(7e-7)


def test_no_operator_no_record() -> None:
    from bnviz.capture.profiler import Profiler

    profiler = Profiler(nn.Identity())
    profiler.start()
    assert Ops().profiled(profiler.stop()) is None
