"""Where a run came from: the model, the versions, the machine, the options."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bnviz.schema import SCHEMA_VERSION

from .blocks.find import size_of
from .values import device_of, nbytes_of


def model_name(model: nn.Module) -> str:
    """A short name: the last part of the config's name or path, else the class."""
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "") or getattr(config, "name_or_path", "") or ""
    return os.path.basename(str(name).rstrip("/\\")) or type(model).__name__


def provenance(model: nn.Module, name: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-able facts about a capture that starts now."""
    parameter = next(model.parameters(), None)
    transformers = sys.modules.get("transformers")
    weights = parameter_bytes(model)
    return {
        "schema": SCHEMA_VERSION,
        "model": name or model_name(model),
        "class": type(model).__name__,
        "parameters": size_of(model),
        "parameter_bytes": weights,
        "dtype": str(parameter.dtype).removeprefix("torch.") if parameter is not None else "none",
        "device": device_of(model),
        "training": model.training,
        "seed": torch.initial_seed(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **({"transformers": transformers.__version__} if transformers is not None else {}),
        },
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "options": dict(options),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "notes": [],
    }


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters, shared ones once."""
    return sum(nbytes_of(p) for p in module.parameters())
