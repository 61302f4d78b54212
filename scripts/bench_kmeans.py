"""Times k-means against the matrix product it cannot do without, and against other libraries, in one process.

    OMP_NUM_THREADS=1 python scripts/bench_kmeans.py --shapes a,b,c,d,e --repeats 5

Prints ratios of CPU time, medians of interleaved runs. The floor is the product of the same shape alone, by the fastest
library at hand. Every library starts from the same rows of the same data and takes the same number of passes; the time
is per assignment pass (scikit-learn and this package make one pass more than they update, and are divided by that).
faiss's sampling is off. `inertia` is each one's final inertia over ours, all measured by the same code.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch

from deepclust.ops import kmeans

SHAPES = {
    "a": (50_000, 128, 10, 10),
    "b": (50_000, 128, 100, 10),
    "c": (50_000, 512, 1000, 5),
    "d": (200_000, 128, 1000, 5),
    "e": (100_000, 64, 3000, 5),
}
"""rows, dimension, clusters, passes."""


def features(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    """(num, dim) unit rows like those of a trained network: 200 classes of 5 modes, power-law spectrum, rotated."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, dim + 1).float().pow(-0.5)
    classes = torch.randn(200, 1, dim, generator=generator)
    modes = (classes + 0.6 * torch.randn(200, 5, dim, generator=generator)).flatten(0, 1)
    x = modes[torch.randint(len(modes), (num,), generator=generator)] + 0.8 * torch.randn(num, dim, generator=generator)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    return torch.nn.functional.normalize((x * spectrum) @ rotation, dim=1).contiguous()


def floors(x: torch.Tensor, num_clusters: int, passes: int, start: torch.Tensor) -> dict[str, Callable[[], None]]:
    """The bare products, 1024 rows at a time, by each library."""
    out = torch.empty(1024, num_clusters)
    xs, cs, outs = x.numpy(), start.numpy(), out.numpy()

    def by_torch() -> None:
        for low in [low for _ in range(passes) for low in range(0, len(x), 1024)]:
            rows = x[low : low + 1024]
            torch.mm(rows, start.T, out=out[: len(rows)])

    def by_numpy() -> None:
        for low in [low for _ in range(passes) for low in range(0, len(x), 1024)]:
            rows = xs[low : low + 1024]
            np.dot(rows, cs.T, out=outs[: len(rows)])

    return {"floor torch": by_torch, "floor numpy": by_numpy}


def peers(x: torch.Tensor, num_clusters: int, passes: int, start: torch.Tensor) -> dict[str, Callable[[], np.ndarray]]:
    """Name → a run that returns its centroids."""
    xs, cs, dim = x.numpy(), start.numpy(), x.shape[1]
    runs: dict[str, Callable[[], np.ndarray]] = {
        "ours": lambda: kmeans(x, num_clusters, init=start, num_iters=passes).centroids.numpy()
    }
    if find_spec("faiss"):
        import faiss

        def by_faiss() -> np.ndarray:
            run = faiss.Kmeans(dim, num_clusters, niter=passes, max_points_per_centroid=10**9)
            run.train(xs, init_centroids=cs)
            return run.centroids

        faiss.omp_set_num_threads(torch.get_num_threads())
        runs["faiss"] = by_faiss
    if find_spec("sklearn"):
        from sklearn.cluster import KMeans

        runs["scikit-learn"] = lambda: (
            KMeans(num_clusters, init=cs, n_init=1, max_iter=passes, tol=0).fit(xs).cluster_centers_
        )
    if find_spec("fast_pytorch_kmeans"):
        from fast_pytorch_kmeans import KMeans as FastTorch

        def by_fast_torch() -> np.ndarray:
            run = FastTorch(num_clusters, max_iter=passes, tol=0)
            run.fit_predict(x, start.clone())
            return run.centroids.numpy()

        runs["fast-pytorch-kmeans"] = by_fast_torch
    if find_spec("fastkmeans"):
        from fastkmeans import FastKMeans

        def by_fastkmeans() -> np.ndarray:
            run = FastKMeans(dim, num_clusters, niter=passes, tol=-1, gpu=False, max_points_per_centroid=None)
            run.train(xs)
            return run.centroids

        runs["fastkmeans (own start)"] = by_fastkmeans
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="a,b,c,d,e")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="comma-separated names of libraries")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"torch {torch.__version__}, numpy {np.__version__}, {options.threads} thread(s), load {os.getloadavg()[0]:.1f}"
    )
    for shape in options.shapes.split(","):
        bench(shape, options.repeats, [name for name in options.only.split(",") if name])


def bench(shape: str, repeats: int, only: list[str]) -> None:
    """Prints one line per library for one shape."""
    num, dim, num_clusters, passes = SHAPES[shape]
    x = features(num, dim)
    start = x[torch.randperm(num, generator=torch.Generator().manual_seed(0))[:num_clusters]].clone()
    runs = peers(x, num_clusters, passes, start)
    runs = {name: run for name, run in runs.items() if not only or name in only}
    everything = {**floors(x, num_clusters, passes, start), **runs}
    times: dict[str, list[float]] = {name: [] for name in everything}
    found = {}
    for _ in range(repeats + 1):
        for name, run in everything.items():
            began = time.process_time()
            found[name] = run()
            times[name].append(time.process_time() - began)
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    floor = min(value for name, value in medians.items() if name.startswith("floor")) / passes
    inertia = {name: kmeans(x, num_clusters, init=found[name], num_iters=0).inertia for name in runs}
    for name, value in medians.items():
        each = value / (passes + (name in ("ours", "scikit-learn")))
        spread = (max(times[name][1:]) - min(times[name][1:])) / value
        line = f"{shape} {num}x{dim} k {num_clusters:<5} {name:<24} {each * 1e3:9.2f} ms"
        line += f"  {each / floor:5.2f} x floor  spread {spread:4.0%}"
        print(
            line
            + (f"  inertia {inertia[name] / inertia['ours']:.6f}" if name in inertia and "ours" in inertia else ""),
            flush=True,
        )


if __name__ == "__main__":
    main()
