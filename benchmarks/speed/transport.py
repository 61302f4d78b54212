"""Transport against its floors and POT; run by `benchmarks.speed.ops`."""

from __future__ import annotations

import math
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.harness import Contestants, Timing, measure, show
from deepclust.ops import partial_transport, self_label, sinkhorn


def cosines(num: int, clusters: int, dim: int = 64) -> Tensor:
    """(num, clusters) similarities of clustered points to random prototypes."""
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(80, dim, generator=generator)[torch.randint(0, 80, (num,), generator=generator)]
    x = F.normalize(centres + torch.randn(num, dim, generator=generator), dim=1)
    return x @ F.normalize(torch.randn(clusters, dim, generator=generator), dim=1).T


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
