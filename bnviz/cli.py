"""`bnviz ...`: each command is one public call; what goes wrong is one sentence and exit status 2."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .errors import BnvizError, StoreError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    arguments : sequence of str, optional
        Words after `bnviz`; those of the process when not given.

    Returns
    -------
    int
        0; 1 when `doctor` finds that something needed is missing; 2 after an error; 130 after an interrupt.

    Examples
    --------
    >>> main(["report", "no/such.run"])
    2
    """
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of our output has gone, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (BnvizError, OSError) as error:
        print(f"bnviz: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bnviz: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bnviz",
        description="Attach once to a running PyTorch model, measure what holds it back, rank it and show it.",
    )
    parser.add_argument("--version", action="version", version=f"bnviz {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="watch small trained models and write a report")
    demo.add_argument("folder", nargs="?", default="demo", help="where to (default: %(default)s)")
    demo.set_defaults(run=_demo)

    report = commands.add_parser("report", help="diagnose a stored run and write one HTML file")
    _takes_run(report)
    report.add_argument("-o", "--output", metavar="FILE", help="the file (default: beside the run, named after it)")
    report.add_argument("-f", "--force", action="store_true", help="replace the file if it exists")
    report.set_defaults(run=_report)

    compare = commands.add_parser("compare", help="say what changed between two stored runs and write one HTML file")
    for name in ("before", "after"):
        compare.add_argument(name, metavar="RUN", help="what run.save(...) or capture(path=...) wrote")
    compare.add_argument(
        "-o", "--output", metavar="FILE", help="the file (default: beside the second, named after both)"
    )
    compare.add_argument("-f", "--force", action="store_true", help="replace the file if it exists")
    compare.set_defaults(run=_compare)

    view = commands.add_parser("view", help="diagnose a stored run and open the report in a browser")
    _takes_run(view)
    view.set_defaults(run=_view)

    trace = commands.add_parser("trace", help="write a run's operators for TensorBoard and Perfetto")
    _takes_run(trace)
    trace.add_argument("directory", help="TensorBoard's log directory")
    trace.add_argument("--worker", default="bnviz", help="name of the process in it (default: %(default)s)")
    trace.set_defaults(run=_trace)

    doctor = commands.add_parser("doctor", help="say what works here, and how to mend what does not")
    doctor.set_defaults(run=_doctor)
    return parser


def _takes_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("stored", metavar="RUN", help="what run.save(...) or capture(path=...) wrote")


def _demo(options: argparse.Namespace) -> int:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch loads: its profiler warns of older memory
    from .demo import main as tour

    tour(options.folder)
    return 0


def _report(options: argparse.Namespace) -> int:
    stored = Path(options.stored)
    target = Path(options.output) if options.output else stored.with_suffix(".html")
    print(_write(stored, target, overwrite=options.force))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from .compare import compare
    from .store import open as open_run

    before, after = Path(options.before), Path(options.after)
    target = Path(options.output) if options.output else after.with_name(f"{before.stem}-{after.stem}.html")
    runs = open_run(before), open_run(after)
    _free(target, overwrite=options.force)
    report = compare(*runs)
    print(report.save(target, overwrite=options.force))
    print(report, file=sys.stderr)
    return 0


def _view(options: argparse.Namespace) -> int:
    stored = Path(options.stored)
    folder = Path(tempfile.mkdtemp(prefix="bnviz-"))
    target = _write(stored, folder / f"{stored.stem}.html", overwrite=True)
    print(target)
    if not webbrowser.open(target.resolve().as_uri()):
        print("No browser was found here; open the file above in one.", file=sys.stderr)
    return 0


def _write(stored: Path, target: Path, *, overwrite: bool) -> Path:
    """The report of a stored run; its findings on the way, as text."""
    from .report import diagnose
    from .store import open as open_run

    run = open_run(stored)
    _free(target, overwrite=overwrite)
    report = diagnose(run)
    saved = report.save(target, overwrite=overwrite)
    print(report, file=sys.stderr)
    return saved


def _free(target: Path, *, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise StoreError(f"{target} exists; name another file with -o, or add -f to replace it.")


def _trace(options: argparse.Namespace) -> int:
    from .store import open as open_run

    print(open_run(options.stored).export_tensorboard(options.directory, worker=options.worker))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import lines, look

    found = look()
    for line in lines(found):
        print(line)
    return 1 if any(one.needed and not one.works for one in found) else 0
