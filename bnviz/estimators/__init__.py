"""One information estimator a file: plain arrays in, an Estimate out."""

from bnviz.catalog import namespace

__getattr__, __dir__ = namespace(__name__)
