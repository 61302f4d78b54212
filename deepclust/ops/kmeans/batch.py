"""Many small problems side by side: one product, one argmax and one sum for all of them in every iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from deepclust.ops.kmeans.assign import bias_of
from deepclust.ops.kmeans.lloyd import Settings, means_of, split
from deepclust.ops.kmeans.ranks import draw
from deepclust.ops.kmeans.step import segment_sums

GROUP_BYTES = 16 << 20
"""Problems are solved together as long as the scores of all of them take at most this much."""


@dataclass
class Solved:
    """(P, K, D) centroids, (P, N) labels, and per problem inertia (float64), iterations, counts (K) and empties."""

    centroids: Tensor
    labels: Tensor
    inertia: Tensor
    num_iters: Tensor
    counts: Tensor
    num_empty: Tensor


def solve_all(
    x: Any, weights: Any, num_clusters: int, init: Any, spherical: bool, seed: int, settings: Settings
) -> list[Solved] | None:
    """All problems of x (…, N, D), group by group.

    None where one problem alone is worth a run, where a setting asks for something else, or where a problem holds what
    must be refused: solved one by one, it is named.
    """
    num, dim = x.shape[-2:]
    step = GROUP_BYTES // (4 * max(num, 1) * max(num, num_clusters, dim))
    chosen = (
        settings.backend != "auto" or settings.chunk_size is not None or (isinstance(init, str) and init[-1] == "|")
    )
    if step < 2 or chosen:
        return None
    x = x.reshape(-1, num, dim)
    if not isinstance(init, str):
        init = torch.as_tensor(init).detach().flatten(0, -3)
        if init.shape != (len(x), num_clusters, dim) or not bool(init.isfinite().all()):
            return None
    if weights is not None:
        weights = torch.as_tensor(weights).detach().flatten(0, -2)
        if weights.shape != x.shape[:2] or not bool((weights.isfinite() & (weights >= 0)).all() & weights.any(1).all()):
            return None
    found = []
    for low in range(0, len(x), step):
        here = slice(low, low + step)
        some = _as_tensor(x[here])
        if not bool(torch.linalg.vector_norm(some, dim=2).square_().isfinite().all()):
            return None
        start = init if isinstance(init, str) else init[here]
        factors = None if weights is None else weights[here].to(some)
        seeds = list(range(seed + low, seed + low + len(some)))
        found.append(_solve_group(some, factors, num_clusters, start, seeds, spherical, settings))
    return found


def _as_tensor(x: Any) -> Tensor:
    """Problems (P, N, D) in the dtype of the computation."""
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
    """Solves a group of problems; every one ends as it would alone, up to rounding.

    x: (P, N, D) finite, float32 or float64. weights: (P, N) or None. init: "k-means++", "random" or (P, K, D).
    seeds: one per problem.
    """
    problems = Problems(x, weights, num_clusters, spherical, settings)
    best = None
    for restart in range(1 if isinstance(init, Tensor) else settings.num_restarts):
        streams = [int(np.random.SeedSequence([seed, restart]).generate_state(1)[0]) for seed in seeds]
        solved = problems.lloyd(problems.start(init, streams), streams)
        best = solved if best is None else _better(best, solved)
    assert best is not None
    best.centroids += problems.shift
    return best


def _better(first: Solved, second: Solved) -> Solved:
    """Per problem the one of lower inertia."""
    wins = second.inertia < first.inertia

    def pick(one: Tensor, other: Tensor) -> Tensor:
        return torch.where(wins.view(-1, *[1] * (one.ndim - 1)), other, one)

    return Solved(*[pick(getattr(first, field.name), getattr(second, field.name)) for field in fields(Solved)])


class Problems:
    """P problems of N rows each: as `Rows`, shifted where they lie far from the origin, of length one if spherical."""

    def __init__(
        self, x: Tensor, weights: Tensor | None, num_clusters: int, spherical: bool, settings: Settings
    ) -> None:
        mean, square = x.mean(1).double(), torch.linalg.vector_norm(x, dim=2).double().square_().mean(1)
        self.spread = (square - mean.square().sum(1)).clamp_min(0)
        far = ~torch.tensor(spherical) & (mean.square().sum(1) > 4 * self.spread)
        self.shift = torch.where(far[:, None], mean, 0).to(x.dtype)[:, None]
        self.x = F.normalize(x, dim=2) if spherical else x - self.shift if bool(far.any()) else x
        self.weights = weights
        self.num_clusters, self.spherical, self.settings = num_clusters, spherical, settings
        self.move_by = 2.0**-5 * (self.spread / x.shape[2]).sqrt()
        if spherical:
            self.move_by = torch.full_like(self.spread, 2.0**-5 * x.shape[2] ** -0.5)

    def start(self, init: str | Tensor, streams: list[int]) -> Tensor:
        """(P, K, D)."""
        if isinstance(init, Tensor):
            return init.to(self.x) - self.shift
        if init == "random":
            chosen = [draw(self.x.shape[1], self.num_clusters, stream, self.x.device) for stream in streams]
            return torch.stack([rows[index] for rows, index in zip(self.x, chosen)])
        chosen = plus_plus_together(self.x, self.num_clusters, self.weights, streams)
        return self.x.gather(1, chosen[:, :, None].expand(-1, -1, self.x.shape[2]))

    def lloyd(self, centroids: Tensor, streams: list[int]) -> Solved:
        """Iterates all problems from `centroids` (P, K, D); a problem that has settled is left alone."""
        num_problems, num, dim = self.x.shape
        if self.spherical:
            centroids = F.normalize(centroids, dim=2)
        generators = [torch.Generator().manual_seed(stream) for stream in streams]
        labels = torch.zeros(num_problems, num, dtype=torch.int64, device=self.x.device)
        iterations, empties = torch.zeros(2, num_problems, dtype=torch.int64, device=self.x.device)
        # Centroids whose scores are not up to date.
        stale = torch.ones(num_problems, self.num_clusters, dtype=torch.bool, device=self.x.device)
        if self.x.device.type == "cpu":
            self.scores = self.x.new_empty(num_problems, num, self.num_clusters)
        live = torch.arange(num_problems, device=self.x.device)
        while len(live) and int(iterations.max()) < self.settings.num_iters:
            before = self._of(live, centroids)
            labels[live] = self.assign(live, before, stale)
            moved, empties[live] = self.move(live, before, labels[live], empties[live], generators)
            changed = (moved != before).any(2)
            place, cluster = torch.nonzero(changed, as_tuple=True)
            distances = torch.linalg.vector_norm(moved[place, cluster] - before[place, cluster], dim=1).double()
            travelled = torch.zeros(len(live), dtype=torch.float64, device=self.x.device)
            travelled.index_add_(0, place, distances.square_())
            centroids, stale[live] = self._with(live, centroids, moved), changed
            iterations[live] += 1
            if self.settings.on_iteration is not None:
                self.settings.on_iteration(int(iterations.max()))
            live = live[travelled > self.settings.tol * self.spread[live] / dim]
        # Centroids that did not move at all already own their labels.
        left = torch.nonzero(stale.any(1)).flatten()
        labels[left] = self.assign(left, centroids[left], stale)
        own = centroids.gather(1, labels[:, :, None].expand(-1, -1, dim))
        distances = torch.linalg.vector_norm(own.sub_(self.x), dim=2).double().square_()
        inertia = (distances if self.weights is None else distances * self.weights).sum(1)
        counts = torch.bincount(self._numbered(labels), minlength=num_problems * self.num_clusters)
        return Solved(centroids, labels, inertia, iterations, counts.view(num_problems, -1), empties)

    def assign(self, live: Tensor, centroids: Tensor, stale: Tensor) -> Tensor:
        """(L, N) nearest of each problem's own centroids (L, K, D); scores are computed where `stale` (P, K)."""
        bias = bias_of(centroids.flatten(0, 1), self.spherical)
        bias = centroids.new_zeros(centroids.shape[:2]) if bias is None else bias.view(centroids.shape[:2])
        if self.x.device.type != "cpu":
            return torch.baddbmm(bias[:, None], self._of(live, self.x), centroids.transpose(1, 2)).argmax(2)
        labels = torch.empty(len(live), self.x.shape[1], dtype=torch.int64)
        for place, problem in enumerate(live.tolist()):
            x, scores, moved = self.x[problem], self.scores[problem], torch.nonzero(stale[problem]).flatten()
            if 4 * len(moved) > 3 * self.num_clusters:
                torch.addmm(bias[place], x, centroids[place].T, out=scores)
            elif len(moved):
                scores[:, moved] = torch.addmm(bias[place, moved], x, centroids[place, moved].T)
            np.argmax(scores.numpy(), axis=1, out=labels[place].numpy())
        return labels

    def move(
        self, live: Tensor, before: Tensor, labels: Tensor, empties: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Means (L, K, D), clusters without rows mended, and the number of these added to `empties` (L,)."""
        weights = None if self.weights is None else self._of(live, self.weights).flatten()
        rows, number = self._of(live, self.x).flatten(0, 1), len(live) * self.num_clusters
        sums, counts = segment_sums(rows, self._numbered(labels), number, weights)
        moved, filled = means_of(sums, counts.to(sums), before.flatten(0, 1), self.spherical)
        moved, filled, counts = moved.view_as(before), filled.view(len(live), -1), counts.view(len(live), -1)
        if self.settings.empty != "keep":
            for place in torch.nonzero(~filled.all(1)).flatten().tolist():
                self._mend(int(live[place]), moved[place], counts[place], generators)
        return moved, empties + (~filled).sum(1)

    def _mend(self, problem: int, moved: Tensor, counts: Tensor, generators: list[torch.Generator]) -> None:
        generator = generators[problem]
        if self.settings.empty == "random":
            seed = int(torch.randint(2**62, (1,), generator=generator))
            empty = counts <= 0
            moved[empty] = self.x[problem, draw(self.x.shape[1], int(empty.sum()), seed, moved.device)]
        else:
            split(float(self.move_by[problem]), moved, counts.double(), generator)
        if self.spherical:
            moved.copy_(F.normalize(moved, dim=1))

    def _of(self, live: Tensor, values: Tensor) -> Tensor:
        return values if len(live) == len(values) else values[live]

    @staticmethod
    def _with(live: Tensor, values: Tensor, fresh: Tensor) -> Tensor:
        """`values` with those of the problems `live` replaced."""
        return fresh if len(live) == len(values) else values.index_copy(0, live, fresh)

    def _numbered(self, labels: Tensor) -> Tensor:
        """Labels counted on from problem to problem, flat."""
        first = torch.arange(len(labels), device=labels.device)[:, None] * self.num_clusters
        return (labels + first).flatten()


def plus_plus_together(x: Tensor, num_clusters: int, weights: Tensor | None, streams: list[int]) -> Tensor:
    """Greedy k-means++ as `plus_plus`, of all problems (P, N, D) at once: (P, K) rows chosen.

    All distances between rows exist from the start, so that a step only looks them up.
    """
    num_problems, num, _ = x.shape
    trials = 2 + int(math.log(num_clusters))
    draws = [np.random.default_rng([stream, 1]).random((num_clusters, trials)) for stream in streams]
    uniform = torch.from_numpy(np.stack(draws, 1)).to(x.device)
    squares = x.square().sum(2)
    pairs = torch.baddbmm(squares[:, None], x, x.transpose(1, 2), alpha=-2).add_(squares[:, :, None]).clamp_min_(0)
    weights = torch.ones_like(squares) if weights is None else weights
    # Rows without distance or weight are drawn only when no others are left, and no row is drawn twice.
    free = torch.full((num_problems, num), 1e-290, dtype=torch.float64, device=x.device)
    nearest = torch.ones_like(squares)
    chosen = torch.empty(num_problems, num_clusters, dtype=torch.int64, device=x.device)
    every = torch.arange(num_problems, device=x.device)
    for step in range(num_clusters):
        cumulated = torch.cumsum(nearest.double() * weights + free, 1)
        candidates = torch.searchsorted(cumulated, uniform[step] * cumulated[:, -1:], right=True).clamp_max_(num - 1)
        distances = pairs[every[:, None], candidates]
        if step:
            distances = torch.minimum(distances, nearest[:, None])
        best = torch.bmm(distances, weights[:, :, None])[:, :, 0].argmin(1)
        nearest, row = distances[every, best], candidates[every, best]
        chosen[:, step] = row
        nearest[every, row] = 0
        free[every, row] = 0
    return chosen
