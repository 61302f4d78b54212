"""Where the centroids start."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from deepclust.ops.kmeans.assign import Backend, bias_of, rows_at_a_time
from deepclust.ops.kmeans.ranks import draw
from deepclust.ops.kmeans.rows import Rows

SAMPLE_PER_CLUSTER = 16
"""Greedy k-means++ on this many rows per centroid costs a few Lloyd iterations and keeps its whole gain."""
PARALLEL_ROUNDS = 5


def initial_centroids(rows: Rows, num_clusters: int, init: str | Tensor, seed: int, assign: Backend) -> Tensor:
    """(K, D) start in the rows' shifted space, equal on all ranks and however the rows are spread over them."""
    if isinstance(init, Tensor):
        centroids = init.to(rows.device, rows.dtype)
        return centroids.clone() if rows.shift is None else centroids - rows.shift
    if init == "random":
        return rows.take(draw(rows.total, num_clusters, seed, rows.device))
    if init == "k-means||":
        sample, weights = parallel_candidates(rows, num_clusters, seed, assign)
    else:
        count = min(rows.total, max(SAMPLE_PER_CLUSTER * num_clusters, 4096))
        indices = draw(rows.total, count, seed, rows.device)
        sample, weights = _directions(rows, rows.take(indices)), rows.take_weights(indices)
    return rows.ranks.broadcast(plus_plus(sample, num_clusters, weights, seed))


def _directions(rows: Rows, x: Tensor) -> Tensor:
    return F.normalize(x, dim=1) if rows.spherical else x


def parallel_candidates(rows: Rows, num_clusters: int, seed: int, assign: Backend) -> tuple[Tensor, Tensor]:
    """k-means|| (Bahmani et al. 2012, algorithm 2): a few rounds that each draw about 2K rows by squared distance.

    The draws of a round are fixed numbers on the line of all rows' distances, so ranks need to agree on nothing else.

    Returns:
        Candidates (M, D), M >= K, and the weight of the rows nearest to each (M,).
    """
    rng = np.random.default_rng([seed, 2])
    chosen = draw(rows.total, num_clusters, seed, rows.device)[rng.integers(num_clusters)].reshape(1)
    nearest = torch.full((rows.num,), float("inf"), dtype=torch.float64, device=rows.device)
    owner = torch.zeros(rows.num, dtype=torch.int64, device=rows.device)
    fresh, candidates = chosen, _directions(rows, rows.take(chosen))
    for _ in range(PARALLEL_ROUNDS):
        _approach(rows, candidates[-len(fresh) :], len(candidates) - len(fresh), nearest, owner, assign)
        cost = nearest if rows.weights is None else nearest * rows.weights
        fresh = _draw_by(cost, rng.random(2 * num_clusters), rows)
        fresh = fresh[~torch.isin(fresh, chosen)]
        if not len(fresh):
            break
        chosen = torch.cat([chosen, fresh])
        candidates = torch.cat([candidates, _directions(rows, rows.take(fresh))])
    if len(chosen) < num_clusters:
        fresh = draw(rows.total, num_clusters, seed, rows.device)
        fresh = fresh[~torch.isin(fresh, chosen)][: num_clusters - len(chosen)]
        candidates = torch.cat([candidates, _directions(rows, rows.take(fresh))])
    if len(fresh):
        _approach(rows, candidates[-len(fresh) :], len(candidates) - len(fresh), nearest, owner, assign)
    weights = None if rows.weights is None else rows.weights.double()
    return candidates, rows.ranks.sum(torch.bincount(owner, weights, len(candidates)).to(rows.dtype))


def _approach(rows: Rows, new: Tensor, first: int, nearest: Tensor, owner: Tensor, assign: Backend) -> None:
    """Lowers every row's squared distance to its nearest candidate, in place; `first` is the first new one's index."""
    find = assign(new, bias_of(new, False), rows_at_a_time(len(new), rows.dim, rows.device))
    for start, block in rows.blocks():
        block = _directions(rows, block)
        part = torch.empty(len(block), dtype=torch.int64, device=rows.device)
        find(block, part)
        distances = (block - new[part]).square_().sum(1).double()
        here = slice(start, start + len(block))
        closer = distances < nearest[here]
        nearest[here] = torch.where(closer, distances, nearest[here])
        owner[here] = torch.where(closer, part + first, owner[here])


def _draw_by(cost: Tensor, uniform: np.ndarray, rows: Rows) -> Tensor:
    """Distinct global indices, ascending, of rows drawn with probability proportional to their cost."""
    cumulated = torch.cumsum(cost, 0)
    local = float(cumulated[-1]) if len(cumulated) else 0.0
    totals = rows.ranks.gather(local)
    before = sum(totals[: rows.ranks.rank])
    points = torch.from_numpy(np.sort(uniform)).to(cost.device) * sum(totals) - before
    mine = points[(points >= 0) & (points < local)]
    found = torch.unique(torch.searchsorted(cumulated, mine, right=True)) + rows.offset
    return torch.tensor(
        [index for part in rows.ranks.gather(found.tolist()) for index in part], device=cost.device
    ).long()


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
