"""One view a file, and the one style they share."""

from bnviz.catalog import namespace

__getattr__, __dir__ = namespace(__name__)
