"""k-means against its floor and other libraries; run by `benchmarks.speed.ops`."""

from __future__ import annotations

import ctypes
import multiprocessing
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.harness import Contestants, Timing, measure, show
from deepclust.ops import kmeans

SHAPES = {
    "a": (50_000, 128, 10, 10),
    "b": (50_000, 128, 100, 10),
    "c": (50_000, 512, 1000, 5),
    "d": (200_000, 128, 1000, 5),
    "e": (100_000, 64, 3000, 5),
}
"""rows, dimension, clusters, passes."""
MODULES = {
    "ours": "deepclust",
    "faiss": "faiss",
    "scikit-learn": "sklearn",
    "fastkmeans, own start": "fastkmeans",
    "fast-pytorch-kmeans": "fast_pytorch_kmeans",
}
PEERS = tuple(MODULES)


def features(num: int, dim: int) -> Tensor:
    """(num, dim) unit rows like those of a trained network: 200 classes of 5 modes, power-law spectrum, rotated."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, dim + 1).float().pow(-0.5)
    classes = torch.randn(200, 1, dim, generator=generator)
    modes = (classes + 0.6 * torch.randn(200, 5, dim, generator=generator)).flatten(0, 1)
    x = modes[torch.randint(len(modes), (num,), generator=generator)] + 0.8 * torch.randn(num, dim, generator=generator)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    return F.normalize((x * spectrum) @ rotation, dim=1).contiguous()


def some_rows(x: Tensor, count: int, seed: int = 0) -> Tensor:
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]].clone()


def bench_lloyd(repeats: int, shapes: str) -> None:
    """One iteration from the same rows. Who makes a pass more than it updates is divided by that."""
    for shape in shapes.split(","):
        num, dim, num_clusters, updates = SHAPES[shape]
        x = features(num, dim)
        start = some_rows(x, num_clusters)
        contestants = {**kmeans_contestants(x, start, updates), **products(x, start)}
        timings = measure(contestants, repeats)
        passes = {name: updates + (name in ("ours", "scikit-learn")) for name in timings if name[:5] != "floor"}
        show(f"lloyd {shape}: {num} x {dim}, k {num_clusters}", timings, passes, inertias(x, timings))


def products(x: Tensor, start: Tensor) -> Contestants:
    """The bare products x · start, 1024 rows at a time, by each library."""
    out = torch.empty(1024, len(start))

    def by_torch() -> None:
        for rows in x.split(1024):
            torch.mm(rows, start.T, out=out[: len(rows)])

    def by_numpy() -> None:
        for rows in x.split(1024):
            np.dot(rows.numpy(), start.numpy().T, out=out[: len(rows)].numpy())

    def by_onednn() -> None:
        for rows in x.split(1024):
            torch.ops.mkldnn._linear_pointwise(rows, start, None, "none", [], "")

    return {"floor torch": by_torch, "floor numpy": by_numpy, "floor oneDNN": by_onednn}


def kmeans_contestants(x: Tensor, start: Tensor, updates: int, peers: Sequence[str] = PEERS) -> Contestants:
    """Runs that return their centroids (K, D), of the libraries that are installed."""
    runs = {
        "ours": by_ours,
        "faiss": by_faiss,
        "scikit-learn": by_sklearn,
        "fastkmeans, own start": by_fastkmeans,
        "fast-pytorch-kmeans": by_fast_torch,
    }
    return {name: partial(runs[name], x, start, updates) for name in peers if find_spec(MODULES[name])}


def by_fast_torch(x: Tensor, start: Tensor, updates: int) -> Tensor:
    from fast_pytorch_kmeans import KMeans

    run = KMeans(len(start), max_iter=updates, tol=0)
    run.fit_predict(x, start.clone())
    return run.centroids


def by_fastkmeans(x: Tensor, start: Tensor, updates: int) -> Tensor:
    """It draws its own rows and takes no start."""
    from fastkmeans import FastKMeans

    run = FastKMeans(x.shape[1], len(start), niter=updates, tol=-1, gpu=False, max_points_per_centroid=None)
    run.train(x.numpy())
    return torch.as_tensor(run.centroids)


def by_ours(x: Tensor, start: Tensor, updates: int) -> Tensor:
    return kmeans(x, len(start), init=start, num_iters=updates).centroids


def by_faiss(x: Tensor, start: Tensor | None, updates: int, num_clusters: int = 0) -> Tensor:
    """faiss on all rows, from `start` or from `num_clusters` rows that it draws itself."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    number = num_clusters if start is None else len(start)
    run = faiss.Kmeans(x.shape[1], number, niter=updates, max_points_per_centroid=10**9)
    run.train(x.numpy(), init_centroids=None if start is None else start.numpy())
    return torch.from_numpy(run.centroids)


def by_sklearn(x: Tensor, start: Tensor, updates: int) -> Tensor:
    from sklearn.cluster import KMeans

    run = KMeans(len(start), init=start.numpy(), n_init=1, max_iter=updates, tol=0)
    return torch.from_numpy(run.fit(x.numpy()).cluster_centers_)


def bench_memory(_: int, shapes: str) -> None:
    """Peak of memory beyond the rows and the start, each in a fresh process."""
    for shape in shapes.split(","):
        peaks = {}
        for name in ("ours", "faiss", "scikit-learn"):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                peaks[name] = pool.submit(peak_memory, name, shape, torch.get_num_threads()).result()
        print(f"memory {shape}: " + ", ".join(f"{name} {peak:.0f} MB" for name, peak in peaks.items() if peak >= 0))


def peak_memory(name: str, shape: str, num_threads: int) -> float:
    """MB of resident memory above what stood before the run, -1 where the library is missing."""
    torch.set_num_threads(num_threads)
    num, dim, num_clusters, _ = SHAPES[shape]
    x = features(num, dim)
    start = some_rows(x, num_clusters)
    small = kmeans_contestants(x[: 2 * num_clusters], start, 1, peers=[name])
    if name not in small:
        return -1.0
    small[name]()
    run = kmeans_contestants(x, start, 3, peers=[name])[name]
    # Memory that is free but not given back would hide what the run takes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """MB of a field of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def inertias(x: Tensor, timings: Mapping[str, Timing]) -> dict[str, str]:
    """Each one's inertia over ours, all measured by the same code."""
    found = {
        name: kmeans(x, len(timing.result), init=timing.result, num_iters=0).inertia
        for name, timing in timings.items()
        if isinstance(timing.result, Tensor)
    }
    return {name: f"inertia {value / found['ours']:.6f}" for name, value in found.items()}


def bench_warm(repeats: int, _: str) -> None:
    """Between epochs: features moved by 15 % of their length, centroids of the epoch before at hand."""
    for num, dim in ((50_000, 128), (20_000, 512)):
        x = features(num, dim)
        before = kmeans(x, 1000, init=some_rows(x, 1000), num_iters=15).centroids
        generator = torch.Generator().manual_seed(1)
        moved = F.normalize(x + 0.15 * F.normalize(torch.randn(x.shape, generator=generator), dim=1), dim=1)
        contestants: Contestants = {"ours": partial(by_ours, moved, before, 10)}
        if find_spec("faiss"):
            contestants["faiss, the same start"] = partial(by_faiss, moved, before, 10)
            contestants["faiss, cold, 25"] = partial(by_faiss, moved, None, 25, 1000)
        timings = measure(contestants, repeats)
        show(f"between epochs: {num} x {dim}, k 1000, 10 updates", timings, notes=inertias(moved, timings))


def bench_batched(repeats: int, _: str) -> None:
    """Ten restarts on the same rows until no row changes cluster: each library's greedy k-means++, and given starts."""
    x = features(1000, 512)
    ten = x.expand(10, -1, -1)
    given = torch.stack([some_rows(x, 500, seed) for seed in range(10)])
    for title, starts in (("k-means++", None), ("the same start", given)):
        init = "k-means++" if starts is None else starts
        contestants: Contestants = {"ours": lambda init=init: float(kmeans(ten, 500, init=init).inertia.mean())}
        if find_spec("sklearn"):
            contestants["scikit-learn, a loop"] = partial(sklearn_loop, x, starts)
        timings = measure(contestants, repeats)
        notes = {name: f"mean inertia {timing.result:.4f}" for name, timing in timings.items()}
        show(f"batched: 10 restarts x 1000 x 512, k 500, {title}", timings, notes=notes)


def sklearn_loop(x: Tensor, starts: Tensor | None) -> float:
    """Mean inertia of ten restarts."""
    from sklearn.cluster import KMeans

    inits: Any = ["k-means++"] * 10 if starts is None else starts.numpy()
    runs: list[Any] = [KMeans(500, init=init, n_init=1, max_iter=25, tol=0).fit(x.numpy()) for init in inits]
    return statistics.mean(run.inertia_ for run in runs)
