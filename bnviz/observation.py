"""What a probe is shown: tensors still on their device, with the place and the moment they were seen.

The recorder makes these; a probe reads them and keeps small tensors. Nothing here may be written to, kept beyond the call, or
read on the host (`.item()`, `.tolist()`, `len(nonzero)`) inside a forward: that would synchronise the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from bnviz.errors import SchemaError

if TYPE_CHECKING:
    import numpy as np
    import torch
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


class BlockSeen:
    """Input and output of a block or of a sub-layer.

    Parameters
    ----------
    site : Site
    context : Context
    input : Tensor (batch, tokens, features)
        The residual stream before. A model without tokens shows (batch, 1, features); a convolution (batch, height x width,
        channels).
    output : Tensor (batch, tokens, features), optional
        The stream after.
    written : Tensor like input, optional
        In place of `output`, what a sub-layer (attention, mlp) adds.

    Attributes
    ----------
    output : Tensor
        The stream after; for a sub-layer input + written, which is made when it is first asked for.
    shape : torch.Size
        Of the stream after.
    """

    __slots__ = ("_output", "context", "input", "site", "written")

    def __init__(
        self,
        site: Site,
        context: Context,
        input: Tensor,  # noqa: A002 - the term of the field
        output: Tensor | None = None,
        *,
        written: Tensor | None = None,
    ) -> None:
        if (output is None) == (written is None):
            raise SchemaError("BlockSeen takes either output or written, beside the input.")
        self.site, self.context, self.input, self.written, self._output = site, context, input, written, output

    @property
    def output(self) -> Tensor:
        if self._output is None:
            self._output = self.input + self.written  # type: ignore[operator]
        return self._output

    @property
    def shape(self) -> torch.Size:
        return self.input.shape if self._output is None else self._output.shape


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
        Which keys are not padding; None when there is none, or not known.
    dropped : int
        Keys at the start that a sliding cache no longer holds: zeros here, and no query sees them.
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
        "logits" (a softmax makes the weights), "sigmoid" or "probabilities".
    """

    site: Site
    context: Context
    ids: Tensor
    weights: Tensor
    logits: Tensor | None
    experts: int
    logits_are: str = "logits"


@dataclass(frozen=True, slots=True)
class Signature:
    """What an operator was called with, as the profiler saw it; hashable, so that a signature is worked out once.

    Parameters
    ----------
    shapes : tuple
        One entry an argument: the sizes of a tensor, a tuple of sizes for a list of tensors, () for anything else.
    strides : tuple
        Likewise; a stride of 0 is an expanded dimension, which takes no memory.
    dtypes : tuple of str
        "float32", "int64", ...; of the members for a list of tensors; "" for what is no tensor.
    values : tuple of str
        Numbers, flags and lists of numbers as text, e.g. "True" or "[2, 2]"; "" for tensors.
    """

    shapes: tuple[Any, ...] = ()
    strides: tuple[Any, ...] = ()
    dtypes: tuple[str, ...] = ()
    values: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Sizes of the tensors as people write them.

        Examples
        --------
        >>> Signature(((64,), (128, 64), ()), ((1,), (64, 1), ()), ("float32", "float32", ""), ("", "", "1")).text
        '64 · 128×64'
        """
        shown = []
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            if dtype and shape and isinstance(shape[0], tuple):
                shown.append(f"{len(shape)} tensors")
            elif dtype and shape:
                shown.append("×".join(map(str, shape)))
        return " · ".join(shown)


@dataclass(frozen=True, slots=True)
class Holding:
    """Memory that something of the model owns.

    Parameters
    ----------
    category : str
        "parameter", "buffer", "gradient" or "optimizer".
    path : str
        The module it belongs to; "" for the model itself or when it is not known.
    nbytes, address : int
        Size and place of the storage; a shared storage is held once.
    device : int
        -1 the host, otherwise the index of the accelerator.
    """

    category: str
    path: str
    nbytes: int
    address: int
    device: int = -1


@dataclass(frozen=True, slots=True)
class Profile:
    """What one profiler session saw, as columns; times in ns since the session's first event.

    Rows of operators are ordered by thread, then by start. What bnviz itself ran is left out.

    Parameters
    ----------
    names, paths, signatures : tuples
        Tables that `name`, `module` and `signature` index.
    name, thread, start, duration : arrays (event,)
        Operators; `name` indexes `names`.
    sequence : array (event,)
        Autograd's number of the node the operator made (forward) or runs (backward); -1: none.
    signature : array (event,)
        Index into `signatures`; -1: not known.
    module : array (event,)
        Index into `paths` of the innermost module, forward and backward; -1: outside every module.
    phase : array (event,)
        Index into `PHASES`: 0 forward, 1 backward, 2 optimizer, 3 other.
    parent : array (event,)
        Row of the enclosing operator, -1 for a root.
    kernel_time : array (event,)
        Nanoseconds of the device kernels this operator launched itself; 0 where there are none.
    call_module, call_start, call_end, call_duration, call_depth, call_backward : arrays (call,)
        Calls of modules in order of their start; depth 0 is a call of the watched model. `call_duration` is without what
        bnviz itself ran inside. `call_backward` marks a recomputation in the backward pass (activation checkpointing).
    memory_time, memory_bytes, memory_address, memory_event, memory_device : arrays (allocation,)
        Allocations (+) and frees (-) in order of time, the operator they happened in (-1: none) and where
        (-1 the host). Address 0: not known.
    before, after : tuples of Holding
        What was held when the session began; gradients and optimizer state when it ended.
    zeroed : int
        When an optimizer first dropped the gradients; -1: it did not.
    wall : int
        Nanoseconds from start to stop.
    overhead : int
        Nanoseconds inside `wall` that bnviz itself took in the watched thread.
    contention : float
        Share of `wall` in which the thread was ready and waited for a core; NaN where the system does not say.
    run_length : float
        Nanoseconds the thread ran between two interruptions, on average; NaN where the system does not say.
    notes : tuple of str
        What a reader of the numbers must know, e.g. that events were cut off.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    signatures: tuple[Signature, ...]
    name: np.ndarray
    thread: np.ndarray
    start: np.ndarray
    duration: np.ndarray
    sequence: np.ndarray
    signature: np.ndarray
    module: np.ndarray
    phase: np.ndarray
    parent: np.ndarray
    kernel_time: np.ndarray
    call_module: np.ndarray
    call_start: np.ndarray
    call_end: np.ndarray
    call_duration: np.ndarray
    call_depth: np.ndarray
    call_backward: np.ndarray
    memory_time: np.ndarray
    memory_bytes: np.ndarray
    memory_address: np.ndarray
    memory_event: np.ndarray
    memory_device: np.ndarray
    before: tuple[Holding, ...] = ()
    after: tuple[Holding, ...] = ()
    zeroed: int = -1
    wall: int = 0
    overhead: int = 0
    contention: float = float("nan")
    run_length: float = float("nan")
    notes: tuple[str, ...] = ()


PHASES = ("forward", "backward", "optimizer", "other")


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
