"""Partial transport that also asks similar samples to share clusters."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepclust.ops.collectives import all_max, all_sum, row_counts
from deepclust.ops.precision import exact, plain, wide
from deepclust.ops.transport.partial import TransportResult, check_settings, result, solve
from deepclust.ops.transport.scaling import Kernel, chunk_rows

SHARPER = 0.01
"""What the solver may leave open, of the plan's last change: tangents of Fashion-MNIST amplified it
eightyfold.
"""


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
    plan_tol: float = 1e-4,
    max_iters: int = 1000,
    max_linearisations: int = 5000,
    warm_start: Tensor | None = None,
    group: Any = None,
) -> TransportResult:
    """`partial_transport` whose objective also holds -similarity_weight * <similarity, Q Q^T>.

    A generalised conditional gradient: the new term is replaced by its tangent at the current Q,
    which gives costs C - similarity_weight (S + S^T) Q, and Q moves towards the plan for these, the
    whole way where the term is concave along it, else as far as lowers the objective. So the
    objective never rises, whatever S is. It ends at a stationary
    point, of which there may be several: when the whole step would change no entry of N * Q by more
    than `plan_tol`. `tol` is the solver's at first; it becomes smaller as the plan comes to rest. Q
    sums to `mass`, so the term shrinks like 1 / N: scale the weight with N.

    logits: (N, K) as in `partial_transport`. similarity: (N, N), dense or sparse, any values, need
    not be symmetric. With a process `group` logits are this rank's rows and similarity this rank's
    rows (n, N) over all ranks' columns. num_iters of the result counts the rounds of all
    linearisations; `change` is that of the last whole step.

    Source: SP2OT (Zhang et al. 2024), section 4, which takes whole steps until the objective stands
    still; the length
    of the step: Bredies, Lorenz and Maass (2009), "A generalized conditional gradient method".
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
    products = _by_rows(similarity), _by_rows(similarity.transpose(0, 1))
    plan = torch.full_like(benefit, mass / benefit.shape[1])
    pull = _pull(products, plan, sizes, group)
    change, rounds = 1.0, 0
    for _ in range(max_linearisations):
        tilted = benefit + similarity_weight * pull
        kernel = Kernel(
            partial(tilted.split, chunk_rows(tilted.shape[1], tilted.device)), True, group, "logits"
        )
        accuracy = min(tol, SHARPER * change)
        solution = solve(kernel, mass, kl_weight, epsilon, accuracy, max_iters, warm_start)
        found = result(kernel, solution, mass, benefit)
        rounds += found.num_iters
        warm_start = found.log_cluster_scale
        step = found.plan - plan
        turn = _pull(products, found.plan, sizes, group) - pull
        change = float(
            all_max(step.abs().flatten().amax(0) if len(step) else step.new_zeros(()), group)
        )
        bend = -0.5 * similarity_weight * (step * turn).sum()
        length = _step_length(plan, found.plan, bend, mass, kl_weight, epsilon, sum(sizes), group)
        plan += length * step
        pull += length * turn
        if change <= plan_tol:
            break
    return replace(found, plan=plan.to(logits.dtype), num_iters=rounds, change=change)


def _by_rows(matrix: Tensor) -> Tensor:
    """A sparse matrix laid out row after row, in which a product takes a tenth of the time; a dense
    one as it is.
    """
    if matrix.layout != torch.sparse_coo:
        return matrix
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls the layout beta
        return matrix.to_sparse_csr()


def _pull(products: tuple[Tensor, Tensor], plan: Tensor, sizes: list[int], group: Any) -> Tensor:
    """(S + S^T) Q, this rank's rows (n, K), for Q = plan / N; products: this rank's rows of S (n,
    N) and their S^T.
    """
    total = sum(sizes)
    start = sum(sizes[: 0 if group is None else dist.get_rank(group)])
    mine = slice(start, start + len(plan))
    everyone = plan.new_zeros(total, plan.shape[1])
    everyone[mine] = plan / total
    forward, backward = products
    return forward @ all_sum(everyone, group) + all_sum(backward @ (plan / total), group)[mine]


def _step_length(
    plan: Tensor,
    best: Tensor,
    bend: Tensor,
    mass: float,
    kl_weight: float,
    epsilon: float,
    total: int,
    group: Any,
) -> float:
    """In (0, 1]: how far to go from `plan` (n, K) to `best`, the plan for the tangent's costs, both
    N * Q.

    With g what the tangent's objective falls by on the whole way and b = N * `bend`, this rank's
    part, what the term lies above its tangent at the end of it, the objective changes by at most -t
    g + t^2 b at a share t of the way, for what else is in it is convex. t = g / (g + b) makes that
    negative; near the end, where the convex part is as good as quadratic, no t is better. `best` is
    a minimiser inside of what is allowed, so g is the Bregman
    divergence of the convex part, a sum of terms that are not negative: no digits cancel.
    """
    rest = 1 - plan.sum(1)
    divergence = epsilon * _divergence(plan, best)
    if mass < 1:
        divergence += epsilon * _divergence(rest.clamp_min(0), (1 - best.sum(1)).clamp_min(0))
    own = torch.cat([torch.stack([divergence, bend]), plan.sum(0), best.sum(0)])
    fall, above, columns = all_sum(own / total, group).split([1, 1, 2 * plan.shape[1]])
    if kl_weight != math.inf:
        fall = fall + kl_weight * _divergence(*columns.chunk(2))
    fall = fall.clamp_min(0)  # but for rounding it is
    return float(fall / (fall + above)) if float(above) > 0 else 1.0


def _divergence(x: Tensor, y: Tensor) -> Tensor:
    """Sum of x log(x / y) - x + y over all entries, finite where y has underflown to 0."""
    tiny = torch.finfo(y.dtype).tiny
    return (torch.xlogy(x, x / y.clamp_min(tiny)) - x + y).sum()
