"""k-means against its floor and other libraries; part of `benchmarks.speed.ops`.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.speed.ops --only lloyd,warm,batched,memory

All contestants start from the same rows and make the same number of updates; each one's inertia is
measured by the same code and printed beside its time. The floor is the bare float32 product of all
rows with all centroids.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.harness import Contestants, Timing, measure, print_timings
from deepclust.ops import kmeans

SHAPES = {
    "a": (50_000, 128, 10, 10),
    "b": (50_000, 128, 100, 10),
    "c": (50_000, 512, 1000, 5),
    "d": (200_000, 128, 1000, 5),
    "e": (100_000, 64, 3000, 5),
}
"""Rows, dimension, clusters, updates."""
MODULES = {
    "ours": "deepclust",
    "faiss": "faiss",
    "scikit-learn": "sklearn",
    "fastkmeans, own start": "fastkmeans",
    "fast-pytorch-kmeans": "fast_pytorch_kmeans",
}
"""Contestant to the module that must be installed for it."""


# --- data -------------------------------------------------------------------------------------


def features(num: int, dim: int) -> Tensor:
    """(num, dim) float32 unit rows like the features of a trained network.

    200 classes of 5 modes each, a spectrum that falls by a power law, axes rotated at random.
    """
    # All draws come from one generator, in this order: the committed figures are of these rows.
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, dim + 1).float().pow(-0.5)
    classes = torch.randn(200, 1, dim, generator=generator)
    modes = (classes + 0.6 * torch.randn(200, 5, dim, generator=generator)).flatten(0, 1)
    centers = modes[torch.randint(len(modes), (num,), generator=generator)]
    x = centers + 0.8 * torch.randn(num, dim, generator=generator)
    # Without the rotation the first ten columns would hold half of a row's squared length.
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    return F.normalize((x * spectrum) @ rotation, dim=1).contiguous()


def some_rows(x: Tensor, count: int, seed: int = 0) -> Tensor:
    """(count, D) different rows of x (N, D), drawn at random."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order[:count]].clone()


# --- contestants ------------------------------------------------------------------------------


def kmeans_contestants(
    x: Tensor,
    start: Tensor,
    updates: int,
    names: Sequence[str] = tuple(MODULES),
) -> dict[str, Callable[[], Tensor]]:
    """Runs that return their centroids (K, D), of those libraries that are installed.

    x: (N, D) float32 rows.
    start: (K, D) first centroids.
    updates: of the centroids.
    names: which contestants, of `MODULES`.
    """
    runs = {
        "ours": by_ours,
        "faiss": by_faiss,
        "scikit-learn": by_sklearn,
        "fastkmeans, own start": by_fastkmeans,
        "fast-pytorch-kmeans": by_fast_torch,
    }
    return {name: partial(runs[name], x, start, updates) for name in names if _installed(name)}


def _installed(name: str) -> bool:
    return find_spec(MODULES[name]) is not None


def by_ours(x: Tensor, start: Tensor, updates: int) -> Tensor:
    """(K, D) centroids by deepclust."""
    return kmeans(x, len(start), init=start, num_iters=updates).centroids


def by_faiss(x: Tensor, start: Tensor | None, updates: int, num_clusters: int = 0) -> Tensor:
    """(K, D) centroids by faiss, from `start`, or from `num_clusters` rows that it draws itself."""
    import faiss

    # faiss has threads of its own, which torch.set_num_threads does not reach.
    faiss.omp_set_num_threads(torch.get_num_threads())
    count = num_clusters if start is None else len(start)
    # By default faiss looks at 256 rows per centroid; a number beyond all rows makes it take all.
    run = faiss.Kmeans(x.shape[1], count, niter=updates, max_points_per_centroid=10**9)
    run.train(x.numpy(), init_centroids=None if start is None else start.numpy())
    return torch.from_numpy(run.centroids)


def by_sklearn(x: Tensor, start: Tensor, updates: int) -> Tensor:
    """(K, D) centroids by scikit-learn."""
    from sklearn.cluster import KMeans

    # tol=0: it must not stop before its updates are made.
    options: dict[str, Any] = {"n_init": 1, "max_iter": updates, "tol": 0}
    run = KMeans(len(start), init=start.numpy(), **options)  # pyright: ignore[reportArgumentType]
    return torch.from_numpy(run.fit(x.numpy()).cluster_centers_)


def by_fastkmeans(x: Tensor, start: Tensor, updates: int) -> Tensor:
    """(K, D) centroids by fastkmeans, which draws its own rows and takes no start."""
    from fastkmeans import FastKMeans  # pyright: ignore[reportMissingImports]

    run = FastKMeans(
        x.shape[1],
        len(start),
        niter=updates,
        # Movements are never below -1: it must not stop before its updates are made.
        tol=-1,
        gpu=False,
        # None switches off its sampling of rows.
        max_points_per_centroid=None,
    )
    run.train(x.numpy())
    return torch.as_tensor(run.centroids)


def by_fast_torch(x: Tensor, start: Tensor, updates: int) -> Tensor:
    """(K, D) centroids by fast-pytorch-kmeans."""
    from fast_pytorch_kmeans import KMeans  # pyright: ignore[reportMissingImports]

    run = KMeans(len(start), max_iter=updates, tol=0)
    # A copy, in case it moves the centroids that it is given: `start` serves the others too.
    run.fit_predict(x, start.clone())
    return run.centroids


def _products(x: Tensor, start: Tensor) -> Contestants:
    """The bare products x · start, 1024 rows at a time, by each library that multiplies.

    None is the fastest on every machine; the best of them counts as the floor.
    """
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


def _inertias(x: Tensor, timings: Mapping[str, Timing]) -> dict[str, str]:
    """Notes by contestant: inertia of its centroids over that of ours."""
    inertia = {
        # num_iters=0 assigns the rows to the given centroids and moves none.
        name: kmeans(x, len(timing.result), init=timing.result, num_iters=0).inertia
        for name, timing in timings.items()
        if isinstance(timing.result, Tensor)
    }
    return {name: f"inertia {value / inertia['ours']:.6f}" for name, value in inertia.items()}


# --- benchmarks -------------------------------------------------------------------------------


def bench_lloyd(repeats: int, shapes: str) -> None:
    """Prints the time of one iteration from the same rows, for each comma-separated shape."""
    for shape in shapes.split(","):
        num, dim, num_clusters, updates = SHAPES[shape]
        x = features(num, dim)
        start = some_rows(x, num_clusters)
        contestants = kmeans_contestants(x, start, updates)
        timings = measure({**contestants, **_products(x, start)}, repeats)
        # These two assign the rows once more after the last update, which is a pass as well.
        one_more = ("ours", "scikit-learn")
        passes = {name: updates + (name in one_more) for name in contestants}
        title = f"lloyd {shape}: {num} x {dim}, k {num_clusters}"
        print_timings(title, timings, passes, _inertias(x, timings))


def bench_warm(repeats: int, _: str) -> None:
    """Prints the time of k-means between two epochs, with the last epoch's centroids at hand.

    Features have moved by 15 % of their length since then.
    """
    for num, dim in ((50_000, 128), (20_000, 512)):
        x = features(num, dim)
        before = kmeans(x, 1000, init=some_rows(x, 1000), num_iters=15).centroids
        generator = torch.Generator().manual_seed(1)
        direction = F.normalize(torch.randn(x.shape, generator=generator), dim=1)
        moved = F.normalize(x + 0.15 * direction, dim=1)
        contestants = {"ours": partial(by_ours, moved, before, 10)}
        if find_spec("faiss"):
            contestants["faiss, the same start"] = partial(by_faiss, moved, before, 10)
            # As it is mostly used: its own random rows, and its default of 25 iterations.
            contestants["faiss, cold, 25"] = partial(by_faiss, moved, None, 25, 1000)
        timings = measure(contestants, repeats)
        title = f"between epochs: {num} x {dim}, k 1000, 10 updates"
        print_timings(title, timings, notes=_inertias(moved, timings))


def bench_batched(repeats: int, _: str) -> None:
    """Prints the time of ten restarts on the same rows, each until no row changes cluster.

    Once by each library's own greedy k-means++, once from given starts.
    """
    x = features(1000, 512)
    ten = x.expand(10, -1, -1)
    given = torch.stack([some_rows(x, 500, seed) for seed in range(10)])
    for title, starts in (("k-means++", None), ("the same start", given)):
        init = "k-means++" if starts is None else starts
        contestants = {"ours": partial(_mean_inertia, ten, init)}
        if find_spec("sklearn"):
            contestants["scikit-learn, a loop"] = partial(_sklearn_loop, x, starts)
        timings = measure(contestants, repeats)
        notes = {name: f"mean inertia {timing.result:.4f}" for name, timing in timings.items()}
        print_timings(f"batched: 10 restarts x 1000 x 512, k 500, {title}", timings, notes=notes)


def _mean_inertia(x: Tensor, init: Any) -> float:
    """Mean inertia of ten problems (10, N, D), solved as one batch."""
    return float(kmeans(x, 500, init=init).inertia.mean())


def _sklearn_loop(x: Tensor, starts: Tensor | None) -> float:
    """Mean inertia of ten restarts, one after the other."""
    from sklearn.cluster import KMeans

    inits: Any = ["k-means++"] * 10 if starts is None else starts.numpy()
    # At most 25 updates, our default; scikit-learn's own is 300.
    options: dict[str, Any] = {"n_init": 1, "max_iter": 25, "tol": 0}
    inertia = []
    for init in inits:
        run: Any = KMeans(500, init=init, **options).fit(x.numpy())
        inertia.append(run.inertia_)
    return statistics.mean(inertia)


# --- memory -----------------------------------------------------------------------------------


def bench_memory(_: int, shapes: str) -> None:
    """Prints the peak of memory beyond the rows and the start, each in a fresh process."""
    for shape in shapes.split(","):
        peaks = {}
        for name in ("ours", "faiss", "scikit-learn"):
            # `spawn` and not `fork`: a child must not begin with this process's memory.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                job = pool.submit(peak_memory, name, shape, torch.get_num_threads())
                peaks[name] = job.result()
        figures = [f"{name} {peak:.0f} MB" for name, peak in peaks.items() if peak >= 0]
        print(f"memory {shape}: {', '.join(figures)}")


def peak_memory(name: str, shape: str, num_threads: int) -> float:
    """MB of resident memory that three updates take, -1 where the library is missing.

    name: of the contestant.
    shape: of `SHAPES`.
    num_threads: of torch, in this process.
    """
    torch.set_num_threads(num_threads)
    num, dim, num_clusters, _ = SHAPES[shape]
    x = features(num, dim)
    start = some_rows(x, num_clusters)
    # A small problem first: what libraries load and set up for good is not the problem's memory.
    small = kmeans_contestants(x[: 2 * num_clusters], start, 1, [name])
    if name not in small:
        return -1.0
    small[name]()
    run = kmeans_contestants(x, start, 3, [name])[name]
    # Memory that is free but not given back would hide what the run takes.
    ctypes.CDLL(None).malloc_trim(0)
    # 5 resets the peak, VmHWM, to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """MB of a field of /proc/self/status, which counts in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise KeyError(field)
