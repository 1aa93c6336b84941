"""Small pictures against torch's own resizing, in every layout they are given in, and where there are none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnviz
from bnviz.capture.pictures import picture_in
from bnviz.errors import CaptureError, SchemaError
from bnviz.observation import Context, PictureSeen, Site
from bnviz.probes.pictures import SIDE, Pictures
from tests.probes.test_query_moments import ids_of, small


def observed(given: Tensor, **options: Any) -> dict[str, Tensor]:
    return Pictures(**options).observe(PictureSeen(Site("picture", ""), Context(0, 0, "forward"), given))


@pytest.mark.parametrize(("height", "width"), [(7, 13), (96, 96), (200, 131), (1, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_are_means_over_areas_scaled_to_bytes(height: int, width: int, dtype: torch.dtype) -> None:
    given = torch.randn(2, 1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = observed(given)
    found, values = kept["picture"].numpy(), given[:, 0].double().numpy()
    side = max(height, width)
    if side <= SIDE:
        high, wide = height, width
    else:
        high, wide = (max(1, round(n * SIDE / side)) for n in (height, width))
    assert found.shape == (2, high, wide, 3) and found.dtype == np.int16
    for at, channel in np.ndindex(2, 3):
        rows = [(i * height // high, -(-(i + 1) * height // high)) for i in range(high)]
        columns = [(i * width // wide, -(-(i + 1) * width // wide)) for i in range(wide)]
        mean = np.array([[values[at, channel, a:b, c:d].mean() for c, d in columns] for a, b in rows])
        least, most = _ends(values[at], rows, columns)
        np.testing.assert_allclose(found[at, :, :, channel], 255 * (mean - least) / (most - least), atol=0.51)
    assert [int(kept[name]) for name in ("height", "width", "frames", "batch")] == [height, width, 1, 2]


def _ends(values: np.ndarray, rows: list[Any], columns: list[Any]) -> tuple[float, float]:
    means = [v[a:b, c:d].mean() for v in values for a, b in rows for c, d in columns]
    return min(means), max(means)


@pytest.mark.parametrize(("channels", "kept"), [(1, 1), (2, 1), (3, 3), (4, 3), (16, 3)])
def test_three_channels_are_kept_or_one(channels: int, kept: int) -> None:
    found = observed(torch.rand(1, 1, channels, 4, 6))["picture"]
    assert found.shape == (1, 4, 6, kept)
    assert (int(found.min()), int(found.max())) == (0, 255)


def test_a_batch_is_cut_a_video_shows_its_middle_and_what_is_flat_is_zero() -> None:
    video = torch.zeros(3, 5, 3, 4, 4)
    video[:, 2, :, 0, 0] = 1.0
    kept = observed(video, pictures=2)
    assert kept["picture"].shape == (2, 4, 4, 3)
    assert kept["picture"][:, 0, 0].eq(255).all() and int(kept["picture"].sum()) == 2 * 3 * 255
    assert (int(kept["frames"]), int(kept["batch"])) == (5, 3)
    assert not observed(torch.full((1, 1, 3, 4, 4), 7.0))["picture"].any()
    strange = torch.tensor([[[[[0.0, torch.nan], [torch.inf, 1.0]]]]])
    assert observed(strange)["picture"][0, :, :, 0].tolist() == [[0, 0], [0, 255]]


class Given(nn.Module):
    """A model whose config counts its channels."""

    def __init__(self, **config: int) -> None:
        super().__init__()
        self.config = type("Config", (), config)()


@pytest.mark.parametrize(
    ("name", "shape", "expected", "config"),
    [
        ("pixel_values", (2, 3, 8, 6), (2, 1, 3, 8, 6), {}),
        ("x", (2, 1, 8, 6), (2, 1, 1, 8, 6), {}),
        ("x", (2, 8, 6, 3), (2, 1, 3, 8, 6), {}),
        ("x", (2, 5, 8, 6), None, {}),
        ("hidden_states", (2, 16, 8, 6), (2, 1, 16, 8, 6), {}),
        ("sample", (2, 4, 8, 6), (2, 1, 4, 8, 6), {}),
        ("hidden_states", (1, 16, 7, 8, 6), (1, 7, 16, 8, 6), {"in_channels": 16}),
        ("hidden_states", (1, 7, 16, 8, 6), (1, 7, 16, 8, 6), {"in_channels": 16}),
        ("pixel_values", (1, 5, 3, 8, 6), (1, 5, 3, 8, 6), {"num_channels": 3}),
        ("x", (1, 3, 5, 8, 6), (1, 5, 3, 8, 6), {}),
        ("x", (2, 12, 32), None, {}),
        ("attention_mask", (2, 1, 8, 8), None, {}),
    ],
)
def test_pictures_are_found_by_name_and_shape(name: str, shape: Any, expected: Any, config: dict[str, int]) -> None:
    found = picture_in(Given(**config), {"labels": torch.ones(2, dtype=torch.long), name: torch.zeros(shape)})
    assert (None if found is None else tuple(found.shape)) == expected


def test_whole_numbers_are_no_picture() -> None:
    assert picture_in(nn.Identity(), {"x": torch.zeros(2, 3, 8, 6, dtype=torch.long)}) is None


def test_a_model_that_reads_tokens_has_no_pictures() -> None:
    model = small("llama")
    with pytest.raises(CaptureError, match="pictures: no picture found in LlamaForCausalLM"):
        bnviz.capture(model, probes=["pictures"]).attach()
    with bnviz.capture(model, probes=["attention"]) as recorder, torch.no_grad():
        model(ids_of(model, 1, 16))
    report = bnviz.diagnose(recorder.run)
    assert report.absent["patch_attention"] == "Not applicable: no picture found in this model"


def test_a_model_that_was_given_no_picture_is_none_of_pictures() -> None:
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), nn.Linear(8, 2)).eval()
    with bnviz.capture(net, probes=["attention", "pictures"]) as recorder:
        net(torch.randn(2, 5, 8))
    assert "pictures" not in recorder.run
    report = bnviz.diagnose(recorder.run)
    assert report.absent["patch_attention"] == "Not applicable: no picture found in this model"


@pytest.mark.parametrize("options", [{"pictures": 0}, {"picture_size": (0, 4)}, {"picture_size": (4,)}])
def test_options_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(SchemaError, match="expected"):
        Pictures(**options)
