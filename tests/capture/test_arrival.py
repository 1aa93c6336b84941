"""What numbers of a device decide may be decided later: the run is the one of a model whose numbers are there at once."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnviz
from bnviz.capture import arrival
from bnviz.capture.arrival import Arrival, Pending
from bnviz.capture.beside import beside
from bnviz.capture.blocks.search import Search
from bnviz.observation import BlockSeen, Context, RouterSeen, Site
from tests.traces import traces

from . import architectures as zoo
from .steps import inputs, loss_of
from .test_sites import Body, Parallel, PostNorm, PreNorm
from .test_streams import InPlace
from .test_sublayers import Depth, Gated, LayerScale, Routed
from .texts import holding, tiny

Act = Callable[[], None]


@contextlib.contextmanager
def put_off(here: Callable[[], bool] = lambda: False) -> Iterator[list[int]]:
    """All numbers are put off, and have come when `here()` says so, or someone waits; counts what was asked for."""
    asked: list[int] = []
    begin = Arrival.__init__

    def noting(self: Arrival, values: Any) -> None:
        begin(self, values)
        asked.append(self.nbytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrival, "late", lambda value: True)
        patch.setattr(Arrival, "__init__", noting)
        patch.setattr(Arrival, "here", lambda self: here())
        yield asked


def run_of(model: nn.Module, act: Act, *probes: str, **options: Any) -> Any:
    before = traces(model, rng=False)
    with bnviz.capture(model, probes=list(probes or ("activations",)), strict=True, **options) as recorder:
        act()
    after = traces(model, rng=False)
    changed = [key for key in before if after.get(key) != before[key]]
    assert not [key for key in changed if not key.endswith(".training")], changed
    return recorder.run


def check_equal(got: Any, want: Any) -> None:
    """Every number of two runs is the same, and so is what was counted and said."""
    assert got.kinds == want.kinds and got.notes == want.notes
    for name in got.kinds:
        assert set(got[name].variables) == set(want[name].variables)
        for variable, one in want[name].variables.items():
            other = got[name][variable]
            assert other.dims == one.dims and other.dtype == one.dtype, variable
            same = np.allclose if one.dtype.kind == "f" else np.array_equal
            options = {"rtol": 1e-6, "atol": 1e-7} if one.dtype.kind == "f" else {}
            assert same(other.values, one.values, equal_nan=one.dtype.kind == "f", **options), (name, variable)  # type: ignore[operator]
    assert {(s.kind, s.path, s.observations, s.forwards) for s in got.sites} == {
        (s.kind, s.path, s.observations, s.forwards) for s in want.sites
    }


WHEN = {"never": lambda: False, "at once": lambda: True}
KINDS: dict[str, Callable[[], nn.Module]] = {
    "pre-norm": lambda: Body(PreNorm),
    "parallel": lambda: Body(Parallel),
    "post-norm": lambda: Body(PostNorm),
    "scaled": lambda: zoo.Looped(LayerScale(), LayerScale(), LayerScale()),
    "gated": lambda: zoo.Looped(Gated(), Gated(), Gated()),
    "routed": lambda: zoo.Looped(Routed(), Gated(), Routed()),
    "sisters that differ": lambda: zoo.Looped(Depth(), Depth(), Depth()),
    "in place": lambda: zoo.Looped(InPlace(), InPlace(), InPlace()),
    "one block, looped": lambda: zoo.Looped(*[PreNorm()] * 4),
    "images": zoo.convnext,
}


def given_of(model: nn.Module) -> Tensor:
    drawn = torch.Generator().manual_seed(3)
    if hasattr(model, "stem"):
        return torch.randn(2, 9, 8, generator=drawn) if isinstance(model, Body) else torch.randn(2, 3, 32, 32)
    return torch.randn(2, 9, 16, generator=drawn)


@pytest.mark.parametrize(
    ("mode", "when"), [(torch.no_grad, "never"), (torch.no_grad, "at once"), (torch.inference_mode, "never")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_run_is_the_same(kind: str, when: str, mode: Any) -> None:
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    x = given_of(model) if kind != "images" else torch.randn(2, 3, 32, 32)

    def act() -> None:
        with mode():
            for _ in range(2 if kind == "images" else 5):
                model(x.clone())

    want = run_of(model, act)
    with put_off(WHEN[when]) as asked:
        got = run_of(model, act)
    assert asked
    check_equal(got, want)


def test_numbers_that_come_in_the_middle_of_a_forward() -> None:
    torch.manual_seed(0)
    model, x, turn = zoo.Looped(*(Gated() for _ in range(6))), torch.randn(2, 9, 16), iter(range(10_000))

    def act() -> None:
        for _ in range(5):
            model(x)

    want = run_of(model, act)
    with put_off(lambda: next(turn) % 3 == 2):
        check_equal(run_of(model, act), want)


def test_few_are_asked_for_once_all_is_known() -> None:
    model, x = Body(PreNorm).eval(), given_of(Body(PreNorm))
    with put_off() as asked, torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True):
        for _ in range(8):
            model(x)
        several = len(asked)
        for _ in range(7):
            model(x)
        assert len(asked) == several  # between the eighth use and the sixteenth
        model(x)
        assert len(asked) == several + 3


def test_decode_steps() -> None:
    from transformers import DynamicCache

    model = tiny("Llama")
    ids = torch.randint(3, 61, (2, 24), generator=torch.Generator().manual_seed(1))

    def act() -> None:
        cache = DynamicCache()
        with torch.no_grad():
            model(ids[:, :6], **holding(cache))
            for at in range(6, 24):
                model(ids[:, at : at + 1], **holding(cache))

    want = run_of(model, act, "activations", "attention", "keys_values")
    with put_off():
        check_equal(run_of(model, act, "activations", "attention", "keys_values"), want)


@pytest.mark.parametrize("kind", [PreNorm, Parallel, LayerScale, Gated])
@pytest.mark.parametrize("when", WHEN)
def test_training(kind: type[nn.Module], when: str) -> None:
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(3))

    def trained() -> Any:
        torch.manual_seed(0)
        model = zoo.Looped(kind(), kind(), kind())
        optimizer = torch.optim.SGD(model.parameters(), 0.01)

        def act() -> None:
            for _ in range(5):
                optimizer.zero_grad()
                loss_of(model(x)).backward()  # type: ignore[no-untyped-call]
                optimizer.step()

        return run_of(model, act, "activations", "gradients", per_token=True, step="optimizer")

    want = trained()
    with put_off(WHEN[when]):
        check_equal(trained(), want)


def test_gradients_that_are_read_late_are_few() -> None:
    model, x = Body(PreNorm), inputs()[0]
    with put_off(), bnviz.capture(model, probes=["gradients"], strict=True) as recorder:
        for _ in range(40):
            loss_of(model(x)).backward()  # type: ignore[no-untyped-call]
            recorder.step()
            taps: Any = recorder._session
            assert len(taps._gradients._readings) <= 8
    assert recorder.run["gradients"].sizes["step"] == 40


def failing_at(model: nn.Module, error: type[BaseException]) -> Callable[[], Any]:
    """Raise in the last block."""

    def fail(_: nn.Module, __: Any) -> None:
        raise error

    return model.blocks[2].mlp.register_forward_pre_hook(fail).remove  # type: ignore[index, union-attr, no-any-return]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("again", [False, True])
def test_a_forward_that_does_not_end(error: type[BaseException], again: bool) -> None:
    model = Body(PreNorm).eval()
    x = given_of(model)

    def act() -> None:
        remove = failing_at(model, error)
        with contextlib.suppress(ValueError, KeyboardInterrupt), torch.no_grad():
            model(x)
        remove()
        if again:
            with torch.no_grad():
                model(x)

    want = run_of(model, act)
    with put_off():
        check_equal(run_of(model, act), want)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_nothing_is_held(error: type[BaseException] | None) -> None:
    model, held = Body(PreNorm), list[weakref.ref[Tensor]]()
    handles = [m.register_forward_hook(lambda _, __, y: held.append(weakref.ref(y))) for m in model.modules()]
    with put_off():
        recorder = bnviz.capture(model, probes=["activations"], strict=True)
        with contextlib.suppress(ValueError, KeyboardInterrupt), recorder:
            if error is not None:
                failing_at(model, error)
            model(given_of(model))
    for handle in handles:
        handle.remove()
    gc.collect()
    assert held and [ref() for ref in held] == [None] * len(held)


def test_what_is_written_into_meanwhile_is_not_shown_as_what_it_was() -> None:
    torch.manual_seed(0)
    model, x = Body(PreNorm).eval(), given_of(Body(PreNorm))
    given: list[Tensor] = []

    def write(*_: Any) -> None:
        given[-1].zero_()

    model.blocks[0].attn.register_forward_hook(lambda _, __, y: given.append(y))  # type: ignore[union-attr]
    model.blocks[1].register_forward_hook(write)  # type: ignore[union-attr]
    with torch.no_grad(), put_off(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        for _ in range(4):
            model(x)
    record = recorder.run["activations"]["cosine"].notnull().all("token")
    assert record.sel(kind="block").values.all()
    assert record.sel(kind="attention", layer=0).values.tolist() == [False] * 3 + [True]  # a third use is not verified
    assert record.sel(kind="attention", layer=[1, 2]).values.all()


@pytest.mark.parametrize("odd", [False, True])
def test_a_sum_has_to_hold_for_all_tokens(odd: bool) -> None:
    torch.manual_seed(0)
    block, x = PreNorm(), torch.randn(1, 200, 16)
    found: list[Any] = []
    for later in (False, True):
        with put_off() if later else contextlib.nullcontext(), torch.no_grad():
            search = Search(block, {tuple(x.shape): -1})
            y = block(x).clone()
            y[:, 1] += 0.1 * odd  # of 200 tokens, every other one is looked at
            if later:
                told = search.ask(x, y)
                told.tell(Arrival(told.asked).values())
            found.append((search.answer(told) if later else search.found(x, y))[0])
            search.close()
    assert found[0] == found[1] and (found[0].evidence == "sum") != odd


def test_what_is_held_has_a_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Body(PreNorm, 6).eval(), given_of(Body(PreNorm))
    want = run_of(model, lambda: model(x))
    waiting, put = list[int](), Pending.put

    def noting(self: Pending, *given: Any) -> None:
        put(self, *given)
        waiting.append(len(self._jobs))

    monkeypatch.setattr(Pending, "put", noting)
    with put_off():
        check_equal(run_of(model, lambda: model(x)), want)
        assert max(waiting) == 6
        waiting.clear()
        monkeypatch.setattr(arrival, "CEILING", 40_000)
        check_equal(run_of(model, lambda: model(x)), want)
        assert 0 < max(waiting) < 6
        monkeypatch.setattr(arrival, "CEILING", 0)
        check_equal(run_of(model, lambda: model(x)), want)


def test_what_is_held_counts_against_the_budget() -> None:
    lent, told = [0], list[Any]()

    def noted(number: int, _: Any) -> None:
        told.append(number)

    def lend(size: int) -> bool:
        if size > 0 and lent[0] + size > 100:
            return False
        lent[0] += size
        return True

    with put_off():
        pending = Pending(lend)
        for number in range(3):
            pending.put([torch.zeros(1)], 32, partial(noted, number))
            assert told == ([] if number < 2 else [0, 1, 2]), number
        assert lent == [0]
        pending.put([torch.zeros(1)], 32, told.append)
        assert lent == [40]
        pending.clear()
    assert lent == [0]


def test_copies_of_several_types_come_in_their_order() -> None:
    one, two = torch.randn(3, 4), torch.tensor(True)
    given = [one, torch.arange(5), two, one, torch.empty(0, 2), one.double()]
    got = Arrival(given).values()
    assert [g.dtype for g in got] == [g.dtype for g in given] and all(map(torch.equal, got, given))
    assert Arrival(given).nbytes == 12 * 4 + 5 * 8 + 1 + 12 * 8


def test_an_observation_of_a_model_that_is_split_lies_on_one_device() -> None:
    shown: list[Any] = []
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, device="meta")])
    emit = beside(model, shown.append)
    assert beside(model[0], shown.append) == shown.append
    there = torch.empty(1, 2, 4, device="meta")
    now = Context(0, 0, "forward", valid=torch.ones(1, 2, dtype=torch.bool))
    emit(RouterSeen(Site("router", "layers.0", 0), now, there.long(), torch.ones(1, 2, 4), None, 4))
    emit(BlockSeen(Site("block", "layers.0", 0), now, there, there))
    assert [one.context.valid.device.type for one in shown] == ["meta", "meta"]
    assert shown[0].weights.device.type == "meta"


def test_a_forward_that_is_cancelled_in_its_middle() -> None:
    model = Body(PreNorm).eval()
    x = given_of(model)

    def cancelled() -> Any:
        with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
            handle = model.blocks[2].register_forward_pre_hook(lambda *_: recorder.cancel())
            model(x)
            handle.remove()
            model(x)
        return recorder.run

    want = cancelled()
    with put_off():
        check_equal(cancelled(), want)
