"""On a GPU: nothing waits for the device inside a forward or a backward pass, and the numbers are those of a CPU."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnviz

from . import architectures as zoo
from .steps import inputs, loss_of
from .test_sites import Body, Parallel, PreNorm
from .test_streams import InPlace
from .test_sublayers import Depth, Gated, LayerScale
from .texts import holding, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROBES = ("activations", "attention", "keys_values")
PROMPT, TOKENS = 8, 20
Call = Callable[[nn.Module, str], list[Tensor]]


@contextlib.contextmanager
def unwaited() -> Iterator[None]:
    """What waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def ids_of(device: str, seed: int = 1, length: int = TOKENS) -> Tensor:
    return torch.randint(3, 61, (2, length), generator=torch.Generator().manual_seed(seed)).to(device)


def t5() -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config).eval()


def bert() -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    return transformers.BertModel(transformers.BertConfig(**sizes, num_attention_heads=4)).eval()


def mixtral() -> Any:
    return tiny("Mixtral", num_local_experts=4, experts_implementation="batched_mm")  # others ask who is chosen


def decoded(model: nn.Module, device: str) -> list[Tensor]:
    """A prompt, then token by token, as `generate` would; it asks the device itself whether all texts have ended."""
    from transformers import DynamicCache

    ids, cache, found = ids_of(device), DynamicCache(), []
    at = torch.arange(TOKENS, device=device)[None]
    with quietly(device):
        found.append(model(ids[:, :PROMPT], position_ids=at[:, :PROMPT], **holding(cache)).logits)
        for now in range(PROMPT, TOKENS):
            step = slice(now, now + 1)
            found.append(model(ids[:, step], position_ids=at[:, step], **holding(cache)).logits)
    return found


def whole(model: nn.Module, device: str) -> list[Tensor]:
    """Three texts, without a mask."""
    texts = [ids_of(device, seed) for seed in range(3)]
    at = torch.arange(TOKENS, device=device)[None]
    with quietly(device):
        return [model(ids, position_ids=at, use_cache=False).logits for ids in texts]


def translated(model: nn.Module, device: str) -> list[Tensor]:
    texts = [(ids_of(device, seed), ids_of(device, seed + 9, 7)) for seed in range(3)]
    with quietly(device):
        return [model(input_ids=ids, decoder_input_ids=own, use_cache=False).logits for ids, own in texts]


def read(model: nn.Module, device: str) -> list[Tensor]:
    texts = [ids_of(device, seed) for seed in range(3)]
    with quietly(device):
        return [model(ids).last_hidden_state for ids in texts]


def given(model: nn.Module, device: str) -> list[Tensor]:
    width = 8 if isinstance(model, Body) else 16
    drawn = torch.randn(5, 2, 9, width, generator=torch.Generator().manual_seed(3)).to(device)
    with quietly(device):
        return [model(x.clone()) for x in drawn]


def quietly(device: str) -> contextlib.AbstractContextManager[None]:
    return unwaited() if device == "cuda" else contextlib.nullcontext()


def run_of(model: nn.Module, call: Call, device: str, *probes: str, mode: Any = torch.no_grad) -> Any:
    """The run of some calls, whose outputs are those of the model alone; on a GPU none of them waits."""
    with mode():
        try:
            alone = call(model, device)
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            pytest.skip(f"the model itself waits for the device: {error}")
        with bnviz.capture(model, probes=list(probes), strict=True, progress=False) as recorder:
            found = call(model, device)
    assert all(map(torch.equal, found, alone))
    return recorder.run


def check_close(got: Any, want: Any) -> None:
    assert got.kinds == want.kinds
    for name in got.kinds:
        assert set(got[name].variables) == set(want[name].variables)
        for variable, one in want[name].variables.items():
            if (name, variable) == ("gradients", "cosine"):  # an estimate, by random signs that lie otherwise on a GPU
                continue
            other = got[name][variable]
            assert (other.dims, other.shape) == (one.dims, one.shape), (name, variable)
            if one.dtype.kind == "f":
                close = np.allclose(other.values, one.values, rtol=1e-4, atol=1e-4, equal_nan=True)
                assert close, (name, variable, np.nanmax(np.abs(other.values - one.values)))
            elif one.dtype.kind in "iub":
                assert np.array_equal(other.values, one.values), (name, variable)
    seen = [{(s.kind, s.path, s.observations, s.forwards) for s in run.sites} for run in (got, want)]
    assert seen[0] == seen[1]


class ScaledParallel(LayerScale):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma1 * self.attn(self.n1(x)) + self.gamma2 * self.mlp(self.n1(x))


CASES: dict[str, tuple[Callable[[], Any], Call, tuple[str, ...]]] = {
    "llama": (lambda: tiny("Llama"), whole, PROBES),
    "llama, token by token": (lambda: tiny("Llama"), decoded, PROBES),
    "mixtral": (mixtral, whole, ("activations", "attention", "routing")),
    "mixtral, token by token": (mixtral, decoded, ("activations", "attention", "routing")),
    "t5": (t5, translated, ("activations", "attention", "cross_attention")),
    "bert": (bert, read, PROBES),
    "pre-norm": (lambda: Body(PreNorm).eval(), given, ("activations",)),
    "parallel": (lambda: Body(Parallel).eval(), given, ("activations",)),
    "scaled": (lambda: zoo.Looped(LayerScale(), LayerScale()), given, ("activations",)),
    "scaled, parallel": (lambda: zoo.Looped(ScaledParallel(), ScaledParallel()), given, ("activations",)),
    "gated": (lambda: zoo.Looped(Gated(), Gated(), Gated()), given, ("activations",)),
    "sisters that differ": (lambda: zoo.Looped(Depth(), Depth(), Depth()), given, ("activations",)),
    "in place": (lambda: zoo.Looped(InPlace(), InPlace(), InPlace()), given, ("activations",)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_waits_in_a_forward_and_the_numbers_are_a_cpus(name: str, mode: Any) -> None:
    make, call, probes = CASES[name]
    torch.manual_seed(0)
    model = make()
    there = copy.deepcopy(model).cuda()
    check_close(run_of(there, call, "cuda", *probes, mode=mode), run_of(model, call, "cpu", *probes, mode=mode))


def trained(device: str) -> Any:
    model = Body(PreNorm).to(device)
    micro = [x.to(device) for x in inputs(4)]
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    probes = ["activations", "gradients"]
    with bnviz.capture(model, probes=probes, strict=True, progress=False, step="optimizer") as recorder:
        for x in micro:
            with quietly(device):
                optimizer.zero_grad()
                loss_of(model(x)).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return recorder.run


def test_nothing_waits_in_a_training_step() -> None:
    check_close(trained("cuda"), trained("cpu"))


def test_a_stream_of_its_own() -> None:
    model = zoo.Looped(*(PreNorm() for _ in range(4))).cuda().eval()
    x = torch.randn(4, 64, 16, device="cuda")
    with torch.no_grad():
        with bnviz.capture(model, probes=["activations"], strict=True, progress=False) as recorder:
            for _ in range(3):
                model(x)
        want, side = recorder.run, torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        with bnviz.capture(model, probes=["activations"], strict=True, progress=False) as recorder:
            with torch.cuda.stream(side):
                for _ in range(3):
                    torch.cuda._sleep(10_000_000)  # type: ignore[no-untyped-call]  # what is read too early is wrong
                    model(x)
        check_close(recorder.run, want)


@pytest.mark.parametrize("error", [None, ValueError])
def test_nothing_is_left_on_the_device(error: type[Exception] | None) -> None:
    model, x = zoo.Looped(*(Gated() for _ in range(3))).cuda().eval(), torch.randn(2, 64, 16, device="cuda")

    def fail(*_: Any) -> None:
        if error is not None:
            raise error

    def captured() -> Any:
        recorder = bnviz.capture(model, probes=["activations", "attention"], strict=True, progress=False)
        with contextlib.suppress(ValueError), torch.no_grad(), recorder:
            model(x)
            handle = model.blocks[2].mlp.register_forward_pre_hook(fail)  # type: ignore[union-attr]
            try:
                model(x)
            finally:
                handle.remove()
        return recorder.run

    captured()  # libraries have made their workspaces
    gc.collect()
    before = torch.cuda.memory_allocated()
    run = captured()
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    assert run["activations"].sizes["step"] == 2


def test_a_model_that_is_moved_as_it_runs() -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model, x = zoo.Looped(PreNorm(), PreNorm(), PreNorm()).eval(), torch.randn(2, 9, 16)

    def called(_: nn.Module, __: str) -> list[Tensor]:
        return [model(x).cpu() for _ in range(3)]

    want = run_of(model, called, "cpu", "activations", "attention")
    for block in model.blocks:
        hook = accelerate.hooks.AlignDevicesHook("cuda", io_same_device=True, place_submodules=True)
        accelerate.hooks.add_hook_to_module(block, hook)  # moves what a block is given, inside its forward, and back
    check_close(run_of(model, called, "cpu", "activations", "attention"), want)


def test_blocks_on_the_host_and_on_the_device() -> None:
    torch.manual_seed(0)
    model, x = zoo.Looped(PreNorm(), PreNorm(), PreNorm()).eval(), torch.randn(2, 9, 16)

    def called(_: nn.Module, __: str) -> list[Tensor]:
        return [model(x).cpu() for _ in range(3)]

    want = run_of(model, called, "cpu", "activations")
    for at in (1, 2):
        block = model.blocks[at].to(("cuda", "cpu")[at - 1])
        forward, device = block.forward, next(block.parameters()).device
        block.forward = lambda y, forward=forward, device=device: forward(y.to(device))  # as accelerate does it
    check_close(run_of(model, called, "cpu", "activations"), want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_two_streams_of_a_block(mode: Any) -> None:
    torch.manual_seed(0)
    model = zoo.MMDiT(3, zoo.DoubleBlock).eval()
    x = [torch.randn(2, 20, 16), torch.randn(2, 11, 16), torch.randn(2, 16)]

    def called(model: nn.Module, device: str) -> list[Tensor]:
        there = [one.to(device) for one in x]
        with contextlib.nullcontext() if mode is torch.inference_mode else quietly(device):
            return [model(*there).detach() for _ in range(3)]

    want = run_of(model, called, "cpu", "activations", mode=mode)
    check_close(run_of(model.cuda(), called, "cuda", "activations", mode=mode), want)
