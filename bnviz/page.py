"""A report as one HTML file: findings and tables in plain HTML, figures drawn by a script that can reach no network."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__, catalog, quantities
from .counts import summary as summary_of
from .figures import Drawn, draw
from .findings import NOT_ESTIMATED, place, rank, saving_words, share_of
from .needs import ON_REQUEST, sort_of
from .schema import Finding
from .tables import Table, places, tables

if TYPE_CHECKING:
    from .report import Outcome, Report

SHOWN = 7
_GENERATOR = '<meta name="generator" content="bnviz '
_NO_SCRIPT = "Figures need JavaScript. The findings and tables below do not"
_MARK = {"high": "■", "medium": "▲", "low": "●", "note": "○"}
_BUNDLES = ("bokeh", "bokeh-gl", "bokeh-widgets", "bokeh-tables")  # in the order they must load
_HALF = 520  # a figure this narrow shares its row from 900 px on

_Figures = Sequence[tuple[str, Drawn]]


@dataclass(frozen=True, slots=True)
class _Part:
    """One report in a page that may hold several.

    Parameters
    ----------
    report : Report
    mark : str
        Before every id of this part, so that ids are unique; empty in a page of one report.
    run : str
        What tells this part's places from those of the others; empty in a page of one report.
    """

    report: Report
    mark: str
    run: str
    figures: dict[str, _Figures]


def _parts(reports: Sequence[Report]) -> list[_Part]:
    if len(reports) == 1:
        return [_Part(reports[0], "", "", _figures(reports[0], ""))]
    names = [report.model for report in reports]
    runs = [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]
    made = enumerate(zip(reports, runs, strict=True), 1)
    return [_Part(report, f"part{i}-", run, _figures(report, f"part{i}-")) for i, (report, run) in made]


def written_here(path: Path) -> bool:
    """Whether a file is a report that bnviz wrote, by the line in its head that says so."""
    try:
        with path.open("rb") as file:
            return _GENERATOR.encode() in file.read(4096)
    except OSError:
        return False


def page(*reports: Report, whole: bool = True) -> str:
    """The whole file: one report, or several beside each other with one list of findings.

    Not `whole`: only the figures of a report and what was found in them, for a place that shows the rest itself.
    """
    from .views import style

    parts = _parts(reports)
    drawn = [(at, each) for part in parts for some in part.figures.values() for at, each in some if not each.error]
    library = _library({bundle for _, each in drawn for bundle in each.bundles}) if drawn else ""
    script = style.page_script(report=True)
    policy = _policy(script, library, evaluates=any(each.evaluates for _, each in drawn))
    title = ", ".join(report.model for report in reports)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
{_GENERATOR}{__version__}"><title>{escape(title)} · bnviz</title>
<style>{style.page_css(report=True)}</style></head><body>
<div class="bar"><div><div id="status" role="status" aria-live="polite">{_NO_SCRIPT}</div>
<button id="theme" type="button" hidden>Dark theme</button></div></div>
<main>{_several(parts) if len(parts) > 1 else _one(parts[0]) if whole else _sections(parts[0]) + _findings(parts)}
<footer>bnviz {__version__}. This file holds everything it shows and reaches no network.</footer></main>
{_stored("bokeh", library)}
{"".join(_stored(f"doc-{at}", each.document) for at, each in drawn)}
<script>{script}</script></body></html>
"""


def _one(part: _Part) -> str:
    return _overview(part) + _findings([part]) + _body(part)


def _several(parts: Sequence[_Part]) -> str:
    """A head for all, one list of findings, then a chapter for each model."""
    links = "".join(f'<li><a href="#{part.mark}top">{escape(part.run)}</a></li>' for part in parts)
    found = _ranked(parts)
    lead = f"{found[0][1].sentence}." if found else "Nothing found above the limits."
    head = f"""<header><h1>What holds {len(parts)} models back</h1><p class="sub">{escape(" · ".join(p.run for p in parts))}</p>
<p class="lead">{escape(lead)}</p><nav aria-label="Models"><ol>{links}</ol></nav></header>"""
    chapters = "".join(
        f'<article class="chapter" id="{part.mark}top" aria-label="{escape(part.run)}">{_overview(part)}{_body(part)}</article>'
        for part in parts
    )
    return head + _findings(parts) + chapters


def _body(part: _Part) -> str:
    return _sections(part) + _not_run(part) + _provenance(part)


def _ranked(parts: Sequence[_Part]) -> list[tuple[_Part, Finding]]:
    """Findings of all parts on one list."""
    home = {id(finding): part for part in parts for finding in part.report.findings}
    return [(home[id(finding)], finding) for finding in rank(f for part in parts for f in part.report.findings)]


def _figures(report: Report, mark: str) -> dict[str, _Figures]:
    found: dict[str, _Figures] = {}
    for name, outcome in report.outcomes.items():
        found[name] = [(f"{mark}{name}-{i}", each) for i, each in enumerate(draw(outcome))]
    return found


# --------------------------------------------------------------------------------------------------------- stored and allowed
def _stored(at: str, text: str) -> str:
    """Text as compressed data that is no script until it is inflated."""
    if not text:
        return ""
    packed = base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()
    return f'<script type="application/octet-stream" id="{escape(at)}">{packed}</script>'


def _library(bundles: Collection[str]) -> str:
    """The BokehJS bundles that are needed, as one script."""
    import bokeh

    folder = Path(bokeh.__file__).parent / "server" / "static" / "js"
    return "\n;".join((folder / f"{name}.min.js").read_text(encoding="utf-8") for name in _BUNDLES if name in bundles)


def _policy(script: str, library: str, *, evaluates: bool) -> str:
    """A content policy under which the page runs these two scripts and reaches nothing.

    `evaluates`: a figure carries JavaScript of its own, which BokehJS compiles.
    """
    allowed = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (script, library)
    ]
    if evaluates:
        allowed.append("'unsafe-eval'")
    return (
        f"default-src 'none'; script-src {' '.join(allowed)}; style-src 'unsafe-inline'; img-src data: blob:; "
        "font-src data:; base-uri 'none'; form-action 'none'"
    )


# -------------------------------------------------------------------------------------------------------------------- head
def _overview(part: _Part) -> str:
    report, said = part.report, part.report.overview()
    line = " · ".join(map(escape, said.about))
    found = report.findings
    lead = f"{found[0].sentence}." if found else f"{said.nothing}."
    numbers = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in said.numbers)
    level = 2 if part.mark else 1
    title = f"<h{level}>{escape(said.title)}</h{level}>"
    return f"""<header>{title}<p class="sub">{line}</p>
<p class="lead">{escape(lead)}</p><dl class="six">{numbers}</dl>{_trust(report)}{_navigation(part)}</header>"""


def _trust(report: Report) -> str:
    """What to know before believing the numbers: the notes of the run and what failed."""
    notes = [*report.run.notes, *(f"{name} did not finish: {why}" for name, why in report.failures.items())]
    if not notes:
        return ""
    return f'<ul class="caveats" aria-label="Limits of this run">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>'


def _navigation(part: _Part) -> str:
    names = part.report.outcomes
    items = "".join(f'<li><a href="#{part.mark}{escape(name)}">{escape(_title_of(name))}</a></li>' for name in names)
    run = escape(part.report.overview().run)
    return f'<nav aria-label="Diagnostics"><ol>{items}<li><a href="#{part.mark}run">{run}</a></li></ol></nav>'


def _title_of(name: str) -> str:
    words = name.replace("_", " ").replace("kv ", "KV ")
    return words[:1].upper() + words[1:]


# ---------------------------------------------------------------------------------------------------------------- findings
def _findings(parts: Sequence[_Part]) -> str:
    found = _ranked(parts)
    if not found:
        every = [each for part in parts for each in part.report.outcomes.values()]
        ran = "".join(f"<li>{escape(each.judgement.question or each.spec.question)}</li>" for each in every)
        words = " ".join(part.report.overview().nothing for part in parts)
        body = f'<div class="nothing">{escape(words)}<ul>{ran}</ul></div>'
    else:
        body = f'<ul class="findings">{"".join(_finding(*each) for each in found[:SHOWN])}</ul>'
        if rest := found[SHOWN:]:
            more = "".join(_finding(*each) for each in rest)
            body += f'<details class="more"><summary>Show {len(rest)} more</summary><ul class="findings">{more}</ul></details>'
    return f'<section class="block" aria-labelledby="findings"><h2 id="findings">Findings</h2>{body}</section>'


def _finding(part: _Part, finding: Finding) -> str:
    section = part.mark + finding.code.partition("/")[0]
    at = dict(finding.where) | ({"run": part.run} if part.run and finding.where else {})
    where = json.dumps(at, default=lambda value: value.item())
    path = finding.where.get("path")
    spot = escape(place({k: v for k, v in finding.where.items() if k != "path"}))
    spot = f"{escape(part.run)}{' · ' * bool(spot)}{spot}" if part.run else spot
    if isinstance(path, str) and path:
        spot += f"<span>{escape(path)}</span>"
    name = _title_of(finding.code.partition("/")[0])
    return f"""<li class="finding" data-where="{escape(where)}" data-section="{escape(section)}">
<span class="sev {finding.severity}"><b aria-hidden="true">{_MARK[finding.severity]}</b>{finding.severity}</span>
<div class="claim"><button type="button" class="what" aria-pressed="false">{escape(finding.sentence)}</button>
<p class="advice">{escape(finding.advice)}</p></div>
<div class="place">{spot}</div>{_saving(finding)}
<a class="go" href="#{escape(section)}" aria-label="Show {escape(name)}">›</a></li>"""


def _saving(finding: Finding) -> str:
    if finding.saving is None:
        return f'<div class="save none">{NOT_ESTIMATED}</div>'
    bar = f'<i style="width:{100 * share_of(finding):.0f}%"></i>'
    return f'<div class="save">{escape(saving_words(finding))}{bar}<small>{escape(finding.saving.how)}</small></div>'


# ---------------------------------------------------------------------------------------------------------------- sections
def _sections(part: _Part) -> str:
    small = [name for name, some in part.figures.items() if some and max(each.width for _, each in some) <= _HALF]
    halves, order, i = set(), list(part.report.outcomes), 0
    while i < len(order) - 1:  # two small ones in a row share a row
        pair = order[i : i + 2]
        if all(name in small for name in pair):
            halves |= set(pair)
            i += 1
        i += 1
    inner = (_section(part, name, outcome, half=name in halves) for name, outcome in part.report.outcomes.items())
    return f'<div class="sections">{"".join(inner)}</div>'


def _section(part: _Part, name: str, outcome: Outcome, *, half: bool) -> str:
    judgement, spec, figures = outcome.judgement, outcome.spec, part.figures[name]
    at = part.mark + name
    record = spec.needs[0].partition(".")[0] if spec.needs else ""
    drawn = "".join(_figure(part, name, *figure) for figure in figures)
    shown = f'<div class="figures">{drawn}</div>' if drawn else ""
    caveats = "".join(f"<li>{escape(line)}</li>" for line in judgement.caveats)
    summary = judgement.summary or judgement.title
    kind, level = ("half" if half else "full"), (3 if part.mark else 2)
    return f"""<section id="{at}" class="{kind}" data-record="{escape(record)}" aria-labelledby="q-{at}">
<h{level} class="question" id="q-{at}">{escape(judgement.question or spec.question)}</h{level}>
<h{level + 1} class="says" id="t-{at}">{escape(judgement.title)}</h{level + 1}>
<p class="sub">{escape(judgement.subtitle)}</p><p class="spoken" id="s-{at}">{escape(summary)}</p>
{shown}{f'<ul class="caveats">{caveats}</ul>' if caveats else ""}{_as_tables(outcome)}</section>"""


def _figure(part: _Part, name: str, at: str, each: Drawn) -> str:
    caption = f'<p class="sub">{escape(each.caption)}</p>' if len(part.figures[name]) > 1 else ""
    labels = f'role="figure" aria-labelledby="t-{part.mark}{name}" aria-describedby="s-{part.mark}{name}"'
    if each.error:
        words = f"{each.name or name} could not be drawn: {each.error}. The numbers are in the table below"
        return f'<figure {labels}>{caption}<div class="unseen"><span>{escape(words)}</span></div></figure>'
    style, run = f"min-height:{each.height}px", f' data-run="{escape(part.run)}"' if part.run else ""
    return f"""<figure {labels} style="flex-basis:{min(each.width, 1100)}px">{caption}<div class="holder noscript" tabindex="0"
 data-doc="doc-{at}"{run} style="{style}"><span>{_NO_SCRIPT}</span></div></figure>"""


def _as_tables(outcome: Outcome) -> str:
    made = "".join(map(_table, tables(outcome.result)))
    return f"<details><summary>Show as table</summary>{made}</details>" if made else ""


def _table(table: Table) -> str:
    classes = [' class="n"' if numeric else "" for numeric in table.numeric]
    heads = "".join(f'<th scope="col"{c}>{escape(h)}</th>' for h, c in zip(table.heads, classes, strict=True))
    rows = "".join(
        "<tr>" + "".join(f"<td{c}>{escape(v)}</td>" for v, c in zip(row, classes, strict=True)) + "</tr>"
        for row in table.rows
    )
    note = f'<p class="sub">{escape(table.note)}</p>' if table.note else ""
    return f'{note}<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


# --------------------------------------------------------------------------------------------------------------------- end
def _not_run(part: _Part) -> str:
    """Diagnostics whose records are not there, with what to add; and those that failed. Folded where others answer beside it."""
    report = part.report
    absent = [(sort_of(why), _question(name), why) for name, why in report.absent.items()]
    asked = [("", what, why) for sort, what, why in absent if sort == ON_REQUEST]
    lines = [("" if sort else "hatched", what, why) for sort, what, why in absent if sort != ON_REQUEST]
    lines += [
        ("failed", _title_of(name), f"○ {why}. The others were not affected") for name, why in report.failures.items()
    ]
    if not lines and not asked:
        return ""
    if part.mark and not report.failures:
        words = f"{quantities.counted(len(lines) + len(asked), 'question')} this run does not answer"
        folded = _states(lines + asked)
        return f'<section class="block"><details><summary>{words}</summary>{folded}</details></section>'
    more = f"<details><summary>{len(asked)} on request</summary>{_states(asked)}</details>" if asked else ""
    return f'<section class="block"><h2>{escape(report.overview().unanswered)}</h2>{_states(lines)}{more}</section>'


def _question(name: str) -> str:
    question: str = catalog.load("diagnostics", name).spec.question
    return question


def _states(lines: Sequence[tuple[str, str, str]]) -> str:
    items = "".join(
        f'<li class="{kind}"><span>{escape(what)}</span><span>{escape(why)}</span></li>' for kind, what, why in lines
    )
    return f'<ul class="states">{items}</ul>' if items else ""


def _provenance(part: _Part) -> str:
    report, said = part.report, part.report.overview()
    rows = "".join(f"<dt>{escape(label)}</dt><dd>{escape(value)}</dd>" for label, value in said.facts)
    kinds = "".join(_record(report, kind) for kind in report.run.kinds)
    name = escape(f"{said.run} of {part.run}" if part.run else said.run)
    facts_of = f'<dl class="facts">{rows}{kinds}</dl>{_sites(report)}'
    return f'<section class="block" id="{part.mark}run"><h2>{name}</h2>{facts_of}</section>'


def _sites(report: Report) -> str:
    """How often each place was seen, folded."""
    counts = report.run.sites
    if not counts:
        return ""
    shown = _table(places(counts))
    return f"<details><summary>Where it was seen: {escape(' · '.join(summary_of(counts)))}</summary>{shown}</details>"


def _record(report: Report, kind: str) -> str:
    record = report.run[kind]
    sizes = " × ".join(f"{name} {size}" for name, size in record.sizes.items())
    return f"<dt>record {escape(kind)}</dt><dd>{escape(sizes)}</dd>"


def summary(report: Report) -> str:
    """A short HTML table of the findings for a notebook: no script, no figures."""
    cell = "padding:4px 12px 4px 0;text-align:left;vertical-align:top"
    rows = "".join(
        f"<tr><td style='{cell};white-space:nowrap'>{_MARK[f.severity]} {f.severity}</td><td style='{cell}'>{escape(f.sentence)}"
        f"<br><span style='opacity:.75'>{escape(f.advice)}</span></td><td style='{cell}'>{escape(place(f.where))}</td>"
        f"<td style='{cell}'>{escape(saving_words(f))}</td></tr>"
        for f in report.findings[:SHOWN]
    )
    more = len(report.findings) - SHOWN
    tail = f"<p>{more} more in <code>report.findings</code></p>" if more > 0 else ""
    said = report.overview()
    head = f"<p><b>{escape(said.title)}</b> · {said.ran}</p>"
    return f"<div>{head}{f'<table>{rows}</table>' if rows else f'<p>{escape(said.nothing)}</p>'}{tail}</div>"
