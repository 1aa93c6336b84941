"""Time of a decode step behind smaller caches: what is cut, what is said, and the model as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import bnviz
from bnviz.errors import BnvizError, SchemaError

from .test_kv_eviction import hooks, text


def timed(model: Any, ids: Any, **options: Any) -> Any:
    return bnviz.experiment(model, ids, "decode_time", progress=False, **options)["decode_time"]


def test_tokens_that_are_kept_and_times_of_both(load_model: Any) -> None:
    ids = torch.cat([text(60), text(60, begin=8)])
    record = timed(load_model("llama-bard"), ids, budgets=[0.5, 0.1, 1.0], prompt=50, pairs=2)
    assert record["tokens_kept"].values.tolist() == [[5, 25, 50]] * 2 and record["tokens"].values.tolist() == [50, 50]
    assert all((record[name].values > 0).all() for name in ("step_time", "step_time_whole", "step_ratio"))


def test_the_texts_rest_is_read_again_where_it_ends(load_model: Any) -> None:
    record = timed(load_model("llama-bard"), text(20), budgets=[0.5], prompt=19, pairs=3)
    assert np.isfinite(record["step_ratio"].values).all()


def test_the_model_is_as_it_was(load_model: Any) -> None:
    model, ids = load_model("llama-bard"), text(40)
    hung = hooks(model)
    with torch.no_grad():
        before = model(ids).logits
        timed(model, ids, budgets=[0.5], pairs=1)
        assert torch.equal(model(ids).logits, before)
    assert hooks(model) == hung


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": [0.0]}, "budgets are"),
        ({"budgets": []}, "budgets are"),
        ({"prompt": -1}, "prompt is -1"),
        ({"pairs": 0}, "pairs is 0"),
    ],
)
def test_options_out_of_range(load_model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=f"^decode_time: {message}"):
        timed(load_model("llama-bard"), text(40), **options)


def test_a_text_that_ends_with_its_prompt(load_model: Any) -> None:
    with pytest.raises(BnvizError, match=r"text 0 has 40 tokens and its prompt ends at 40"):
        timed(load_model("llama-bard"), text(40), prompt=40)
