"""Fixtures every test may use: the project's own small trained models."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# a busy machine is no failure; where a change is judged, the same examples every time
settings.register_profile("bnviz", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("bnviz")

MODELS = Path(str(files("bnviz").joinpath("demo/models")))


@pytest.fixture(scope="session")
def load_model() -> Any:
    """`load_model(name)`: a trained model of the project, in eval mode, float32; loaded once."""
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    held: dict[tuple[str, str], Any] = {}

    def load(name: str, attention: str = "sdpa") -> Any:
        if (name, attention) not in held:
            folder = MODELS / name
            held[name, attention] = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation=attention
            ).eval()
        return held[name, attention]

    return load
