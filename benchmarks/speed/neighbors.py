"""Neighbour search against its floor and faiss; run by `benchmarks.speed.ops`."""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.harness import Contestants, measure, show
from deepclust.ops import knn


def bench_knn(repeats: int, _: str) -> None:
    """Some rows against all of them, and all pairs of fewer."""
    x = F.normalize(torch.randn(50_000, 128, generator=torch.Generator().manual_seed(0)), dim=1)
    timings = measure(knn_contestants(x[:4096].contiguous(), x), repeats)
    show("knn 50,000 x 128, top 20, 4,096 queries", timings)
    some = x[:16_000].contiguous()
    show("knn 16,000 x 128, top 20, all pairs", measure(knn_contestants(some, some), repeats))


def knn_contestants(queries: Tensor, bank: Tensor) -> Contestants:
    def floor() -> None:
        for part in queries.split(1024):
            for columns in bank.split(1024):
                torch.ops.mkldnn._linear_pointwise(part, columns, None, "none", [], "")

    contestants: Contestants = {"ours": lambda: knn(queries, bank, k=20), "floor (GEMM)": floor}
    if find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        q, b = queries.numpy(), bank.numpy()
        contestants["faiss.knn"] = lambda: faiss.knn(q, b, 20, metric=faiss.METRIC_INNER_PRODUCT)
    return contestants
