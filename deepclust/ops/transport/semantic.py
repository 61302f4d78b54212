"""Partial transport that also asks similar samples to share clusters."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepclust.ops.collectives import row_counts
from deepclust.ops.precision import exact, plain, wide
from deepclust.ops.transport.partial import TransportResult, check_settings, result, solve
from deepclust.ops.transport.scaling import Kernel, chunk_rows
from deepclust.ops.transport.shared import all_sum


@exact
def semantic_partial_transport(
    logits: Tensor,
    similarity: Tensor,
    *,
    mass: float,
    similarity_weight: float,
    kl_weight: float = 1.0,
    epsilon: float = 0.1,
    tol: float = 1e-6,
    max_iters: int = 1000,
    max_linearisations: int = 100,
    warm_start: Tensor | None = None,
    group: Any = None,
) -> TransportResult:
    """`partial_transport` whose objective also holds -similarity_weight * <similarity, Q Q^T>.

    Majorise and minimise: the new term is replaced by its tangent at the current Q, which gives costs
    C - similarity_weight (S + S^T) Q, until the objective moves by less than 1e-6. It never rises where S + S^T has no
    negative eigenvalue. Q sums to `mass`, so the term shrinks like 1 / N: scale the weight with N.

    logits: (N, K) as in `partial_transport`. similarity: (N, N), dense or sparse, any values, need not be symmetric.
    With a process `group` logits are this rank's rows and similarity this rank's rows (n, N) over all ranks' columns.
    num_iters of the result counts the rounds of all linearisations. Source: SP2OT (Zhang et al. 2024), section 4.
    """
    check_settings(logits, mass, kl_weight, epsilon)
    logits = plain(logits)
    benefit = torch.log_softmax(wide(logits), 1)
    sizes = row_counts(len(logits), group, logits.device)
    if similarity.shape != (len(logits), sum(sizes)):
        raise ValueError(
            f"similarity {tuple(similarity.shape)} must be (rows of logits, rows of all ranks): "
            f"({len(logits)}, {sum(sizes)})"
        )
    similarity = wide(similarity)
    plan = torch.full_like(benefit, mass / benefit.shape[1])
    forward, pull = _pull(similarity, plan, sizes, group)
    objective, rounds = math.inf, 0
    for _ in range(max_linearisations):
        tilted = benefit + similarity_weight * pull
        chunks = partial(tilted.split, chunk_rows(tilted.shape[1], tilted.device))
        kernel = Kernel(chunks, True, group, "logits")
        solution = solve(kernel, mass, kl_weight, epsilon, tol, max_iters, warm_start)
        found = result(kernel, solution, mass, benefit)
        rounds, warm_start = rounds + found.num_iters, found.log_cluster_scale
        forward, pull = _pull(similarity, found.plan, sizes, group)
        linear = -(found.plan * (benefit + similarity_weight * forward))
        before, objective = objective, _objective(linear, found.plan, mass, kl_weight, epsilon, sum(sizes), group)
        if abs(before - objective) < 1e-6:
            break
    return TransportResult(found.plan.to(logits.dtype), found.log_cluster_scale, rounds, found.mass, found.violation)


def _pull(similarity: Tensor, plan: Tensor, sizes: list[int], group: Any) -> tuple[Tensor, Tensor]:
    """S Q and (S + S^T) Q, this rank's rows (n, K) of both, for Q = plan / N."""
    total = sum(sizes)
    start = sum(sizes[: 0 if group is None else dist.get_rank(group)])
    mine = slice(start, start + len(plan))
    everyone = plan.new_zeros(total, plan.shape[1])
    everyone[mine] = plan / total
    forward = similarity @ all_sum(everyone, group)
    backward = all_sum(similarity.transpose(0, 1) @ (plan / total), group)
    return forward, forward + backward[mine]


def _objective(
    linear: Tensor, plan: Tensor, mass: float, kl_weight: float, epsilon: float, total: int, group: Any
) -> float:
    """What the plan minimises, with the entropy of the unused rest, at Q = plan / N."""
    rest = (1.0 - plan.sum(1)).clamp_min(0.0) if mass < 1 else plan.new_zeros(len(plan))
    entropies = torch.special.entr(plan / total).sum() + torch.special.entr(rest / total).sum()
    sums = all_sum(torch.cat([(linear.sum() / total - epsilon * entropies)[None], plan.sum(0) / total]), group)
    columns, target = sums[1:], mass / plan.shape[1]
    divergence = 0.0
    if kl_weight != math.inf:
        divergence = kl_weight * float((torch.xlogy(columns, columns / target) - columns + target).sum())
    return float(sums[0]) + divergence
