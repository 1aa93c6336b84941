"""torch's own attention and transformer layers: their fused paths stay on, and what is seen is what they computed."""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnviz
from bnviz.capture.around import around
from bnviz.capture.attention.native import fused_layer

FUSED = "aten::_transformer_encoder_layer_fwd"
FUSED_ATTENTION = "aten::_native_multi_head_attention"


def operators(run: Any) -> tuple[Any, set[str]]:
    """What `run()` gave, and the names of the operators it ran."""
    with warnings.catch_warnings(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        warnings.simplefilter("ignore")
        found = run()
    return found, {event.name for event in profile.events()}


@contextlib.contextmanager
def told(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """By path: the weights (batch, head, query, key) that each attention of a plain copy says it used, fast paths off."""
    said: dict[str, list[Tensor]] = {}
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):

            def ask(m: nn.Module, args: Any, kwargs: Any, _: Any, path: str = path) -> None:
                given = {**kwargs, "need_weights": True, "average_attn_weights": False}
                with torch.no_grad():
                    weights = nn.MultiheadAttention.forward(m, *args[:3], **given)[1]  # type: ignore[arg-type]
                said.setdefault(path, []).append(weights if weights.dim() == 4 else weights[None])

            handles.append(module.register_forward_hook(ask, with_kwargs=True))
    try:
        yield said
    finally:
        for handle in handles:
            handle.remove()


def weights_of(seen: Any) -> Tensor:
    """(batch, head, query, key): the softmax that an observation describes, its extra columns last, as torch has them."""
    logits = seen.scale * seen.query.double() @ seen.key.double().transpose(-1, -2)
    if seen.allowed is not None:
        allowed = seen.allowed
        logits = logits.masked_fill(~allowed, -torch.inf) if allowed.dtype == torch.bool else logits + allowed
    return logits.softmax(-1)


@contextlib.contextmanager
def spied(model: nn.Module) -> Iterator[list[Any]]:
    """The observations of attention that a capture of `model` makes."""
    seen: list[Any] = []
    recorder = bnviz.capture(model, probes=["attention", "activations"], strict=True)
    probe = recorder._probes["attention"]
    observe = probe.observe
    probe.observe = lambda one: (seen.append(one), observe(one))[1]
    with recorder:
        yield seen


def test_an_own_hook_on_a_fused_layer_would_switch_it_off() -> None:
    """Why layers are looked at through their class."""
    layer, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        assert FUSED in operators(lambda: layer(x))[1]
        with around(layer, lambda *_: None, lambda *_: None):
            assert FUSED not in operators(lambda: layer(x))[1]
        with around(layer, lambda *_: None, lambda *_: None, quiet=True):
            assert FUSED in operators(lambda: layer(x))[1]


@pytest.mark.parametrize(
    ("norm_first", "masks", "mode"),
    [
        *itertools.product((False, True), ("none", "padding", "causal", "both"), ("eval",)),
        (False, "both", "train"),
        (True, "padding", "train"),
        (False, "padding", "grad"),
        (True, "both", "grad"),
    ],
)
def test_every_layer_of_an_encoder_is_seen_and_none_notices(norm_first: bool, masks: str, mode: str) -> None:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, 0.0 if mode != "train" else 0.1, norm_first=norm_first, batch_first=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.TransformerEncoder(layer, 3, nn.LayerNorm(32))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.train(mode == "train")
    x, given = torch.randn(3, 9, 32), dict[str, Any]()
    lengths = torch.tensor([8, 6, 4])
    if masks in ("padding", "both"):
        given["src_key_padding_mask"] = torch.arange(9) >= lengths[:, None]
    if masks in ("causal", "both"):
        given["mask"] = torch.ones(9, 9, dtype=torch.bool).triu(1)
    grads = contextlib.nullcontext() if mode == "grad" else torch.no_grad()
    plain = copy.deepcopy(model)
    with grads, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(2)
        expected, ran = operators(lambda: plain(x, **given))
        with spied(model) as seen:
            torch.manual_seed(2)
            found, now = operators(lambda: model(x, **given))
            state = torch.get_rng_state()
    assert torch.equal(found, expected)
    if mode == "train":
        torch.manual_seed(2)
        plain(x, **given)
        assert torch.equal(torch.get_rng_state(), state)
    assert (FUSED in ran) == (FUSED in now) == (mode == "eval")
    assert [s.site.path for s in seen] == [f"layers.{i}.self_attn" for i in range(3)]
    if mode == "train":
        return  # dropout: the copy below draws other numbers from layer 1 on
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), told(plain) as said:
            plain(x, **given)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    for one in seen:
        weights = said[one.site.path][0].double()
        mine = weights_of(one)
        for b, real in enumerate(lengths.tolist() if masks in ("padding", "both") else [9] * 3):
            assert torch.allclose(mine[b, :, :real, :real], weights[b, :, :real, :real], atol=1e-5)
        if masks in ("padding", "both"):
            assert torch.equal(one.context.valid.sum(1), lengths)
            assert torch.equal(one.valid_keys.sum(1), lengths)


ATTENTIONS: list[tuple[dict[str, Any], str]] = [
    ({"batch_first": True}, "self"),
    ({"batch_first": False}, "self"),
    ({"batch_first": True}, "unbatched"),
    ({"batch_first": True}, "cross"),
    ({"kdim": 12, "vdim": 10, "batch_first": True}, "cross"),
    ({"kdim": 12, "vdim": 10, "bias": False}, "cross"),
    ({"add_bias_kv": True}, "self"),
    ({"add_zero_attn": True, "batch_first": True}, "cross"),
    ({"add_bias_kv": True, "add_zero_attn": True, "batch_first": True}, "self"),
]


@pytest.mark.parametrize(("options", "kind"), ATTENTIONS)
@pytest.mark.parametrize("masks", ["none", "bool", "float", "heads", "hint"])
def test_attention_is_what_the_module_says_it_was(options: dict[str, Any], kind: str, masks: str) -> None:
    torch.manual_seed(3)
    module, flat = nn.MultiheadAttention(16, 4, **options).eval(), kind == "unbatched"
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    query = torch.randn(2, 5, 16)
    key = torch.randn(2, 7, options.get("kdim", 16)) if kind == "cross" else query
    value = torch.randn(2, 7, options.get("vdim", key.shape[-1])) if kind == "cross" else query
    batch, keys, given = 1 if flat else 2, key.shape[1], dict[str, Any]()
    hidden = torch.rand(5, keys) < 0.3
    hidden[:, 0] = False
    padding = torch.arange(keys) >= torch.tensor([[keys], [keys - 2]])
    if masks == "bool":
        given = {"attn_mask": hidden, "key_padding_mask": padding}
    elif masks == "float":
        bias = torch.randn(5, keys).masked_fill(hidden, -torch.inf)
        given = {"attn_mask": bias, "key_padding_mask": torch.zeros(2, keys).masked_fill(padding, -torch.inf)}
    elif masks == "heads":
        given = {"attn_mask": torch.rand(batch * 4, 5, keys) < 0.3}
        given["attn_mask"][..., 0] = False
    elif masks == "hint":
        given = {"attn_mask": torch.ones(5, keys, dtype=torch.bool).triu(1), "is_causal": True, "need_weights": False}
    if flat and "key_padding_mask" in given:
        given["key_padding_mask"] = given["key_padding_mask"][1]
    laid = (lambda t: t[0]) if flat else (lambda t: t) if module.batch_first else (lambda t: t.transpose(0, 1))
    known: dict[int, Tensor] = {}
    parts = [known.setdefault(id(part), laid(part)) for part in (query, key, value)]
    with torch.no_grad():
        expected = module(*parts, **given)[0]
        with spied(module) as seen:
            found = module(*parts, **given)[0]
        said = module(*parts, **{**given, "need_weights": True, "average_attn_weights": False})[1]
    assert torch.equal(found, expected)
    said = said if said.dim() == 4 else said[None]
    (one,) = seen
    extra = int(module.bias_k is not None) + int(module.add_zero_attn)
    mine = weights_of(one).roll(-extra, -1)
    if masks != "hint" or not extra:  # with the hint torch hides its own extra columns, or not, by the kernel it takes
        assert torch.allclose(mine, said.double(), atol=1e-5)
    written = mine @ one.value.double().roll(-extra, -2)
    written = written.transpose(1, 2).flatten(2) @ module.out_proj.weight.double().T
    written = written + (0 if module.out_proj.bias is None else module.out_proj.bias.double())
    assert torch.allclose(
        written,
        (expected[None] if flat else expected if module.batch_first else expected.transpose(0, 1)).double(),
        atol=1e-5,
    )
    if extra:
        assert one.valid_keys is not None
        assert not one.valid_keys[:, :extra].any()
        assert one.key.shape[-2] == keys + extra


def test_the_record_of_an_attention_with_columns_that_are_no_tokens_keeps_the_tokens_only() -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 2, add_bias_kv=True, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad(), bnviz.capture(module, probes=["attention", "keys_values"], strict=True) as recorder:
        module(x, x, x)
        said = module(x, x, x, average_attn_weights=False)[1]
    record = recorder.run["attention"].isel(step=0)
    assert record.key_position.values.tolist() == [0, 1, 2, 3, 4] * 2
    mass = torch.cat(list(said.sum(2)[..., :5]), -1)
    assert np.allclose(record["mass"].values[0], mass.numpy(), atol=1e-5)
    previous = torch.cat([said[b].diagonal(-1, 1, 2) for b in range(2)], -1)
    found = record["previous_mass"].values[0].reshape(2, 2, 5)[:, :, 1:].reshape(2, 8)
    assert np.allclose(found, previous.numpy(), atol=1e-5)
    assert np.isfinite(recorder.run["keys_values"]["key_norm"].values).all()


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_decoder_is_seen_in_itself(batch_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, batch_first=batch_first), 2).eval()
    target, memory = torch.randn(2, 6, 16), torch.randn(2, 4, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    padding = torch.arange(6) >= torch.tensor([[6], [4]])
    if not batch_first:
        target, memory = target.transpose(0, 1), memory.transpose(0, 1)
    given = {"tgt_mask": mask, "tgt_key_padding_mask": padding.float().masked_fill(padding, -torch.inf)}
    with torch.no_grad():
        expected = model(target, memory, **given)
        with spied(model) as seen:
            assert torch.equal(model(target, memory, **given), expected)
        with told(model) as said:
            model(target, memory, **given)
    assert [one.site.path for one in seen if one.site.kind == "attention"] == [
        "layers.0.self_attn",
        "layers.1.self_attn",
    ]
    for one in seen:
        mine, weights = weights_of(one), said[one.site.path][0].double()
        assert torch.allclose(mine[0], weights[0], atol=1e-5)
        assert torch.allclose(mine[1, :, :4], weights[1, :, :4], atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_what_a_decoder_reads_of_its_encoder_is_a_record_of_its_own(training: bool) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Transformer(16, 2, 2, 2, 32, 0.0, batch_first=True).train(training)
    source, target = torch.randn(2, 7, 16), torch.randn(2, 5, 16)
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    given = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    given["tgt_mask"] = nn.Transformer.generate_square_subsequent_mask(5)
    plain = copy.deepcopy(model)
    with torch.set_grad_enabled(training), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = plain(source, target, **given)
        with bnviz.capture(model, probes=["attention", "cross_attention", "activations"], strict=True) as recorder:
            found, ran = operators(lambda: model(source, target, **given))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with told(plain) as said:
                plain(source, target, **given)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert torch.equal(found, expected)
    assert (FUSED in ran) == (not training)
    own, across = (recorder.run[name].isel(step=0) for name in ("attention", "cross_attention"))
    assert list(own.path.values) == [
        f"{side}.layers.{i}.self_attn" for side in ("encoder", "decoder") for i in range(2)
    ]
    assert list(across.path.values) == [f"decoder.layers.{i}.multihead_attn" for i in range(2)]
    for at in range(2):
        maps = said[f"decoder.layers.{at}.multihead_attn"][0]
        mass = torch.cat([maps[b, :, :, :n].sum(1) for b, n in ((0, 7), (1, 4))], -1)
        assert np.allclose(across["mass"].values[at], mass.detach().numpy(), atol=1e-5)
    cosine = recorder.run["activations"]["cosine"].isel(step=0).sel(kind="block")
    assert [int(np.isfinite(cosine.sel(layer=layer)).sum()) for layer in range(4)] == [11, 11, 10, 10]


@pytest.mark.parametrize("layout", ["batch_first", "tokens_first", "unbatched", "nested"])
def test_blocks_of_an_encoder_are_measured_token_by_token(layout: str) -> None:
    torch.manual_seed(0)
    batch_first = layout != "tokens_first"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=layout == "nested").eval()
    lengths = (5, 3) if layout == "nested" else (6, 6)
    x, padding = torch.randn(2, 6, 16), torch.arange(6) >= torch.tensor(lengths)[:, None]
    given = {"src_key_padding_mask": padding} if layout == "nested" else {}
    x = x[0] if layout == "unbatched" else x if batch_first else x.transpose(0, 1)
    lengths = lengths[:1] if layout == "unbatched" else lengths
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model(x, **given)
        with bnviz.capture(model, probes=["activations", "attention"], strict=True) as recorder:
            found, ran = operators(lambda: model(x, **given))
        middle = model.layers[0](x, **given)
        last = model.layers[1](middle, **given)
    assert torch.equal(found, expected)
    assert (FUSED in ran) == (layout in ("batch_first", "nested"))
    rows = [t[None] if layout == "unbatched" else t if batch_first else t.transpose(0, 1) for t in (x, middle, last)]
    record = recorder.run["activations"].isel(step=0)
    for at in (0, 1):
        cosine = torch.cosine_similarity(rows[at].double(), rows[at + 1].double(), dim=-1)
        flat = torch.cat([cosine[b, :n] for b, n in enumerate(lengths)])
        assert np.allclose(record["cosine"].sel(kind="block", layer=at).values, flat.numpy(), atol=1e-5)
    assert record.sequence.values.tolist() == [b for b, n in enumerate(lengths) for _ in range(n)]
    assert recorder.run["attention"].isel(step=0).query_position.values.tolist() == [
        i for n in lengths for i in range(n)
    ]


def test_a_fused_layer_is_one_block_when_it_is_the_model() -> None:
    model, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = model(x)
        with bnviz.capture(model, strict=True) as recorder:
            found, ran = operators(lambda: model(x))
    assert FUSED in ran
    assert torch.equal(found, expected)
    assert recorder.run["activations"].sizes["layer"] == 1
    assert recorder.run["attention"].sizes["query"] == 10


def test_a_subclass_is_seen_where_its_base_computes() -> None:
    class Scaled(nn.TransformerEncoderLayer):
        def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return 3 * super().forward(2 * src, *args, **kwargs)

    torch.manual_seed(0)
    model, x = nn.Sequential(Scaled(16, 2, 32, batch_first=True), nn.Linear(16, 16)).eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = model(x)
        with spied(model) as seen:
            found, ran = operators(lambda: model(x))
        said = model[0].self_attn(2 * x, 2 * x, 2 * x, average_attn_weights=False)[1]
    assert FUSED in ran
    assert torch.equal(found, expected)
    assert torch.allclose(weights_of(seen[0]), said.double(), atol=1e-5)


def test_attention_alone_keeps_its_fused_path() -> None:
    model, x = nn.MultiheadAttention(16, 2, batch_first=True).eval(), torch.randn(2, 5, 16)
    with torch.no_grad(), spied(model) as seen:
        assert FUSED_ATTENTION in operators(lambda: model(x, x, x, need_weights=False))[1]
    assert len(seen) == 1


def test_a_profiled_encoder_keeps_its_fused_path() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    with torch.no_grad(), bnviz.capture(model, probes=["ops", "attention"], strict=True) as recorder:
        model(torch.randn(2, 5, 16))
    name = recorder.run["ops"]["op"]
    assert FUSED in {name.attrs["table"][i] for i in name.values.ravel()}


def test_classes_are_as_they_were_also_after_an_error() -> None:
    before = {cls: vars(cls)["forward"] for cls in (nn.MultiheadAttention, nn.TransformerEncoderLayer)}
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    with pytest.raises((RuntimeError, AssertionError)), bnviz.capture(model):
        model(torch.randn(2, 5, 17))
    with torch.no_grad(), bnviz.capture(model) as outer, bnviz.capture(model) as inner:
        model(torch.randn(2, 5, 16))
        assert vars(nn.TransformerEncoderLayer)["forward"] is not before[nn.TransformerEncoderLayer]
    assert all(vars(cls)["forward"] is forward for cls, forward in before.items())
    assert np.array_equal(outer.run["attention"]["mass"], inner.run["attention"]["mass"])
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_a_layer_with_a_forward_of_its_own_is_still_seen() -> None:
    """As offloading leaves them."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    for layer in model.layers:
        layer.forward = layer.forward
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = model(x)
        with bnviz.capture(model, probes=["attention", "activations"], strict=True) as recorder:
            found, ran = operators(lambda: model(x))
    assert FUSED in ran
    assert torch.equal(found, expected)
    assert recorder.run["activations"].sizes["layer"] == recorder.run["attention"].sizes["layer"] == 2
    assert "__call__" not in vars(nn.TransformerEncoderLayer)


def test_a_layer_is_known_as_the_owner_of_its_attention() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    assert fused_layer(model, "layers.0.self_attn") is model.layers[0]
    assert fused_layer(model, "layers.0") is None
