"""`...` among the names of probes: the usual ones beside those that are named, of which each must find something."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bnviz
from bnviz.errors import CaptureError
from tests.probes.test_query_moments import ids_of, small


def kept(model: nn.Module, *args: Any, **options: Any) -> tuple[str, ...]:
    with bnviz.capture(model, strict=True, **options) as recorder, torch.no_grad():
        model(*args)
    return tuple(recorder.run.kinds)


@pytest.mark.parametrize("usual", [..., "..."])
def test_the_usual_ones_and_one_more(usual: Any) -> None:
    model = small("llama")
    ids = ids_of(model, 1, 12)
    alone, more = kept(model, ids), kept(model, ids, probes=[usual, "kv_spectra"])
    assert set(more) == {*alone, "kv_spectra"} and "routing" not in more  # a model without routers is none for it
    assert set(kept(model, ids, probes=[usual])) == set(alone)
    assert set(kept(model, ids, probes=["attention", usual])) == set(alone)


def test_what_is_named_must_find_something_and_what_is_usual_need_not() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4)
    with pytest.raises(CaptureError, match=r"^kv_spectra: no attention found in Sequential"):
        kept(net, x, probes=[..., "kv_spectra"])
    with pytest.raises(CaptureError, match=r"^routing: no router found in LlamaForCausalLM"):
        kept(small("llama"), ids_of(small("llama"), 1, 4), probes=[..., "routing"])


def test_options_of_both_are_taken() -> None:
    model = small("llama")
    with bnviz.capture(model, probes=[..., "keyformer"], seeds=1, window=8) as recorder, torch.no_grad():
        model(ids_of(model, 1, 12))
    assert recorder.run["attention"].attrs["window"] == 8 and recorder.run["keyformer"].attrs["seeds"] == 1
