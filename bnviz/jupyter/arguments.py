"""What may be written after `%bnviz` and `%%bnviz`."""

from __future__ import annotations

import argparse
import keyword
import shlex
from typing import NoReturn

from IPython.core.error import UsageError

from bnviz import catalog
from bnviz.catalog import USUAL

HELP = """\
%bnviz attach MODEL [-p attention,routing] [--budget 1GiB] [--path DIR]   watch a model from now on
%bnviz status                                                             what is watched, what was seen
%bnviz report [OUT.html] [-r RUN]                                         show the report, or write it (again) to a file
%bnviz compare RUN RUN [OUT.html]                                         what changed from one run to another
%bnviz detach [-o NAME]                                                   stop watching; the run is in NAME (run)
%bnviz sites MODEL                                                        where it can be watched
%bnviz panel                                                              bring JupyterLab's side panel to the front
%%bnviz [MODEL] [-p attention,routing] [--budget 1GiB] [--path DIR] [-o NAME] [-q]
                                                                          watch while the cell runs; -q: no report"""


class _Parser(argparse.ArgumentParser):
    """A slip is a `UsageError`, which IPython shows as one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}. See: %bnviz help")


def line(text: str) -> argparse.Namespace:
    """The arguments of `%bnviz`; `.action` is one of `ACTIONS`."""
    return _LINE.parse_args(_words(text) or ["help"])


def cell(text: str) -> argparse.Namespace:
    """The arguments of `%%bnviz`."""
    return _CELL.parse_args(_words(text))


def _words(text: str) -> list[str]:
    """Words as typed: quotes hold words together, backslashes are backslashes and `models["a"]` stays what it is."""
    words = shlex.shlex(text, posix=False, punctuation_chars=False)
    words.whitespace_split = True
    words.commenters = ""
    try:
        return [word[1:-1] if word[0] in "\"'" and word[-1] == word[0] else word for word in words]
    except ValueError as error:
        raise UsageError(f"{error} in {text!r}. See: %bnviz help") from None


def _probes(text: str) -> tuple[str, ...]:
    chosen = tuple(name for name in text.split(",") if name)
    for name in chosen:
        if name != USUAL and name not in catalog.names("probes"):
            raise argparse.ArgumentTypeError(
                f"unknown probe {name!r}; valid: {USUAL} (the usual ones), {', '.join(catalog.names('probes'))}"
            )
    return chosen


def _variable(text: str) -> str:
    if not text.isidentifier() or keyword.iskeyword(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a variable's name")
    return text


def _watching(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-p", "--probes", type=_probes, metavar="NAMES")
    parser.add_argument("--budget", metavar="SIZE")
    parser.add_argument("--path", metavar="DIR")


def _line_parser() -> _Parser:
    parser = _Parser(prog="%bnviz", add_help=False)
    actions = parser.add_subparsers(dest="action", metavar="|".join(ACTIONS), required=True)
    parsers = {name: actions.add_parser(name, prog=f"%bnviz {name}", add_help=False) for name in ACTIONS}
    parsers["attach"].add_argument("model", metavar="MODEL")
    _watching(parsers["attach"])
    parsers["detach"].add_argument("-o", "--output", type=_variable, default="run", metavar="NAME")
    parsers["report"].add_argument("file", nargs="?", metavar="OUT.html")
    parsers["report"].add_argument("-r", "--run", default="run", metavar="RUN")
    parsers["compare"].add_argument("runs", nargs=2, metavar="RUN")
    parsers["compare"].add_argument("file", nargs="?", metavar="OUT.html")
    parsers["sites"].add_argument("model", metavar="MODEL")
    return parser


def _cell_parser() -> _Parser:
    parser = _Parser(prog="%%bnviz", add_help=False)
    parser.add_argument("model", nargs="?", metavar="MODEL")
    _watching(parser)
    parser.add_argument("-o", "--output", type=_variable, default="run", metavar="NAME")
    parser.add_argument("-q", "--quiet", action="store_true")
    return parser


ACTIONS = ("attach", "detach", "status", "report", "compare", "sites", "panel", "help")
_LINE = _line_parser()
_CELL = _cell_parser()
