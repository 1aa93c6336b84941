"""What only kineto's event tree knows: where memory lies, and the dtypes of lists of tensors."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Tree:
    """Addresses by (time, bytes), dtypes of list arguments by (correlation, argument), and of older torch shapes and strides."""

    addresses: dict[tuple[int, int], deque[int]] = field(default_factory=lambda: defaultdict(deque))
    list_dtypes: dict[int, dict[int, str]] = field(default_factory=dict)
    layouts: dict[int, tuple[list[Any], list[Any]]] = field(default_factory=dict)

    def address(self, time: int, nbytes: int) -> int:
        """Of the allocation made at `time`; 0 when not known. Each is given once: two may share their moment."""
        waiting = self.addresses.get((time, nbytes))
        return waiting.popleft() if waiting else 0


def read_tree(results: Any, with_lists: set[int], *, layouts: bool = False) -> tuple[Tree, tuple[str, ...]]:
    """Walk the tree once (2 µs a node); a torch that has changed it costs the addresses, not the profile.

    Parameters
    ----------
    results : torch's _ProfilerResult
    with_lists : set of int
        Correlation ids of operators whose list arguments' dtypes are wanted.
    layouts : bool
        Shapes and strides of all operators' inputs are wanted: the events of this torch do not tell them.

    Returns
    -------
    Tree, tuple of str
        And a note when the tree could not be read.
    """
    import torch

    tree = Tree()
    try:
        kinds = torch._C._profiler._EventType
        waiting = list(results.experimental_event_tree())
        while waiting:
            node = waiting.pop()
            waiting.extend(node.children)
            if node.tag == kinds.Allocation:
                extra = node.typed[1]
                tree.addresses[node.start_time_ns, extra.alloc_size].append(int(extra.ptr or 0))
            elif node.tag == kinds.TorchOp and (layouts or node.correlation_id in with_lists):
                inputs = node.typed[1].inputs
                if node.correlation_id in with_lists:
                    tree.list_dtypes[node.correlation_id] = _lists(inputs)
                if layouts:
                    tree.layouts[node.correlation_id] = ([_sizes(i) for i in inputs], [_strides(i) for i in inputs])
    except (AttributeError, TypeError, IndexError, RuntimeError) as error:
        return tree, (f"Where memory lies is not known: this torch has another event tree ({error}).",)
    return tree, ()


def _lists(inputs: Any) -> dict[int, str]:
    return {
        i: str(one[0].dtype).removeprefix("torch.")
        for i, one in enumerate(inputs)
        if isinstance(one, (list, tuple)) and one and hasattr(one[0], "dtype")
    }


def _sizes(value: Any) -> list[Any]:
    return [_sizes(one) for one in value] if isinstance(value, list | tuple) else list(getattr(value, "sizes", ()))


def _strides(value: Any) -> list[Any]:
    return [_strides(one) for one in value] if isinstance(value, list | tuple) else list(getattr(value, "strides", ()))
