"""The tour: watch real trained models, diagnose them, and leave one report. What `bnviz demo` runs."""

from __future__ import annotations

import os
import string
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnviz.errors import StoreError
from bnviz.quantities import counted, duration, size

from .models import MODELS, load
from .texts import text

if TYPE_CHECKING:
    from bnviz.report import Report
    from bnviz.run import Run

Say = Callable[[str], None]

PROMPT, WRITTEN = 320, 96  # tokens read and written by the language model; its context is 512
PASSAGES, LENGTH = 4, 256  # of the play, for the mixture of experts
COPIED = 31  # letters, told twice: the byte model was trained on windows of 64
ABOUT = (
    "Small models, really trained: a 4-layer llama and a mixture of experts that read Shakespeare, a 2-layer llama with a "
    "known induction head, and a network that learns a rule while it is watched."
)


def main(folder: str | os.PathLike[str] = "demo", *, say: Say = print) -> Path:
    """Watch four small trained models, diagnose them, and write `folder/report.html`.

    Parameters
    ----------
    folder : path-like
        Gets `report.html`, the runs (`*.zarr`) and `trace/`, which TensorBoard and Perfetto open. What an earlier demo left
        there is replaced; a `report.html` that is not one of ours is not.
    say : callable
        Given each line of progress.

    Returns
    -------
    Path
        The report.

    Raises
    ------
    StoreError
        `folder` is a file, or holds a `report.html` of somebody else; nothing was run.
    """
    start = time.perf_counter()
    home = _free(Path(folder))
    say(ABOUT)
    reports: list[Report] = []
    for number, (what, watch) in enumerate(STOPS, 1):
        begun = time.perf_counter()
        run = watch()
        run.save(home / f"{run.model.replace(' ', '-')}.zarr", overwrite=True)
        report = _diagnose(run)
        reports.append(report)
        ran = counted(len(report.names), "diagnostic")
        say(f"[{number}/{len(STOPS)}] {what}: {ran}, {duration(time.perf_counter() - begun)}")
        if "ops" in run:
            run.export_tensorboard(home / "trace", worker=run.model)
    target = reports[0].save(home / "report.html", beside=reports[1:], overwrite=True)
    found = sum(len(report.findings) for report in reports)
    say(f"{counted(found, 'finding')} in {duration(time.perf_counter() - start)}, the first of each model:")
    for report in reports:
        if report.findings:
            say(f"  {report.model}: {report.findings[0].sentence}")
    say(f"Open {target} ({size(target.stat().st_size)}); it needs no network.")
    return target


def _free(home: Path) -> Path:
    """The folder, when the demo may write there."""
    from bnviz.page import written_here

    target = home / "report.html"
    if home.exists() and not home.is_dir():
        raise StoreError(f"{home} is a file, and the demo writes a folder; name another: bnviz demo FOLDER.")
    if target.exists() and not written_here(target):
        raise StoreError(
            f"{target} was not written by bnviz and is left alone; name another folder: bnviz demo FOLDER."
        )
    return home


def _diagnose(run: Run) -> Report:
    from bnviz.report import diagnose

    return diagnose(run)


def language_model() -> Run:
    """A llama reads the opening of The Tempest and writes on: prefill and decode, every probe."""
    import torch

    from bnviz.capture import capture

    model, tokenizer = load("llama-bard")
    ids = torch.tensor([tokenizer.encode(_passage(0))[:PROMPT]])
    options: dict[str, Any] = {"max_new_tokens": WRITTEN, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        model.generate(ids, **options)  # the first call of a process pays for what later calls find ready
        with capture(model, name="llama-bard", tokenizer=tokenizer) as recorder:
            model.generate(ids, **options)
    return recorder.run


def copying_heads() -> Run:
    """A llama with a known circuit is told letters in random order twice: the second time it can copy."""
    import torch

    from bnviz.capture import capture

    model, _ = load("llama-induction-byte")
    source = torch.Generator().manual_seed(0)
    letters = torch.tensor(list(string.ascii_letters.encode()))
    once = torch.stack([letters[torch.randperm(len(letters), generator=source)[:COPIED]] for _ in range(8)])
    with torch.no_grad(), capture(model, probes=["attention"], name="llama-induction-byte") as recorder:
        model(torch.cat([once, once], 1))
    return recorder.run


def experts() -> Run:
    """A mixture of experts reads four passages."""
    import torch

    from bnviz.capture import capture

    model, tokenizer = load("mixtral-bard")
    rows = [tokenizer.encode(_passage(20_000 * i))[:LENGTH] for i in range(PASSAGES)]
    with torch.no_grad(), capture(model, probes=["routing", "activations"], name="mixtral-bard") as recorder:
        model(torch.tensor(rows))
    return recorder.run


def network_in_training() -> Run:
    """A small network learns a rule; every layer is watched from before the first epoch."""
    from .ib import train_and_capture

    return train_and_capture().run


STOPS: tuple[tuple[str, Callable[[], Any]], ...] = (
    (f"llama-bard ({MODELS['llama-bard'].split(',')[0]}) reads and writes", language_model),
    ("llama-induction-byte is told random letters twice", copying_heads),
    ("mixtral-bard routes four passages", experts),
    ("a 12-10-7-5-4-3-2 network learns a rule", network_in_training),
)


def _passage(start: int) -> str:
    """The play from the first line after `start`, its title page left out."""
    play = text()
    opening = play.index("ACT 1")
    at = play.index("\n", opening + start) + 1 if start else opening
    return play[at : at + 4000]
