"""The profiler session: what belongs to which module and phase, and that nobody notices it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from bnviz.capture.profiler import Profiler, holdings
from bnviz.profile import PHASES, Profile


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(nn.functional.gelu(self.up(x)))


class Gpt(nn.Module):
    def __init__(self, width: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 11, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@contextlib.contextmanager
def watched(model: nn.Module, **options: int) -> Iterator[Profiler]:
    """Marks on every module, as the recorder puts them."""
    profiler = Profiler(model, **options)
    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, p=path: profiler.enter(p)))
        handles.append(module.register_forward_hook(lambda *_: profiler.leave(), always_call=True))
    profiler.start()
    try:
        yield profiler
    finally:
        profiler.halt()
        for handle in handles:
            handle.remove()


def train(model: nn.Module, ids: torch.Tensor, steps: int = 1, optimizer: torch.optim.Optimizer | None = None) -> None:
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()


def column(profile: Profile, what: str) -> list[str]:
    table = {"name": profile.names, "module": (*profile.paths, "outside"), "phase": PHASES}[what]
    return [table[i] for i in getattr(profile, what)]


def tally(profile: Profile, *names: str) -> Counter[tuple[str, str, str]]:
    rows = zip(column(profile, "name"), column(profile, "module"), column(profile, "phase"), strict=True)
    return Counter((n, m, p) for n, m, p in rows if n in names)


IDS = torch.arange(22).reshape(2, 11) % 11


@pytest.mark.parametrize(("width", "layers", "steps"), [(8, 1, 1), (16, 2, 3)])
def test_every_linear_has_one_product_forward_and_two_backward(width: int, layers: int, steps: int) -> None:
    torch.manual_seed(0)
    model = Gpt(width, layers)
    with watched(model) as profiler:
        train(model, IDS, steps, torch.optim.AdamW(model.parameters()))
    counts = tally(profiler.stop(), "aten::mm", "aten::addmm")
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    expected = Counter()
    for path in linear:
        expected["aten::mm" if path == "head" else "aten::addmm", path, "forward"] = steps
        expected["aten::mm", path, "backward"] = 2 * steps
    assert counts == expected


def test_attention_norms_and_embedding_keep_their_module_in_backward() -> None:
    model = Gpt()
    with watched(model) as profiler:
        train(model, IDS)
    profile = profiler.stop()
    counts = tally(
        profile,
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
        "aten::native_layer_norm_backward",
        "aten::embedding_dense_backward",
        "aten::gelu_backward",
    )
    assert counts == {
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", f"blocks.{i}", "backward"): 1 for i in (0, 1)
    } | {("aten::native_layer_norm_backward", f"blocks.{i}.norm", "backward"): 1 for i in (0, 1)} | {
        ("aten::gelu_backward", f"blocks.{i}", "backward"): 1 for i in (0, 1)
    } | {("aten::embedding_dense_backward", "embed", "backward"): 1}
    outside = {n for n, m in zip(column(profile, "name"), column(profile, "module"), strict=True) if m == "outside"}
    assert not [n for n in outside if "mm" in n or "norm" in n]


def test_gradients_accumulate_in_the_module_of_their_parameter() -> None:
    model = Gpt()
    with watched(model) as profiler:
        train(model, IDS, 2)  # the second backward adds to gradients that are there
    profile = profiler.stop()
    counts = tally(profile, "torch::autograd::AccumulateGrad")
    parameters = Counter(name.rpartition(".")[0] for name, _ in model.named_parameters())
    assert {path: n for (_, path, _), n in counts.items()} == {path: 2 * n for path, n in parameters.items()}


def test_phases() -> None:
    model = Gpt()
    with watched(model) as profiler:
        ids = torch.randint(11, (2, 11))
        ready = ids.float() * 2  # reads the number of the model's first node, and made none
        train(model, ids, 1, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    assert ready.shape == (2, 11)
    profile = profiler.stop()
    rows = list(zip(column(profile, "name"), column(profile, "module"), column(profile, "phase"), strict=True))
    assert ("aten::randint", "outside", "other") in rows
    assert [p for n, m, p in rows if n == "aten::mul" and m == "outside"] == ["other"]
    assert [p for n, _, p in rows if n == "aten::nll_loss_forward"] == ["forward"]  # the loss is outside the model
    assert {p for n, _, p in rows if "Backward" in n} == {"backward"}
    assert {p for n, m, p in rows if n == "aten::clone" and m == "outside"} == {"optimizer"}  # momentum of step one


def test_recomputed_blocks_belong_to_their_modules() -> None:
    model = Gpt()
    block, original = model.blocks[0], model.blocks[0].forward
    block.forward = lambda x: torch.utils.checkpoint.checkpoint(
        lambda y: model.blocks[0].up(original(y)).sum(-1, keepdim=True) + y, x, use_reentrant=False
    )
    with watched(model) as profiler:
        train(model, IDS)
    profile = profiler.stop()
    counts = tally(profile, "aten::addmm", "aten::mm")
    assert counts["aten::addmm", "blocks.0.qkv", "forward"] == 1
    assert counts["aten::addmm", "blocks.0.qkv", "backward"] == 1  # once more, inside the backward pass
    assert counts["aten::mm", "blocks.0.qkv", "backward"] == 2
    assert profile.call_backward.sum() >= 5
    assert {profile.paths[m] for m in profile.call_module[profile.call_backward]} >= {"blocks.0.qkv", "blocks.0.up"}


def test_double_backward_stays_with_the_module() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(5, 3, requires_grad=True)
    with watched(model) as profiler:
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
    counts = tally(profiler.stop(), "aten::mm")
    assert {m for (_, m, _), n in counts.items() if n} == {"0", "2"}


def test_calls_nest_and_own_work_is_left_out() -> None:
    model = Gpt(layers=1)
    with watched(model) as profiler:

        def spy(*_: object) -> None:
            with profiler.own():
                torch.ones(64, 64).matmul(torch.ones(64, 64)).cumsum(0)

        handle = model.blocks[0].register_forward_hook(spy)
        with torch.no_grad():
            model(IDS)
        handle.remove()
    profile = profiler.stop()
    assert "aten::cumsum" not in profile.names and "aten::ones" not in profile.names
    assert profile.overhead > 0
    assert 64 * 64 * 4 not in profile.memory_bytes
    paths = [profile.paths[m] for m in profile.call_module]
    assert paths[0] == "" and profile.call_depth[0] == 0 and paths.count("blocks.0.up") == 1
    by_path = dict(zip(paths, profile.call_duration, strict=True))
    assert (profile.call_end - profile.call_start)[0] >= by_path[""] + profile.overhead
    assert by_path[""] > by_path["blocks.0"] > by_path["blocks.0.up"] > 0


def test_parents_enclose() -> None:
    model = Gpt()
    with watched(model) as profiler:
        train(model, IDS)
    p = profiler.stop()
    inner = np.flatnonzero(p.parent >= 0)
    outer = p.parent[inner]
    assert (p.thread[inner] == p.thread[outer]).all() and (p.start[inner] >= p.start[outer]).all()
    assert (p.start[inner] + p.duration[inner] <= p.start[outer] + p.duration[outer]).all()
    children = np.bincount(outer, p.duration[inner], len(p.name))
    assert (p.duration >= children).all()


def test_outputs_and_gradients_are_bit_identical() -> None:
    results = []
    for watch in (False, True):
        torch.manual_seed(3)
        model = Gpt()
        context = watched(model) if watch else contextlib.nullcontext()
        with context:
            train(model, IDS, 2, torch.optim.AdamW(model.parameters()))
        results.append([p.detach().clone() for p in model.parameters()] + [torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_running_profiler_of_the_user_is_left_alone() -> None:
    model = nn.Linear(3, 3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as theirs:
        profiler = Profiler(model)
        assert "another torch profiler" in profiler.start()
        model(torch.ones(2, 3))
        assert profiler.stop() is None
    assert "aten::addmm" in {e.name() for e in theirs.profiler.kineto_results.events()}


def test_profiler_of_the_user_that_warms_up_is_left_alone() -> None:
    model = nn.Linear(3, 3)
    plan = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    theirs = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], schedule=plan)
    theirs.start()
    profiler = Profiler(model)
    assert "warming up" in profiler.start()
    assert profiler.stop() is None
    theirs.step()  # a session started and stopped meanwhile would crash the process here
    model(torch.ones(2, 3))
    theirs.step()
    theirs.stop()
    assert "aten::addmm" in {e.name() for e in theirs.profiler.kineto_results.events()}


@pytest.mark.parametrize("still_running", [False, True])
def test_profiler_the_user_starts_inside_takes_over(still_running: bool) -> None:
    model = nn.Linear(3, 3)
    with watched(model) as profiler:
        theirs = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        theirs.start()
        model(torch.ones(2, 3))
        if not still_running:
            theirs.stop()
        assert profiler.stop() is None
        if still_running:
            theirs.stop()
    assert "took over" in profiler.note
    assert "aten::addmm" in {e.name() for e in theirs.profiler.kineto_results.events()}
    fresh = Profiler(model)
    assert fresh.start() is None
    assert fresh.stop() is not None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_stops_cleanly_after_an_error(error: type[BaseException]) -> None:
    model = Gpt()

    def fail(*_: object) -> None:
        raise error("stop here")

    handle = model.blocks[1].register_forward_pre_hook(fail)
    with watched(model) as profiler:
        with pytest.raises(error, match="stop here"):
            model(IDS)
        handle.remove()
        model(IDS)
    profile = profiler.stop()
    assert not torch.autograd._profiler_enabled()
    assert profile is not None
    assert tally(profile, "aten::addmm")["aten::addmm", "blocks.0.qkv", "forward"] == 2
    assert tally(profile, "aten::addmm")["aten::addmm", "blocks.1.qkv", "forward"] == 1
    assert (profile.call_depth == 0).sum() == 2


def test_stop_again_gives_the_same_profile_and_starting_again_does_nothing() -> None:
    model = nn.Linear(3, 3)
    with watched(model) as profiler:
        model(torch.ones(2, 3))
    profile = profiler.stop()
    assert profiler.start() is None
    assert not profiler.running
    assert profiler.stop() is profile


def test_events_are_bounded() -> None:
    model = Gpt()
    with watched(model, max_events=300) as profiler:
        for _ in range(5):
            train(model, IDS)
    profile = profiler.stop()
    assert len(profile.name) + len(profile.memory_time) <= 300
    assert any("first 300 were kept" in note for note in profile.notes)
    assert any("module calls only" in note for note in profile.notes)


def test_memory_addresses_pair_up() -> None:
    model = nn.Linear(64, 64)
    with watched(model) as profiler:
        y = model(torch.ones(32, 64))
        size = y.nbytes
        del y
    p = profiler.stop()
    rows = np.flatnonzero(p.memory_address == p.memory_address[p.memory_bytes == size][-1])
    assert (p.memory_bytes[rows] == size).any() and (p.memory_bytes[rows] == -size).any()
    made = rows[p.memory_bytes[rows] == size][-1]
    assert p.names[p.name[p.memory_event[made]]] == "aten::addmm"


def test_what_the_model_frees_while_bnviz_works_is_still_freed() -> None:
    model = nn.Linear(64, 64)
    with watched(model) as profiler:
        outputs = [model(torch.ones(32, 64))]
        with profiler.own():
            mine = torch.ones(512)
            outputs.clear()
        del mine
    p = profiler.stop()
    assert (p.memory_bytes == -4 * 32 * 64).sum() == (p.memory_bytes == 4 * 32 * 64).sum() == 2  # input and output
    assert 4 * 512 not in p.memory_bytes and -4 * 512 not in p.memory_bytes


def test_holdings_name_each_storage_once() -> None:
    model = Gpt(layers=1)
    model.head.weight = model.embed.weight
    found = {(h.category, h.path): h.nbytes for h in holdings(model) if h.path in ("embed", "head")}
    assert found == {("parameter", "embed"): 11 * 16 * 4}


def test_optimizer_state_is_held_after() -> None:
    model = nn.Linear(4, 4, bias=False)
    with watched(model) as profiler:
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    after = Counter()
    for holding in profiler.stop().after:
        after[holding.category] += holding.nbytes
    assert after == {"gradient": 64, "optimizer": 2 * 64 + 4}  # two moments and the count of steps


def test_optimizer_state_of_before_is_held_before() -> None:
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> None:
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()

    step()
    with watched(model) as profiler:
        step()
        step()
    before = Counter()
    for holding in profiler.stop().before:
        before[holding.category] += holding.nbytes
    assert before == {"parameter": 64, "gradient": 64, "optimizer": 2 * 64 + 4}
