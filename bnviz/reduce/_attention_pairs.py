"""One key a query: the token before, the latest earlier copy of the token, and what followed that copy."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from ._attention_sight import Tokens

PAIRS = ("previous_mass", "echo_mass", "induction_mass")


def latest_copy(token_ids: Tensor) -> Tensor:
    """(batch, keys): position of the latest earlier copy of each token, -1 where there is none. Sorts: O(N log N).

    Examples
    --------
    >>> latest_copy(torch.tensor([[7, 8, 7, 7, 8]])).tolist()
    [[-1, -1, 0, 2, 1]]
    """
    order = torch.sort(token_ids, dim=-1, stable=True)
    same = order.values[:, 1:] == order.values[:, :-1]
    before = torch.where(same, order.indices[:, :-1], -1)
    first = torch.full_like(order.indices[:, :1], -1)
    return torch.full_like(order.indices, -1).scatter_(-1, order.indices, torch.cat([first, before], -1))


def partners(names: tuple[str, ...], of: Tokens, token_ids: Tensor | None, device: torch.device) -> dict[str, Tensor]:
    """Per name (batch | 1, queries): the key whose share of the row is the statistic; -1: not defined."""
    found: dict[str, Tensor] = {}
    at = torch.arange(of.shift, of.keys, device=device)[None]
    if "previous_mass" in names:
        found["previous_mass"] = _real((at - 1).clamp_min(-1), of)
    if {"echo_mass", "induction_mass"} & set(names):
        assert token_ids is not None
        ids = token_ids
        if of.keys_valid is not None:  # padding is no copy of anything: give every padded key an id of its own
            unlike = ids.amin() - 1 - torch.arange(of.keys, device=device)
            ids = torch.where(of.keys_valid, ids, unlike)
        copy = _of_queries(latest_copy(ids), of)
        if "echo_mass" in names:
            found["echo_mass"] = copy
        if "induction_mass" in names:
            found["induction_mass"] = torch.where(copy >= 0, copy + 1, -1)
    return found


_Made = tuple[weakref.ref[Tensor], tuple[object, ...], dict[str, Tensor]]
_latest: dict[str, _Made] = {}  # one entry; replaced whole, so that threads see it so


def partners_again(
    names: tuple[str, ...], of: Tokens, token_ids: Tensor | None, device: torch.device
) -> dict[str, Tensor]:
    """`partners`, made once for calls that follow one another with the same ids; for a GPU, where each operation is a launch.

    Kept until `forget`, which a capture calls when a forward ends.
    """
    if token_ids is None or of.keys_valid is not None or token_ids.is_inference():
        return partners(names, of, token_ids, device)
    key = (names, of.queries, of.keys, token_ids._version, device)
    latest = _latest.get("")
    if latest is None or latest[0]() is not token_ids or latest[1] != key:
        latest = weakref.ref(token_ids), key, partners(names, of, token_ids, device)
        _latest[""] = latest
    return dict(latest[2])


def forget() -> None:
    """Let go what `partners_again` keeps."""
    _latest.clear()


def _of_queries(of_key: Tensor, of: Tokens) -> Tensor:
    """The entries of the keys that are the queries' own tokens; -1 for queries before the first key."""
    if of.shift >= 0:
        return of_key[:, of.shift :]
    return torch.cat([of_key.new_full((of_key.shape[0], -of.shift), -1), of_key], -1)


def _real(partner: Tensor, of: Tokens) -> Tensor:
    """-1 where the partner is padding."""
    if of.keys_valid is None:
        return partner
    partner = partner.expand(of.keys_valid.shape[0], -1)
    return torch.where(of.keys_valid.gather(-1, partner.clamp_min(0)), partner, -1)
