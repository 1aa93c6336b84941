"""What each block, attention and MLP does to the residual stream: per token and per channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnviz.errors import CaptureError
from bnviz.observation import BlockSeen
from bnviz.reduce._native import library
from bnviz.reduce.block_stats import BlockStats, block_stats, stream_stats
from bnviz.schema import Variable, probe

if TYPE_CHECKING:
    from torch import Tensor

_TOKEN = ("step", "kind", "layer", "token")
_CHANNEL = ("step", "kind", "layer", "feature")
_PAIR = ("norm_in", "cosine", "relative_change")
_CHANNELS = ("mean", "variance", "max_abs", "kurtosis", "zero_fraction", "outlier_fraction")


@probe(
    sites=("block", "sublayer"),
    variables=(
        Variable("norm_in", _TOKEN, "norm", "L2 norm of the residual stream before", "append", True),
        Variable("norm_out", _TOKEN, "norm", "L2 norm of the residual stream after", "append"),
        Variable("cosine", _TOKEN, "1", "cosine of before and after; 1 leaves the direction as it was", "append", True),
        Variable("relative_change", _TOKEN, "1", "norm of what was added over the norm before", "append", True),
        Variable("mean", _CHANNEL, "1", "mean of a channel after, over tokens", optional=True),
        Variable("variance", _CHANNEL, "1", "variance of a channel after, over tokens", optional=True),
        Variable("max_abs", _CHANNEL, "1", "largest magnitude of a channel after", optional=True),
        Variable("kurtosis", _CHANNEL, "1", "fourth moment over variance squared; 3 for a Gaussian", optional=True),
        Variable("zero_fraction", _CHANNEL, "1", "share of a channel's values that are exactly zero", optional=True),
        Variable("outlier_fraction", _CHANNEL, "1", "share of a channel's values that are outliers", optional=True),
        Variable("nonfinite", ("step", "kind", "layer"), "count", "values that are NaN or infinite", "add", True),
        Variable(
            "activation",
            ("step", "layer", "sample", "feature"),
            "1",
            "block outputs of the first rows",
            optional=True,
            option="sample=N",
        ),
    ),
    memory="16 B a token for each block and sub-layer, 24 B a channel for each block",
)
class Activations:
    """How far every block, attention and MLP turns and stretches the residual stream.

    For a sub-layer, before is x and after x + f(x). A cosine near 1 with a small relative change says that the part
    writes little; it does not say that the model can do without it.

    Parameters
    ----------
    sample : int
        Rows of block outputs to keep as they are, for information measures: the first ones of (batch x tokens) that are
        not padding. For a network without tokens a row is an example. 0: none.

    Notes
    -----
    * `kind`: "block"; "attention" for the part that mixes tokens (attention, convolutions, recurrent and state-space mixers),
      "mlp" for the one that mixes channels; "cross_attention", and "mlp_2" and so on for further ones. Parts are shown where what
      they write is verified to be what the block added; the notes of the run say where it is not, and why.
    * "stream_2": a second stream that goes through the blocks beside the first, as text beside an image in MMDiT;
      "stream_2_attention" and "stream_2_mlp" write to it. "block" is the one that comes first in what blocks are given.
    * A token is a pixel of an image, a frame's pixel of a video, a node of a graph, a row of a table, a call of a recurrent cell.
    * NaN: the token's vector is zero before (`relative_change`), or before or after (`cosine`), or holds a value that is not
      finite; such values are counted in `nonfinite` and left out of the channels.
    * `norm_in`, `cosine` and `relative_change` are absent where before and after differ in shape (a layer that changes
      the width, a strided convolution).
    * Channel statistics describe streams, and `activation` the first of them, in whole forwards and prompts: NaN for sub-layers,
      and a decode step, which shows one token a sequence, adds none.
    * For a sub-layer `relative_change` is the norm of what it writes, before the sum is rounded to the stream's dtype.
    * Cost: one read of input and output. `activation` grows by 4 B x rows x width a layer and step.

    Source: ShortGPT (arXiv 2403.03853) for the cosine of blocks, LLM-Drop (arXiv 2406.15786) for sub-layers.

    Examples
    --------
    >>> import torch
    >>> from bnviz.observation import BlockSeen, Context, Site
    >>> x = torch.tensor([[[3.0, 4.0]]])
    >>> seen = BlockSeen(Site("block", "layers.0", 0), Context(0, 0, "forward"), x, 2 * x)
    >>> kept = Activations().observe(seen)
    >>> float(kept["norm_in"]), float(kept["cosine"]), float(kept["relative_change"])
    (5.0, 1.0, 1.0)
    """

    def __init__(self, *, sample: int = 0) -> None:
        if sample < 0:
            raise CaptureError(f"sample={sample}: expected a number of rows to keep, 0 or more.")
        self.sample = sample
        library("block_pass")  # compiled now, not in the middle of a forward
        self._ahead: dict[int, BlockStats] = {}

    def observe(self, seen: BlockSeen) -> dict[str, Tensor]:
        """Statistics of one block or sub-layer in one call."""
        paired, whole = seen.written is not None or seen.input.shape == seen.shape, seen.site.whole
        valid = seen.context.valid
        if valid is not None and valid.shape != seen.shape[:2]:
            valid = None  # the mask is of other rows than this block's
        channels = whole and seen.context.phase != "decode"
        stats = self._ahead.pop(id(seen), None)
        if stats is None:
            stats = self._stats(seen, paired, valid, channels)
        kept = {"norm_out": stats.norm_out, "nonfinite": stats.nonfinite}
        if paired:
            kept |= {name: getattr(stats, name) for name in _PAIR}
        if channels:
            kept |= {name: getattr(stats, name) for name in _CHANNELS}
            if self.sample and seen.site.kind == "block":
                kept["activation"] = _first_rows(seen.output, self.sample, valid)
        return kept

    def _stats(self, seen: BlockSeen, paired: bool, valid: Tensor | None, channels: bool) -> BlockStats:
        """Of a block together with its parts, which are shown next, where their sums are one chain; else of this one alone."""
        self._ahead.clear()
        if seen.written is not None:
            return block_stats(seen.input, written=seen.written, valid=valid, channels=channels)
        if not paired:
            return block_stats(seen.output, seen.output, valid=valid, channels=channels)
        written = [part.written for part in seen.parts if part.written is not None and part.shape == seen.shape]
        if not written or len(written) < len(seen.parts):
            return block_stats(seen.input, seen.output, valid=valid, channels=channels)
        parallel = all(part.follows is None for part in seen.parts)
        stats = stream_stats(seen.input, seen.output, written, parallel=parallel, valid=valid, channels=channels)
        self._ahead = {id(part): one for part, one in zip(seen.parts, stats[1:], strict=True)}
        return stats[0]


def _first_rows(output: Tensor, count: int, valid: Tensor | None) -> Tensor:
    """(1, rows, features): the first `count` rows that are not padding, without asking the device how many there are."""
    rows = output.detach().reshape(-1, output.shape[-1]).float()
    count = min(count, len(rows))
    if valid is None:
        return rows[None, :count]
    kept = valid.reshape(-1)
    if count < len(rows):  # sorting asks the device for no number, as selecting by the mask would
        first = (~kept).byte().argsort(stable=True)[:count]
        rows, kept = rows[first], kept[first]
    return rows.masked_fill(~kept[:, None], float("nan"))[None]
