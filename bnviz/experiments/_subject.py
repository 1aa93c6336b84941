"""The model and the batch of an experiment, and a model that holds still while it is measured."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnviz.errors import BnvizError


@dataclass(frozen=True, slots=True)
class Subject:
    """What an experiment measures on.

    Parameters
    ----------
    model : nn.Module
    texts : tuple of Tensor (1, tokens) int64
        The sequences of the batch, each without its padding, on the model's device.
    """

    model: nn.Module
    texts: tuple[Tensor, ...]

    @property
    def digest(self) -> str:
        """Of the texts and of some of every weight: another one is another experiment."""
        found = hashlib.sha256()
        for text in self.texts:
            found.update(text.cpu().numpy().tobytes() + b"|")
        for name, parameter in self.model.named_parameters():
            some = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)][:64]
            found.update(f"{name}{tuple(parameter.shape)}".encode() + some.float().cpu().numpy().tobytes())
        return found.hexdigest()[:16]


def subject(model: Any, batch: Any) -> Subject:
    """A model and a batch of token ids, checked.

    Parameters
    ----------
    model : nn.Module
    batch : Tensor (tokens,) or (batch, tokens), sequence of int, or mapping, optional
        Ids; a mapping as a tokenizer gives it, with `input_ids` and perhaps `attention_mask`; None: no texts.

    Raises
    ------
    BnvizError
        The model is none, or the batch holds no ids.
    """
    if not isinstance(model, nn.Module):
        raise BnvizError(
            f"experiment: found a {type(model).__name__}, expected a torch.nn.Module; give the model itself."
        )
    if batch is None:
        return Subject(model, ())
    mask = None
    if isinstance(batch, Mapping) or hasattr(batch, "keys"):
        if "input_ids" not in batch:
            raise BnvizError(f"experiment: the batch holds {', '.join(batch)}, expected 'input_ids'.")
        batch, mask = batch["input_ids"], batch.get("attention_mask")
    try:
        ids = torch.as_tensor(batch)
    except (TypeError, ValueError, RuntimeError):
        raise BnvizError(
            f"experiment: found a batch of {type(batch).__name__} that is no array of numbers, expected token ids (batch, "
            "tokens) in rows of one length; give what the tokenizer returns."
        ) from None
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim not in (1, 2) or not ids.numel():
        raise BnvizError(
            f"experiment: found a batch of {ids.dtype} of shape {tuple(ids.shape)}, expected token ids (batch, tokens)."
        )
    ids = ids[None] if ids.ndim == 1 else ids
    _known(model, ids)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else torch.as_tensor(mask).bool().to(ids.device)
    if real.shape != ids.shape:
        raise BnvizError(f"experiment: attention_mask is {tuple(real.shape)}, expected {tuple(ids.shape)}, as the ids.")
    device = next(model.parameters()).device
    texts = (row[keep][None].long().to(device) for row, keep in zip(ids, real, strict=True))
    return Subject(model, tuple(texts))


def _known(model: nn.Module, ids: Tensor) -> None:
    """Whether the model has an embedding for every id."""
    table = getattr(model, "get_input_embeddings", lambda: None)()
    many = getattr(table, "num_embeddings", None)
    if isinstance(many, int) and (int(ids.max()) >= many or int(ids.min()) < 0):
        raise BnvizError(
            f"experiment: the batch holds ids from {int(ids.min())} to {int(ids.max())}, and {type(model).__name__} knows 0 to "
            f"{many - 1}; use the model's own tokenizer."
        )


@contextlib.contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; every module is in its own mode again afterwards, whatever happens."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
