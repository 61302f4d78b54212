"""PCA whitening of features, over chunks and ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepclust.ops.eigen import eigh
from deepclust.ops.kmeans.ranks import Ranks
from deepclust.ops.kmeans.rows import Rows

if TYPE_CHECKING:
    import torch.distributed as dist


def pca_whiten(x: Any, num_components: int, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Projects rows on their leading principal directions and scales each to unit variance.

    DeepCluster (Caron et al. 2018, section 3.3) does this to features before k-means. Directions in
    which the data do not vary give zeros instead of amplified noise. Signs are fixed: a direction's
    largest entry is positive.

    Args:
        x: (N, D) tensor, NumPy array, memory map or re-readable iterable of chunks; with `group`
        this rank's rows.
        num_components: C, at most D.

    Returns:
        (N, C), float64 for rows that are float64 or whole numbers beyond 2^24, else float32;
        variances are over N - 1 rows of all ranks.

    Raises:
        ValueError: fewer than two rows, C out of range, NaN or infinite rows (named).
    """
    rows = Rows(x, Ranks(group))
    mean, projection = _fit(rows, num_components)
    out = torch.empty(rows.num, num_components, dtype=rows.dtype, device=rows.device)
    for start, block in rows.blocks():
        torch.mm(block - mean, projection, out=out[start : start + len(block)])
    return out


def _fit(rows: Rows, num_components: int) -> tuple[Tensor, Tensor]:
    if rows.total < 2:
        raise ValueError(f"x: whitening needs at least 2 rows, got {rows.total}")
    if not 1 <= num_components <= rows.dim:
        raise ValueError(
            f"num_components={num_components}: must be from 1 to the feature dimension {rows.dim}"
        )
    mean, covariance = _moments(rows)
    return mean, rows.ranks.broadcast(_whitening(covariance, num_components)).to(rows.dtype)


def _moments(rows: Rows) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) float64 over all ranks; two passes, so that large offsets do
    no harm.
    """
    total = torch.zeros(rows.dim, dtype=torch.float64, device=rows.device)
    for _, block in rows.blocks():
        total += block.sum(0)
    mean = (rows.ranks.sum(total) / rows.total).to(rows.dtype)
    # The rounded mean leaves a remainder, which is taken off the products below.
    packed = torch.zeros(rows.dim + 1, rows.dim, dtype=torch.float64, device=rows.device)
    for _, block in rows.blocks():
        centred = block - mean
        packed[:-1] += centred.T @ centred
        packed[-1] += centred.sum(0)
    rows.ranks.sum(packed)
    rest = packed[-1] / rows.total
    return mean, (packed[:-1] - rows.total * torch.outer(rest, rest)) / (rows.total - 1)


def _whitening(covariance: Tensor, num_components: int) -> Tensor:
    """(D, C) float64: principal directions, largest variance first, each divided by its standard
    deviation.
    """
    variances, directions = eigh(covariance)
    variances, directions = (
        variances.flip(0)[:num_components],
        directions.flip(1)[:, :num_components],
    )
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    floor = variances[0].clamp_min(0) * len(covariance) * 1e-7
    scale = torch.where(variances > floor, variances.clamp_min(1e-300).rsqrt(), 0)
    return directions * torch.sign(largest) * scale
