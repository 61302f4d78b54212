"""Speed of k-means, transport and neighbour search, against their floors and other libraries.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.speed.ops

printed the figures of "Speed of the operations" in the documents. `--only lloyd,knn --shapes c,d`
runs some of it, `--repeats` says how often.

A floor is the matrix product, or the passes over memory, that nobody can do without. Compared
libraries, where they are installed: faiss (its sampling off), scikit-learn, fastkmeans,
fast-pytorch-kmeans, POT. Every row interleaves its contestants and prints medians of CPU time, per
pass where contestants make several, and ratios to ours and to the floor. Read the ratios, not the
seconds: those are the machine's.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.speed.kmeans import (
    SHAPES,
    bench_batched,
    bench_lloyd,
    bench_memory,
    bench_warm,
)
from benchmarks.speed.neighbors import bench_knn
from benchmarks.speed.transport import bench_partial, bench_self_label, bench_sinkhorn

BENCHES: dict[str, Callable[[int, str], None]] = {
    "lloyd": bench_lloyd,
    "warm": bench_warm,
    "batched": bench_batched,
    "memory": bench_memory,
    "sinkhorn": bench_sinkhorn,
    "self_label": bench_self_label,
    "partial": bench_partial,
    "knn": bench_knn,
}
"""Each takes the number of repeats and the shapes asked for, which only k-means has."""


def main() -> None:
    """Runs the benchmarks asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default=",".join(BENCHES), help=f"comma-separated, of {', '.join(BENCHES)}"
    )
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of lloyd and memory")
    parser.add_argument("--repeats", type=int, default=5)
    # One thread by default: with more, libraries wait for each other's threads on a busy machine.
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"torch {torch.__version__}, numpy {np.__version__}, {torch.get_num_threads()} thread(s), "
        f"{torch.backends.cpu.get_cpu_capability()}, load {os.getloadavg()[0]:.1f}"
    )
    for name in options.only.split(","):
        BENCHES[name](options.repeats, options.shapes)


if __name__ == "__main__":
    main()
