"""Generation: what is recorded of a text, however it was written, is what one forward over the whole text would show."""

from __future__ import annotations

import copy
import gc
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bnviz


def tiny(kind: str, **options: Any) -> Any:
    """A small decoder with random weights, in eval mode, whose texts differ from row to row."""
    import transformers

    torch.manual_seed(options.pop("seed", 0))
    sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "eos_token_id": None,
        "bos_token_id": 1,
    }
    sizes |= {"head_dim": 8} if kind.startswith("Gemma") else {}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def maps_of(model: Any, ids: Tensor, mask: Tensor | None = None) -> np.ndarray:
    """(layer, batch, head, query, key): attention of one eager forward over whole texts."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return (
            torch.stack(model(ids, attention_mask=mask, output_attentions=True, use_cache=False).attentions)
            .double()
            .numpy()
        )


def entropy_of(maps: np.ndarray) -> np.ndarray:
    return -np.where(maps > 0, maps * np.log(np.where(maps > 0, maps, 1)), 0).sum(-1)


def of_sequence(record: Any, sequence: int) -> tuple[Any, Any]:
    """The keys and the queries of one sequence of a record of one step."""
    return (
        record.isel(key=record.key_sequence.values == sequence),
        record.isel(query=record.query_sequence.values == sequence),
    )


def check_rows(record: Any, maps: np.ndarray, sequence: int, first: int, real: np.ndarray | None = None) -> None:
    """The queries of one text from token `first` on, as recorded in one row, against whole `maps` (layer, head, query, key)."""
    real = np.ones(maps.shape[-1], bool) if real is None else real
    maps = maps[..., real, :][..., real]
    first -= int((~real[:first]).sum())
    keys, queries = of_sequence(record, sequence)
    assert queries.query_position.values.tolist() == list(range(first, maps.shape[-1]))
    assert keys.key_position.values.tolist() == list(range(maps.shape[-1]))
    rows = maps[..., first:, :]
    assert np.allclose(keys["mass"].values, rows.sum(-2), atol=1e-5)
    assert np.allclose(keys["peak"].values, rows.max(-2), atol=1e-5)
    assert np.allclose(keys["last_row"].values, rows[..., -1, :], atol=1e-5)
    assert np.allclose(queries["entropy"].values, entropy_of(rows), atol=1e-4)


def holding(cache: Any) -> dict[str, Any]:
    """The argument of a model's forward that gives it a cache; its name changed with releases."""
    from transformers import LlamaForCausalLM

    return {"cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values": cache}


def captured(model: Any, *probes: str, **options: Any) -> Any:
    return bnviz.capture(model, probes=list(probes or ("attention",)), strict=True, **options)


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


def row_of(record: Any, maps: np.ndarray, first: int) -> int:
    """The sequence of a record that has the statistics of one text, whose attention is `maps` (layer, head, query, key)."""
    for sequence in np.unique(record.key_sequence.values):
        keys, _ = of_sequence(record, sequence)
        if np.allclose(keys["mass"].values, maps[..., first:, :].sum(-2), atol=1e-5):
            check_rows(record, maps, sequence, first)
            return int(sequence)
    raise AssertionError("no sequence of the record has the statistics of this text")


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


def test_a_prompt_in_chunks_is_one_row() -> None:
    model, ids = tiny("Llama"), torch.randint(3, 61, (2, 45))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 4,
        "do_sample": False,
        "prefill_chunk_size": 20,
    }
    plain = model.generate(ids, **options)
    with captured(model, "attention", "activations") as recorder:
        assert torch.equal(plain, model.generate(ids, **options))
    whole = torch.cat([mask, mask.new_ones(2, 3)], 1)
    maps, record = maps_of(model, plain[:, :-1], whole), recorder.run["attention"]
    assert list(record.phase.values) == ["prefill", "decode"]
    for sequence in range(2):
        real = whole[sequence].bool().numpy()
        check_rows(record.isel(step=0), maps[:, sequence, :, :45, :45], sequence, 0, real[:45])
        check_rows(record.isel(step=1), maps[:, sequence], sequence, 45, real)
    assert recorder.run["activations"].isel(step=0).position.values.tolist() == [*range(45), *range(40)]


@pytest.mark.parametrize("short", [True, False])
def test_a_conversation_goes_on_with_rows_of_its_own(short: bool) -> None:
    from transformers import DynamicCache

    model, cache = tiny("Llama"), DynamicCache()
    first, more = torch.randint(3, 61, (1, 9)), torch.randint(3, 61, (1, 5 if short else 40))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False} | holding(cache)
    with captured(model) as recorder:
        said = model.generate(first, attention_mask=torch.ones_like(first), **options)
        whole = torch.cat([said, more], 1)
        said = model.generate(whole, attention_mask=torch.ones_like(whole), **options)
    maps, record = maps_of(model, said[:, :-1])[:, 0], recorder.run["attention"]
    assert list(record.phase.values) == ["prefill", "decode", "prefill", "decode"]
    end = whole.shape[1]
    for step, (start, stop) in enumerate([(0, 9), (9, 12), (12, end), (end, end + 3)]):
        row = record.isel(step=step)
        row = row.isel(key=row.key_position.values >= 0, query=row.query_position.values >= 0)
        check_rows(row, maps[..., :stop, :stop], 0, start)


def test_texts_that_take_turns_do_not_mix() -> None:
    from transformers import DynamicCache

    model, caches = tiny("Llama"), (DynamicCache(), DynamicCache())
    texts = torch.randint(3, 61, (2, 12))
    with torch.no_grad(), captured(model) as recorder:
        for cache, text in zip(caches, texts, strict=True):
            model(text[None, :6], **holding(cache))
        for at in range(6, 12):
            for cache, text in zip(caches, texts, strict=True):
                model(text[None, at : at + 1], **holding(cache))
    maps, record = maps_of(model, texts), recorder.run["attention"]
    assert list(record.phase.values) == ["prefill", "prefill", "decode", "decode"]
    for text in range(2):
        check_rows(record.isel(step=2 + text), maps[:, text], 0, 6)


def test_one_cache_that_two_models_fill_in_turn() -> None:
    from transformers import DynamicCache

    model, cache, ids = tiny("Llama"), DynamicCache(), torch.randint(3, 61, (1, 12))
    other = copy.deepcopy(model)
    with torch.no_grad(), captured(model) as recorder, captured(other) as beside:
        for at in range(12):
            (model, other)[at % 2](ids[:, at : at + 1], **holding(cache))
    maps = maps_of(model, ids)[:, 0]
    for first, record in ((0, recorder.run["attention"]), (1, beside.run["attention"])):
        positions = np.concatenate([row[row >= 0] for row in record.query_position.values])
        assert positions.tolist() == list(range(first, 12, 2))[: len(positions)]
        entropy = np.concatenate([v[..., ~np.isnan(v).all((0, 1))] for v in record["entropy"].values], -1)
        assert np.allclose(entropy, entropy_of(maps)[..., first::2], atol=1e-4)


def test_sequences_of_one_prompt_have_their_own_rows() -> None:
    model, ids = tiny("Llama"), torch.randint(3, 61, (2, 6))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(0)
    with captured(model) as recorder:
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    maps, record = maps_of(model, plain[:, :-1]), recorder.run["attention"]
    for sequence in range(6):
        check_rows(record.isel(step=1), maps[:, sequence], sequence, 6)


def test_a_static_cache_that_is_used_again_begins_anew() -> None:
    model, ids = tiny("Llama"), torch.randint(3, 61, (2, 6))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    with captured(model) as recorder:
        for text in (ids, ids.flip(0)):
            plain = model.generate(text, attention_mask=torch.ones_like(ids), **options)
    record = recorder.run["attention"]
    assert list(record.phase.values) == ["prefill", "decode"] * 2
    maps = maps_of(model, plain[:, :-1])
    for sequence in range(2):
        check_rows(record.isel(step=3), maps[:, sequence], sequence, 6)


def test_sequences_that_are_chosen_from_a_cache_keep_their_history() -> None:
    from transformers import DynamicCache

    model, cache, ids = tiny("Llama"), DynamicCache(), torch.randint(3, 61, (2, 5))
    with torch.no_grad(), captured(model) as recorder:
        model(ids, **holding(cache))
        cache.batch_repeat_interleave(2)
        texts = torch.cat([ids.repeat_interleave(2, 0), torch.randint(3, 61, (4, 1))], 1)
        model(texts[:, -1:], **holding(cache))
        chosen = torch.tensor([3, 0])
        cache.batch_select_indices(chosen)
        texts = torch.cat([texts[chosen], torch.randint(3, 61, (2, 1))], 1)
        model(texts[:, -1:], **holding(cache))
    maps, record = maps_of(model, texts), recorder.run["attention"]
    assert list(record.phase.values) == ["prefill", "decode"]
    for sequence in range(2):
        check_rows(record.isel(step=1), maps[:, sequence], sequence, 5)


def test_a_text_cut_back_to_its_prompt_is_another_text() -> None:
    from transformers import DynamicCache

    model, cache, ids = tiny("Llama"), DynamicCache(), torch.randint(3, 61, (1, 8))
    endings = torch.randint(3, 61, (2, 4))
    with torch.no_grad(), captured(model) as recorder:
        model(ids, **holding(cache))
        for ending in endings:
            model(ending[None], **holding(cache))
            cache.crop(-4)
    record = recorder.run["attention"]
    entropy = entropy_of(maps_of(model, torch.cat([ids.expand(2, -1), endings], 1)))
    found = record["entropy"].values
    assert np.allclose(found[0, ..., 8:12], entropy[:, 0, :, 8:], atol=1e-4)  # the first ending went on with the prompt
    assert np.allclose(found[1, ..., :4], entropy[:, 1, :, 8:], atol=1e-4)
    assert record.query_position.values[1, :4].tolist() == [8, 9, 10, 11]


def test_classes_of_caches_are_as_they_were() -> None:
    from transformers import DynamicCache
    from transformers.cache_utils import Cache

    before = {
        (cls, name): vars(cls).get(name) for cls in (Cache, DynamicCache) for name in ("crop", "reorder_cache", "reset")
    }
    model, ids = tiny("Llama"), torch.randint(3, 61, (1, 5))
    with captured(model):
        model.generate(ids, max_new_tokens=3, do_sample=False)
        assert vars(DynamicCache).get("crop") is not before[DynamicCache, "crop"]
    assert {at: vars(at[0]).get(at[1]) for at in before} == before


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


class Gpt(torch.nn.Module):
    """A decoder as people write it: no names that are known, its cache a list of tuples of tensors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = torch.nn.Embedding(31, 16), torch.nn.Linear(16, 31)
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({"attn": Causal(), "mlp": torch.nn.Linear(16, 16)}) for _ in range(2)
        )

    def forward(self, tokens: Tensor, past: Any = None) -> tuple[Tensor, list[Any]]:
        x, kept = self.table(tokens), []
        for at, block in enumerate(self.blocks):
            y, held = block["attn"](x, None if past is None else past[at])
            x = x + y + block["mlp"](x)
            kept.append(held)
        return self.head(x), kept


class Causal(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)

    def forward(self, x: Tensor, past: Any) -> tuple[Tensor, Any]:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2)), (k, v)


def test_a_cache_of_tuples_is_followed() -> None:
    model, ids = Gpt().eval(), torch.randint(0, 31, (2, 10))
    with torch.no_grad(), captured(model) as whole:
        model(ids)
    with torch.no_grad(), captured(model) as recorder:
        _, past = model(ids[:, :5])
        for at in range(5, 10):
            _, past = model(ids[:, at : at + 1], past)
    record, all_at_once = recorder.run["attention"], whole.run["attention"].isel(step=0)
    assert list(record.phase.values) == ["forward", "decode"]
    decode = record.isel(step=1)
    for sequence in range(2):
        _, mine = of_sequence(decode, sequence)
        _, other = of_sequence(all_at_once, sequence)
        assert mine.query_position.values.tolist() == [5, 6, 7, 8, 9]
        for name in ("entropy", "echo_mass", "previous_mass"):
            assert np.allclose(mine[name].values, other[name].values[..., 5:], atol=1e-5, equal_nan=True), name


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


@pytest.mark.parametrize("static", [False, True])
def test_a_capture_that_begins_in_the_middle_of_a_text(static: bool) -> None:
    from transformers import DynamicCache, StaticCache

    model, ids = tiny("Llama"), torch.randint(3, 61, (2, 10))
    cache = StaticCache(model.config, max_cache_len=16) if static else DynamicCache()
    with torch.no_grad():
        model(ids[:, :6], **holding(cache))
        with captured(model) as recorder:
            for at in range(6, 10):
                model(ids[:, at : at + 1], **holding(cache))
    maps, record = maps_of(model, ids), recorder.run["attention"].isel(step=0)
    assert record.phase.item() == "decode"
    for sequence in range(2):
        check_rows(record, maps[:, sequence], sequence, 6)


def test_a_call_that_fails_leaves_no_tokens_behind() -> None:
    from transformers import DynamicCache

    model, cache, ids = tiny("Llama"), DynamicCache(), torch.randint(3, 61, (1, 9))

    def fail(*_: Any) -> None:
        raise RuntimeError("full")

    with torch.no_grad(), captured(model) as recorder:
        model(ids[:, :6], **holding(cache))
        model(ids[:, 6:7], **holding(cache))
        handle = model.model.layers[0].self_attn.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="full"):
            model(ids[:, 7:8], **holding(cache))
        handle.remove()
        for at in (7, 8):
            model(ids[:, at : at + 1], **holding(cache))
    check_rows(recorder.run["attention"].isel(step=1), maps_of(model, ids)[:, 0], 0, 6)


def test_texts_do_not_outlive_their_caches() -> None:
    from transformers import DynamicCache

    model, ids = tiny("Llama"), torch.randint(3, 61, (1, 4))
    with torch.no_grad(), captured(model) as recorder:
        for _ in range(20):
            model(ids, **holding(DynamicCache()))
            gc.collect()
            assert recorder._session is not None
            assert len(recorder._session.clock._stories._known) <= 1
