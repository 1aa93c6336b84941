"""What is kept of results: exact copies of any shape, beside one another, let go with the last of them."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest

from bnviz.capture import kept as module
from bnviz.capture.kept import ROOM, Kept


def kept(values: np.ndarray) -> np.ndarray:
    return Kept({"before": np.arange(3), "it": values, "behind": np.ones((2, 5))}).arrays()["it"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.bool_])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0, 4), (ROOM // 8 + 1,)])
def test_a_copy_is_exact_and_ones_own(shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    values = np.asarray(np.random.default_rng(0).normal(size=shape) * 9).astype(dtype)
    own = kept(values)
    assert own.dtype == values.dtype and own.shape == values.shape
    np.testing.assert_array_equal(own, values)
    assert not np.shares_memory(own, values)
    before = values.copy()
    own[...] = 0
    np.testing.assert_array_equal(values, before)


def test_strided_values_are_copied_in_order() -> None:
    values = np.arange(24).reshape(4, 6)[::2, ::-3].T
    np.testing.assert_array_equal(kept(values), values)


def test_what_many_threads_keep_does_not_overlap() -> None:
    found: list[np.ndarray] = []

    def keep(number: int) -> None:
        found.extend(kept(np.full(100, number)) for _ in range(200))

    threads = [threading.Thread(target=keep, args=(number,)) for number in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(found) == 800 and all((one == one[0]).all() for one in found)
    assert sorted({int(one[0]) for one in found}) == [0, 1, 2, 3]


def test_room_goes_back_with_the_last_that_lies_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_room", np.empty(0, np.uint8))
    monkeypatch.setattr(module, "_used", 0)
    some = [kept(np.ones(1000)) for _ in range(3)]
    gone = weakref.ref(module._room)
    module._room = np.empty(0, np.uint8)  # the next room is another
    del some[1:]
    gc.collect()
    assert gone() is not None and some[0].sum() == 1000
    some.clear()
    gc.collect()
    assert gone() is None
