"""Does a capture see every model there is, and leave it as it was?

    python -m bench.coverage                      # every type of the installed transformers, and the hand-written models
    python -m bench.coverage --only 'qwen*' zoo   # some of them
    python -m bench.coverage --resume             # only what is not in the results yet
    python -m bench.coverage --failures           # only what was not right last time
    python -m bench.coverage --write docs/coverage.md

Each model is built tiny with random weights in a process of its own, run plain, counted by an independent census of its
operators, and captured. Results stay in `.coverage.json` in the folder of this repository.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing of a sweep is downloaded
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from bench.zoo import page, table
from bench.zoo.build import NotBuilt, tiny
from bench.zoo.handmade import MODELS
from bench.zoo.types import model_types
from bench.zoo.watched import Result, watch

STORE = Path(__file__).resolve().parent.parent / ".coverage.json"
LIMIT = 120.0  # seconds a model may take


def names() -> list[str]:
    """Everything that is swept: transformers' types, then `zoo/NAME`."""
    return [*model_types(), *(f"zoo/{n}" for n in MODELS)]


def examine(name: str) -> Result:
    """Build one model, watch it, say what was seen; what cannot be built says why."""
    try:
        if name.startswith("zoo/"):
            made = MODELS[name.removeprefix("zoo/")]()
            return watch(name, made.model.eval(), made.call, made)
        model, call, note = tiny(name)
    except NotBuilt as why:
        return Result(name, reason=str(why))
    except Exception as error:
        return Result(name, reason=f"not built: {_worded(error)}", error=traceback.format_exc()[-1500:])
    try:
        result = watch(name, model, call)
    except Exception as error:
        return Result(name, type(model).__name__, error=f"{_worded(error)}\n{traceback.format_exc()[-2500:]}")
    result.idle = note
    return result


def _worded(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


def _send(name: str, pipe: Any) -> None:
    pipe.send(examine(name).row)


def alone(name: str, limit: float = LIMIT) -> dict[str, Any]:
    """`examine` in a process of its own, so that a crash or a hang is one row of the table."""
    mine, theirs = multiprocessing.Pipe(duplex=False)
    worker = multiprocessing.get_context("fork").Process(target=_send, args=(name, theirs))
    worker.start()
    theirs.close()
    result = Result(name, error=f"took more than {limit:.0f} s").row
    if mine.poll(limit):
        try:
            result = mine.recv()
        except EOFError:
            worker.join()
            result["error"] = f"the process ended with {worker.exitcode}"
    worker.kill()
    worker.join()
    return result


def _prepare() -> None:
    """Import once what every model needs; each process then starts with it."""
    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    for name in ("llama", "t5", "clip", "zoo/nanogpt-softmax", "zoo/torch-encoder"):
        examine(name)


def _stored() -> dict[str, Any]:
    """Results of sweeps before; rows of another form are made again."""
    rows = json.loads(STORE.read_text()) if STORE.exists() else {}
    return {n: r for n, r in rows.items() if r.keys() == Result(n).row.keys()}


def _chosen(asked: argparse.Namespace, stored: dict[str, Any]) -> list[str]:
    found = names()
    if asked.only:
        found = [n for n in found if any(fnmatch(n, p) or n.startswith(f"{p}/") for p in asked.only)]
    if asked.resume:
        found = [n for n in found if n not in stored]
    if asked.failures:
        found = [n for n in found if n not in stored or table.verdict(stored[n]) != "right"]
    return found


def sweep(chosen: Iterable[str], stored: dict[str, Any]) -> None:
    """Examine each and store as it comes."""
    chosen = list(chosen)
    for count, name in enumerate(chosen, 1):
        started = time.perf_counter()
        stored[name] = alone(name)
        print(f"{count}/{len(chosen)} {time.perf_counter() - started:5.1f} s  {table.line(stored[name])}", flush=True)
        if count % 20 == 0 or count == len(chosen):
            STORE.write_text(json.dumps(stored, indent=0))


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--only", nargs="+", metavar="NAME", help="types or patterns; zoo: the hand-written models")
    ask.add_argument("--resume", action="store_true", help="leave out what is in the results")
    ask.add_argument("--failures", action="store_true", help="leave out what was right")
    ask.add_argument("--table", action="store_true", help="run nothing, print the table of the results")
    ask.add_argument("--write", type=Path, metavar="FILE", help="write the table as Markdown")
    asked = ask.parse_args()
    stored = _stored()
    if not asked.table:
        _prepare()
        sweep(_chosen(asked, stored), stored)
    stored = {n: stored[n] for n in names() if n in stored}
    print(table.totals(stored))
    if asked.write:
        asked.write.write_text(page.markdown(stored))


if __name__ == "__main__":
    sys.exit(main())
