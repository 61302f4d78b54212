"""Speed of k-means, transport and neighbours against their physical floors and against other libraries, in one process.

    OMP_NUM_THREADS=1 taskset -c 1 python scripts/bench_ops.py [--only lloyd,knn] [--shapes c,d] [--repeats 5]

Every row interleaves its contestants and prints medians of CPU time (`time.process_time`), which other jobs on the
machine disturb least, per pass where contestants make several, and ratios to our own and to the floor. Read the ratios,
not the seconds. A floor is the matrix product (or the passes over memory) that nobody can do without. Libraries are
compared where they are installed: faiss (its sampling off), scikit-learn, fastkmeans, fast-pytorch-kmeans, POT.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.ops import kmeans, knn, partial_transport, self_label, sinkhorn

Contestants = dict[str, Callable[[], Any]]

SHAPES = {
    "a": (50_000, 128, 10, 10),
    "b": (50_000, 128, 100, 10),
    "c": (50_000, 512, 1000, 5),
    "d": (200_000, 128, 1000, 5),
    "e": (100_000, 64, 3000, 5),
}
"""rows, dimension, clusters, passes."""


@dataclass
class Timing:
    """seconds: median of CPU time. spread: (largest - smallest) / median. result: what the last run returned."""

    seconds: float
    spread: float
    result: Any


def measure(contestants: Contestants, repeats: int) -> dict[str, Timing]:
    """Runs all in turn, `repeats` times and once before that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    results = {}
    for _ in range(repeats + 1):
        for name, run in contestants.items():
            start = time.process_time()
            results[name] = run()
            seconds[name].append(time.process_time() - start)
    timings = {}
    for name, values in seconds.items():
        median = statistics.median(values[1:])
        timings[name] = Timing(median, (max(values[1:]) - min(values[1:])) / median, results[name])
    return timings


def show(
    title: str, timings: Mapping[str, Timing], passes: Mapping[str, int] = {}, notes: Mapping[str, str] = {}
) -> None:
    """Prints one comparison; a contestant's time is divided by its number of passes."""
    each = {name: timing.seconds / passes.get(name, 1) for name, timing in timings.items()}
    floor = min((value for name, value in each.items() if name.startswith("floor")), default=math.nan)
    print(title)
    for name, value in each.items():
        ratios = f"{value / each['ours']:7.2f} x ours"
        ratios += "" if math.isnan(floor) else f"{value / floor:7.2f} x floor"
        spread = f"spread {timings[name].spread:4.0%}"
        print(f"  {name:26s}{1e3 * value:10.2f} ms  {ratios}  {spread}  {notes.get(name, '')}".rstrip(), flush=True)


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


def cosines(num: int, clusters: int, dim: int = 64) -> Tensor:
    """(num, clusters) similarities of clustered points to random prototypes."""
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(80, dim, generator=generator)[torch.randint(0, 80, (num,), generator=generator)]
    x = F.normalize(centres + torch.randn(num, dim, generator=generator), dim=1)
    return x @ F.normalize(torch.randn(clusters, dim, generator=generator), dim=1).T


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


def kmeans_contestants(x: Tensor, start: Tensor, updates: int) -> Contestants:
    """Runs that return their centroids (K, D)."""
    number, dim = start.shape
    contestants: Contestants = {"ours": partial(by_ours, x, start, updates)}
    if find_spec("faiss"):
        contestants["faiss"] = partial(by_faiss, x, start, updates)
    if find_spec("sklearn"):
        contestants["scikit-learn"] = partial(by_sklearn, x, start, updates)
    if find_spec("fast_pytorch_kmeans"):
        from fast_pytorch_kmeans import KMeans as FastTorch

        def by_fast_torch() -> Tensor:
            run = FastTorch(number, max_iter=updates, tol=0)
            run.fit_predict(x, start.clone())
            return run.centroids

        contestants["fast-pytorch-kmeans"] = by_fast_torch
    if find_spec("fastkmeans"):
        from fastkmeans import FastKMeans

        def by_fastkmeans() -> Tensor:
            run = FastKMeans(dim, number, niter=updates, tol=-1, gpu=False, max_points_per_centroid=None)
            run.train(x.numpy())
            return torch.as_tensor(run.centroids)

        contestants["fastkmeans, own start"] = by_fastkmeans
    return contestants


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


def bench_sinkhorn(repeats: int, _: str) -> None:
    for epsilon in (0.05, 0.01):
        timings = measure(sinkhorn_contestants(cosines(512, 3000), epsilon), 3 * repeats)
        show(f"sinkhorn 512 x 3000, 3 iterations, epsilon {epsilon}", timings)


def sinkhorn_contestants(scores: Tensor, epsilon: float) -> Contestants:
    columns, rows = torch.rand(3000), torch.rand(512)

    def floor() -> None:
        kernel = scores.exp()
        for _ in range(3):
            torch.mv(kernel, columns)
            torch.mv(kernel.T, rows)
        kernel.mul_(columns)

    contestants: Contestants = {"ours": lambda: sinkhorn(scores, epsilon=epsilon), "floor": floor}
    if find_spec("ot"):
        import ot

        a, b, cost = np.full(512, 1 / 512, np.float32), np.full(3000, 1 / 3000, np.float32), -scores.numpy()
        options: dict[str, Any] = {"numItermax": 3, "stopThr": 0.0, "warn": False}
        contestants["POT"] = lambda: ot.sinkhorn(a, b, cost, epsilon, **options)
        contestants["POT, log"] = lambda: ot.sinkhorn(a, b, cost, epsilon, method="sinkhorn_log", **options)
    return contestants


def bench_self_label(repeats: int, _: str) -> None:
    """One round is the difference between 101 rounds and 1, over 100."""
    log_probs = torch.log_softmax(10 * cosines(50_000, 100), 1)
    powers, scale = 20 * log_probs, torch.rand(100)
    kernel = torch.rand(50_000, 100, dtype=torch.float64)

    def by_logarithms() -> None:
        log_rows = torch.logsumexp(powers + scale, 1)
        torch.logsumexp(powers - log_rows[:, None], 0)

    def rounds(count: int) -> None:
        self_label(log_probs, power=20.0, stop="paper", tol=0.0, max_iters=count)

    contestants: Contestants = {"set up": partial(rounds, 1), "rounds": partial(rounds, 101)}
    contestants |= {"log-domain, float32": by_logarithms, "floor (reading once)": lambda: kernel.sum()}
    contestants["to the end"] = lambda: self_label(log_probs, power=20.0)
    timings = measure(contestants, repeats)
    whole, before, end = timings.pop("rounds"), timings.pop("set up"), timings.pop("to the end")
    timings = {"ours": Timing((whole.seconds - before.seconds) / 100, whole.spread, None), **timings}
    show("self_label 50,000 x 100, power 20, one round", timings)
    print(f"  to a violation of {end.result.violation:.1e}: {end.result.num_iters} rounds, {1e3 * end.seconds:.0f} ms")


def bench_partial(repeats: int, _: str) -> None:
    logits = 10 * cosines(5120, 100)
    for epsilon in (0.1, 0.05):
        timings = measure(partial_contestants(logits, epsilon), repeats)
        notes = {}
        if len(timings) > 1:
            ours = partial_transport(logits.double(), mass=1.0, epsilon=epsilon, tol=1e-7).plan / 5120
            difference = float((ours - torch.as_tensor(timings["POT unbalanced, float64"].result)).abs().max())
            notes = {"ours": f"largest difference to POT's plan {difference:.1e}"}
        show(f"partial_transport 5120 x 100, mass 1, epsilon {epsilon}", timings, notes=notes)
    for mass in (0.1, 0.5):
        timings = measure({"ours": partial(partial_transport, logits, mass=mass)}, repeats)
        show(f"partial_transport 5120 x 100, mass {mass}: {timings['ours'].result.num_iters} rounds", timings)


def partial_contestants(logits: Tensor, epsilon: float) -> Contestants:
    contestants: Contestants = {"ours": lambda: partial_transport(logits, mass=1.0, epsilon=epsilon, tol=1e-7)}
    if find_spec("ot"):
        import ot

        cost = -torch.log_softmax(logits.double(), 1).numpy()
        a, b, ones = np.full(5120, 1 / 5120), np.full(100, 0.01), np.ones_like(cost)
        # a prior of ones makes POT's divergence the plain entropy, up to a constant
        options: dict[str, Any] = {"numItermax": 10_000, "stopThr": 1e-9, "c": ones}
        contestants["POT unbalanced, float64"] = lambda: ot.unbalanced.sinkhorn_unbalanced(
            a, b, cost, epsilon, (math.inf, 1.0), **options
        )
    return contestants


def bench_knn(repeats: int, _: str) -> None:
    """Some rows against all of them, and all pairs of fewer."""
    x = F.normalize(torch.randn(50_000, 128, generator=torch.Generator().manual_seed(0)), dim=1)
    timings = measure(knn_contestants(x[:2048].contiguous(), x), repeats)
    show("knn 50,000 x 128, top 20, 2,048 queries", timings)
    some = x[:16_000].contiguous()
    show("knn 16,000 x 128, top 20, all pairs", measure(knn_contestants(some, some), repeats))


def knn_contestants(queries: Tensor, bank: Tensor) -> Contestants:
    def floor() -> None:
        for part in queries.split(64):
            torch.ops.mkldnn._linear_pointwise(part, bank, None, "none", [], "")

    contestants: Contestants = {"ours": lambda: knn(queries, bank, k=20), "floor (GEMM)": floor}
    if find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        q, b = queries.numpy(), bank.numpy()
        contestants["faiss.knn"] = lambda: faiss.knn(q, b, 20, metric=faiss.METRIC_INNER_PRODUCT)
    return contestants


BENCHES: dict[str, Callable[[int, str], None]] = {
    "lloyd": bench_lloyd,
    "warm": bench_warm,
    "batched": bench_batched,
    "sinkhorn": bench_sinkhorn,
    "self_label": bench_self_label,
    "partial": bench_partial,
    "knn": bench_knn,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(BENCHES), help=f"comma-separated, of {', '.join(BENCHES)}")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of the rows called lloyd")
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
