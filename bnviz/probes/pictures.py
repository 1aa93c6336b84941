"""The pictures that a model is called with, small: what a map of attention is drawn on."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from bnviz.errors import SchemaError
from bnviz.observation import PictureSeen
from bnviz.schema import ProbeSpec, Variable, probe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SIDE = 96  # pixels of a kept picture, at most


@probe(
    sites=("picture",),
    variables=(
        Variable(
            "picture",
            ("step", "image", "pixel_row", "pixel_column", "channel"),
            "1",
            "small copy of a picture, 0 (its least value) to 255 (its largest); of a video the middle frame",
            "last",
        ),
        Variable("height", ("step",), "count", "rows of the picture as the model got it", "last"),
        Variable("width", ("step",), "count", "columns of the picture as the model got it", "last"),
        Variable("frames", ("step",), "count", "frames of the video; 1: a picture", "last"),
        Variable("batch", ("step",), "count", "pictures of the batch, kept or not", "last"),
    ),
    memory="96 x 96 x 3 x 2 B a picture at most, `pictures` of them a step",
    default=False,
)
class Pictures:
    """A small copy of the pictures, videos or latents that a model is called with, and how large they were.

    Asked for beside `attention`, so that the attention on patches can be shown on the picture. A model that is called with tokens
    has none: `picture_size` says how large the picture is that its tokens stand for. Watch one that writes a picture token by
    token as it writes, with `decode_attention` too, or in one call with the finished tokens.

    Parameters
    ----------
    pictures : int
        Pictures of a batch that are kept, the first ones.
    picture_size : (int, int), optional
        Height and width of the picture, for a model that is called without one: with tokens, or with patches cut beforehand.

    Raises
    ------
    SchemaError
        An option below 1.

    Notes
    -----
    The mean over areas, at most 96 x 96 of them, of the first three channels (of one or two channels, the first), then
    255 (x - min) / (max - min) over all pixels and channels of a picture; what is not finite counts as 0, and a picture of one
    value is 0. Cost: one pass over the pictures that are kept.

    Examples
    --------
    >>> import torch
    >>> from bnviz.observation import Context, Site
    >>> seen = PictureSeen(Site("picture", ""), Context(0, 0, "forward"), torch.tensor([[[[[0.0, 1.0], [0.5, 2.0]]]]]))
    >>> Pictures().observe(seen)["picture"][0, :, :, 0].tolist()
    [[0, 128], [64, 255]]
    """

    spec: ClassVar[ProbeSpec]

    def __init__(self, *, pictures: int = 4, picture_size: tuple[int, int] | None = None) -> None:
        if pictures < 1:
            raise SchemaError(f"Probe {self.spec.name}: pictures is {pictures}, expected 1 or more.")
        if picture_size is not None and (len(picture_size) != 2 or min(picture_size) < 1):
            raise SchemaError(
                f"Probe {self.spec.name}: picture_size is {picture_size}, expected (height, width), each 1 or more."
            )
        self.pictures, self.picture_size = pictures, picture_size

    def observe(self, seen: PictureSeen) -> dict[str, Tensor]:
        """The small pictures (image, row, column, channel) of one call, and sizes of the large ones."""
        import torch

        batch, frames, _, height, width = seen.input.shape
        sizes = {"height": height, "width": width, "frames": frames, "batch": batch}
        found = _small(seen.input[: self.pictures, frames // 2])
        return {"picture": found, **{name: torch.tensor(size) for name, size in sizes.items()}}


def _small(pictures: torch.Tensor) -> torch.Tensor:
    """(image, row, column, channel) int16."""
    import torch

    channels = 3 if pictures.shape[1] >= 3 else 1
    values = pictures[:, :channels].detach().float().nan_to_num(0.0, 0.0, 0.0)
    longest = max(values.shape[2:])
    if longest > SIDE:
        height, width = (max(1, round(side * SIDE / longest)) for side in values.shape[2:])
        values = torch.nn.functional.adaptive_avg_pool2d(values, (height, width))
    least, most = (extreme((1, 2, 3), keepdim=True) for extreme in (values.amin, values.amax))
    scaled = (values - least) * (255 / torch.where(most > least, most - least, torch.inf))
    return scaled.round().to(torch.int16).permute(0, 2, 3, 1).contiguous()
