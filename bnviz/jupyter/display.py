"""How a run and a report display themselves in a notebook: one piece of HTML each, whole without a kernel.

A run is a table of what was seen. A report is its own saved page in a frame, so that what is seen live, reopened, converted and
sent to a colleague is one and the same thing.
"""

from __future__ import annotations

import html
from typing import Any

from bnviz import quantities
from bnviz.report import Report
from bnviz.run import Run

from .frame import framed

_MUTED = "color:var(--jp-ui-font-color2,#5f5f5f)"
_CODE = "font-family:var(--jp-code-font-family,ui-monospace,monospace)"
_STEM = "list-style:none;margin:0 0 0 6px;padding:0 0 0 14px;border-left:1px solid var(--jp-border-color1,#bdbdbd)"
_SHOWN_VARIABLES = 8


def report_html(report: Report) -> str:
    """A report as its page in a frame, with its findings as plain HTML for readers that strip frames."""
    from bnviz.page import page, summary

    return framed(page(report), title=f"bnviz report on {report.model}", still=summary(report))


def run_html(run: Run) -> str:
    """What was watched, what was seen, what went otherwise than asked, and what to do next."""
    rows = "".join(_record_row(kind, run[kind]) for kind in run.kinds)
    heads = "".join(
        f'<th style="text-align:left">{name}</th>' for name in ("record", "dimensions", "variables", "size")
    )
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>" if rows else "<p>No records.</p>"
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in run.notes)
    return (
        f"<div><p><strong>Run of {html.escape(run.model)}</strong> "
        f'<span style="{_MUTED}">{html.escape(" · ".join(_facts(run)))}</span></p>{table}'
        f"{f'<ul>{notes}</ul>' if notes else ''}"
        f'<p style="{_MUTED}">What it says: <code>bnviz.diagnose(run)</code> · the numbers: '
        f"<code>run[{html.escape(repr(next(iter(run.kinds), 'record')))}]</code> · "
        f'keep it: <code>run.save("run.zip")</code></p></div>'
    )


def sites_html(branch: Any) -> str:
    """What would be watched in a model, as a tree: branches with a name, something in code, words, and branches below."""
    return f"<div>{_branch(branch, strong=True)}{_below(branch, style='list-style:none;margin:0;padding:0')}</div>"


def _below(branch: Any, style: str = _STEM) -> str:
    items = "".join(f'<li style="margin:2px 0">{_branch(inner)}{_below(inner)}</li>' for inner in branch.below)
    return f'<ul style="{style}">{items}</ul>' if items else ""


def _branch(branch: Any, *, strong: bool = False) -> str:
    name = html.escape(branch.name)
    shown = [f"<strong>{name}</strong>" if strong else name] if name else []
    if branch.code:
        shown.append(f'<span style="{_CODE}">{html.escape(branch.code).replace("  ", " &nbsp;")}</span>')
    if branch.words:
        shown.append(f'<span style="{_MUTED}">{html.escape(branch.words)}</span>')
    return " &nbsp;".join(shown)


def _facts(run: Run) -> list[str]:
    """What was watched, from the provenance; a fact that is not there is left out."""
    given = run.provenance
    facts = [str(given["class"])] if given.get("class") and given.get("class") != run.model else []
    if "parameters" in given:
        facts.append(quantities.counted(given["parameters"], "parameter"))
    facts += [str(given[name]) for name in ("dtype", "device") if name in given]
    if "watched" in given:
        facts.append(f"{quantities.count(given['watched'])} of {quantities.counted(given['calls'], 'forward')} watched")
    if "seconds" in given:
        facts.append(quantities.duration(given["seconds"]))
    return [*facts, f"{quantities.size(run.nbytes)} of records"]


def _record_row(kind: str, record: Any) -> str:
    dims = " × ".join(f"{name} {quantities.count(size)}" for name, size in record.sizes.items()) or "–"
    names = [str(name) for name in record.data_vars]
    more = f" and {len(names) - _SHOWN_VARIABLES} more" if len(names) > _SHOWN_VARIABLES else ""
    cells = (
        f'<td style="text-align:left;{_CODE}">{html.escape(kind)}</td>',
        f'<td style="text-align:left">{html.escape(dims)}</td>',
        f'<td style="text-align:left;{_CODE}">{html.escape(", ".join(names[:_SHOWN_VARIABLES]))}{more}</td>',
        f'<td style="text-align:right;white-space:nowrap">{quantities.size(record.nbytes)}</td>',
    )
    return f"<tr>{''.join(cells)}</tr>"
