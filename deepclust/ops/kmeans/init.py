"""Where the centroids start."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from deepclust.ops.kmeans.ranks import draw
from deepclust.ops.kmeans.rows import Rows

SAMPLE_PER_CLUSTER = 16
"""Greedy k-means++ on this many rows per centroid costs a few Lloyd iterations and keeps its whole gain."""


def initial_centroids(rows: Rows, num_clusters: int, init: str | Tensor, seed: int) -> Tensor:
    """(K, D) start in the rows' shifted space, equal on all ranks."""
    if isinstance(init, Tensor):
        centroids = init.to(rows.device, rows.dtype)
        return centroids.clone() if rows.shift is None else centroids - rows.shift
    if init == "random":
        return rows.take(draw(rows.total, num_clusters, seed, rows.device))
    count = min(rows.total, max(SAMPLE_PER_CLUSTER * num_clusters, 4096))
    indices = draw(rows.total, count, seed, rows.device)
    sample, weights = rows.take(indices), rows.take_weights(indices)
    if rows.spherical:
        sample = torch.nn.functional.normalize(sample, dim=1)
    return rows.ranks.broadcast(plus_plus(sample, num_clusters, weights, seed))


def plus_plus(x: Tensor, num_clusters: int, weights: Tensor, seed: int) -> Tensor:
    """Greedy k-means++ (Arthur and Vassilvitskii 2007; the greedy form of their section 4).

    Every step draws 2 + log K candidates with probability proportional to the squared distance to the nearest centre
    and keeps the one that lowers the sum of these distances most.

    Args:
        x: (M, D) with M >= K. weights: (M,).

    Returns:
        (K, D) distinct rows of x.
    """
    rng = np.random.default_rng([seed, 1])
    uniform = torch.from_numpy(rng.random((num_clusters, 2 + int(math.log(num_clusters))))).to(x.device)
    squares = x.square().sum(1)
    # Rows without distance or weight are drawn only when no others are left, and no row is drawn twice.
    free = torch.full((len(x),), 1e-290, dtype=torch.float64, device=x.device)
    nearest = torch.ones_like(squares)
    chosen = torch.empty(num_clusters, dtype=torch.int64, device=x.device)
    for step in range(num_clusters):
        cumulated = torch.cumsum(nearest.double() * weights + free, 0)
        candidates = torch.searchsorted(cumulated, uniform[step] * cumulated[-1], right=True).clamp_max_(len(x) - 1)
        distances = torch.addmm(squares, x[candidates], x.T, alpha=-2).add_(squares[candidates, None]).clamp_min_(0)
        if step:
            distances = torch.minimum(distances, nearest)
        best = torch.argmin(distances @ weights)
        nearest, chosen[step] = distances[best], candidates[best]
        nearest[chosen[step]] = 0
        free[chosen[step]] = 0
    return x[chosen]
