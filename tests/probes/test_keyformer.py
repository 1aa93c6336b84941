"""The keyformer probe against noisy softmax in float64, on paper and through a real capture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bnviz
from bnviz.errors import SchemaError, UnknownName
from bnviz.observation import AttentionSeen, Context, Site
from bnviz.probes.keyformer import Keyformer
from tests.reduce._gumbel_definition import noisy, uniform


def seen(layer: int = 2, phase: str = "forward", **more: Any) -> AttentionSeen:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, h, 24, 8, generator=generator, dtype=torch.float64) for h in (4, 2))
    site, context = Site("attention", "a", layer), Context(0, 0, phase)
    return AttentionSeen(site, context, query, key, key, None, True, 8**-0.5, **more)


def gumbel(seed: int, layer: int, heads: int, keys: int) -> torch.Tensor:
    places = np.arange(keys)
    return -(-torch.from_numpy(uniform(seed, layer, heads, places, places)).log()).log()


@pytest.mark.parametrize(("seeds", "tau"), [(2, 1.0), (5, 2.0)])
def test_mean_and_spread_are_those_of_the_draws(seeds: int, tau: float) -> None:
    one = seen()
    kept = Keyformer(seeds=seeds, tau=tau).observe(one)
    assert kept is not None
    logits = one.query @ one.key.repeat_interleave(2, 1).mT * one.scale
    sees = torch.ones(24, 24, dtype=torch.bool).tril()
    drawn = torch.stack([noisy(logits, sees, gumbel(seed, 2, 4, 24), tau=tau).sum(2) for seed in range(seeds)])
    torch.testing.assert_close(kept["noisy_mass"], drawn.mean(0))
    torch.testing.assert_close(kept["noisy_mass_spread"], drawn.std(0))


def test_layers_have_noise_of_their_own_and_one_draw_has_no_spread() -> None:
    one, two = (Keyformer(seeds=1).observe(seen(layer)) for layer in (0, 1))
    assert one is not None and two is not None
    assert (one["noisy_mass"] != two["noisy_mass"]).any()
    assert one["noisy_mass_spread"].isnan().all()


def test_decoding_and_keys_of_another_text_have_none() -> None:
    assert Keyformer().observe(seen(phase="decode")) is None
    assert Keyformer().observe(seen(across=True)) is None
    assert Keyformer().observe(seen(phase="prefill")) is not None


def test_wrong_options_are_refused() -> None:
    for seeds in (0, 1.5, True):
        with pytest.raises(SchemaError, match=r"Probe keyformer: seeds is .*, expected a whole number from 1"):
            Keyformer(seeds=seeds)  # type: ignore[arg-type]
    for tau in (0.0, float("nan")):
        with pytest.raises(SchemaError, match=r"Probe keyformer: tau is .*, expected a temperature above 0"):
            Keyformer(tau=tau)
    with pytest.raises(UnknownName):
        bnviz.capture(torch.nn.Linear(2, 2), probes=["attention"], tau=1.0)


def test_a_capture_of_a_model_is_what_its_eager_weights_say(load_model: Any) -> None:
    text = (Path(bnviz.__file__).parent / "demo" / "data" / "tempest.txt").read_bytes()
    ids = torch.tensor([list(text[3000:3080])])
    model = load_model("llama-induction-byte")
    with torch.no_grad(), bnviz.capture(model, probes=["keyformer"], seeds=4, strict=True) as recorder:
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    record = recorder.run["keyformer"]
    with torch.no_grad():
        weights = load_model("llama-induction-byte", "eager")(ids, output_attentions=True).attentions
    sees = torch.ones(80, 80, dtype=torch.bool).tril()
    assert record["noisy_mass"].sizes["step"] == 1 and record.attrs["seeds"] == 4 and record.attrs["tau"] == 1.0
    for layer, p in enumerate(weights):
        logits = p[0].double().log()  # but for a number that a row shares
        drawn = torch.stack([noisy(logits, sees, gumbel(seed, layer, len(logits), 80)).sum(1) for seed in range(4)])
        for name, want in (("noisy_mass", drawn.mean(0)), ("noisy_mass_spread", drawn.std(0))):
            np.testing.assert_allclose(record[name].values[0, layer], want, rtol=1e-4, atol=1e-4, err_msg=name)


def test_it_is_not_on_by_default(load_model: Any) -> None:
    with torch.no_grad(), bnviz.capture(load_model("llama-induction-byte"), ceilings=False) as recorder:
        load_model("llama-induction-byte")(torch.arange(12)[None])
    assert "keyformer" not in recorder.run
