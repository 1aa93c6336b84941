"""The text the demo reads: public domain, and unseen by the models called *bard*."""

from __future__ import annotations

from importlib.resources import files


def text() -> str:
    """Shakespeare's The Tempest, whole: about 100 kB.

    Examples
    --------
    >>> text().splitlines()[0]
    'THE TEMPEST'
    """
    return files("bnviz.demo").joinpath("data", "tempest.txt").read_text("utf-8")
