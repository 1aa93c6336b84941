"""Every colour, map, size and font of bnviz; drawn with through `style`, and nowhere written a second time.

Python writes the light theme. The page swaps colours token for token when its theme is dark (`static/theme.js`), so a colour
stands in a scalar property or in a mapper made here, and never in a data column.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from bokeh.models import CategoricalColorMapper, LinearColorMapper, LogColorMapper
from bokeh.palettes import Cividis256

Ramp = Literal["ramp", "cividis", "diverge"]

CHROME: Mapping[str, tuple[str, str]] = MappingProxyType(
    {  # token: light, dark
        "surface": ("#ffffff", "#212121"),
        "raised": ("#f5f5f5", "#2b2b2b"),
        "ink": ("#212121", "#e4e4e4"),
        "muted": ("#5f5f5f", "#b0b0b0"),
        "faint": ("#8a8a8a", "#7d7d7d"),
        "grid": ("#e6e6e6", "#383838"),
        "rule": ("#bdbdbd", "#616161"),
        "accent": ("#0b57d0", "#8ab4f8"),
        "wash": ("#dbe8f8", "#2c4257"),
    }
)
SEVERITY: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"high": ("#b3261e", "#ff8f85"), "medium": ("#8a5300", "#f0b429"), "low": ("#1d5fa8", "#8ab8ff")}
)
CATEGORY: Mapping[str, tuple[str, str]] = MappingProxyType(
    {  # in order of use: farthest apart under normal sight and all three dichromacies, 3:1 on the surface
        "blue": ("#2126a9", "#b1caff"),
        "brick": ("#851903", "#e0431e"),
        "violet": ("#925fe9", "#7860ea"),
        "ochre": ("#c78443", "#e99976"),
        "sky": ("#4d9db6", "#47a3e4"),
        "plum": ("#582e61", "#9f648a"),
        "olive": ("#856500", "#fdd90e"),
        "teal": ("#0c7474", "#3bffbb"),
    }
)
STOPS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = MappingProxyType(
    {  # the first stop of the ramp and the middle of diverge are (nearly) the surface: nothing must look like nothing
        "ramp": (
            ("#f4f7fb", "#c9dcf2", "#8fbbe6", "#4f93d2", "#1f68ad", "#0b3d75"),
            ("#272b31", "#2a4561", "#2d6699", "#4a90d0", "#8bbfee", "#dcedff"),
        ),
        "diverge": (
            ("#7a3300", "#c7762b", "#efc79c", "#f6f6f6", "#b9d1ee", "#4a86c6", "#123f7a"),
            ("#ffbe8a", "#c9732f", "#6a4527", "#2a2a2a", "#2a4868", "#4088cf", "#acd5ff"),
        ),
    }
)
TOKENS: Mapping[str, tuple[str, str]] = MappingProxyType({**CHROME, **SEVERITY, **CATEGORY})
LIGHT: Mapping[str, str] = MappingProxyType({name: pair[0] for name, pair in TOKENS.items()})
DARK: Mapping[str, str] = MappingProxyType({name: pair[1] for name, pair in TOKENS.items()})
SERIES: tuple[str, ...] = tuple(pair[0] for pair in CATEGORY.values())

SIZE: Mapping[str, str] = MappingProxyType({"title": "14px", "subtitle": "12px", "label": "12px", "tick": "11px"})
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace"
UI_FONT = f"var(--jp-ui-font-family, {FONT})"
MARK: Mapping[str, str] = MappingProxyType({"high": "■", "medium": "▲", "low": "●", "note": "○"})

CLEAR = "rgba(0, 0, 0, 0)"


@cache
def palette(name: Ramp, steps: int = 256, *, dark: bool = False) -> tuple[str, ...]:
    """A sequential or diverging map in `steps` colours, mixed in linear light so that neither end turns muddy.

    `ramp` for a magnitude from zero, `cividis` for dense images, log scales and ranges that do not start at zero, `diverge`
    for what has a centre that means something.

    Examples
    --------
    >>> palette("ramp", 3)[0], len(palette("cividis"))
    ('#f4f7fb', 256)
    """
    if name == "cividis":
        return tuple(Cividis256[round(at)] for at in np.linspace(0, 255, steps))
    stops = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in STOPS[name][int(dark)]]) ** 2.2
    at = np.linspace(0, len(stops) - 1, steps)
    mixed = np.stack([np.interp(at, np.arange(len(stops)), stops[:, i]) for i in range(3)], axis=1) ** (1 / 2.2)
    return tuple("#" + "".join(f"{round(255 * float(v)):02x}" for v in colour) for colour in mixed)


def mapper(name: Ramp, low: float, high: float, *, log: bool = False, **options: Any) -> LinearColorMapper:
    """A colour mapper that the page can turn to the other theme; NaN stays empty.

    Equal limits are widened, so that a constant draws as the low end instead of failing. `log=True` is for `cividis`.

    Examples
    --------
    >>> mapper("ramp", 0, 1).tags
    ['bnviz-map:ramp']
    """
    low, high = float(low), float(high)
    if not high > low:
        high = low * 10 if log else low + 1.0
    kind = LogColorMapper if log else LinearColorMapper
    steps = {"nan_color": CLEAR, **options}
    return kind(palette=list(palette(name)), low=low, high=high, tags=[f"bnviz-map:{name}"], **steps)


def categories(factors: Sequence[str], colours: Sequence[str] = SERIES) -> CategoricalColorMapper:
    """One category colour a factor, in the order given; what comes after the eighth is grey, which means *other*."""
    shown = [*colours[: len(factors)], *[LIGHT["faint"]] * max(0, len(factors) - len(colours))]
    return CategoricalColorMapper(factors=list(factors), palette=shown, nan_color=CLEAR)


def css() -> str:
    """The tokens as CSS variables for both themes, and the two fonts."""

    def block(mode: int) -> str:
        return "".join(f"--bnv-{name}:{pair[mode]};" for name, pair in TOKENS.items())

    fonts = f"--bnv-font:{UI_FONT};--bnv-mono:var(--jp-code-font-family,{MONO});"
    return (
        f":root{{color-scheme:light;{fonts}{block(0)}}}\n"
        f":root[data-bnviz-theme=dark]{{color-scheme:dark;{block(1)}}}\n"
        f"@media print{{:root[data-bnviz-theme=dark]{{color-scheme:light;{block(0)}}}}}\n"
    )


def themes() -> str:
    """What the page's script needs to change the theme, as JSON: token for token, and the 256 colours of each map."""
    maps = {name: {"light": palette(name), "dark": palette(name, dark=True)} for name in ("ramp", "diverge")}
    return json.dumps({"light": dict(LIGHT), "dark": dict(DARK), "maps": maps}, separators=(",", ":"))
