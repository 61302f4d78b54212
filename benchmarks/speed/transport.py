"""Transport against the passes over memory that it needs, and POT; part of `benchmarks.speed.ops`.

OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.speed.ops --only sinkhorn,self_label,partial
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.harness import Contestants, Timing, measure, print_timings
from deepclust.ops import partial_transport, self_label, sinkhorn


def cosines(num: int, clusters: int, dim: int = 64) -> Tensor:
    """(num, clusters) cosine similarities of clustered points to random prototypes.

    num: points, of 80 Gaussians whose centres lie twice as far out as their points scatter.
    clusters: prototypes.
    dim: of points and prototypes.
    """
    generator = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(80, dim, generator=generator)
    centers = means[torch.randint(0, 80, (num,), generator=generator)]
    x = F.normalize(centers + torch.randn(num, dim, generator=generator), dim=1)
    return x @ F.normalize(torch.randn(clusters, dim, generator=generator), dim=1).T


def bench_sinkhorn(repeats: int, _: str) -> None:
    """Prints the time of balanced codes: 512 rows, 3,000 prototypes as SwAV has on ImageNet."""
    # SwAV's epsilon, and one at which exp(1 / epsilon) is beyond float32.
    for epsilon in (0.05, 0.01):
        # A run takes milliseconds: three times the repeats still cost little.
        timings = measure(_sinkhorn_contestants(cosines(512, 3000), epsilon), 3 * repeats)
        print_timings(f"sinkhorn 512 x 3000, 3 iterations, epsilon {epsilon}", timings)


def _sinkhorn_contestants(scores: Tensor, epsilon: float) -> Contestants:
    columns = torch.rand(3000)
    rows = torch.rand(512)

    def floor() -> None:
        # One exponential; each time a pass for rows and one for columns; one product at the end.
        kernel = scores.exp()
        for _ in range(3):
            torch.mv(kernel, columns)
            torch.mv(kernel.T, rows)
        kernel.mul_(columns)

    contestants: dict[str, Callable[[], Any]] = {
        "ours": lambda: sinkhorn(scores, epsilon=epsilon),
        "floor": floor,
    }
    if find_spec("ot"):
        import ot

        a = np.full(512, 1 / 512, np.float32)
        b = np.full(3000, 1 / 3000, np.float32)
        cost = -scores.numpy()
        # No threshold: POT must make its three iterations as we do ours.
        options: dict[str, Any] = {"numItermax": 3, "stopThr": 0.0, "warn": False}
        contestants["POT"] = lambda: ot.sinkhorn(a, b, cost, epsilon, **options)
        contestants["POT, log"] = lambda: ot.sinkhorn(
            a, b, cost, epsilon, method="sinkhorn_log", **options
        )
    return contestants


def bench_self_label(repeats: int, _: str) -> None:
    """Prints the time of one round of self-labelling, and rounds and time to convergence."""
    log_probs = torch.log_softmax(10 * cosines(50_000, 100), 1)
    powers = 20 * log_probs
    scale = torch.rand(100)
    kernel = torch.rand(50_000, 100, dtype=torch.float64)

    def by_logarithms() -> None:
        log_rows = torch.logsumexp(powers + scale, 1)
        torch.logsumexp(powers - log_rows[:, None], 0)

    def rounds(count: int) -> None:
        # tol=0 never stops early, so that exactly `count` rounds are made.
        self_label(log_probs, power=20.0, stop="paper", tol=0.0, max_iters=count)

    timings = measure(
        {
            "set up": partial(rounds, 1),
            "rounds": partial(rounds, 101),
            "log-domain, float32": by_logarithms,
            "floor (reading once)": kernel.sum,
            "to the end": lambda: self_label(log_probs, power=20.0),
        },
        repeats,
    )
    whole = timings.pop("rounds")
    before = timings.pop("set up")
    end = timings.pop("to the end")
    # 101 rounds less 1, over 100: what is done once, before the rounds, cancels out.
    one_round = Timing((whole.seconds - before.seconds) / 100, whole.spread, None)
    print_timings("self_label 50,000 x 100, power 20, one round", {"ours": one_round, **timings})
    print(
        f"  to a violation of {end.result.violation:.1e}: {end.result.num_iters} rounds,"
        f" {1e3 * end.seconds:.0f} ms"
    )


def bench_partial(repeats: int, _: str) -> None:
    """Prints the time of P2OT's transport: at mass 1 beside POT, then at smaller masses."""
    # 5,120 rows: P2OT's memory, on which it solves.
    logits = 10 * cosines(5120, 100)
    for epsilon in (0.1, 0.05):
        timings = measure(_partial_contestants(logits, epsilon), repeats)
        notes = {}
        peer = timings.get("POT unbalanced, float64")
        if peer is not None:
            # In float64, so that rounding can neither make a difference nor hide one.
            result = partial_transport(logits.double(), mass=1.0, epsilon=epsilon, tol=1e-7)
            ours = result.plan / 5120
            difference = float((ours - torch.as_tensor(peer.result)).abs().max())
            notes = {"ours": f"largest difference to POT's plan {difference:.1e}"}
        title = f"partial_transport 5120 x 100, mass 1, epsilon {epsilon}"
        print_timings(title, timings, notes=notes)
    # POT has no partial transport of this kind: below mass 1 there is nobody to compare with.
    for mass in (0.1, 0.5):
        timings = measure({"ours": partial(partial_transport, logits, mass=mass)}, repeats)
        rounds = timings["ours"].result.num_iters
        print_timings(f"partial_transport 5120 x 100, mass {mass}: {rounds} rounds", timings)


def _partial_contestants(logits: Tensor, epsilon: float) -> Contestants:
    contestants: dict[str, Callable[[], Any]] = {
        "ours": lambda: partial_transport(logits, mass=1.0, epsilon=epsilon, tol=1e-7)
    }
    if find_spec("ot"):
        import ot

        cost = -torch.log_softmax(logits.double(), 1).numpy()
        a = np.full(5120, 1 / 5120)
        b = np.full(100, 0.01)
        # A prior of ones makes POT's divergence the plain entropy, up to a constant.
        prior = np.ones_like(cost)
        options: dict[str, Any] = {"numItermax": 10_000, "stopThr": 1e-9, "c": prior}
        # Rows must hold their mass (infinite weight), columns may deviate at a price (weight 1).
        contestants["POT unbalanced, float64"] = lambda: ot.unbalanced.sinkhorn_unbalanced(
            a, b, cost, epsilon, (math.inf, 1.0), **options
        )
    return contestants
