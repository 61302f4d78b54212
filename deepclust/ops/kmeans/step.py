"""One pass of Lloyd's algorithm over this rank's rows, and the types of its exchangeable parts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from deepclust.ops.kmeans.rows import SLICE, Rows

Assign = Callable[[Tensor, Tensor], None]
"""(block (B, D), labels (B,) int64): overwrites the labels with each row's nearest centroid."""
Backend = Callable[[Tensor, "Tensor | None", int], Assign]
"""(centroids (K, D), bias (K,) or None, rows at a time) → `Assign` for these centroids."""
AssignAt = Callable[[int, Tensor, Tensor], None]
"""(index of the first row, block (B, D), labels (B,)): `Assign` for searches with a memory."""
Sums = Callable[[Tensor, Tensor, int, "Tensor | None"], tuple[Tensor, Tensor]]
"""(block (B, D), labels (B,), K, weights (B,) or None) → sums (K, D), total weights (K,)."""


def lloyd_step(
    rows: Rows,
    assign: AssignAt,
    num_clusters: int,
    labels: Tensor,
    sums_of: Sums | None = None,
) -> Tensor:
    """Assigns every row of this rank to a centroid and sums the rows of each cluster.

    Args:
        rows: the rows of this rank.
        assign: search for the nearest centroids, in the rows' shifted space.
        num_clusters: K.
        labels: (N,) int64, overwritten.
        sums_of: how the rows of a block are summed; `segment_sums` if None.

    Returns:
        (K, D + 1) float64, equal on all ranks: per cluster the weighted sum of its rows and, in the
        last column, their total weight.
    """
    sums_of = sums_of or segment_sums
    # float64: the blocks' float32 sums would lose the last rows of a large cluster if they were
    # added up in float32.
    packed = torch.zeros(num_clusters, rows.dim + 1, dtype=torch.float64, device=rows.device)
    for start, block in rows.blocks():
        part = labels[start : start + len(block)]
        assign(start, block, part)
        sums, counts = sums_of(block, part, num_clusters, rows.block_weights(start, block))
        packed[:, :-1] += sums
        packed[:, -1] += counts
    # Sums and weights travel in one tensor, so that a pass costs one reduction.
    return rows.ranks.sum(packed)


def segment_sums(
    block: Tensor,
    labels: Tensor,
    num_clusters: int,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sums (K, D) and total weights (K,) of the rows of every cluster.

    The rows are added in a fixed order on every device, so that runs repeat bit by bit.

    Args:
        block: (B, D) floating point.
        labels: (B,) int64 in [0, K).
        num_clusters: K.
        weights: (B,) in the dtype of the block, or None where all are one.
    """
    # `index_add_` would be shorter, but on CUDA its atomic additions come in any order. A stable
    # sort puts the rows of a cluster side by side, so that each sum is written only once.
    order, starts = by_cluster(labels, num_clusters)
    if weights is None:
        counts = torch.diff(starts, append=starts.new_full((1,), len(labels)))
        return F.embedding_bag(order, block, starts, mode="sum"), counts
    weights = weights[order]
    ones = block.new_ones(len(block), 1)
    counts = F.embedding_bag(order, ones, starts, mode="sum", per_sample_weights=weights)
    sums = F.embedding_bag(order, block, starts, mode="sum", per_sample_weights=weights)
    return sums, counts[:, 0]


def by_cluster(labels: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Row indices sorted by cluster (B,), then by index, and where each cluster starts there (K,).

    labels: (B,) int64 in [0, K). Both results are int32: indices within a block need no more.
    """
    if labels.device.type == "cpu" and num_clusters <= 1 << 16:
        # NumPy sorts 16-bit integers by radix, several times faster than any other sort at hand.
        narrow = labels.numpy().astype(np.uint16)
        order = torch.from_numpy(np.argsort(narrow, kind="stable").astype(np.int32))
    else:
        order = torch.argsort(labels.int(), stable=True).int()
    counts = torch.bincount(labels, minlength=num_clusters)
    return order, (torch.cumsum(counts, 0) - counts).int()


def final_step(
    rows: Rows,
    assign: AssignAt | None,
    centroids: Tensor,
    labels: Tensor,
) -> tuple[float, Tensor]:
    """Assigns once more, unless `assign` is None, and measures the clustering over all ranks.

    Args:
        rows: the rows of this rank.
        assign: search for the nearest centroids; None where `labels` already belong to them.
        centroids: (K, D) in the rows' shifted space.
        labels: (N,) int64, overwritten unless `assign` is None.

    Returns:
        Inertia (weighted sum of squared distances) and rows per cluster (K,) int64.
    """
    total = torch.zeros(len(centroids) + 1, dtype=torch.float64, device=rows.device)
    for start, block in rows.blocks():
        part = labels[start : start + len(block)]
        if assign is not None:
            assign(start, block, part)
        # On a processor the differences of a slice stay in the cache; on a GPU every slice would
        # cost launches, so it takes the block whole.
        size = SLICE if block.device.type == "cpu" else len(block)
        for low in range(0, len(block), size):
            some = block[low : low + size]
            if rows.spherical:
                some = F.normalize(some, dim=1)
            # From the differences themselves: |x|² − 2x·c + |c|² cancels where clusters are tight.
            differences = centroids.index_select(0, part[low : low + size]).sub_(some)
            distances = torch.linalg.vector_norm(differences, dim=1).double().square_()
            if rows.weights is not None:
                distances *= rows.weights[start + low : start + low + len(some)]
            total[-1] += distances.sum()
        total[:-1] += torch.bincount(part, minlength=len(centroids))
    rows.ranks.sum(total)
    return float(total[-1]), total[:-1].long()
