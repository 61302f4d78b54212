"""Speed of k-means, transport and neighbours against their physical floors and against other libraries, in one process.

    OMP_NUM_THREADS=1 taskset -c 1 python -m benchmarks.speed.ops [--only lloyd,knn] [--shapes c,d] [--repeats 5]

Every row interleaves its contestants and prints medians of CPU time (`time.process_time`), which other jobs on the
machine disturb least, per pass where contestants make several, and ratios to our own and to the floor. Read the ratios,
not the seconds. A floor is the matrix product (or the passes over memory) that nobody can do without. Libraries are
compared where they are installed: faiss (its sampling off), scikit-learn, fastkmeans, fast-pytorch-kmeans, POT.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.speed.kmeans import SHAPES, bench_batched, bench_lloyd, bench_memory, bench_warm
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(BENCHES), help=f"comma-separated, of {', '.join(BENCHES)}")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of the rows called lloyd and memory")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    capability = torch.backends.cpu.get_cpu_capability()
    versions = f"torch {torch.__version__}, numpy {np.__version__}, {torch.get_num_threads()} thread(s), {capability}"
    print(f"{versions}, load {os.getloadavg()[0]:.1f}")
    for name in arguments.only.split(","):
        BENCHES[name](arguments.repeats, arguments.shapes)


if __name__ == "__main__":
    main()
