"""Self-labelling: hard labels of a whole data set, each cluster used equally often (SeLa)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from deepclust.ops.collectives import all_max, all_sum
from deepclust.ops.precision import exact, wide
from deepclust.ops.transport import pot
from deepclust.ops.transport.scaling import Balance, Kernel, balance, chunk_rows

PAPER_PERIOD = 10  # the paper looks at its error every tenth iteration


@dataclass(frozen=True)
class SelfLabelResult:
    """Labels of this rank's samples and the scaling that gave them.

    labels: (n,) int64. cost: mean of -log_probs at the labels, over all ranks. log_cluster_scale:
    (K,) and
    log_sample_scale: (n,), float64: exp(power * log_probs + both) is the plan; its rows sum to 1/N,
    its columns approach 1/K. violation: sum over clusters of |column sum - 1/K|. num_iters: for
    backend "pot" the limit.
    """

    labels: Tensor
    num_iters: int
    cost: float
    log_cluster_scale: Tensor
    log_sample_scale: Tensor
    violation: float


@exact
def self_label(
    log_probs: Tensor | Callable[[], Iterable[Tensor]],
    *,
    power: float = 25.0,
    tol: float | None = None,
    stop: Literal["marginal", "paper"] = "marginal",
    max_iters: int = 5000,
    group: Any = None,
    backend: Literal["own", "pot"] = "own",
) -> SelfLabelResult:
    """Balanced hard labels: argmax of diag(r) P^power diag(c) with rows of 1/N and columns of 1/K.

    log_probs: (N, K) finite log-probabilities, or a callable that gives a fresh iterator of (rows,
    K) chunks in fixed order; then nothing but the two scalings is kept between iterations. Computed
    in float64. With a process `group`, this rank's samples (a callable gives at least one chunk,
    which may have no rows).

    stop="marginal": when the column sums are off by at most `tol` in total (1e-4 changes about 1
    label in 10,000). stop="paper": plain iterations until sum |c / c_new - 1| over all N samples,
    looked at every tenth iteration, is at most `tol` (0.1 in the paper's ImageNet runs). `tol`
    defaults to 1e-4 and 0.1.

    backend "pot" asks the POT library: for a tensor, on one process, with stop="marginal".

    Raises ValueError for values that are not finite, or what the backend cannot do.
    Source: SeLa (Asano et al. 2020), equations 5 to 8.
    """
    if power <= 0 or stop not in ("marginal", "paper"):
        raise ValueError(f"power={power} must be positive and stop={stop!r} 'marginal' or 'paper'")
    pot.check_backend(backend, group)
    chunks = _chunks(log_probs)
    kernel = Kernel(chunks, isinstance(log_probs, Tensor), group, "log_probs")
    log_target = torch.full(
        (kernel.num_clusters,), -math.log(kernel.num_clusters), dtype=torch.float64
    )
    if backend == "pot":
        solution = _by_pot(
            log_probs, kernel, power, log_target, 1e-4 if tol is None else tol, max_iters, stop
        )
    elif stop == "paper":
        solution = _paper(kernel, power, log_target, 0.1 if tol is None else tol, max_iters)
    else:
        solution = balance(
            kernel, power, log_target, tol=1e-4 if tol is None else tol, max_iters=max_iters
        )
    labels, cost = _labels(kernel, chunks, solution.log_scale)
    log_cluster_scale = solution.log_scale.to(kernel.log_rows)
    log_sample_scale = -kernel.log_rows - math.log(kernel.total)
    return SelfLabelResult(
        labels, solution.num_iters, cost, log_cluster_scale, log_sample_scale, solution.violation
    )


def _chunks(log_probs: Tensor | Callable[[], Iterable[Tensor]]) -> Callable[[], Iterable[Tensor]]:
    if not isinstance(log_probs, Tensor):
        return log_probs
    if log_probs.ndim != 2:
        raise ValueError(f"log_probs {tuple(log_probs.shape)} must be (N, K)")
    return lambda: log_probs.split(chunk_rows(log_probs.shape[1], log_probs.device))


def _by_pot(
    log_probs: Any,
    kernel: Kernel,
    power: float,
    log_target: Tensor,
    tol: float,
    max_iters: int,
    stop: str,
) -> Balance:
    """POT's scales; the samples' scales and the violation are then those of one round of our
    own."""
    if not isinstance(log_probs, Tensor) or stop != "marginal":
        raise ValueError(
            f"backend 'pot' takes a tensor and stop='marginal', not {type(log_probs).__name__},"
            f" {stop!r}"
        )
    target = log_target.exp().to(kernel.log_rows)
    _, log_scale = pot.hard_columns(wide(log_probs), target, 1.0 / power, tol, max_iters)
    start = log_scale.cpu().double()
    kernel.absorb(start, power)
    shares = kernel.shares(start)
    return Balance(start, shares, max_iters, float((shares - target.cpu()).abs().sum()))


def _paper(kernel: Kernel, power: float, log_target: Tensor, tol: float, max_iters: int) -> Balance:
    """The reference's loop: c starts at 1/N; r = (1/K) / (P c), c = (1/N) / (P^T r); error at 0,
    10, 20, ...
    """
    log_scale = log_target + math.log(kernel.total) - _log_column_sums(kernel, power)
    kernel.absorb(log_scale, power)
    log_rows = torch.zeros_like(kernel.log_rows)  # of c = 1/N
    for iteration in range(max_iters):
        shares = kernel.shares(log_scale)
        change = all_sum((kernel.log_rows - log_rows).expm1().abs().sum(), kernel.group)
        if (iteration % PAPER_PERIOD == 0 and float(change) <= tol) or iteration == max_iters - 1:
            break
        log_rows = kernel.log_rows.clone()
        log_scale = log_scale + log_target - shares.clamp_min(torch.finfo(shares.dtype).tiny).log()
    violation = float((shares - log_target.exp()).abs().sum())
    return Balance(log_scale, shares, iteration + 1, violation)


def _log_column_sums(kernel: Kernel, power: float) -> Tensor:
    """(K,) float64 on the CPU: log of the column sums of P^power over all ranks, streamed."""
    top = torch.full((kernel.num_clusters,), -torch.inf, dtype=kernel.dtype, device=kernel.device)
    sums = torch.zeros_like(top)
    for chunk in kernel.chunks():
        if len(chunk):
            log_powers = wide(chunk) * power
            higher = torch.maximum(top, log_powers.amax(0))
            sums = sums * (top - higher).exp() + (log_powers - higher).exp().sum(0)
            top = higher
    highest = all_max(top.clone(), kernel.group)
    return (highest + all_sum(sums * (top - highest).exp(), kernel.group).log()).cpu().double()


def _labels(
    kernel: Kernel, chunks: Callable[[], Iterable[Tensor]], log_scale: Tensor
) -> tuple[Tensor, float]:
    """Labels (n,) of this rank and the mean cost over all ranks."""
    log_scale = log_scale.to(kernel.log_rows)
    labels, cost = [], torch.zeros((), dtype=kernel.dtype, device=kernel.device)
    for chunk in chunks():
        labels.append((wide(chunk) * kernel.sharpness + log_scale).argmax(1))
        cost -= wide(chunk).gather(1, labels[-1][:, None]).sum()
    return torch.cat(labels), float(all_sum(cost, kernel.group)) / kernel.total
