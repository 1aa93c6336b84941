"""What tests of twins share; a module that imports it is skipped where there is no Triton."""

import importlib.util

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
asked_of_the_interpreter = pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is asked for")


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal random numbers, the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
