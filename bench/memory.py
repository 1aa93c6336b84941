"""Peak memory of one forward, in a process of its own: `python -m bench.memory "activations,attention"`, or "" for plain."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import torch


def peak(probes: str, layers: int, hidden: int, tokens: int) -> int:
    """Bytes, at most, of a process that runs one forward, watched by `probes` or, for "", plain.

    Both import the same packages and build the same model; that is most of it.
    """
    arguments = [sys.executable, "-m", "bench.memory", probes, str(layers), str(hidden), str(tokens)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def _peak() -> int:
    """Bytes of this process at most: as Linux counts them since it began, `ru_maxrss` begins with what its parent had."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    probes, (layers, hidden, tokens) = sys.argv[1], map(int, sys.argv[2:5])
    import xarray  # noqa: F401 - a run is made of it: in both processes, as are all other imports

    import bnviz

    from .model import build

    torch.set_num_threads(1)
    model, ids = build(layers, hidden, tokens)
    with torch.no_grad():
        if probes:
            with bnviz.capture(model, probes=probes.split(",")) as recorder:
                model(ids)
            del recorder
        else:
            model(ids)
    print(_peak())


if __name__ == "__main__":
    main()
