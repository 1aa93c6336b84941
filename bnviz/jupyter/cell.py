"""The body of a cell magic, run as IPython runs any cell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from IPython.core.displayhook import DisplayHook


def check(shell: Any, cell: str) -> None:
    """Refuse a cell that is not Python before anything is attached.

    Raises
    ------
    SyntaxError
        IPython shows it as that of any cell.
    """
    shell.compile.ast_parse(shell.transform_cell(cell))


def run(shell: Any, cell: str, header: str) -> BaseException | None:
    """Run `cell` in the user's namespace, with its magics, its last value displayed, its output as usual.

    Parameters
    ----------
    shell : IPython.core.interactiveshell.InteractiveShell
    cell : str
        The lines below the magic.
    header : str
        The magic's own line; a comment stands for it, so that line numbers in tracebacks are those of the cell.

    Returns
    -------
    BaseException or None
        What the cell raised, not shown yet. Raised again by the magic it is shown once, with the frames of the cell only, and
        the cell counts as failed: `Run All` stops there.
    """
    if DisplayHook.semicolon_at_end_of_expression(cell):
        cell += "\npass"  # the hook looks for the semicolon in the history, where this cell is an argument
    source = cell if cell.lstrip().startswith("%%") else f"# {header.strip()}\n{cell}"
    with _unshown(shell):
        outcome = shell.run_cell(source, store_history=False)
    error: BaseException | None = outcome.error_before_exec or outcome.error_in_exec
    if error is not None:
        _render_as(error, _cell_frames(shell, error))
    return error


@contextmanager
def _unshown(shell: Any) -> Iterator[None]:
    """Errors are kept in the result and not shown."""
    before = shell.custom_exceptions, shell.CustomTB
    shell.set_custom_exc((BaseException,), lambda *_args, **_options: None)
    try:
        yield
    finally:
        shell.custom_exceptions, shell.CustomTB = before


def _cell_frames(shell: Any, error: BaseException) -> list[str]:
    """The traceback as IPython words it, from the cell's first frame on."""
    lines: list[str] = shell.InteractiveTB.structured_traceback(type(error), error, error.__traceback__, tb_offset=1)
    return lines


def _render_as(error: BaseException, lines: list[str]) -> None:
    """Have IPython show these lines the next time it shows `error`, once."""

    def render() -> list[str]:
        BaseException.__delattr__(error, "_render_traceback_")
        return lines

    BaseException.__setattr__(error, "_render_traceback_", render)  # a frozen exception would refuse setattr()
