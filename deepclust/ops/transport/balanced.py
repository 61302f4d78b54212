"""Balanced soft assignment of a batch to clusters by Sinkhorn-Knopp."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from deepclust.ops.collectives import all_max, all_sum
from deepclust.ops.precision import exact, plain, wide
from deepclust.ops.transport import pot
from deepclust.ops.transport.shared import exp_, refuse_not_finite

CHUNK_BYTES = 8_388_608  # of rows worked on at a time on a CPU: they stay in the last-level cache
# kernel entries are at least exp(-64) of their row's largest: denormals make a CPU ten times
# slower
LOG_ZERO = -64.0
SMALL = 40.0  # |scores| / epsilon up to here need no shift
MAX_RANGE = (
    1e16  # of the cluster scales: up to here that bound changes no code by more than K * 2e-12
)


@exact
def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    num_iters: int = 3,
    column_marginal: Tensor | None = None,
    group: Any = None,
    backend: Literal["own", "pot"] = "own",
) -> Tensor:
    """Codes of a batch: diag(r) exp(scores / epsilon) diag(c) after `num_iters` rounds of columns,
    then rows.

    scores: (B, K) similarities (larger = more alike), any finite values; float16 and bfloat16 are
    computed in float32.
    column_marginal: (K,) non-negative, the share of the batch each cluster gets; uniform by
    default. With a process `group` scores are this rank's rows of one joint batch, of any number.
    backend "pot" asks the POT library.

    Returns codes (B, K), float64 for float64 scores, else float32. Rows sum to 1; columns approach
    B * column_marginal as `num_iters` grows. Source: SwAV (Caron et al. 2020), equation 5 and
    appendix A.

    Raises ValueError for scores that are not finite or a marginal that is no distribution over K
    clusters.
    """
    if scores.ndim != 2 or epsilon <= 0 or num_iters < 1:
        raise ValueError(
            f"sinkhorn: scores {tuple(scores.shape)} must be (B, K), epsilon {epsilon} > 0,"
            f" num_iters {num_iters} >= 1"
        )
    pot.check_backend(backend, group)
    scores = plain(scores)
    marginal = _marginal(column_marginal, scores)
    if backend == "pot":
        refuse_not_finite(scores, "scores", group)
        return pot.codes(scores, epsilon, num_iters, marginal)
    codes = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    spread = _scale(scores, codes, epsilon, num_iters, marginal, group)
    lost = ~(spread <= MAX_RANGE)  # also where it is NaN
    if bool(all_max(lost.float(), group)):
        refuse_not_finite(scores, "scores", group)
        return _log_domain(scores, epsilon, num_iters, marginal, group)
    return codes


def _marginal(column_marginal: Tensor | None, scores: Tensor) -> Tensor:
    """(K,) shares that sum to 1."""
    clusters = scores.shape[1]
    if column_marginal is None:
        return scores.new_full((clusters,), 1.0 / max(clusters, 1))
    marginal = torch.as_tensor(column_marginal, dtype=scores.dtype, device=scores.device)
    if marginal.shape != (clusters,) or not bool(
        (marginal >= 0).all() & marginal.isfinite().all() & marginal.any()
    ):
        raise ValueError(
            f"column_marginal {marginal.tolist()} must be {clusters} non-negative finite shares,"
            " not all zero"
        )
    return marginal / marginal.sum()


def _scale(
    scores: Tensor, codes: Tensor, epsilon: float, num_iters: int, marginal: Tensor, group: Any
) -> Tensor:
    """Writes the codes and gives the largest ratio of two cluster scales. Only the scaling vectors
    change by round.

    Every row chunk gives its row sums and its share of the next column sums while it is in cache.
    """
    chunk_rows = max(1, len(scores))
    if scores.device.type == "cpu":
        chunk_rows = max(1, CHUNK_BYTES // (scores.element_size() * max(1, scores.shape[1])))
    chunks = codes.split(chunk_rows)
    sums, peak = _first_sums(scores, codes, 1.0 / epsilon, chunk_rows)
    top = all_max(peak.clone(), group)
    sums = sums * ((peak - top) / epsilon).exp()
    unused = torch.where(marginal > 0, 0.0, torch.inf)
    spread = sums.new_zeros(())
    for step in range(num_iters):
        scale = marginal / all_sum(sums, group)
        spread = torch.maximum(spread, scale.amax() / (scale + unused).amin())
        sums = torch.zeros_like(marginal)
        for chunk in chunks:
            rows = (chunk @ scale).reciprocal_()
            if step < num_iters - 1:
                sums.addmv_(chunk.T, rows)
            else:
                chunk.mul_(scale).mul_(rows[:, None])
    return spread


def _first_sums(
    scores: Tensor, codes: Tensor, sharpness: float, chunk_rows: int
) -> tuple[Tensor, Tensor]:
    """Writes the kernel exp(sharpness * (scores - shift of the row)) into codes.

    Gives the column sums (K,) of exp(sharpness * (scores - peak)) and the peak: the first round
    starts from equal weights of the bare scores, as the paper does, not of the shifted ones.
    """
    sums = torch.zeros_like(codes[:1].sum(0))
    peak = sums.new_tensor(torch.finfo(sums.dtype).min)
    for chunk, part in zip(codes.split(chunk_rows), scores.split(chunk_rows)):
        if not chunk.numel():
            break
        low, high = part.aminmax()
        if float(torch.maximum(high, -low)) * sharpness <= SMALL:
            row_max = torch.zeros_like(high)
            exp_(torch.mul(part, sharpness, out=chunk))
        else:
            row_max = part.amax(1, keepdim=True)
            exp_(torch.sub(part, row_max, out=chunk).mul_(sharpness).clamp_min_(LOG_ZERO))
        higher = torch.maximum(peak, row_max.amax())
        sums = sums * ((peak - higher) * sharpness).exp()
        peak = higher
        sums.addmv_(chunk.T, ((row_max - peak) * sharpness).exp().expand(len(chunk), 1)[:, 0])
        sums += 0.0 * low  # NaN where that is infinite
    return sums, peak


def _log_domain(
    scores: Tensor, epsilon: float, num_iters: int, marginal: Tensor, group: Any
) -> Tensor:
    """The same rounds on logarithms in float64: right for any finite scores, several times
    slower."""
    # the bounds keep differences finite where scores / epsilon would overflow
    log_kernel = (wide(scores) / epsilon).clamp_(-1e30, 1e30)
    log_marginal = wide(marginal).log()
    log_rows = torch.zeros_like(log_kernel[:, 0])
    log_scale = log_marginal
    for _ in range(num_iters):
        log_scale = log_marginal - _log_column_sums(log_kernel + log_rows[:, None], group)
        log_rows = -torch.logsumexp(log_kernel + log_scale, 1)
    return torch.softmax(log_kernel + log_scale, 1).to(scores.dtype)


def _log_column_sums(log_plan: Tensor, group: Any) -> Tensor:
    """(K,) log of the column sums of exp(log_plan) over all ranks' rows."""
    clusters = log_plan.shape[1]
    top = log_plan.amax(0) if len(log_plan) else log_plan.new_full((clusters,), -torch.inf)
    top = all_max(top, group)
    return top + all_sum((log_plan - top).exp().sum(0), group).log()
