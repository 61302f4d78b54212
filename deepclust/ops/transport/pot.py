"""The POT library as a backend, for those problems that it solves too: on one process and in
memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from deepclust.ops.precision import wide


def check_backend(backend: str, group: Any) -> None:
    """Raises ValueError for a name that is unknown, or ranks with a backend that knows none."""
    if backend not in ("own", "pot"):
        raise ValueError(f"backend {backend!r} is unknown; valid are 'own' and 'pot'")
    if backend == "pot" and group is not None:
        raise ValueError(
            "backend 'pot' knows one process only; use the default backend with a process group"
        )


def codes(scores: Tensor, epsilon: float, num_iters: int, marginal: Tensor) -> Tensor:
    """(B, K) as `sinkhorn`."""
    import ot

    share = scores.new_full((len(scores),), 1.0 / max(1, len(scores)))
    options = {"method": "sinkhorn_log", "numItermax": num_iters, "stopThr": 0.0, "warn": False}
    plan: Any = ot.sinkhorn(share, marginal, -scores, epsilon, **options)
    return len(scores) * plan


def hard_columns(
    benefit: Tensor, target: Tensor, epsilon: float, tol: float, max_iters: int
) -> tuple[Tensor, Tensor]:
    """(plan (N, K), log_scale (K,)): columns sum to target (K,), to `tol` in total, rows to 1/N."""
    import ot

    share = benefit.new_full((len(benefit),), 1.0 / len(benefit))
    # POT looks at the Euclidean norm of what the columns are off by, at least the total over the
    # root of K
    stop = tol / math.sqrt(len(target))
    options = {
        "method": "sinkhorn_log",
        "numItermax": max_iters,
        "stopThr": stop,
        "warn": False,
        "log": True,
    }
    found: Any = ot.sinkhorn(share, target, -benefit, epsilon, **options)
    plan, log = found
    return plan, log["log_v"]


def soft_columns(
    benefit: Tensor, kl_weight: float, epsilon: float, tol: float, max_iters: int
) -> tuple[Tensor, Tensor]:
    """(plan (N, K), log_scale (K,)): rows sum to 1/N, columns give way to 1/K at a price."""
    import ot

    num, clusters = benefit.shape
    rows, columns = (
        benefit.new_full((num,), 1.0 / num),
        benefit.new_full((clusters,), 1.0 / clusters),
    )
    # a prior of ones makes POT's divergence the plain entropy, up to a constant
    options = {"c": torch.ones_like(benefit), "numItermax": max_iters, "stopThr": tol, "log": True}
    weights = (math.inf, kl_weight)
    found: Any = ot.unbalanced.sinkhorn_unbalanced(
        rows, columns, -benefit, epsilon, weights, **options
    )
    plan, log = found
    return plan, log["logv"]


def partial(
    logits: Tensor, mass: float, kl_weight: float, epsilon: float, tol: float, max_iters: int
) -> tuple[Tensor, Tensor]:
    """(plan (N, K), log_scale (K,)) as `partial_transport`, in float64.

    Raises ValueError for mass < 1 with columns that give way: POT has one weight for all columns,
    and the virtual cluster's must be infinite.
    """
    benefit = torch.log_softmax(wide(logits), 1)
    if kl_weight != math.inf:
        if mass < 1:
            raise ValueError(
                f"backend 'pot' cannot solve mass={mass} with kl_weight={kl_weight}: its columns"
                " give way all or none; use the default backend, mass=1 or kl_weight=inf"
            )
        return soft_columns(benefit, kl_weight, epsilon, tol, max_iters)
    clusters = benefit.shape[1]
    target = benefit.new_full((clusters,), mass / clusters)
    if mass == 1:
        return hard_columns(benefit, target, epsilon, tol, max_iters)
    widened = torch.cat([benefit, torch.zeros_like(benefit[:, :1])], 1)
    target = torch.cat([target, target.new_tensor([1.0 - mass])])
    plan, log_scale = hard_columns(widened, target, epsilon, tol * mass, max_iters)
    return plan[:, :clusters], log_scale[:clusters]
