"""Partial transport: only the most confident share of the samples' mass is assigned, column sums
may give way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from deepclust.ops.precision import exact, plain, wide
from deepclust.ops.transport import pot
from deepclust.ops.transport.scaling import Balance, Kernel, balance, chunk_rows


@dataclass(frozen=True)
class TransportResult:
    """A transport plan and how it was found.

    plan: (N, K); a row's sum in [0, 1] says how much of that sample is used. log_cluster_scale: (K
    + 1,) float64, real clusters, then the virtual one that takes the unused mass; a later call's
    `warm_start`. mass: the used share of all samples (mean row sum). violation: the share of the
    mass that one more update of the clusters would move. change: of a plan found in linearisations,
    the largest change of an entry that one more would have made.
    """

    plan: Tensor
    log_cluster_scale: Tensor
    num_iters: int
    mass: float
    violation: float
    change: float = 0.0


@exact
def partial_transport(
    logits: Tensor,
    *,
    mass: float,
    kl_weight: float = 1.0,
    epsilon: float = 0.1,
    tol: float = 1e-6,
    max_iters: int = 1000,
    warm_start: Tensor | None = None,
    group: Any = None,
    backend: Literal["own", "pot"] = "own",
) -> TransportResult:
    """Soft pseudo-labels by partial, unbalanced optimal transport.

    Minimises <Q, C> + kl_weight * KL(column sums || mass / K) - epsilon * entropy over plans with
    rows of at most 1/N and total `mass`, where C = -log_softmax(logits); the entropy counts each
    sample's unused rest as one more cell. Returns N * Q, so that a fully used sample's row sums to
    1. `kl_weight=inf` makes all columns equal.

    logits: (N, K), any finite values; computed in float64, the plan comes in float64 for float64
    logits, else float32. With a process `group` logits are this rank's rows of one problem.
    warm_start: a former `log_cluster_scale`. Rows and total mass are exact after every round; `tol`
    bounds the violation of the columns.

    backend "pot" asks the POT library where it has the same problem, mass=1 or kl_weight=inf, on
    one process and without a warm start; num_iters is then the limit.

    Raises ValueError for logits that are not finite, settings out of range, or what the backend
    cannot do.
    Source: P2OT (Zhang et al. 2024), equations 3 to 6; the virtual cluster's scale is solved for in
    every round, where the paper iterates it.
    """
    check_settings(logits, mass, kl_weight, epsilon)
    logits = plain(logits)
    pot.check_backend(backend, group)
    benefit = torch.log_softmax(wide(logits), 1)
    chunks = partial(benefit.split, chunk_rows(benefit.shape[1], benefit.device))
    kernel = Kernel(chunks, True, group, "logits")
    if backend == "pot":
        if warm_start is not None:
            raise ValueError(
                "backend 'pot' takes no warm_start; leave it out or use the default backend"
            )
        plan, log_scale = pot.partial(logits, mass, kl_weight, epsilon, tol, max_iters)
        solution = solve(
            kernel, mass, kl_weight, epsilon, tol, 1, torch.cat([log_scale, log_scale[:1]])
        )
        known, plan = result(kernel, solution, mass, logits), plan * len(logits)
        used = float(plan.sum()) / len(logits)
        return TransportResult(
            plan.to(logits.dtype), known.log_cluster_scale, max_iters, used, known.violation
        )
    solution = solve(kernel, mass, kl_weight, epsilon, tol, max_iters, warm_start)
    return result(kernel, solution, mass, logits)


def check_settings(logits: Tensor, mass: float, kl_weight: float, epsilon: float) -> None:
    """Raises ValueError in words for settings that define no transport problem."""
    if logits.ndim != 2:
        raise ValueError(f"logits {tuple(logits.shape)} must be (N, K)")
    for name, value, fits in (
        ("mass", mass, 0 < mass <= 1),
        ("kl_weight", kl_weight, kl_weight > 0),
        ("epsilon", epsilon, 0 < epsilon < math.inf),
    ):
        if not fits:
            raise ValueError(
                f"{name}={value} is out of range; valid: 0 < mass <= 1, kl_weight > 0, epsilon > 0"
            )


def solve(
    kernel: Kernel,
    mass: float,
    kl_weight: float,
    epsilon: float,
    tol: float,
    max_iters: int,
    warm_start: Tensor | None,
) -> Balance:
    """The scaling problem of a kernel whose benefits are minus the costs."""
    clusters = kernel.num_clusters
    log_target = torch.full((clusters,), math.log(mass / clusters), dtype=torch.float64)
    exponent = 1.0 if kl_weight == math.inf else kl_weight / (kl_weight + epsilon)
    start = None if warm_start is None else _start(warm_start, clusters)
    return balance(
        kernel,
        1.0 / epsilon,
        log_target,
        exponent=exponent,
        mass=mass,
        tol=tol,
        max_iters=max_iters,
        log_scale=start,
    )


def _start(warm_start: Tensor, clusters: int) -> Tensor:
    if warm_start.shape != (clusters + 1,) or not bool(warm_start.isfinite().all()):
        raise ValueError(
            f"warm_start {tuple(warm_start.shape)} must be a finite log_cluster_scale"
            f" ({clusters + 1},)"
        )
    return warm_start[:clusters].detach().cpu().double()


def result(kernel: Kernel, solution: Balance, mass: float, like: Tensor) -> TransportResult:
    """The plan of the last round, in the dtype and on the device of `like` (n, K)."""
    plan = like.new_empty(like.shape)
    for rows, part, row_max, scale in kernel.parts(solution.log_scale):
        log_sums = kernel.log_rows[rows]
        if mass < 1:
            log_sums = torch.logaddexp(log_sums, torch.full_like(log_sums, kernel.log_virtual))
        plan[rows] = (part * scale).mul_((row_max - log_sums).exp()[:, None])
    # at mass 1 the virtual cluster is empty: a scale too small to matter, finite for whoever stores
    # it
    virtual = kernel.log_virtual if mass < 1 else float(solution.log_scale.amin()) - 1e4
    log_scale = torch.cat([solution.log_scale, solution.log_scale.new_tensor([virtual])]).to(
        wide(like[:0])
    )
    return TransportResult(
        plan, log_scale, solution.num_iters, float(solution.shares.sum()), solution.violation
    )


def mass_schedule(
    step: int,
    num_steps: int,
    *,
    start: float = 0.1,
    end: float = 1.0,
    shape: Literal["sigmoid", "linear"] = "sigmoid",
) -> float:
    """Share of the mass to transport at `step` of `num_steps`: from about `start` up to `end`, at
    most 1 or `end`.

    With t = step / num_steps in [0, 1], "sigmoid" is start + (end - start) exp(-5 (1 - t)^2),
    "linear" is start + (end - start) t. Source: P2OT (Zhang et al. 2024), section 4.3.
    """
    if num_steps < 1 or shape not in ("sigmoid", "linear"):
        raise ValueError(
            f"num_steps={num_steps} must be at least 1 and shape={shape!r} 'sigmoid' or 'linear'"
        )
    t = min(max(step / num_steps, 0.0), 1.0)
    ramp = math.exp(-5.0 * (1.0 - t) ** 2) if shape == "sigmoid" else t
    return start + (end - start) * ramp
