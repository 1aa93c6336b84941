"""What looks like attention or a router and is reached by no mechanism."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unknown:
    """A place that was not understood.

    Parameters
    ----------
    path : str
        As in `model.named_modules()`.
    cls : str
        Name of its class.
    why : str
        What was seen of it and what is missing.
    option : str
        Of `bnviz.capture` that names it: "attention" or "routers"; "" where naming does not help.
    """

    path: str
    cls: str
    why: str
    option: str = ""

    def __str__(self) -> str:
        """One line, with the shortest way of naming it.

        Examples
        --------
        >>> str(Unknown("blocks.0.mix", "Mix", "named attention, calls no known kernel", "attention"))
        'blocks.0.mix Mix: named attention, calls no known kernel; try attention="blocks.0.mix"'
        """
        naming = f'; try {self.option}="{self.path}"' if self.option else ""
        return f"{self.path} {self.cls}: {self.why}{naming}"
