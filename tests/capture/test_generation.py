"""Generation: what is recorded of a text, however it was written, is what one forward over the whole text would show."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from .texts import captured, check_rows, entropy_of, holding, maps_of, of_sequence, row_of, tiny


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Mistral"])
def test_left_padded_prompts_grow_by_sampling(kind: str, cache: str) -> None:
    model = tiny(kind, **({"sliding_window": 6} if kind != "Llama" else {}))
    ids, mask = torch.randint(3, 61, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "do_sample": True,
        "cache_implementation": cache,
    }
    torch.manual_seed(5)
    plain = model.generate(ids, **options)
    torch.manual_seed(5)
    with captured(model, "attention", "activations") as recorder:
        assert torch.equal(plain, model.generate(ids, **options))
    whole = torch.cat([mask, mask.new_ones(2, 5)], 1)
    maps = maps_of(model, plain[:, :-1], whole)
    record = recorder.run["attention"]
    assert list(record.phase.values) == ["prefill", "decode"]
    for sequence in range(2):
        check_rows(record.isel(step=1), maps[:, sequence], sequence, 9, whole[sequence].bool().numpy())
    stream = recorder.run["activations"].isel(step=1)
    assert stream.position.values[stream.sequence.values == 1].tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("sampled", [False, True])
def test_each_beam_has_the_statistics_of_its_own_history(beams: int, sampled: bool) -> None:
    model, ids = tiny("Llama"), torch.randint(3, 61, (2, 7))
    options: dict[str, Any] = {
        "num_beams": beams,
        "max_new_tokens": 8,
        "num_return_sequences": beams,
        "pad_token_id": 0,
    }
    options |= {"attention_mask": torch.ones_like(ids), "do_sample": sampled}
    torch.manual_seed(1)
    told = model.generate(ids, return_dict_in_generate=True, output_scores=True, **options)
    plain, came_from = told.sequences, told.beam_indices[:, :8]
    assert (came_from != came_from[:, :1]).any()  # hypotheses did change places
    torch.manual_seed(1)
    with captured(model, "attention", "activations") as recorder:
        assert torch.equal(plain, model.generate(ids, **options))
    maps = maps_of(model, plain[:, :-1])
    record = recorder.run["attention"].isel(step=1)
    assert len(np.unique(record.key_sequence.values)) == 2 * beams
    rows = [row_of(record, maps[:, sequence], 7) for sequence in range(2 * beams)]
    with torch.no_grad(), captured(model, "activations") as whole:
        model(plain[:, :-1], use_cache=False)
    stream, all_at_once = recorder.run["activations"].isel(step=1), whole.run["activations"].isel(step=0)
    for sequence, row in enumerate(rows):
        mine = stream["norm_out"].values[..., stream.sequence.values == row]
        other = all_at_once["norm_out"].values[..., all_at_once.sequence.values == sequence]
        assert np.allclose(mine, other[..., 7:], rtol=1e-4)
    histories = {tuple(row) for row in plain[:, :-1].tolist()}
    assert len(set(rows)) == len(histories)
    assert all(row // beams == at // beams for at, row in enumerate(rows))


ASSISTED: list[tuple[str, dict[str, Any]]] = [
    ("lookup", {"prompt_lookup_num_tokens": 3}),
    ("assistant", {}),
    ("same", {}),
    ("sampled", {"do_sample": True}),
    ("window", {"prompt_lookup_num_tokens": 3}),
    ("static", {"prompt_lookup_num_tokens": 3}),
]


@pytest.mark.parametrize(("helper", "more"), ASSISTED)
def test_tokens_that_were_taken_back_are_not_in_the_record(helper: str, more: dict[str, Any]) -> None:
    from transformers import StaticCache

    model = tiny("Mistral", sliding_window=6) if helper == "window" else tiny("Llama")
    ids = torch.tensor([[5, 9, 11, 5, 9, 12, 5, 9, 11, 5, 9]])
    other = {"assistant": tiny("Llama", seed=3), "same": model, "sampled": tiny("Llama", seed=3)}.get(helper)
    options: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    options |= more | ({} if other is None else {"assistant_model": copy.deepcopy(other)})
    torch.manual_seed(0)
    fresh = (lambda: holding(StaticCache(model.config, max_cache_len=40))) if helper == "static" else dict
    plain = model.generate(ids, **options, **fresh())
    if other is not None:
        options["assistant_model"] = copy.deepcopy(other)
    torch.manual_seed(0)
    with captured(model, "attention", "activations", "keys_values") as recorder:
        assert torch.equal(plain, model.generate(ids, **options, **fresh()))
    assert recorder.run.provenance["calls"] < 14 or helper in ("assistant", "sampled", "window")
    record = recorder.run["attention"]
    assert list(record.phase.values) == ["prefill", "decode"]
    maps = maps_of(model, plain[:, :-1])[:, 0]
    prefill, decode = record.isel(step=0), record.isel(step=1)
    assert np.allclose(prefill["mass"].values[..., :11], maps[..., :11, :11].sum(-2), atol=1e-5)
    seen = int((decode.query_position.values >= 0).sum()) + 11
    assert int((decode.key_position.values >= 0).sum()) == seen
    assert seen in (24, 25)  # the last token may have been a guess that was right
    maps = maps_of(model, plain[:, :seen])[:, 0]
    cut = decode.isel(key=slice(0, seen), query=slice(0, seen - 11))
    check_rows(cut, maps, 0, 11)
    stream = recorder.run["activations"].isel(step=1)
    assert stream.position.values[: seen - 11].tolist() == list(range(11, seen))
    norms = recorder.run["keys_values"].isel(step=1)["key_norm"].values[0, 0, :seen]
    assert np.isfinite(norms[-5:]).all()
    assert np.isfinite(norms).all() == (helper != "window")


def test_an_assistant_that_is_watched_forgets_what_was_refused() -> None:
    model, assistant = tiny("Llama"), tiny("Llama", seed=3)
    ids = torch.tensor([[5, 9, 11, 5, 9, 12, 5, 9, 11]])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    plain = model.generate(ids, assistant_model=copy.deepcopy(assistant), **options)
    with captured(model) as main, captured(assistant) as beside:
        assert torch.equal(plain, model.generate(ids, assistant_model=assistant, **options))
    for watched, recorder, first in (
        (model, main, 9),
        (assistant, beside, 8),
    ):  # the assistant reads its last token again
        record = recorder.run["attention"]
        assert list(record.phase.values) == ["prefill", "decode"]
        decode = record.isel(step=1)
        seen = int((decode.query_position.values >= 0).sum()) + first
        assert plain.shape[1] - 4 <= seen <= plain.shape[1]
        assert int((decode.key_position.values >= 0).sum()) == seen
        check_rows(
            decode.isel(key=slice(0, seen), query=slice(0, seen - first)),
            maps_of(watched, plain[:, :seen])[:, 0],
            0,
            first,
        )
        assert not any("taken back" in note for note in recorder.run.notes)


def test_sequences_of_one_prompt_have_their_own_rows() -> None:
    model, ids = tiny("Llama"), torch.randint(3, 61, (2, 6))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(0)
    with captured(model) as recorder:
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    maps, record = maps_of(model, plain[:, :-1]), recorder.run["attention"]
    for sequence in range(6):
        check_rows(record.isel(step=1), maps[:, sequence], sequence, 6)


def test_a_forward_that_backward_repeats_is_no_step() -> None:
    from torch.utils.checkpoint import checkpoint

    from .test_sites import Body, PreNorm

    model, x = Body(PreNorm), torch.randn(2, 5, 16)
    block = model.blocks[0]
    with captured(block, "activations") as recorder:
        for _ in range(2):
            checkpoint(block, x.clone().requires_grad_(), use_reentrant=False).sum().backward()
    assert recorder.run["activations"].sizes["step"] == 2
    assert recorder.run.provenance["calls"] == 2


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("beams", [1, 3])
def test_an_encoder_and_its_decoder_are_one_text(beams: int, cache: str | None) -> None:
    from .test_recorder import t5

    model, ids, mask = t5("sdpa"), torch.randint(3, 61, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    mask[1, 6:] = 0
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "num_beams": beams,
        "num_return_sequences": beams,
    }
    options |= {"do_sample": False, "attention_mask": mask, "cache_implementation": cache}
    plain = model.generate(ids, **options)
    with captured(model, "attention", "activations") as recorder:
        assert torch.equal(plain, model.generate(ids, **options))
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        given = {"input_ids": ids.repeat_interleave(beams, 0), "attention_mask": mask.repeat_interleave(beams, 0)}
        told = eager(**given, decoder_input_ids=plain[:, :-1], output_attentions=True)
    record = recorder.run["attention"]
    assert list(record.phase.values) == ["prefill", "decode"]
    encoder = torch.stack(told.encoder_attentions)[:, ::beams].double().numpy()
    mass = [encoder[:, b, :, :n, :n].sum(-2) for b, n in ((0, 9), (1, 6))]
    assert np.allclose(
        record["mass"].isel(step=0).sel(layer=[0, 1]).values[..., :15], np.concatenate(mass, -1), atol=1e-5
    )
    maps = torch.stack(told.decoder_attentions).double().numpy()
    decode = record.isel(step=1).sel(layer=[2, 3])
    if beams == 1:
        for sequence in range(2):
            check_rows(decode, maps[:, sequence], sequence, 1)
    else:
        rows = [row_of(decode, maps[:, sequence], 1) for sequence in range(2 * beams)]
        assert len(set(rows)) == len({tuple(row) for row in plain[:, :-1].tolist()})


def test_parts_of_a_model_that_are_called_alone_are_seen() -> None:
    from .test_recorder import t5

    model, ids = t5("sdpa"), torch.randint(3, 61, (2, 9))
    with torch.no_grad(), captured(model, "activations", every=2) as recorder:
        for _ in range(4):
            model.get_encoder()(ids)
    record = recorder.run["activations"]
    assert record.sizes["step"] == 2
    assert list(record.layer.values) == [0, 1]


def test_beams_that_are_streamed_to_disk_keep_their_history(tmp_path: Any) -> None:
    model, ids = tiny("Llama"), torch.randint(3, 61, (2, 7))
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 8, "num_return_sequences": 3, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(ids), "do_sample": False}
    with captured(model, path=tmp_path / "run.zarr") as recorder:
        for _ in range(2):
            plain = model.generate(ids, **options)
    maps, record = maps_of(model, plain[:, :-1]), recorder.run["attention"]
    assert list(record.phase.values) == ["prefill", "decode"] * 2
    for step in (1, 3):
        rows = [row_of(record.isel(step=step), maps[:, sequence], 7) for sequence in range(6)]
        assert len(set(rows)) == len({tuple(row) for row in plain[:, :-1].tolist()})


@pytest.mark.parametrize("streamed", [False, True])
def test_documents_that_share_a_sequence_are_sequences_of_their_own(tmp_path: Any, streamed: bool) -> None:
    model, lengths = tiny("Llama"), (5, 1, 7)
    ids = torch.randint(3, 61, (1, 13))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    options = {"path": tmp_path / "run.zarr"} if streamed else {}
    with torch.no_grad(), captured(model, "attention", "activations", **options) as recorder:
        model(ids, position_ids=positions, use_cache=False)
    record, stream = (recorder.run[name].isel(step=0) for name in ("attention", "activations"))
    expected = [n for n, length in enumerate(lengths) for _ in range(length)]
    assert record.key_sequence.values.tolist() == record.query_sequence.values.tolist() == expected
    assert stream.sequence.values.tolist() == expected
    assert stream.position.values.tolist() == positions[0].tolist()
    for number, text in enumerate(ids.split(lengths, 1)):
        (keys, queries), maps = of_sequence(record, number), maps_of(model, text)[:, 0]
        assert np.allclose(keys["mass"].values, maps.sum(-2), atol=1e-5)
        assert np.allclose(queries["entropy"].values, entropy_of(maps), atol=1e-4)


def test_every_other_text_is_watched_whole() -> None:
    model, texts = tiny("Llama"), torch.randint(3, 61, (4, 6))
    with captured(model, every=2) as recorder:
        said = [
            model.generate(t[None], max_new_tokens=4, do_sample=False, attention_mask=torch.ones(1, 6)) for t in texts
        ]
    record = recorder.run["attention"]
    assert list(record.phase.values) == ["prefill", "decode"] * 2
    for step, text in ((1, 0), (3, 2)):
        check_rows(record.isel(step=step), maps_of(model, said[text][:, :-1])[:, 0], 0, 6)
