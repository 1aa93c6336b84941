"""What of a block is watched: names of its streams, and of what writes to them."""

from __future__ import annotations

import re

_BESIDE = re.compile(r"(stream_\d+)(?:_(.+))?")


def stream_name(nth: int) -> str:
    """Of a block's streams, from 0: "" for its own, "stream_2" and so on for those beside it.

    Examples
    --------
    >>> stream_name(0), stream_name(1)
    ('', 'stream_2')
    """
    return f"stream_{nth + 1}" if nth else ""


def kind_of(stream: str, part: str) -> str:
    """The kind of a part that writes to a stream of this name; part "": of all that a block does to it.

    Examples
    --------
    >>> kind_of("", ""), kind_of("", "mlp"), kind_of("stream_2", ""), kind_of("stream_2", "mlp")
    ('block', 'mlp', 'stream_2', 'stream_2_mlp')
    """
    return "_".join(name for name in (stream, part) if name) or "block"


def stream_and_part(kind: str) -> tuple[str, str]:
    """What `kind_of` was given.

    Examples
    --------
    >>> [stream_and_part(kind) for kind in ("block", "mlp_2", "stream_2", "stream_2_mlp")]
    [('', ''), ('', 'mlp_2'), ('stream_2', ''), ('stream_2', 'mlp')]
    """
    beside = _BESIDE.fullmatch(kind)
    if beside:
        return beside[1], beside[2] or ""
    return "", "" if kind == "block" else kind
