"""One pass of Lloyd's algorithm over the rows of this rank."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from deepclust.ops.kmeans.rows import Rows

AssignAt = Callable[[int, Tensor, Tensor], None]
"""(first row's index, block (B, D), labels (B,) int64, overwritten)."""
Sums = Callable[[Tensor, Tensor, int, "Tensor | None"], tuple[Tensor, Tensor]]
"""(rows (B, D), labels (B,), K, weights (B,) or None) → sums (K, D), total weights (K,); see `segment_sums`."""

SLICE = 2048
"""Rows whose differences to their centroids exist at one time."""


def lloyd_step(rows: Rows, assign: AssignAt, num_clusters: int, labels: Tensor, sums_of: Sums | None = None) -> Tensor:
    """Assigns every row of this rank and adds it up.

    Args:
        assign: nearest centroids, in the rows' shifted space. sums_of: how the rows of a block are added up.
        labels: (N,) int64, overwritten.

    Returns:
        (K, D + 1) float64: per cluster the weighted sum of its rows and their total weight, over all ranks.
    """
    sums_of = sums_of or segment_sums
    packed = torch.zeros(num_clusters, rows.dim + 1, dtype=torch.float64, device=rows.device)
    for start, block in rows.blocks():
        part = labels[start : start + len(block)]
        assign(start, block, part)
        sums, counts = sums_of(block, part, num_clusters, rows.block_weights(start, block))
        packed[:, :-1] += sums
        packed[:, -1] += counts
    return rows.ranks.sum(packed)


def segment_sums(block: Tensor, labels: Tensor, num_clusters: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums (K, D) and total weights (K,) of the rows of every cluster, in a fixed order on every device.

    A stable sort puts the rows of a cluster side by side, so that each sum is written once and without contention.
    """
    order, starts = by_cluster(labels, num_clusters)
    if weights is None:
        counts = torch.diff(starts, append=starts.new_full((1,), len(labels)))
        return F.embedding_bag(order, block, starts, mode="sum"), counts
    weights = weights[order]
    ones = block.new_ones(len(block), 1)
    counts = F.embedding_bag(order, ones, starts, mode="sum", per_sample_weights=weights)
    return F.embedding_bag(order, block, starts, mode="sum", per_sample_weights=weights), counts[:, 0]


def by_cluster(labels: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """(row indices ordered by cluster and within it by index (B,), each cluster's first place in that order (K,))."""
    if labels.device.type == "cpu" and num_clusters <= 1 << 16:
        # NumPy sorts 16-bit integers by radix, several times faster than any other sort at hand.
        order = torch.from_numpy(np.argsort(labels.numpy().astype(np.uint16), kind="stable").astype(np.int32))
    else:
        order = torch.argsort(labels.int(), stable=True).int()
    counts = torch.bincount(labels, minlength=num_clusters)
    return order, (torch.cumsum(counts, 0) - counts).int()


def final_step(rows: Rows, assign: AssignAt | None, centroids: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Assigns once more (unless `assign` is None) and measures.

    Returns:
        (weighted sum of squared distances, from the differences themselves; rows per cluster (K,) int64), all ranks.
    """
    total = torch.zeros(len(centroids) + 1, dtype=torch.float64, device=rows.device)
    for start, block in rows.blocks():
        part = labels[start : start + len(block)]
        if assign is not None:
            assign(start, block, part)
        size = SLICE if block.device.type == "cpu" else len(block)
        for low in range(0, len(block), size):
            some = block[low : low + size]
            if rows.spherical:
                some = F.normalize(some, dim=1)
            differences = centroids.index_select(0, part[low : low + size]).sub_(some)
            distances = torch.linalg.vector_norm(differences, dim=1).double().square_()
            if rows.weights is not None:
                distances *= rows.weights[start + low : start + low + len(some)]
            total[-1] += distances.sum()
        total[:-1] += torch.bincount(part, minlength=len(centroids))
    rows.ranks.sum(total)
    return float(total[-1]), total[:-1].long()
