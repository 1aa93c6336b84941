"""`python kernels/bench`: one table, the same on a CPU and on a GPU.

Every row is timed next to its peers in the same process, interleaved, so that ratios hold on a machine whose clock or load
moves. `/ floor` is against what can't be avoided (each file says what), `/ naive` against the definitions written out, `/ plain`
against the reduction without compiled C and without Triton. Triton's interpreter is never timed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# its neighbours are imported by their own names: `bench` is the directory at the top of the checkout
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: CPU time of one thread is what repeats

import attention_stats  # noqa: E402
import binned_codes  # noqa: E402
import block_stats  # noqa: E402
import covariance  # noqa: E402
import gram_reduce  # noqa: E402
import joint_histogram  # noqa: E402
import routing_counts  # noqa: E402
import token_similarity  # noqa: E402
from race import Ceilings, header, line  # noqa: E402

BENCHES = (
    attention_stats,
    binned_codes,
    block_stats,
    covariance,
    gram_reduce,
    joint_histogram,
    routing_counts,
    token_similarity,
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.7, help="time for one row of the table")
    seconds = parser.parse_args().seconds
    ceilings = Ceilings.measured()
    print(header(ceilings))
    for bench in BENCHES:
        for row in bench.rows(seconds):
            print(line(row, ceilings), flush=True)


if __name__ == "__main__":
    main()
