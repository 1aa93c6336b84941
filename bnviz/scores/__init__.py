"""One KV-importance score a file: per-head statistics in, (kv_head, key) out."""

from bnviz.catalog import namespace

__getattr__, __dir__ = namespace(__name__)
