"""Bytes of a token as a cache holds it: whole, quantised, preallocated, sliding; and what is not understood."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bnviz
from bnviz.capture.attention.cached import cached_bytes
from tests.probes.test_query_moments import ids_of, small

cache_utils = pytest.importorskip("transformers.cache_utils")
WHOLE = 2 * (16 + 16) * 4  # kv heads, channels of keys and values, float32


def cache_name(model: Any) -> str:
    """What its forward calls a cache: newer versions of transformers have another name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def told(model: Any, ids: torch.Tensor, cache: Any = None, **more: Any) -> list[float]:
    given = {} if cache is None else {cache_name(model): cache, "use_cache": True}
    with bnviz.capture(model, probes=["keys_values"], strict=True) as recorder, torch.no_grad():
        model(ids, **given, **more)
    found: list[float] = recorder.run["keys_values"]["bytes_per_token"].values[-1].tolist()
    return found


def test_with_and_without_a_cache_they_are_those_of_its_shapes() -> None:
    model = small("llama")
    ids = ids_of(model, 3, 20)
    assert told(model, ids, use_cache=False) == told(model, ids, use_cache=True) == [WHOLE, WHOLE]
    assert told(model.to(torch.bfloat16), ids, use_cache=True) == [WHOLE / 2, WHOLE / 2]


def test_a_quantised_cache_takes_what_its_codes_and_scales_take() -> None:
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no cache that quantises without further packages")
    model = small("llama")
    ids = ids_of(model, 3, 20)
    scales = 2 * 4 / (3 * 20)  # one float32 for keys and one for values, over all tokens
    assert told(model, ids, cache_utils.QuantizedCache("fp8", model.config)) == pytest.approx([WHOLE / 4 + scales] * 2)


def test_a_preallocated_cache_is_told_by_its_places() -> None:
    model = small("llama")
    found = told(model, ids_of(model, 1, 20), cache_utils.StaticCache(model.config, max_cache_len=64))
    assert found == pytest.approx([WHOLE, WHOLE], rel=1e-2)


def test_a_sliding_layer_takes_as_much_a_token_as_the_others() -> None:
    model = small("gemma3_text", sliding_window=8)
    assert told(model, ids_of(model, 1, 40), use_cache=True) == [WHOLE, WHOLE]


def test_decoding_goes_on_with_the_same_cache() -> None:
    model = small("llama")
    with bnviz.capture(model, probes=["keys_values"], strict=True) as recorder:
        model.generate(ids_of(model, 2, 9), max_new_tokens=5, do_sample=False)
    assert recorder.run["keys_values"]["bytes_per_token"].values.tolist() == [[WHOLE, WHOLE]] * 2


class Codes(torch.Tensor):
    """A quantised tensor of a subclass: it looks like its original, and is made of a byte a value and a scale."""

    codes: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor) -> Codes:
        made: Codes = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        made.codes = codes
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("only shapes and types are read")

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes"], None


def call(keys: int, heads: int = 2) -> Any:
    return SimpleNamespace(key=torch.zeros(1, heads, keys, 4))


def test_tensors_of_a_subclass_take_what_they_are_made_of() -> None:
    layer = SimpleNamespace(
        keys=torch.zeros(1, 2, 3, 4),
        values=torch.zeros(1, 2, 3, 4),
        _quantized_keys=(Codes(torch.zeros(1, 2, 7, 4, dtype=torch.uint8)), {"scale": torch.zeros(7)}),
        _quantized_values=Codes(torch.zeros(1, 2, 7, 4, dtype=torch.uint8)),
    )
    cache, module = SimpleNamespace(layers=[None, layer]), SimpleNamespace(layer_idx=1)
    assert cached_bytes(cache, module, call(10)) == (2 * 2 * 3 * 4 * 4 + 2 * 2 * 7 * 4 + 7 * 4) / 10  # type: ignore[arg-type]


def test_a_layer_that_keeps_nothing_takes_nothing() -> None:
    cache = SimpleNamespace(layers=[SimpleNamespace(keys=None)])
    assert cached_bytes(cache, SimpleNamespace(layer_idx=0), call(10)) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cache", "module"),
    [
        (None, SimpleNamespace(layer_idx=0)),
        (SimpleNamespace(), SimpleNamespace(layer_idx=0)),
        (SimpleNamespace(layers=[]), SimpleNamespace(layer_idx=0)),
        (SimpleNamespace(layers=[SimpleNamespace()]), SimpleNamespace()),
        (SimpleNamespace(layers=[SimpleNamespace()]), SimpleNamespace(layer_idx=3)),
    ],
)
def test_what_is_not_understood_is_not_told(cache: Any, module: Any) -> None:
    assert cached_bytes(cache, module, call(10)) == -1
