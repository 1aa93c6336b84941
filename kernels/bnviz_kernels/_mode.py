"""Whether this process interprets Triton: decided before Triton is imported, for all kernels."""

from __future__ import annotations

import os

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
