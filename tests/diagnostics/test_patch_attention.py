"""Maps over patches: on paper, against whole attention matrices of small models, and where there is no grid."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bnviz
from bnviz.diagnostics._patch_grid import EXTRA, Grid, grid_of
from bnviz.diagnostics.patch_attention import judge, patch_attention
from bnviz.errors import NotCaptured, SchemaError

SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 24}
BOTH = ["attention", "pictures"]


# ------------------------------------------------------------------------------------------------ the grid
@pytest.mark.parametrize(
    ("tokens", "size", "expected"),
    [
        (196, (224, 224), Grid(14, 14)),
        (197, (224, 224), Grid(14, 14, 1)),
        (198, (224, 224), Grid(14, 14, 2)),
        (1374, (518, 518), Grid(37, 37, 5)),
        (1201, (480, 640), Grid(30, 40, 1)),
        (7 * 5 + 1, (30, 20), Grid(7, 5, 1)),  # squares of 4 leave a rest, and are cut there
        (8 * 5, (30, 20), Grid(8, 5)),  # or filled up
        (37, (30, 30), Grid(6, 6, 1)),
        (2, (8, 8), Grid(1, 1, 1)),
        (1, (8, 8), Grid(1, 1)),
        (8, (16, 8), Grid(4, 2)),
        (64, (8, 32), Grid(4, 16)),
        (1000, (16, 16), None),
    ],
)
def test_grids_of_known_models(tokens: int, size: tuple[int, int], expected: Grid | None) -> None:
    assert grid_of(tokens, *size) == expected


@given(st.integers(1, 24), st.integers(1, 24), st.integers(2, 16), st.integers(0, 5))
def test_a_grid_has_room_for_its_tokens_and_no_fewer_others(rows: int, columns: int, patch: int, extra: int) -> None:
    tokens = rows * columns + extra
    found = grid_of(tokens, rows * patch, columns * patch)
    assert found is not None
    assert found.first + found.patches == tokens and found.first <= extra <= EXTRA
    if found.first == extra:
        assert (found.rows, found.columns) == (rows, columns)


# ------------------------------------------------------------------------------------------------ on paper
def record(masses: Any, **coordinates: Any) -> xr.Dataset:
    return xr.Dataset({"mass": (("step", "layer", "head", "key"), np.asarray(masses, float))}, coords=coordinates)


def pictures(height: int, width: int, batch: int = 1, steps: int = 1, frames: int = 1, kept: Any = None) -> xr.Dataset:
    dims = ("step", "image", "pixel_row", "pixel_column", "channel")
    values = np.zeros((steps, batch, 2, 2, 1), np.int16) if kept is None else kept
    sizes = {"height": height, "width": width, "frames": frames, "batch": batch}
    return xr.Dataset({"picture": (dims, values), **{n: ("step", np.full(steps, v)) for n, v in sizes.items()}})


def test_layers_with_fewer_patches_have_larger_cells() -> None:
    fine = np.arange(16.0)
    coarse = np.array([1.0, 2.0, 3.0, 4.0, *[np.nan] * 12])
    none = np.array([1.0] * 5 + [np.nan] * 11)
    result = patch_attention(record([[[fine], [coarse], [none]]]), pictures(8, 8))
    np.testing.assert_allclose(result["attention"].values[0, 0], fine.reshape(4, 4) / fine.mean())
    wide = np.kron(np.array([[1.0, 2.0], [3.0, 4.0]]) / 2.5, np.ones((2, 2)))
    np.testing.assert_allclose(result["attention"].values[0, 1], wide, rtol=1e-6)
    assert result["others"].values.tolist() == [[0, 0, 1]]  # 2 x 2 and a class token
    np.testing.assert_allclose(
        result["attention_mean"].values[0], (fine.reshape(4, 4) / 7.5 + wide + 1.0) / 3, rtol=1e-6
    )


def test_a_text_beside_the_picture_is_no_grid_by_chance() -> None:
    def layer(tokens: int) -> np.ndarray:
        return np.where(np.arange(76) < tokens, 1.0, np.nan)[None]

    text, patches, both, half = layer(12), layer(64), layer(76), layer(16)
    result = patch_attention(record([[text, patches, both, half]]), pictures(16, 16))
    assert result["others"].values.tolist() == [[-1, 0, 12, 0]]
    assert np.isnan(result["attention"].values[0, 0]).all()
    assert "1 layer has no map: the tokens are no grid" in judge(result).caveats[-1]
    assert "The first 12 tokens are taken for no patches" in " ".join(judge(result).caveats)


def test_large_grids_are_joined_and_numbers_are_of_the_patches() -> None:
    mass = np.zeros(36)
    mass[7] = 36.0
    result = patch_attention(record([[[mass]]]), pictures(12, 12), side=4)
    assert result["attention"].shape == (1, 1, 3, 3) and result.attrs["cell"] == 2
    assert result["attention"].values[0, 0, 0, 0] == 9.0 and result["largest"].item() == 36.0
    assert (result["outliers"].item(), result["outlier_share"].item()) == (1, 1.0)
    assert "mean of 2 x 2 patches" in " ".join(judge(result).caveats)


def test_outliers_and_other_tokens_are_found() -> None:
    mass = np.full(65, 0.2)
    mass[0], mass[20] = 24.0, 30.0
    result = patch_attention(record([[[mass]]]), pictures(16, 16))
    total = mass.sum()
    np.testing.assert_allclose(result["other_share"].item(), 24 / total)
    np.testing.assert_allclose(result["outlier_share"].item(), 30 / total)
    told = {one.code: one for one in judge(result).findings}
    assert set(told) == {"patch_attention/outliers", "patch_attention/others"}
    assert "1 of 64 patches" in told["patch_attention/outliers"].sentence
    assert told["patch_attention/others"].where == {"layer": 0, "path": ""}
    assert (
        judge(result).title == f"The patch at row 2, column 3 gets most attention: ×{30 / total * 65:.1f} an even share"
    )
    even = patch_attention(record([[[np.ones(64)]]]), pictures(16, 16))
    assert judge(even).title == "No patch gets more than 1.00 times an even share of attention"
    assert judge(even).findings == ()


def test_maps_of_steps_are_compared_and_what_that_means_depends_on_the_pictures() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.random(16), rng.random(16)
    masses = np.stack([np.stack([m + 0.01 * rng.random(16), rng.random(16)])[:, None] for m in (one, one, one)])
    near = np.stack([np.linspace(0, 250, 64) + noise for noise in rng.normal(0, 3, (3, 64))])
    far = rng.integers(0, 255, (3, 64))
    for kept, code in ((near, "alike"), (far, "place")):
        shown = pictures(8, 8, steps=3, kept=kept.reshape(3, 1, 8, 8, 1).astype(np.int16))
        result = patch_attention(record(masses), shown)
        expected = [np.corrcoef(masses[i, 0, 0], masses[i - 1, 0, 0])[0, 1] for i in (1, 2)]
        np.testing.assert_allclose(result["likeness"].values[1:, 0], expected)
        assert np.isnan(result["likeness"].values[0]).all()
        (finding,) = judge(result).findings
        assert finding.code == f"patch_attention/{code}" and finding.where == {"layer": [0]}
    assert not judge(patch_attention(record(masses), pictures(8, 8, steps=3))).findings
    masses[1] = other
    assert not judge(patch_attention(record(masses), shown)).findings


def test_windows_and_tokens_without_a_grid_are_said() -> None:
    with pytest.raises(
        NotCaptured,
        match=r"40 tokens are no grid .* of 4 x 4 pixels .*'grid': \(rows, columns\), 'first': place\}\}\.$",
    ):
        patch_attention(record([[[np.ones(40)]]]), pictures(4, 4))
    windows = record([[[np.ones(32)]]], key_sequence=(("step", "key"), [np.repeat(np.arange(2), 16)]))
    with pytest.raises(NotCaptured, match="2 sequences for a batch of 1, as within windows"):
        patch_attention(windows, pictures(16, 16))
    with pytest.raises(NotCaptured, match="no step has a picture"):
        patch_attention(record([[[np.ones(4)]]], step=[3]), pictures(2, 2))
    with pytest.raises(SchemaError, match="sequence is 1, expected 0 to 0"):
        patch_attention(record([[[np.ones(4)]]]), pictures(2, 2), sequence=1)
    with pytest.raises(SchemaError, match="side is 0"):
        patch_attention(record([[[np.ones(4)]]]), pictures(2, 2), side=0)
    with pytest.raises(NotCaptured, match="3 x 3 patches from place 0 on do not fit in 4 tokens"):
        patch_attention(record([[[np.ones(4)]]]), pictures(2, 2), grid=(3, 3))


def test_a_grid_is_as_named_and_text_may_stand_behind() -> None:
    mass = np.arange(1.0, 101.0)  # 64 patches, then 36 of a text
    result = patch_attention(record([[[mass]]]), pictures(8, 8), first=0)
    np.testing.assert_allclose(result["attention"].values[0, 0].ravel(), mass[:64] / mass.mean(), rtol=1e-6)
    assert result["others"].item() == 36
    named = patch_attention(record([[[mass]]]), pictures(8, 8), grid=(4, 16), first=30)
    assert named["attention"].shape == (1, 1, 4, 16)
    np.testing.assert_allclose(named["attention"].values[0, 0].ravel(), mass[30:94] / mass.mean(), rtol=1e-6)


def test_an_even_causal_head_is_even_everywhere() -> None:
    queries = np.arange(1, 26)
    mass = np.array([(1 / queries[j:]).sum() for j in range(25)])
    seen = record([[[mass]]]).assign(visible=(("step", "layer", "query"), queries[None, None].astype(float)))
    result = patch_attention(seen, pictures(4, 6))
    assert result["others"].item() == 1
    np.testing.assert_allclose(result["attention"].values, 1.0, rtol=1e-6)


# ------------------------------------------------------------------------------------------------ whole matrices
def vit(kind: str, **sizes: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        **SMALL, **sizes, initializer_range=0.3, attn_implementation="eager"
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}Model")(config).eval().double()


MODELS = [
    ("ViT", {"image_size": (24, 40), "patch_size": 8}, (24, 40), (3, 5), 1),
    ("DeiT", {"image_size": 24, "patch_size": 4}, (24, 24), (6, 6), 2),
    ("Dinov2WithRegisters", {"image_size": 30, "patch_size": 5, "num_register_tokens": 3}, (30, 20), (6, 4), 4),
    ("Dinov2", {"image_size": 28, "patch_size": 7}, (21, 37), (3, 5), 1),  # 37 pixels: 2 are cut off
]


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize(("kind", "sizes", "size", "grid", "extra"), MODELS, ids=[m[0] for m in MODELS])
def test_maps_of_models_are_column_sums_of_their_whole_attention(
    kind: str, sizes: dict[str, Any], size: tuple[int, int], grid: tuple[int, int], extra: int, kernel: str
) -> None:
    model = vit(kind, **sizes)
    given = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        whole = torch.stack(model(given, output_attentions=True).attentions).numpy()  # layer, batch, head, query, key
        model.set_attn_implementation(kernel)
        with bnviz.capture(model, probes=BOTH, strict=True) as recorder:
            model(given)
    for sequence in range(2):
        result = patch_attention(recorder.run["attention"], recorder.run["pictures"], sequence=sequence)
        mass = whole[:, sequence].sum(-2).mean(1)
        np.testing.assert_allclose(result["attention"].values[0], mass[:, extra:].reshape(-1, *grid), rtol=1e-5)
        np.testing.assert_allclose(result["other_share"].values[0], mass[:, :extra].sum(-1) / mass.sum(-1), rtol=1e-5)
        np.testing.assert_allclose(result["largest"].values[0], mass[:, extra:].max(-1), rtol=1e-5)
        assert result["picture"].shape == (1, *size, 3)


def test_a_video_is_the_mean_over_its_moments() -> None:
    model = vit("VideoMAE", image_size=(16, 16), patch_size=4, num_frames=4, tubelet_size=2)
    given = torch.randn(1, 4, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad(), bnviz.capture(model, probes=BOTH, strict=True) as recorder:
        whole = torch.stack(model(given, output_attentions=True).attentions).numpy()
    result = bnviz.diagnose(recorder.run, "patch_attention", strict=True)["patch_attention"]
    mass = whole[:, 0].sum(-2).mean(1).reshape(-1, 2, 4, 4)
    assert result.attrs["moments"] == 2
    np.testing.assert_allclose(result["attention"].values[0], mass.mean(1), rtol=1e-5)


def test_steps_of_a_diffusion_transformer_have_maps_of_their_own() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 12, "patch_size": 2}
    model = diffusers.DiTTransformer2DModel(in_channels=4, out_channels=4, num_embeds_ada_norm=1000, **sizes).eval()
    read: list[torch.Tensor] = []
    for block in model.transformer_blocks:
        block.attn1.register_forward_pre_hook(lambda _, args, kwargs: read.append(args[0].detach()), with_kwargs=True)
    noise, clean = torch.randn(2, 1, 4, 12, 12, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), bnviz.capture(model, probes=BOTH, strict=True) as recorder:
        for at in (0.9, 0.6, 0.3):
            step = torch.tensor([int(1000 * at)])
            model(clean * (1 - at) + noise * at, timestep=step, class_labels=torch.tensor([1]))
    expected = np.stack([_mass(model.transformer_blocks[i % 2].attn1, hidden) for i, hidden in enumerate(read)])
    result = bnviz.diagnose(recorder.run, "patch_attention", strict=True)["patch_attention"]
    np.testing.assert_allclose(result["attention"].values, expected.reshape(3, 2, 6, 6), rtol=1e-4)
    assert np.isfinite(result["likeness"].values[1:]).all() and result["others"].values.max() == 0
    assert 0.5 < result["picture_likeness"].values[1] < 1


def _mass(attention: Any, hidden: torch.Tensor) -> np.ndarray:
    """(patch,): attention received, by hand from the weights; mean over heads."""
    with torch.no_grad():
        query, key = (
            side(hidden).double().reshape(1, -1, attention.heads, 8).transpose(1, 2)
            for side in (attention.to_q, attention.to_k)
        )
        weights = (query @ key.transpose(-1, -2) * attention.scale).softmax(-1)
    return weights.sum(-2).mean(1)[0].numpy()


def writer() -> nn.Module:
    """A small model that writes token by token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=40, initializer_range=0.3)
    config._attn_implementation = "eager"
    return GPT2LMHeadModel(config).eval()


def test_stretches_of_written_tokens_are_steps() -> None:
    model, names = writer(), [*BOTH, "decode_attention"]
    prompt = torch.randint(0, 40, (1, 3), generator=torch.Generator().manual_seed(3))
    asked = {"picture_size": (8, 12), "steps": 24, "strict": True}
    with torch.no_grad():
        with bnviz.capture(model, probes=names, cells=27, **asked) as recorder:
            ids = model.generate(prompt, max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0)
        whole = torch.stack(model(ids, output_attentions=True, use_cache=False).attentions).double().numpy()
    result = bnviz.diagnose(recorder.run, "patch_attention", strict=True)["patch_attention"]
    stretches = np.array_split(np.arange(3, 26), 16)  # the 24th is written and not read
    assert result["step"].values.tolist() == [int(some[0]) - 3 for some in stretches]
    for at, some in enumerate(stretches):
        sees = np.tri(27)[some]
        even = (sees / (some + 1)[:, None]).sum(0)[3:]
        given = whole[:, 0].mean(1)[:, some, 3:].sum(1)
        expected = np.divide(given, even, out=np.full(given.shape, np.nan), where=even > 0).reshape(2, 4, 6)
        np.testing.assert_allclose(result["attention"].values[at], expected, rtol=2e-4)
    assert result["others"].values.tolist() == [[3, 3]] * 16
    assert result.attrs["written"] and re.fullmatch(
        r"From token \d+ on the patch at row \d, column \d gets ×[\d.]+ an even share", judge(result).title
    )
    with torch.no_grad(), bnviz.capture(model, probes=names, cells=9, **asked) as recorder:
        model.generate(prompt, max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0)
    with pytest.raises(NotCaptured, match="in cells of 3 keys; capture decode_attention with cells="):
        bnviz.diagnose(recorder.run, "patch_attention", strict=True)


def test_a_picture_that_was_written_token_by_token_is_read_once_more() -> None:
    model = writer()
    ids = torch.randint(0, 40, (1, 3 + 4 * 6), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), bnviz.capture(model, probes=BOTH, picture_size=(8, 12), strict=True) as recorder:
        whole = torch.stack(model(ids, output_attentions=True, use_cache=False).attentions).double().numpy()
    with pytest.raises(NotCaptured, match="27 tokens of causal attention may hold 4 x 6 patches, and which of them"):
        bnviz.diagnose(recorder.run, "patch_attention", strict=True)
    result = patch_attention(recorder.run["attention"], recorder.run["pictures"], first=3)
    mass = whole[:, 0].sum(-2).mean(1)
    even = np.array([(1 / np.arange(1, 28))[j:].sum() for j in range(27)])
    np.testing.assert_allclose(result["attention"].values[0], (mass / even)[:, 3:].reshape(2, 4, 6), rtol=1e-4)
    assert "picture" not in result and result["others"].values.tolist() == [[3, 3]]


def test_windows_of_a_real_model_are_refused() -> None:
    from transformers import SwinConfig, SwinModel

    torch.manual_seed(0)
    config = SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4)
    model = SwinModel(config).eval()
    with torch.no_grad(), bnviz.capture(model, probes=BOTH, strict=True) as recorder:
        model(torch.randn(1, 3, 32, 32))
    with pytest.raises(NotCaptured, match="16 sequences for a batch of 1, as within windows of the picture"):
        bnviz.diagnose(recorder.run, "patch_attention", strict=True)
