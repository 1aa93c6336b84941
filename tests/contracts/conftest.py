"""Real runs of real models, made once; the contracts look at them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import bnviz
from bnviz import catalog
from bnviz.comparison import NAME
from bnviz.run import Run


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2))


def encoder_decoder() -> nn.Module:
    """A small model of two texts, with random weights."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)).eval()


def looker() -> nn.Module:
    """A small model of pictures, with random weights: 6 x 8 patches and a class token."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return ViTModel(ViTConfig(image_size=(24, 32), patch_size=4, **sizes)).eval()


class Mixture(nn.Module):
    """Every token goes to the expert its gate scores highest."""

    def __init__(self, width: int = 6, experts: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, chosen = self.gate(x).softmax(-1).topk(1, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen[:, 0] == number).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(x[rows]) * weight[rows])
        return out


class Pair(nn.Module):
    """A block with two mixtures, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mixture(), Mixture()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.first(x)
        return x + self.second(x)


def pairs() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Pair(), Pair())


@pytest.fixture(scope="session")
def pairs_run() -> Run:
    """Every default probe on a model with two routers in each block."""
    model = pairs()
    with torch.no_grad(), bnviz.capture(model, strict=True) as recorder:
        model(torch.linspace(-1, 1, 48).reshape(8, 6))
    return recorder.run


@pytest.fixture(scope="session")
def looker_run() -> Run:
    """Attention on two pictures."""
    model = looker()
    with torch.no_grad(), bnviz.capture(model, probes=["attention", "pictures"], strict=True) as recorder:
        model(torch.linspace(-1, 1, 2 * 3 * 24 * 32).reshape(2, 3, 24, 32))
    return recorder.run


@pytest.fixture(scope="session")
def experts_run(load_model: Any) -> Run:
    """Every default probe on the trained mixture-of-experts model."""
    model = load_model("mixtral-bard")
    ids = torch.arange(5, 101).reshape(2, 48)
    with torch.no_grad(), bnviz.capture(model, strict=True) as recorder:
        model(ids)
    return recorder.run


@pytest.fixture(scope="session")
def net_run() -> Run:
    """Activations with samples and labels, at three moments of a small network's training."""
    model = net()
    x = torch.randn(256, 6, generator=torch.Generator().manual_seed(1))
    y = (x.sum(1) > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with bnviz.capture(model, probes=["activations"], sample=256, when="eval", labels=y, strict=True) as recorder:
        for step in range(30):
            model.train()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if step % 10 == 9:
                model.eval()
                with torch.no_grad():
                    model(x)
    return recorder.run


@pytest.fixture(scope="session")
def asked_run(load_model: Any) -> Run:
    """Every probe of attention that is there on request, on two texts of the trained mixture-of-experts model."""
    asked = [name for name, p in catalog.every("probes") if not p.spec.default and p.spec.sites == ("attention",)]
    model = load_model("mixtral-bard")
    with torch.no_grad(), bnviz.capture(model, probes=asked, strict=True) as recorder:
        model.generate(torch.arange(5, 101).reshape(2, 48), max_new_tokens=6, do_sample=False, pad_token_id=0)
    return recorder.run


@pytest.fixture(scope="session")
def measured_run(load_model: Any) -> Run:
    """Every experiment on the trained mixture-of-experts model."""
    ids = torch.arange(5, 165).reshape(2, 80)
    return bnviz.experiment(load_model("mixtral-bard"), ids, budgets=(0.25, 1.0), greedy=2, probes={"window": 8})


@pytest.fixture(scope="session")
def runs(
    experts_run: Run, net_run: Run, pairs_run: Run, measured_run: Run, asked_run: Run, looker_run: Run
) -> tuple[Run, ...]:
    return experts_run, net_run, pairs_run, measured_run, asked_run, looker_run


@pytest.fixture(scope="session")
def reopened(runs: tuple[Run, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, ...]:
    """The same runs, written to disk and read again."""
    folder = tmp_path_factory.mktemp("runs")
    return tuple(bnviz.open(run.save(folder / f"{at}.zarr")) for at, run in enumerate(runs))


def record_for(need: str, runs: tuple[Run, ...]) -> Any:
    """The record that holds "record.variable" in one of the runs."""
    record, _, variable = need.partition(".")
    return next((run[record] for run in runs if record in run and variable in run[record]), None)


@pytest.fixture(scope="session")
def changed_run(load_model: Any) -> Run:
    """The trained model again, with the weights of a block scaled."""
    model = copy.deepcopy(load_model("mixtral-bard"))
    with torch.no_grad():
        for weight in model.model.layers[2].self_attn.parameters():
            weight.mul_(2.0)
    with torch.no_grad(), bnviz.capture(model, ceilings=False, strict=True) as recorder:
        model(torch.arange(5, 101).reshape(2, 48))
    return recorder.run


@pytest.fixture(scope="session")
def results(runs: tuple[Run, ...], changed_run: Run) -> dict[str, Any]:
    """Every diagnostic of the catalogue, on real records, and what two runs say of each other."""
    found = {}
    for name, diagnostic in catalog.every("diagnostics"):
        needed = {
            need.partition(".")[0]: record_for(need, runs) for need in (*diagnostic.spec.needs, *diagnostic.spec.wants)
        }
        found[name] = diagnostic(**{record: data for record, data in needed.items() if data is not None})
    found[NAME] = bnviz.compare(runs[0], changed_run)[NAME]
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> Iterator[None] | None:
    for room in ("probes", "diagnostics", "views"):
        if f"{room[:-1]}_name" in metafunc.fixturenames:
            metafunc.parametrize(f"{room[:-1]}_name", catalog.names(room))
    return None
