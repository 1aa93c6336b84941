"""Small trained models and a text that travel with bnviz: everything can be tried offline, in seconds, on a CPU."""

from .models import MODELS, load
from .texts import text
from .tour import main

__all__ = ["MODELS", "load", "main", "text"]
