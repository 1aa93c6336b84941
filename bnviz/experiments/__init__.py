"""One intervention a file: the model runs again on the user's own batch, changed in one stated way."""

from bnviz.catalog import namespace

__getattr__, __dir__ = namespace(__name__)
