"""One probe a file: where to look, and which small tensors to keep."""

from bnviz.catalog import namespace

__getattr__, __dir__ = namespace(__name__)
