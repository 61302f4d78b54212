"""One pass of Lloyd's algorithm over the rows of this rank."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from deepclust.ops.kmeans.rows import Rows


def assign(block: Tensor, centroids: Tensor, bias: Tensor, out: Tensor, chunk_size: int) -> None:
    """Nearest centroid of every row: the largest x·c − ‖c‖²/2, the lowest index among equals.

    Args:
        block: (B, D). centroids: (K, D). bias: (K,), −‖c‖²/2. out: (B,) int64, written.
        chunk_size: rows whose scores exist at one time, (chunk_size, K).
    """
    for low in range(0, len(block), chunk_size):
        torch.argmax(
            torch.addmm(bias, block[low : low + chunk_size], centroids.T), dim=1, out=out[low : low + chunk_size]
        )


def segment_sums(block: Tensor, labels: Tensor, num_clusters: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums (K, D) and total weights (K,) of the rows of every cluster; deterministic on every device.

    A stable sort puts the rows of a cluster side by side, so that each sum is written once and in a fixed order.
    """
    ordered, order = torch.sort(labels.to(torch.int32), stable=True)
    starts = torch.searchsorted(ordered, torch.arange(num_clusters, dtype=torch.int32, device=labels.device))
    order = order.to(starts.dtype)
    weights = None if weights is None else weights[order]
    sums = F.embedding_bag(order, block, starts, mode="sum", per_sample_weights=weights)
    if weights is None:
        return sums, torch.bincount(labels, minlength=num_clusters)
    return sums, F.embedding_bag(order, block.new_ones(len(block), 1), starts, mode="sum", per_sample_weights=weights)[
        :, 0
    ]


def lloyd_step(rows: Rows, centroids: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
    """Assigns every row of this rank and adds it up.

    Args:
        centroids: (K, D), in the rows' shifted space.
        labels: (N,) int64, overwritten.

    Returns:
        (K, D + 1) float64: per cluster the weighted sum of its rows and their total weight, over all ranks.
    """
    packed = torch.zeros(len(centroids), rows.dim + 1, dtype=torch.float64, device=rows.device)
    bias = centroids.new_zeros(len(centroids)) if rows.spherical else centroids.square().sum(1).mul_(-0.5)
    for start, block in rows.blocks():
        part = labels[start : start + len(block)]
        assign(block, centroids, bias, part, chunk_size)
        sums, counts = segment_sums(block, part, len(centroids), rows.block_weights(start, block))
        packed[:, :-1] += sums
        packed[:, -1] += counts
    return rows.ranks.sum(packed)


def inertia_of(rows: Rows, centroids: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """(weighted sum of squared distances, rows per cluster (K,) int64), over all ranks, from the differences themselves."""
    total = torch.zeros(len(centroids) + 1, dtype=torch.float64, device=rows.device)
    for start, block in rows.blocks():
        part = labels[start : start + len(block)]
        if rows.spherical:
            block = F.normalize(block, dim=1)
        distances = (block - centroids[part]).square_().sum(1)
        if rows.weights is not None:
            distances *= rows.weights[start : start + len(block)]
        total[-1] += distances.sum(dtype=torch.float64)
        total[:-1] += torch.bincount(part, minlength=len(centroids))
    rows.ranks.sum(total)
    return float(total[-1]), total[:-1].long()
