"""Exact neighbour search against the bare matrix product and faiss; part of `benchmarks.speed.ops`.

OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.speed.ops --only knn
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.harness import Contestants, measure, print_timings
from deepclust.ops import knn


def bench_knn(repeats: int, _: str) -> None:
    """Prints times of both uses: some rows against all of them, and all pairs of fewer rows."""
    x = F.normalize(torch.randn(50_000, 128, generator=torch.Generator().manual_seed(0)), dim=1)
    timings = measure(_contestants(x[:4096].contiguous(), x), repeats)
    print_timings("knn 50,000 x 128, top 20, 4,096 queries", timings)
    some = x[:16_000].contiguous()
    timings = measure(_contestants(some, some), repeats)
    print_timings("knn 16,000 x 128, top 20, all pairs", timings)


def _contestants(queries: Tensor, bank: Tensor) -> Contestants:
    """Searches for the 20 nearest of `bank` (N, D) to each of `queries` (n, D), unit rows."""

    def floor() -> None:
        # Tiles of 1024 x 1024 products stay in the cache; an exhaustive search computes them all.
        for part in queries.split(1024):
            for columns in bank.split(1024):
                torch.ops.mkldnn._linear_pointwise(part, columns, None, "none", [], "")

    contestants = {"ours": lambda: knn(queries, bank, k=20), "floor (GEMM)": floor}
    if find_spec("faiss"):
        import faiss

        # faiss has threads of its own, which torch.set_num_threads does not reach.
        faiss.omp_set_num_threads(torch.get_num_threads())
        # Unit rows: the inner product orders as the distance does, and costs less.
        metric = faiss.METRIC_INNER_PRODUCT
        contestants["faiss.knn"] = lambda: faiss.knn(
            queries.numpy(), bank.numpy(), 20, metric=metric
        )
    return contestants
