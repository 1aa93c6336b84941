"""What a probe is shown: tensors still on their device, with the place and the moment they were seen.

The recorder makes these; a probe reads them and keeps small tensors. Nothing here may be written to, kept beyond the call, or
read on the host (`.item()`, `.tolist()`, `len(nonzero)`) inside a forward: that would synchronise the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from bnviz.errors import SchemaError
from bnviz.kinds import stream_and_part

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Site:
    """A place in a model where something can be seen.

    Parameters
    ----------
    kind : str
        "picture", "block", "sublayer", "attention", "cross_attention", "router", "further_router", "gradient", "model", "module".
    path : str
        As in `model.named_modules()`.
    layer : int
        The block it lies in, counted in order of execution; -1 outside every block.
    part : str
        Of the block: "block", "attention", "mlp", "cross_attention", "mlp_2" and so on; "stream_2" for a stream beside its own,
        and "stream_2_attention" and so on for what writes to that one.
    evidence : str
        Why it was taken for one: shown by `bnviz.sites`.
    """

    kind: str
    path: str
    layer: int = -1
    part: str = "block"
    evidence: str = ""

    @property
    def whole(self) -> bool:
        """All that a block does to a stream, and not what one part of it does."""
        return not stream_and_part(self.part)[1]


@dataclass(frozen=True, slots=True)
class Context:
    """The moment of an observation.

    Parameters
    ----------
    step : int
        Row of the step axis; decode steps of one generation share one.
    call : int
        Forwards of the watched model since the capture began.
    phase : str
        "forward", "prefill" or "decode".
    past : int
        Tokens in the cache before this call.
    valid : Tensor (batch, tokens) bool, optional
        Which tokens of this call are not padding; None when there is none.
    held : Tensor (batch, past) bool, optional
        Which tokens in the cache are not padding; None when there is none.
    positions : Tensor (batch or 1, tokens) int, optional
        Of a whole text, where the model was given them: several documents in one sequence begin anew.
    """

    step: int
    call: int
    phase: str
    past: int = 0
    valid: Tensor | None = None
    held: Tensor | None = None
    positions: Tensor | None = None


class BlockSeen:
    """Input and output of a block or of a sub-layer.

    Parameters
    ----------
    site : Site
    context : Context
    input : Tensor (batch, tokens, features) or BlockSeen
        The residual stream before. A model without tokens shows (batch, 1, features); a convolution (batch, height x width,
        channels). The observation of the sub-layer before stands for its output.
    output : Tensor (batch, tokens, features), optional
        The stream after.
    written : Tensor like input, optional
        In place of `output`, what a sub-layer (attention, mlp) adds.

    Attributes
    ----------
    input, output : Tensor
        The stream before and after. For a sub-layer, output is input + written, which is made when it is first asked for.
    shape : torch.Size
        Of the stream after.
    follows : BlockSeen, optional
        The sub-layer whose output this one reads.
    parts : tuple of BlockSeen
        Of a block: the sub-layers that are shown after it.
    """

    __slots__ = ("_input", "_output", "context", "follows", "parts", "shape", "site", "written")

    def __init__(
        self,
        site: Site,
        context: Context,
        input: Tensor | BlockSeen,  # noqa: A002 - the term of the field
        output: Tensor | None = None,
        *,
        written: Tensor | None = None,
    ) -> None:
        after = output if output is not None else written
        if after is None or (output is not None and written is not None):
            raise SchemaError("BlockSeen takes either output or written, beside the input.")
        self.site, self.context, self.written, self._output = site, context, written, output
        self.follows = input if isinstance(input, BlockSeen) else None
        self._input = None if isinstance(input, BlockSeen) else input
        self.shape, self.parts = after.shape, tuple[BlockSeen, ...]()

    @property
    def input(self) -> Tensor:
        if self._input is None:
            assert self.follows is not None
            self._input = self.follows.output
        return self._input

    @property
    def output(self) -> Tensor:
        if self._output is None:
            self._output = self.input + self.written  # type: ignore[operator]
        return self._output


@dataclass(frozen=True, slots=True)
class Rotary:
    """Queries of one call of attention before rotary positions turned them, and how these turn; without any, nothing turns.

    Parameters
    ----------
    query : Tensor (batch, heads, queries, dim)
        Before the rotation, in the channels and the units of the queries that the kernel got.
    partner : Tensor (dim,) int
        The channel that each one turns with; itself where none.
    sign : Tensor (dim,)
        -1 for the first of two channels, 1 for the second, 0 where none.
    angle, rate : Tensor (batch, dim)
        Of the last query, and what every further token adds.
    holds : Tensor (batch,) bool
        It was verified: what the kernel got of a sequence is `query` turned so, up to rounding.

    Notes
    -----
    What the kernel gets of a query x that stands n tokens after the last (before it, where n < 0) is, in channel c,
    cos(a_c) x_c + sign_c sin(a_c) x_partner(c), a = angle + n rate.
    """

    query: Tensor
    partner: Tensor
    sign: Tensor
    angle: Tensor
    rate: Tensor
    holds: Tensor


@dataclass(frozen=True, slots=True)
class Projection:
    """The matrix that the output of attention is multiplied by.

    Parameters
    ----------
    weight : Tensor (heads, value dim, features)
        What each head's output is multiplied by, and summed over heads; the model's own memory.
    holds : Tensor () bool
        It was verified: what the module that holds it was given is the output of the heads, up to rounding.
    """

    weight: Tensor
    holds: Tensor


@dataclass(frozen=True, slots=True)
class AttentionSeen:
    """One call of an attention mechanism, as the kernel got it: after rotation, norms and the cache's update.

    Parameters
    ----------
    site : Site
    context : Context
    query : Tensor (batch, heads, queries, dim)
    key, value : Tensor (batch, kv_heads, keys, dim)
    allowed : Tensor (batch or 1, heads or 1, queries, keys), optional
        Additive float or boolean mask as the kernel got it; None with `causal` for a plain causal or full pattern.
    causal : bool
        Query i sees keys up to i + keys - queries.
    scale : float
    window : int, optional
        Sliding window: query i sees the last `window` keys only.
    softcap : float, optional
    sinks : Tensor (heads,), optional
        Learned logits of one more column that is dropped after the softmax.
    token_ids : Tensor (batch, keys) int, optional
        Ids of the tokens the keys belong to, when the model was called with ids.
    valid_keys : Tensor (batch, keys) bool, optional
        Which keys are tokens and not padding; None when all are, or it is not known. Columns that stand for no token (a learned
        key, a key of zeros) come first and are none.
    dropped : int
        Keys at the start that a sliding cache no longer holds: zeros here, and no query sees them.
    across : bool
        The keys are not the queries' own tokens (another text, an image, a pooled sequence): distances mean nothing.
    grows : int
        Not 0: keys and values are those of a cache that only puts new tokens behind. Calls with the same number follow one
        another without anything else done to it: what the earlier was given comes first in what the later was given.
    rotary : Rotary, optional
        The queries before rotary positions turned them, where a probe asks for them and the model computed them where they can
        be seen; never while decoding.
    projection : Projection, optional
        What the output of the heads is multiplied by, where a probe asks for it and a module of the model's does that; never
        while decoding.
    cached : float
        Bytes that a token takes in this layer of the cache, as it holds them; -1: none is given, or not understood.

    Notes
    -----
    Attention written by hand may not show its queries and keys, or its values: the last dimension of what is not known is 0. Then
    `allowed` holds the logits that the model gave its softmax, `scale` is 1, and softmax(scale x query.key + allowed) is the
    model's own weights all the same.
    """

    site: Site
    context: Context
    query: Tensor
    key: Tensor
    value: Tensor
    allowed: Tensor | None
    causal: bool
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    token_ids: Tensor | None = None
    valid_keys: Tensor | None = None
    dropped: int = 0
    across: bool = False
    grows: int = 0
    rotary: Rotary | None = None
    projection: Projection | None = None
    cached: float = -1.0


@dataclass(frozen=True, slots=True)
class RouterSeen:
    """One decision of a router.

    Parameters
    ----------
    site : Site
    context : Context
    ids : Tensor (batch, tokens, slots) int
        Experts as dispatched. -1 with weight 0: the choice was dropped (a capacity). -1 with weight NaN: no further choice.
    weights : Tensor (batch, tokens, slots)
        Their weights as used.
    logits : Tensor (batch, tokens, experts), optional
        What the router computed for every expert, as the model has it: logits, gates or probabilities.
    experts : int
        Things it chooses among, ways past all experts included.
    share : Tensor (batch, tokens, experts), optional
        `logits` as a distribution over experts, by the rule that makes the weights of them; NaN where no rule fits.
    skip : int
        How many of the last ids compute nothing.
    shared : int
        Experts that every token passes, beside these.
    verified : bool or Tensor () bool
        The choice was seen where experts use it; else only where it was made, or made once more.
    mapped : bool
        Rows are the tokens of this call's sequences; else they are (1, rows, ...), in the router's order.
    """

    site: Site
    context: Context
    ids: Tensor
    weights: Tensor
    logits: Tensor | None
    experts: int
    share: Tensor | None = None
    skip: int = 0
    shared: int = 0
    verified: bool | Tensor = True
    mapped: bool = True


@dataclass(frozen=True, slots=True)
class PictureSeen:
    """Pictures that a call of the model is given: `input` (batch, frames, channels, height, width), the model's own memory."""

    site: Site
    context: Context
    input: Tensor


@dataclass(frozen=True, slots=True)
class GradientSeen:
    """What the backward passes of one step gave one layer, or one part of it: read between forwards, on the host.

    Gradients are those of the loss itself: what a GradScaler multiplied the loss by is divided out where it is known.

    Parameters
    ----------
    site : Site
        Kind "gradient"; `part` is "block", "attention" or "mlp".
    context : Context
        Of the forward that the gradients belong to.
    sizes : Tensor (parameters,) int64
        Values of each trained parameter of the place.
    weights : Tensor (parameters,) float64
        Norm of each, before the optimizer stepped; NaN: no gradient reached it.
    added : Tensor (parameters,) float64
        Norm of what the step's backward passes added to its gradient; NaN: none reached it, or several did that cannot be told
        from what was there before.
    nonfinite : int
        Values added that are NaN or infinite.
    scale : float
        What the loss was multiplied by; NaN: not known, and not divided out.
    total : Tensor (parameters,) float64, optional
        Norm of the gradient that an optimizer was given after this step; None: none stepped.
    changes : Tensor (parameters,) float64, optional
        Norm of what that optimizer changed.
    output : Tensor (batch, tokens), optional
        Norm of the gradient with respect to each token of the stream after the place.
    projection : Tensor (directions,) float32, optional
        Of what was added to all its parameters: see `reduce.projection`.
    mean : Tensor (parameters,) float64, optional
        Norm of the mean of what was added over a window of steps that ends here.
    window : int
        Steps of that window; 0: none ends here.
    whole : float, optional
        Norm of what was added to all parameters of the model, told with one place of a step.
    """

    site: Site
    context: Context
    sizes: Tensor
    weights: Tensor
    added: Tensor
    nonfinite: int
    scale: float = float("nan")
    total: Tensor | None = None
    changes: Tensor | None = None
    output: Tensor | None = None
    projection: Tensor | None = None
    mean: Tensor | None = None
    window: int = 0
    whole: float | None = None


@dataclass(frozen=True, slots=True)
class GradientWants:
    """What a probe of gradients asks for besides norms: its attribute `wants`.

    Parameters
    ----------
    projection : bool
        A random projection of every layer's gradient.
    window : int
        Steps over which the mean gradient is taken exactly, at the price of one copy of the trained parameters; 0: not.
    changes : bool
        What an optimizer changes, at the price of a copy of its parameters during its step.
    """

    projection: bool = False
    window: int = 0
    changes: bool = False


class Probe(Protocol):
    """What the recorder asks of a probe. A class declares itself with `schema.probe`; every method but `__init__` is optional.

    Notes
    -----
    * `__init__(self, *, option=default, ...)`: options are keywords with defaults.
    * `observe(seen)`: called at each observation of a site kind the probe declared; returns {variable: tensor} or None.
      The dims `step` and `layer` (and `kind`) are the recorder's: leave them out. A variable with a token-like dim
      (token, query, key, sample) is returned with one leading batch axis, e.g. (batch, head, key) for
      ("step", "layer", "head", "key"): the recorder drops padding and packs sequences at the end of the step.
      Others are returned without a batch axis and must leave padding out themselves (`seen.context.valid`).
      In decoding, one observation may show several tokens that were written one after the other.
    * `rotary = True`: attention is shown with its queries before rotary positions turned them, where these can be seen.
    * `projection = True`: attention is shown with the matrix that its output is multiplied by, where a module does that.
    * `profiled(profile)`: for `uses=("profiler",)`; returns {variable: array} without step and layer axes.
    * `start()`, `stop()`: for `uses=("process",)`; `stop` returns {variable: array}.
    """

    def observe(self, seen: Any) -> Mapping[str, Tensor] | None: ...
