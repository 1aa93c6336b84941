"""The words of bnviz: dimensions, units, severities and kinds of site; whatever is labelled uses these."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

DIMENSIONS: Mapping[str, str] = MappingProxyType(
    {
        "step": "one watched forward, or one phase (all decode steps of a generation) of several",
        "layer": "block of the model, counted from 0 in order of execution; `path (layer)` names the module",
        "kind": "what of a block was watched: block, attention, mlp",
        "head": "query head",
        "head_to": "the query head a head is compared with",
        "kv_head": "key-value head, shared by head / kv_head query heads",
        "expert": "expert of a mixture-of-experts layer",
        "place": "place of a key among those with most attention, 0 the first",
        "top": "how many of the keys with most attention are taken",
        "lag": "generated tokens from one to another",
        "slot": "one of the k experts chosen for a token, in the router's order",
        "candidate": "expert a router could choose, in records whose variable `expert` says which it chose",
        "token": "token of the packed batch; `sequence` and `position` say which",
        "query": "token that attends",
        "key": "token that is attended to",
        "row": "query of a window of attention, or row of a grid of patches",
        "column": "key of a window of attention, or column of a grid of patches",
        "image": "picture of a batch",
        "pixel_row": "row of a small picture",
        "pixel_column": "column of a small picture",
        "channel": "colour of a small picture: one of grey, or red, green and blue",
        "query_bin": "bin of queries of a pooled attention map",
        "key_bin": "bin of keys of a pooled attention map",
        "sample": "row of a batch that is one example (for information measures)",
        "feature": "channel of an activation, of a key or a value",
        "feature_to": "the channel a channel is multiplied with",
        "bits": "bits of a code that a number is kept as",
        "class": "value of a label",
        "estimator": "name of an information estimator",
        "method": "name of a KV-importance score, or of a way to share a cache out or to keep it in fewer bytes",
        "method_to": "the score a score is compared with",
        "pattern": "name of an attention pattern",
        "budget": "share of the KV cache that is kept",
        "threshold": "share of the attention mass, or of the energy, that is to stay",
        "op": "operator of a roofline at one set of shapes",
        "module": "module of the model, by its path",
        "ceiling": "a measured limit of the machine",
        "category": "what memory or time is spent on",
        "time": "moment of a timeline",
        "function": "Python function or source line seen in sampled stacks",
        "thread": "thread of the host process",
        "event": "row of an event table",
        "frame": "distinct stack frame",
        "bin": "bin of a histogram",
        "rank": "process of a distributed run, or order of an eigenvalue",
        "layer_to": "the layer a layer is compared with",
        "expert_to": "the expert an expert is compared with",
        "phase": "forward, backward, optimizer or other",
        "quantity": "variable of a diagnostic, of one kind, method or pattern, in which two runs are compared",
    }
)

UNITS: frozenset[str] = frozenset(
    {
        "1",
        "nat",
        "bit",
        "query",
        "token",
        "count",
        "s",
        "ns",
        "B",
        "FLOP",
        "FLOP/s",
        "B/s",
        "FLOP/B",
        "%",
        "norm",
        "id",
        "name",
    }
)

Severity = Literal["high", "medium", "low", "note"]
SEVERITIES: tuple[Severity, ...] = ("high", "medium", "low", "note")
Merge = Literal["stack", "add", "max", "append", "last"]
SITE_KINDS = (
    "model",
    "picture",
    "block",
    "sublayer",
    "attention",
    "cross_attention",
    "router",
    "further_router",
    "gradient",
    "module",
)
