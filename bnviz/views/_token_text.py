"""Tokens of a passage as HTML: darker the longer they stay, struck out when dropped; in Python first, by the page after."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from . import style

CSS = f"""
:host {{ width: 100%; }}
.bnviz-tokens {{ font: 13px/1.9 var(--jp-code-font-family, {style.MONO}); color: var(--bnv-ink, #212121); max-width: 90ch;
  overflow-wrap: anywhere; white-space: pre-wrap; }}
.bnviz-tokens span {{ border-radius: 2px; padding: 2px 0;
  background: color-mix(in srgb, var(--bnv-low, #1d5fa8) calc(var(--s) * 50%), transparent); }}
.bnviz-tokens span.out {{ background: none; color: var(--bnv-muted, #5f5f5f); text-decoration: line-through;
  text-decoration-color: var(--bnv-faint, #8a8a8a); text-decoration-thickness: 1.5px; }}
.bnviz-tokens i {{ font-style: normal; color: var(--bnv-faint, #8a8a8a); }}
.bnviz-quiet {{ color: var(--bnv-muted, #5f5f5f); font: 12px/1.5 var(--jp-ui-font-family, {style.FONT}); }}
"""

# The same as `render`, in the page: names of models and words of texts are escaped here as there.
CODE = """
const at = control.value, row = Number(picked.value) * n, first = window ? window.value : 0;
const kept = source.data.image[0], rows = kept.length / bins;
const share = new Float32Array(kept.length);
for (let m = 0; m < rows; m++)
  for (let b = 0; b < bins; b++) {
    const from = b * width, to = Math.min(n, from + width);
    let count = 0;
    for (let t = from; t < to; t++) if (levels[m * n + t] <= at) count++;
    share[m * bins + b] = count / (to - from);
  }
kept.set(share);
source.change.emit();
const escaped = text => text.replace(/[&<>"']/g, c => '&#' + c.charCodeAt(0) + ';');
if (n <= limit) {
  const parts = [];
  for (let t = first; t < Math.min(n, first + size); t++) {
    const level = levels[row + t], out = level > at;
    const word = words.length ? escaped(words[t]).replace(/\\n/g, '<i>⏎</i>\\n') : t + ' ';
    const shade = (1 - level / budgets).toFixed(2);
    parts.push(`<span ${out ? 'class=out ' : ''}style="--s:${shade}" title="token ${t}">${word}</span>`);
  }
  div.text = '<div class=bnviz-tokens>' + parts.join('') + '</div>';
}
"""


def render(words: Sequence[str], levels: np.ndarray, at: int, *, first: int, size: int, budgets: int) -> str:
    """HTML of the tokens [first, first + size).

    Parameters
    ----------
    words : sequence of str
        All tokens; empty: positions stand for them.
    levels : array (token,)
        First budget that keeps each token.
    at : int
        The chosen budget: tokens with a higher level are struck out.
    first, size : int
        The window.
    budgets : int
        How many there are; a token that all of them keep is darkest.

    Examples
    --------
    >>> render(["<b>", "x"], np.array([0, 9]), 0, first=0, size=1, budgets=10)
    '<div class=bnviz-tokens><span style="--s:1.00" title="token 0">&lt;b&gt;</span></div>'
    """
    parts = []
    for token in range(first, min(len(levels), first + size)):
        level = int(levels[token])
        word = html.escape(words[token]).replace("\n", "<i>⏎</i>\n") if words else f"{token} "
        out = "class=out " if level > at else ""
        parts.append(f'<span {out}style="--s:{1 - level / budgets:.2f}" title="token {token}">{word}</span>')
    return f"<div class=bnviz-tokens>{''.join(parts)}</div>"
