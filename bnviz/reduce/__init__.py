"""One numeric reduction a file, written once for NumPy and torch; the plain version is the definition."""

from bnviz.catalog import namespace

__getattr__, __dir__ = namespace(__name__)
