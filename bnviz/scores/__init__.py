"""One KV-importance score a file: per-head statistics in, (kv_head, key) out."""

from bnviz.catalog import namespace

from ._score import AGGREGATES, Floats, Statistics, keep_order, over_group, score, whole

__all__ = ["AGGREGATES", "Floats", "Statistics", "keep_order", "over_group", "score", "whole"]

__getattr__, __dir__ = namespace(__name__)
