"""Starts of the centroids: given, random rows, k-means++ and k-means||."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from deepclust.ops.kmeans.assign import bias_of, rows_at_a_time
from deepclust.ops.kmeans.ranks import draw
from deepclust.ops.kmeans.rows import Rows
from deepclust.ops.kmeans.step import Backend

SAMPLE_PER_CLUSTER = 16
"""Rows per centroid that greedy k-means++ sees: a few Lloyd iterations' cost and its whole gain."""
MIN_SAMPLE = 4096
"""Rows that k-means++ sees at least, as far as there are so many."""
PARALLEL_ROUNDS = 5
"""Rounds of k-means||, as in the experiments of Bahmani et al. 2012."""
NO_CHANCE = 1e-290
"""Added to every row's chance: rows without distance or weight are drawn when no others are left.

Far below any squared distance, yet a cumulated sum of such terms stays above zero."""


def restart_seed(seed: int, restart: int) -> int:
    """Seed of one restart's random numbers."""
    # Mixed, not added: restart 1 of seed 0 must not be restart 0 of seed 1.
    return int(np.random.SeedSequence([seed, restart]).generate_state(1)[0])


def initial_centroids(
    rows: Rows,
    num_clusters: int,
    init: str | Tensor,
    seed: int,
    backend: Backend,
) -> Tensor:
    """Start (K, D) in the rows' shifted space, equal on all ranks however the rows are spread.

    Args:
        rows: the rows of this rank.
        num_clusters: K.
        init: "k-means++", "k-means||", "random" or centroids (K, D).
        seed: makes the start repeatable.
        backend: finds nearest candidates, for k-means||.
    """
    if isinstance(init, Tensor):
        centroids = init.to(rows.device, rows.dtype)
        return centroids.clone() if rows.shift is None else centroids - rows.shift
    if init == "random":
        return rows.take(draw(rows.total, num_clusters, seed, rows.device))
    if init == "k-means||":
        sample, weights = parallel_candidates(rows, num_clusters, seed, backend)
    else:
        count = min(rows.total, max(SAMPLE_PER_CLUSTER * num_clusters, MIN_SAMPLE))
        indices = draw(rows.total, count, seed, rows.device)
        sample = _directions(rows, rows.take(indices))
        weights = rows.take_weights(indices)
    return rows.ranks.broadcast(plus_plus(sample, num_clusters, weights, seed))


def _directions(rows: Rows, x: Tensor) -> Tensor:
    return F.normalize(x, dim=1) if rows.spherical else x


def parallel_candidates(
    rows: Rows,
    num_clusters: int,
    seed: int,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """Candidates for centroids by k-means|| (Bahmani et al. 2012, algorithm 2).

    A few rounds each draw about 2K rows with probability proportional to the squared distance from
    the candidates so far.

    Returns:
        Candidates (M, D), M >= K, and the weight of the rows nearest to each (M,).
    """
    # The second entry keeps this stream apart from that of `plus_plus`, which follows on the same
    # seed.
    rng = np.random.default_rng([seed, 2])
    first = draw(rows.total, num_clusters, seed, rows.device)[rng.integers(num_clusters)]
    chosen = first.reshape(1)
    nearest = torch.full((rows.num,), float("inf"), dtype=torch.float64, device=rows.device)
    owner = torch.zeros(rows.num, dtype=torch.int64, device=rows.device)
    fresh = chosen
    candidates = _directions(rows, rows.take(chosen))
    for _ in range(PARALLEL_ROUNDS):
        _approach(rows, candidates, len(fresh), nearest, owner, backend)
        cost = nearest if rows.weights is None else nearest * rows.weights
        fresh = _draw_by(cost, rng.random(2 * num_clusters), rows)
        fresh = fresh[~torch.isin(fresh, chosen)]
        if not len(fresh):
            break
        chosen = torch.cat([chosen, fresh])
        candidates = torch.cat([candidates, _directions(rows, rows.take(fresh))])
    # With few distinct rows the rounds end early: rows drawn evenly make up the K candidates.
    if len(chosen) < num_clusters:
        fresh = draw(rows.total, num_clusters, seed, rows.device)
        fresh = fresh[~torch.isin(fresh, chosen)][: num_clusters - len(chosen)]
        candidates = torch.cat([candidates, _directions(rows, rows.take(fresh))])
    if len(fresh):
        _approach(rows, candidates, len(fresh), nearest, owner, backend)
    weights = None if rows.weights is None else rows.weights.double()
    totals = torch.bincount(owner, weights, len(candidates)).to(rows.dtype)
    return candidates, rows.ranks.sum(totals)


def _approach(
    rows: Rows,
    candidates: Tensor,
    num_new: int,
    nearest: Tensor,
    owner: Tensor,
    backend: Backend,
) -> None:
    """Takes the last `num_new` candidates (M, D) into account, in place.

    nearest: (N,) float64, squared distance of every row to its nearest candidate.
    owner: (N,) int64, that candidate's index.
    """
    new = candidates[-num_new:]
    first = len(candidates) - num_new
    # With a bias even where rows are spherical: a zero row's candidate is not of length one.
    bias = bias_of(new, False)
    find = backend(new, bias, rows_at_a_time(len(new), rows.dim, rows.device))
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
    """Distinct global indices, ascending, of rows drawn with probability proportional to cost (N,).

    uniform: (M,) numbers from 0 to 1, the same on all ranks.
    """
    # The numbers are points on the line of all rows' costs laid end to end. Each rank finds those
    # that fall on its part, so that ranks need to agree on nothing but the length of the parts.
    cumulated = torch.cumsum(cost, 0)
    local = float(cumulated[-1]) if len(cumulated) else 0.0
    totals = rows.ranks.gather(local)
    before = sum(totals[: rows.ranks.rank])
    points = torch.from_numpy(np.sort(uniform)).to(cost.device) * sum(totals) - before
    points = points[(points >= 0) & (points < local)]
    indices = torch.unique(torch.searchsorted(cumulated, points, right=True)) + rows.offset
    everywhere = [index for part in rows.ranks.gather(indices.tolist()) for index in part]
    return torch.tensor(everywhere, device=cost.device).long()


def plus_plus(x: Tensor, num_clusters: int, weights: Tensor, seed: int) -> Tensor:
    """Start by greedy k-means++ (Arthur and Vassilvitskii 2007, the greedy form of section 4).

    Every step draws 2 + log K candidates with probability proportional to the squared distance to
    the nearest centre and keeps the one that lowers the sum of these distances most.

    Args:
        x: (M, D) with M >= K.
        num_clusters: K.
        weights: (M,) non-negative.
        seed: makes the start repeatable.

    Returns:
        (K, D) distinct rows of x.
    """
    rng = np.random.default_rng([seed, 1])
    trials = 2 + int(math.log(num_clusters))
    uniform = torch.from_numpy(rng.random((num_clusters, trials))).to(x.device)
    squares = x.square().sum(1)
    free = torch.full((len(x),), NO_CHANCE, dtype=torch.float64, device=x.device)
    nearest = torch.ones_like(squares)
    chosen = torch.empty(num_clusters, dtype=torch.int64, device=x.device)
    for step in range(num_clusters):
        cumulated = torch.cumsum(nearest.double() * weights + free, 0)
        points = uniform[step] * cumulated[-1]
        # A point that rounds up to the end of the line belongs to the last row.
        candidates = torch.searchsorted(cumulated, points, right=True).clamp_max_(len(x) - 1)
        distances = torch.addmm(squares, x[candidates], x.T, alpha=-2)
        distances = distances.add_(squares[candidates, None]).clamp_min_(0)
        # In the first step no centre exists yet: all rows count the same.
        if step:
            distances = torch.minimum(distances, nearest)
        best = torch.argmin(distances @ weights)
        nearest = distances[best]
        chosen[step] = candidates[best]
        # No row is drawn twice.
        nearest[chosen[step]] = 0
        free[chosen[step]] = 0
    return x[chosen]
