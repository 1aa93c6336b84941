"""One diagnostic a file, with its judge beside it."""

from bnviz.catalog import namespace

__getattr__, __dir__ = namespace(__name__)
