"""What a probe is shown: tensors still on their device, with the place and the moment they were seen.

The recorder makes these; a probe reads them and keeps small tensors. Nothing here may be written to, kept beyond the call, or
read on the host (`.item()`, `.tolist()`, `len(nonzero)`) inside a forward: that would synchronise the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Site:
    """A place in a model where something can be seen.

    Parameters
    ----------
    kind : str
        "model", "block", "sublayer", "attention", "router" or "module".
    path : str
        As in `model.named_modules()`.
    layer : int
        The block it lies in, counted in order of execution; -1 outside every block.
    part : str
        Of the block: "block", "attention", "mlp".
    evidence : str
        Why it was taken for one: shown by `bnviz.sites`.
    """

    kind: str
    path: str
    layer: int = -1
    part: str = "block"
    evidence: str = ""


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
    """

    step: int
    call: int
    phase: str
    past: int = 0
    valid: Tensor | None = None


@dataclass(frozen=True, slots=True)
class BlockSeen:
    """Input and output of a block or of a sub-layer.

    Parameters
    ----------
    site : Site
    context : Context
    input, output : Tensor (batch, tokens, features)
        The residual stream before and after; for a sub-layer (attention, mlp) `output` is input + what the sub-layer
        writes. A model without tokens shows (batch, 1, features); a convolution (batch, height x width, channels).
    """

    site: Site
    context: Context
    input: Tensor
    output: Tensor


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


@dataclass(frozen=True, slots=True)
class RouterSeen:
    """One decision of a router.

    Parameters
    ----------
    site : Site
    context : Context
    ids : Tensor (batch, tokens, slots) int
        Experts as dispatched.
    weights : Tensor (batch, tokens, slots)
        Their weights as used.
    logits : Tensor (batch, tokens, experts), optional
        What the router computed before it chose; logits or probabilities, see `logits_are`.
    experts : int
    logits_are : str
        "logits" or "probabilities".
    """

    site: Site
    context: Context
    ids: Tensor
    weights: Tensor
    logits: Tensor | None
    experts: int
    logits_are: str = "logits"


@dataclass(frozen=True, slots=True)
class Profile:
    """What one profiler session saw, as columns; times in ns since the session's first event.

    Parameters
    ----------
    name, thread, start, duration, sequence, forward_thread : arrays (event,)
        Operators. `name` indexes `names`; `sequence` is autograd's number (-1: none).
    shapes : tuple of str
        Distinct input signatures, e.g. "float32[128,64] float32[64]"; `shape (event,)` indexes it (-1: unknown).
    module : array (event,)
        Index into `paths` of the innermost module (-1: outside), forward and backward.
    phase : array (event,)
        0 forward, 1 backward, 2 optimizer, 3 other.
    parent : array (event,)
        Row of the enclosing operator, -1 for a root.
    memory_time, memory_bytes, memory_address, memory_event : arrays (allocation,)
        Allocations (+) and frees (-) and the operator they happened in (-1: none).
    static : mapping
        Bytes that were there before: {"parameter": ..., "buffer": ..., "gradient": ..., "optimizer": ...}.
    gradient_addresses : frozenset of int
        Where gradients lie at the end.
    device_type : array (event,)
        0 CPU, 1 CUDA kernel.
    wall : int
        Nanoseconds from the first to the last event.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    shapes: tuple[str, ...]
    name: np.ndarray
    thread: np.ndarray
    start: np.ndarray
    duration: np.ndarray
    sequence: np.ndarray
    forward_thread: np.ndarray
    shape: np.ndarray
    module: np.ndarray
    phase: np.ndarray
    parent: np.ndarray
    device_type: np.ndarray
    memory_time: np.ndarray
    memory_bytes: np.ndarray
    memory_address: np.ndarray
    memory_event: np.ndarray
    static: Mapping[str, int] = field(default_factory=dict)
    gradient_addresses: frozenset[int] = frozenset()
    wall: int = 0


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
    * `profiled(profile)`: for `uses=("profiler",)`; returns {variable: array} without step and layer axes.
    * `start()`, `stop()`: for `uses=("process",)`; `stop` returns {variable: array}.
    """

    def observe(self, seen: Any) -> Mapping[str, Tensor] | None: ...
