"""The only room that touches a model: find sites, attach, collect, drain, detach. It knows no concrete probe."""

from .plan import sites
from .recorder import Recorder, capture

__all__ = ["Recorder", "capture", "sites"]
