"""Findings as the panel gets them: text, and coordinates as JSON holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bnviz.findings import place
from bnviz.schema import Finding


def finding(one: Finding) -> dict[str, Any]:
    """Severity, sentence, place in words, coordinates, and the diagnostic whose view shows it."""
    return {
        "severity": one.severity,
        "sentence": one.sentence,
        "place": place(one.where),
        "where": _plain(one.where),
        "diagnostic": one.code.partition("/")[0],
    }


def _plain(where: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, value in where.items():
        some = value.tolist() if hasattr(value, "tolist") else value
        plain[name] = list(some) if isinstance(some, tuple) else some
    return plain
