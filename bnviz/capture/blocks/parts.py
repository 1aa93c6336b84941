"""What the parts of a block are called.

"attention" mixes tokens: attention, convolutions over tokens, recurrent and state-space mixers. "mlp" mixes channels. A second
attention is "cross_attention"; further ones of a name are counted ("mlp_2"). Names of modules and classes decide, those of the
writer before those of what ran for it; where none says anything, the first part of a block is its attention.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from torch import nn

_CROSS = re.compile(r"cross|enc_?dec|encoder_attn|attn_?2$|context_attn", re.IGNORECASE)
_KINDS = (  # the first that matches
    ("attention", re.compile(r"mlp_?tokens|tokens?_?mix|spatial_gat", re.IGNORECASE)),
    ("self", re.compile(r"attn|attention|qkv|^[qkv]_?proj|^(query|key|value)$", re.IGNORECASE)),
    (
        "mlp",
        re.compile(
            r"mlp|ffn|feed_?forward|channel_?mix|moe|expert|intermediate|^(fc|ff|lin|dense|linear)", re.IGNORECASE
        ),
    ),
    (
        "attention",
        re.compile(
            r"mixer|mamba|ssm|^s4|rnn|lstm|gru|recurrent|temporal|time_mix|retention|message|filter", re.IGNORECASE
        ),
    ),
    ("conv", re.compile(r"conv", re.IGNORECASE)),
)
_MODULATES = re.compile(r"norm|modulat|ada_?ln|emb", re.IGNORECASE)  # what is in it says nothing of what it serves


def parts_of(block: nn.Module, paths: Sequence[str], modules: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """What each writer is called, each name once; () where a single writer is not of a known kind: the block says it all.

    Parameters
    ----------
    block : nn.Module
    paths : sequence of str
        Of the writers, relative to the block.
    modules : sequence of sequence of str
        Modules that ran for each.
    """
    told = [_kind(block, path, ran) for path, ran in zip(paths, modules, strict=True)]
    if len(told) == 1 and told[0] in (None, "conv"):
        return ()
    named: list[str] = []
    for place, kind in enumerate(told):
        if kind in ("self", "cross"):
            crosses = kind == "cross" and any(k in ("self", "cross") for at, k in enumerate(told) if at != place)
            name = "cross_attention" if crosses or ("self" in told[:place]) else "attention"
        elif kind is None:
            name = "attention" if place == 0 and not {"self", "attention", "conv"} & set(told) else "mlp"
        else:
            name = "attention" if kind == "conv" else kind
        times = sum(known.rstrip("_23456789") == name for known in named)
        named.append(f"{name}_{times + 1}" if times else name)
    return tuple(named)


def holds_both(block: nn.Module) -> bool:
    """Whether a block holds, by their names, an attention and an MLP: one that expects to see them apart is told why not."""
    told = {_named([name], child) for name, child in block.named_children()}
    return "mlp" in told and bool({"self", "cross", "attention"} & told)


def _kind(block: nn.Module, path: str, ran: Sequence[str]) -> str | None:
    """ "self" or "cross" for attentions, "attention" for other mixers of tokens, "mlp", "conv"; None: names say nothing."""
    own = _named(path.split("."), block.get_submodule(path))
    if own not in (None, "conv"):
        return own
    found = Counter[str]()
    for inner in ran:
        module = block.get_submodule(inner)
        size = sum(p.numel() for p in module.parameters(recurse=False))
        names = inner.split(".")
        kind = _named(names, None) if size and not any(map(_MODULATES.search, names)) else None
        if kind is not None:
            found[kind] += size
    return found.most_common(1)[0][0] if found else own


def _named(names: Sequence[str], module: nn.Module | None) -> str | None:
    for text in (*names, *(() if module is None or _plain(module) else (type(module).__name__,))):
        for kind, pattern in _KINDS:
            if pattern.search(text):
                return "cross" if kind == "self" and _CROSS.search(text) else kind
    return None


def _plain(module: nn.Module) -> bool:
    """A layer of PyTorch, whose class says nothing of its part."""
    return type(module).__module__.startswith("torch.nn")
