"""Many small problems side by side: each iteration has one product, argmax and sum for all."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from deepclust.ops.kmeans.assign import bias_of
from deepclust.ops.kmeans.init import NO_CHANCE, restart_seed
from deepclust.ops.kmeans.lloyd import SPLIT_STEP, Settings, means_of, split
from deepclust.ops.kmeans.ranks import draw
from deepclust.ops.kmeans.step import segment_sums

GROUP_BYTES = 16 << 20
"""Problems are solved together as long as the scores of all of them take at most this much."""


@dataclass
class Solved:
    """Result for a group of P problems."""

    centroids: Tensor
    """(P, K, D)."""
    labels: Tensor
    """(P, N) int64."""
    inertia: Tensor
    """(P,) float64."""
    num_iters: Tensor
    """(P,) int64."""
    counts: Tensor
    """(P, K) int64, rows per cluster."""
    num_empty: Tensor
    """(P,) int64, empty clusters met on the way, summed over iterations."""


def solve_all(
    x: Any,
    weights: Any,
    num_clusters: int,
    init: Any,
    spherical: bool,
    seed: int,
    settings: Settings,
) -> list[Solved] | None:
    """k-means of all problems in x (…, N, D), group by group; see `kmeans` for the arguments.

    Returns None where problems have to be solved one by one: where one alone is worth a run, where
    a setting asks for something that groups do not have, or where a problem holds what must be
    refused (solved alone, it is named in the error).
    """
    num, dim = x.shape[-2:]
    size = GROUP_BYTES // (4 * max(num, 1) * max(num, num_clusters, dim))
    if size < 2 or _asks_for_more(init, settings):
        return None
    x = x.reshape(-1, num, dim)
    if not isinstance(init, str):
        init = torch.as_tensor(init).detach().flatten(0, -3)
        if init.shape != (len(x), num_clusters, dim) or not bool(init.isfinite().all()):
            return None
    if weights is not None:
        weights = torch.as_tensor(weights).detach().flatten(0, -2)
        if weights.shape != x.shape[:2] or not _valid_weights(weights):
            return None
    results = []
    for low in range(0, len(x), size):
        here = slice(low, low + size)
        some = _as_tensor(x[here])
        # Squares that overflow are refused as NaN and infinity are.
        if not bool(torch.linalg.vector_norm(some, dim=2).square_().isfinite().all()):
            return None
        start = init if isinstance(init, str) else init[here]
        factors = None if weights is None else weights[here].to(some)
        # A seed of its own for each problem, as problems solved one by one have it.
        seeds = list(range(seed + low, seed + low + len(some)))
        results.append(_solve_group(some, factors, num_clusters, start, seeds, spherical, settings))
    return results


def _asks_for_more(init: Any, settings: Settings) -> bool:
    """Whether a backend, a chunk size or k-means|| is asked for, which groups do not have."""
    parallel = isinstance(init, str) and init == "k-means||"
    return settings.backend != "auto" or settings.chunk_size is not None or parallel


def _valid_weights(weights: Tensor) -> bool:
    """Whether weights (P, N) are finite and non-negative, and some are positive in each problem."""
    valid = (weights.isfinite() & (weights >= 0)).all()
    return bool(valid & weights.any(1).all())


def _as_tensor(x: Any) -> Tensor:
    """Problems (P, N, D) in the dtype of the computation: float64 as it is, all else float32."""
    if isinstance(x, Tensor):
        return x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return torch.from_numpy(np.array(x, dtype=np.float64 if x.dtype == np.float64 else np.float32))


def _solve_group(
    x: Tensor,
    weights: Tensor | None,
    num_clusters: int,
    init: str | Tensor,
    seeds: list[int],
    spherical: bool,
    settings: Settings,
) -> Solved:
    """k-means of a group of problems; each ends as it would alone, up to rounding.

    Args:
        x: (P, N, D) finite, float32 or float64.
        weights: (P, N), or None where all are one.
        num_clusters: K.
        init: "k-means++", "random" or centroids (P, K, D).
        seeds: one per problem.
        spherical: see `kmeans`.
        settings: see `kmeans`.
    """
    problems = Problems(x, weights, num_clusters, spherical, settings)
    best = None
    num_restarts = 1 if isinstance(init, Tensor) else settings.num_restarts
    for restart in range(num_restarts):
        streams = [restart_seed(seed, restart) for seed in seeds]
        solved = problems.lloyd(problems.start(init, streams), streams)
        best = solved if best is None else _better(best, solved)
    assert best is not None
    best.centroids += problems.shift
    return best


def _better(first: Solved, second: Solved) -> Solved:
    """For each problem the result of lower inertia, the first of equals."""
    wins = second.inertia < first.inertia

    def pick(one: Tensor, other: Tensor) -> Tensor:
        return torch.where(wins.view(-1, *[1] * (one.ndim - 1)), other, one)

    names = [field.name for field in fields(Solved)]
    return Solved(*[pick(getattr(first, name), getattr(second, name)) for name in names])


class Problems:
    """P problems of N rows each, prepared as `Rows` prepares one.

    Rows are shifted where they lie far from the origin, and have length one if spherical.
    """

    def __init__(
        self,
        x: Tensor,
        weights: Tensor | None,
        num_clusters: int,
        spherical: bool,
        settings: Settings,
    ) -> None:
        self.weights = weights
        self.num_clusters = num_clusters
        self.spherical = spherical
        self.settings = settings
        mean = x.mean(1).double()
        square = torch.linalg.vector_norm(x, dim=2).double().square_().mean(1)
        # Mean squared length about the mean, D times the mean variance of a feature.
        self.spread = (square - mean.square().sum(1)).clamp_min(0)
        # Far from the origin: where `Rows` shifts a problem that is solved alone.
        far = ~torch.tensor(spherical) & (mean.square().sum(1) > 4 * self.spread)
        self.shift = torch.where(far[:, None], mean, 0).to(x.dtype)[:, None]
        if spherical:
            self.x = F.normalize(x, dim=2)
            self.move_by = torch.full_like(self.spread, SPLIT_STEP * x.shape[2] ** -0.5)
        else:
            self.x = x - self.shift if bool(far.any()) else x
            self.move_by = SPLIT_STEP * (self.spread / x.shape[2]).sqrt()

    def start(self, init: str | Tensor, streams: list[int]) -> Tensor:
        """Start (P, K, D) of the centroids, in the shifted space."""
        if isinstance(init, Tensor):
            return init.to(self.x) - self.shift
        if init == "random":
            num = self.x.shape[1]
            starts = []
            for rows, stream in zip(self.x, streams):
                starts.append(rows[draw(num, self.num_clusters, stream, self.x.device)])
            return torch.stack(starts)
        chosen = plus_plus_together(self.x, self.num_clusters, self.weights, streams)
        return self.x.gather(1, chosen[:, :, None].expand(-1, -1, self.x.shape[2]))

    def lloyd(self, centroids: Tensor, streams: list[int]) -> Solved:
        """Iterates all problems from centroids (P, K, D); one that has settled is left alone.

        streams: seeds of the random numbers with which empty clusters are refilled.
        """
        num_problems, num, dim = self.x.shape
        device = self.x.device
        if self.spherical:
            centroids = F.normalize(centroids, dim=2)
        generators = [torch.Generator().manual_seed(stream) for stream in streams]
        labels = torch.zeros(num_problems, num, dtype=torch.int64, device=device)
        iterations, empties = torch.zeros(2, num_problems, dtype=torch.int64, device=device)
        # Centroids whose scores are not up to date.
        stale = torch.ones(num_problems, self.num_clusters, dtype=torch.bool, device=device)
        if device.type == "cpu":
            self.scores = self.x.new_empty(num_problems, num, self.num_clusters)
        # Problems that have not settled.
        live = torch.arange(num_problems, device=device)
        while len(live) and int(iterations.max()) < self.settings.num_iters:
            before = self._of(live, centroids)
            labels[live] = self.assign(live, before, stale)
            moved, num_empty = self.move(live, before, labels[live], generators)
            empties[live] += num_empty
            changed = (moved != before).any(2)
            travelled = _travelled(moved, before, changed)
            centroids = self._with(live, centroids, moved)
            stale[live] = changed
            iterations[live] += 1
            if self.settings.on_iteration is not None:
                self.settings.on_iteration(int(iterations.max()))
            live = live[travelled > self.settings.tol * self.spread[live] / dim]
        # Where no centroid moved in the last iteration, the labels already belong to them.
        left = torch.nonzero(stale.any(1)).flatten()
        labels[left] = self.assign(left, centroids[left], stale)
        nearest = centroids.gather(1, labels[:, :, None].expand(-1, -1, dim))
        distances = torch.linalg.vector_norm(nearest.sub_(self.x), dim=2).double().square_()
        if self.weights is not None:
            distances = distances * self.weights
        inertia = distances.sum(1)
        total = num_problems * self.num_clusters
        counts = torch.bincount(self._numbered(labels), minlength=total).view(num_problems, -1)
        return Solved(centroids, labels, inertia, iterations, counts, empties)

    def assign(self, live: Tensor, centroids: Tensor, stale: Tensor) -> Tensor:
        """Nearest centroids (L, N) of the problems `live` (L,), each among its own (L, K, D).

        On processors scores are kept, and computed anew where `stale` (P, K) says so.
        """
        bias = bias_of(centroids.flatten(0, 1), self.spherical)
        if bias is None:
            bias = centroids.new_zeros(centroids.shape[:2])
        else:
            bias = bias.view(centroids.shape[:2])
        if self.x.device.type != "cpu":
            rows = self._of(live, self.x)
            return torch.baddbmm(bias[:, None], rows, centroids.transpose(1, 2)).argmax(2)
        labels = torch.empty(len(live), self.x.shape[1], dtype=torch.int64)
        for index, problem in enumerate(live.tolist()):
            x = self.x[problem]
            scores = self.scores[problem]
            moved = torch.nonzero(stale[problem]).flatten()
            # Writing single columns is slower: beyond three quarters all are computed.
            if 4 * len(moved) > 3 * self.num_clusters:
                torch.addmm(bias[index], x, centroids[index].T, out=scores)
            elif len(moved):
                scores[:, moved] = torch.addmm(bias[index, moved], x, centroids[index, moved].T)
            np.argmax(scores.numpy(), axis=1, out=labels[index].numpy())
        return labels

    def move(
        self,
        live: Tensor,
        before: Tensor,
        labels: Tensor,
        generators: list[torch.Generator],
    ) -> tuple[Tensor, Tensor]:
        """Means (L, K, D), with empty clusters refilled, and how many of these there were (L,).

        Args:
            live: (L,) indices of the problems.
            before: (L, K, D) their centroids.
            labels: (L, N) their labels.
            generators: one per problem, of all P.
        """
        weights = None
        if self.weights is not None:
            weights = self._of(live, self.weights).flatten()
        rows = self._of(live, self.x).flatten(0, 1)
        number = len(live) * self.num_clusters
        # Numbered through, the clusters of all problems are those of one large problem.
        sums, counts = segment_sums(rows, self._numbered(labels), number, weights)
        moved, filled = means_of(sums, counts.to(sums), before.flatten(0, 1), self.spherical)
        moved = moved.view_as(before)
        filled = filled.view(len(live), -1)
        counts = counts.view(len(live), -1)
        if self.settings.empty != "keep":
            for index in torch.nonzero(~filled.all(1)).flatten().tolist():
                self._refill(int(live[index]), moved[index], counts[index], generators)
        return moved, (~filled).sum(1)

    def _refill(
        self,
        problem: int,
        moved: Tensor,
        counts: Tensor,
        generators: list[torch.Generator],
    ) -> None:
        """Moves the centroids (K, D) of empty clusters as `settings.empty` says, in place."""
        generator = generators[problem]
        if self.settings.empty == "random":
            seed = int(torch.randint(2**62, (1,), generator=generator))
            empty = counts <= 0
            chosen = draw(self.x.shape[1], int(empty.sum()), seed, moved.device)
            moved[empty] = self.x[problem, chosen]
        else:
            split(float(self.move_by[problem]), moved, counts.double(), generator)
        if self.spherical:
            moved.copy_(F.normalize(moved, dim=1))

    def _of(self, live: Tensor, values: Tensor) -> Tensor:
        """Values of the problems `live`, without a copy while all are."""
        return values if len(live) == len(values) else values[live]

    @staticmethod
    def _with(live: Tensor, values: Tensor, fresh: Tensor) -> Tensor:
        """`values` with those of the problems `live` replaced."""
        return fresh if len(live) == len(values) else values.index_copy(0, live, fresh)

    def _numbered(self, labels: Tensor) -> Tensor:
        """Labels (L, N) counted on from problem to problem, flat (L · N,)."""
        first = torch.arange(len(labels), device=labels.device)[:, None] * self.num_clusters
        return (labels + first).flatten()


def _travelled(moved: Tensor, before: Tensor, changed: Tensor) -> Tensor:
    """Summed squared movement (L,) float64 of each problem's centroids (L, K, D).

    changed: (L, K) bool, those that moved at all.
    """
    index, cluster = torch.nonzero(changed, as_tuple=True)
    difference = moved[index, cluster] - before[index, cluster]
    distances = torch.linalg.vector_norm(difference, dim=1).double()
    travelled = torch.zeros(len(moved), dtype=torch.float64, device=moved.device)
    return travelled.index_add_(0, index, distances.square_())


def plus_plus_together(
    x: Tensor,
    num_clusters: int,
    weights: Tensor | None,
    streams: list[int],
) -> Tensor:
    """Rows (P, K) chosen by greedy k-means++, for all problems (P, N, D) at once; see `plus_plus`.

    weights: (P, N), or None where all are one. streams: one seed per problem.
    """
    num_problems, num, _ = x.shape
    trials = 2 + int(math.log(num_clusters))
    # Each problem draws as it would alone.
    draws = []
    for stream in streams:
        draws.append(np.random.default_rng([stream, 1]).random((num_clusters, trials)))
    uniform = torch.from_numpy(np.stack(draws, 1)).to(x.device)
    # All distances between rows exist from the start, so that a step only looks them up.
    squares = x.square().sum(2)
    pairs = torch.baddbmm(squares[:, None], x, x.transpose(1, 2), alpha=-2)
    pairs = pairs.add_(squares[:, :, None]).clamp_min_(0)
    if weights is None:
        weights = torch.ones_like(squares)
    free = torch.full((num_problems, num), NO_CHANCE, dtype=torch.float64, device=x.device)
    nearest = torch.ones_like(squares)
    chosen = torch.empty(num_problems, num_clusters, dtype=torch.int64, device=x.device)
    every = torch.arange(num_problems, device=x.device)
    for step in range(num_clusters):
        cumulated = torch.cumsum(nearest.double() * weights + free, 1)
        points = uniform[step] * cumulated[:, -1:]
        candidates = torch.searchsorted(cumulated, points, right=True).clamp_max_(num - 1)
        distances = pairs[every[:, None], candidates]
        if step:
            distances = torch.minimum(distances, nearest[:, None])
        best = torch.bmm(distances, weights[:, :, None])[:, :, 0].argmin(1)
        nearest = distances[every, best]
        row = candidates[every, best]
        chosen[:, step] = row
        # No row is drawn twice.
        nearest[every, row] = 0
        free[every, row] = 0
    return chosen
