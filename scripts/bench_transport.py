"""Speed of transport and neighbours against their physical floors and against POT and faiss, in one process.

    OMP_NUM_THREADS=1 taskset -c 1 python scripts/bench_transport.py [--repeats 5] [--only sinkhorn,knn] [--threads 1]

Every row interleaves its contestants and prints medians of CPU time (`time.process_time`), which other jobs on the
machine disturb least, and ratios to our own. Read the ratios, not the seconds. POT and faiss are compared where
they are installed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.ops import knn, partial_transport, self_label, sinkhorn

Contestants = dict[str, Callable[[], object]]


def cosines(num: int, clusters: int, dim: int = 64) -> Tensor:
    """(num, clusters) similarities of clustered points to random prototypes."""
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(80, dim, generator=generator)[torch.randint(0, 80, (num,), generator=generator)]
    x = F.normalize(centres + torch.randn(num, dim, generator=generator), dim=1)
    return x @ F.normalize(torch.randn(clusters, dim, generator=generator), dim=1).T


def medians(contestants: Contestants, repeats: int) -> dict[str, tuple[float, float]]:
    """Median and range of CPU seconds by name; the first run of each does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats + 1):
        for name, run in contestants.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    kept = {name: values[1:] for name, values in seconds.items()}
    return {name: (statistics.median(values), max(values) - min(values)) for name, values in kept.items()}


def show(title: str, contestants: Contestants, repeats: int) -> None:
    """Prints one comparison."""
    found = medians(contestants, repeats)
    ours = found["ours"][0]
    print(title)
    for name, (median, spread) in found.items():
        print(f"  {name:24s} {1e3 * median:10.2f} ms  +- {500 * spread:8.2f}   {median / ours:8.2f} x ours")


def bench_sinkhorn(repeats: int) -> None:
    for epsilon in (0.05, 0.01):
        title = f"sinkhorn 512 x 3000, 3 iterations, epsilon {epsilon}"
        show(title, sinkhorn_contestants(cosines(512, 3000), epsilon), 3 * repeats)


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


def bench_self_label(repeats: int) -> None:
    log_probs = torch.log_softmax(10 * cosines(50_000, 100), 1)
    found = self_label(log_probs, power=20.0)
    print(f"self_label 50,000 x 100, power 20: {found.num_iters} rounds to a violation of {found.violation:.1e}")
    kernel, scale = torch.rand(50_000, 100, dtype=torch.float64), torch.rand(100, dtype=torch.float64)
    powers = 20 * log_probs

    def by_logarithms() -> None:
        log_rows = torch.logsumexp(powers + scale.float(), 1)
        torch.logsumexp(powers - log_rows[:, None], 0)

    def plain_rounds() -> None:
        self_label(log_probs, power=20.0, stop="paper", tol=0.0, max_iters=101)

    def set_up() -> None:
        self_label(log_probs, power=20.0, stop="paper", tol=0.0, max_iters=1)

    def read_once() -> None:
        kernel.sum()

    times = medians({"rounds": plain_rounds, "set up": set_up, "log": by_logarithms, "read": read_once}, repeats)
    each = (times["rounds"][0] - times["set up"][0]) / 100
    print(f"  one round {1e3 * each:.2f} ms; log-domain round (float32) {1e3 * times['log'][0]:.1f} ms")
    print(f"  log-domain round / ours {times['log'][0] / each:.1f}; ours / reading once {each / times['read'][0]:.1f}")
    show(
        "  to the end", {"ours": lambda: self_label(log_probs, power=20.0), "paper's loop, 101": plain_rounds}, repeats
    )


def bench_partial(repeats: int) -> None:
    logits = 10 * cosines(5120, 100)
    for epsilon in (0.1, 0.05):
        contestants = partial_contestants(logits, epsilon)
        show(f"partial_transport 5120 x 100, mass 1, epsilon {epsilon}", contestants, repeats)
    for mass in (0.1, 0.5):
        rounds = partial_transport(logits, mass=mass).num_iters
        ours: Contestants = {"ours": partial(partial_transport, logits, mass=mass)}
        show(f"partial_transport 5120 x 100, mass {mass}: {rounds} rounds", ours, repeats)


def partial_contestants(logits: Tensor, epsilon: float) -> Contestants:
    contestants: Contestants = {"ours": lambda: partial_transport(logits, mass=1.0, epsilon=epsilon, tol=1e-7)}
    if find_spec("ot"):
        import ot

        cost = -torch.log_softmax(logits.double(), 1).numpy()
        a, b, ones = np.full(5120, 1 / 5120), np.full(100, 0.01), np.ones_like(cost)
        weights = (math.inf, 1.0)

        def pot() -> Any:
            # a prior of ones makes POT's divergence the plain entropy, up to a constant
            options = {"numItermax": 10_000, "stopThr": 1e-9}
            return ot.unbalanced.sinkhorn_unbalanced(a, b, cost, epsilon, weights, c=ones, **options)

        ours = partial_transport(logits.double(), mass=1.0, epsilon=epsilon, tol=1e-7).plan / 5120
        difference = float((ours - torch.as_tensor(pot())).abs().max())
        print(f"partial_transport: largest difference to POT's plan {difference:.1e}")
        contestants["POT unbalanced, float64"] = pot
    return contestants


def bench_knn(repeats: int, rows: int = 2048) -> None:
    x = F.normalize(torch.randn(50_000, 128, generator=torch.Generator().manual_seed(0)), dim=1)
    queries = x[:rows].contiguous()

    def floor() -> None:
        for part in queries.split(64):
            torch.ops.mkldnn._linear_pointwise(part, x, None, "none", [], "")

    contestants: Contestants = {"ours": lambda: knn(queries, x, k=20), "floor (GEMM)": floor}
    if find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatIP(128)
        index.add(x.numpy())
        contestants["faiss IndexFlatIP"] = lambda: index.search(queries.numpy(), 20)
        contestants["faiss.knn"] = lambda: faiss.knn(queries.numpy(), x.numpy(), 20, metric=faiss.METRIC_INNER_PRODUCT)
    show(f"knn 50,000 x 128, top 20, {rows} queries", contestants, repeats)


BENCHES = {"sinkhorn": bench_sinkhorn, "self_label": bench_self_label, "partial": bench_partial, "knn": bench_knn}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default=",".join(BENCHES))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {torch.backends.cpu.get_cpu_capability()}")
    for name in arguments.only.split(","):
        BENCHES[name](arguments.repeats)


if __name__ == "__main__":
    main()
