"""The trained models that travel with bnviz: `models/README.md` says what they are and how they were made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from types import MappingProxyType
from typing import Any

from bnviz.errors import missing, unknown

MODELS = MappingProxyType(
    {
        "llama-bard": "Llama, 4 layers of 8 heads, 824 k parameters, trained on Shakespeare: real heads, readable tokens",
        "mixtral-bard": "the same with 8 experts, top 2, 2.4 M parameters: idle experts that are really there",
        "llama-induction-byte": "byte-level Llama, 2 layers of 4 heads, with a known induction head: layer 1 head 3",
        "llama-fixture": "the same shape without an induction head: the negative control",
    }
)


def load(name: str = "llama-bard") -> tuple[Any, Any]:
    """A trained model, ready to run in float32, and its tokenizer.

    Parameters
    ----------
    name : str
        One of `MODELS`.

    Returns
    -------
    model : transformers.PreTrainedModel
        In eval mode, on the CPU.
    tokenizer : transformers.PreTrainedTokenizerBase or None
        None for the byte models: their ids are the text's UTF-8 bytes.

    Raises
    ------
    UnknownName
        With the valid choices.
    MissingDependency
        transformers is not installed.

    Examples
    --------
    >>> model, tokenizer = load("llama-fixture")
    >>> sum(p.numel() for p in model.parameters()), tokenizer
    (107328, None)
    """
    if name not in MODELS:
        raise unknown("demo model", name, MODELS)
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise missing("transformers", "transformers", f"loading the demo model {name!r}") from None
    with as_file(files("bnviz.demo").joinpath("models", name)) as folder:
        with _without_progress():  # a bar in a notebook is a widget, and an error where its kernel is gone
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        spoken = (folder / "tokenizer.json").exists()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True) if spoken else None
    return model.eval(), tokenizer


@contextmanager
def _without_progress() -> Iterator[None]:
    """No progress bars of transformers; afterwards as it was."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
