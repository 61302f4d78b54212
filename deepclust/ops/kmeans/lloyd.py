"""Lloyd's iterations: assign, average, refill empty clusters, stop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from deepclust.ops.kmeans.bounds import GroupBounds
from deepclust.ops.kmeans.filter import Filter
from deepclust.ops.kmeans.gpu import sums_for
from deepclust.ops.kmeans.ranks import draw
from deepclust.ops.kmeans.rows import Rows
from deepclust.ops.kmeans.step import Assign, AssignAt, final_step, lloyd_step, segment_sums
from deepclust.ops.kmeans.sums import RunningSums

Assigner = Callable[[Tensor], Assign]
"""Centroids (K, D) → the search for the nearest of them."""

SPLIT_STEP = 2.0**-5
"""Distance of a split centroid from the old one, in standard deviations of a feature.

A power of two multiplies without rounding."""

log = logging.getLogger("deepclust")


@dataclass(frozen=True)
class Settings:
    """Settings of the loop; see `kmeans` for their meaning."""

    num_iters: int
    tol: float
    num_restarts: int
    empty: str
    chunk_size: int | None
    backend: str
    on_iteration: Callable[[int], None] | None


@dataclass
class Run:
    """One finished run."""

    centroids: Tensor
    """(K, D), in the rows' shifted space."""
    labels: Tensor
    """(N,) int64, the nearest centroid of every row of this rank."""
    inertia: float
    """Sum of (weighted) squared distances over all ranks."""
    num_iters: int
    counts: Tensor
    """(K,) int64, rows per cluster over all ranks."""
    num_empty: int
    """Empty clusters met on the way, summed over iterations."""


def lloyd(
    rows: Rows,
    centroids: Tensor,
    assign: Assigner,
    settings: Settings,
    seed: int,
) -> Run:
    """Iterates until the centroids move by no more than the tolerance or iterations are used up.

    Args:
        rows: the rows of this rank.
        centroids: (K, D) start, in the rows' shifted space.
        assign: gives the search for each iteration's centroids.
        settings: see `kmeans`.
        seed: of the random numbers with which empty clusters are refilled.
    """
    labels = torch.zeros(rows.num, dtype=torch.int64, device=rows.device)
    search = _search(rows, assign, len(centroids), settings.backend)
    step = _stepper(rows, len(centroids), settings.backend)
    if rows.spherical:
        centroids = F.normalize(centroids, dim=1)
    generator = torch.Generator().manual_seed(seed)
    iteration = 0
    num_empty = 0
    settled = False
    still = False
    while iteration < settings.num_iters and not settled:
        packed = step(search(centroids), labels)
        iteration += 1
        num_empty += int((packed[:, -1] <= 0).sum())
        moved = _move(rows, packed, centroids, settings, generator)
        # One tensor carries rank 0's decision and its centroids.
        stop = _within_tolerance(rows, moved, centroids, settings.tol)
        decision = torch.cat([moved.flatten(), stop.reshape(1)])
        rows.ranks.broadcast(decision)
        moved = decision[:-1].view_as(centroids)
        still = torch.equal(moved, centroids)
        centroids = moved.clone()
        settled = bool(decision[-1] == 1)
        if settings.on_iteration is not None:
            settings.on_iteration(iteration)
    # If the centroids did not move at all, the labels of the last pass already belong to them.
    last = None if still else search(centroids)
    if isinstance(step, RunningSums) and iteration:
        inertia, counts = step.finish(last, centroids, labels)
    else:
        inertia, counts = final_step(rows, last, centroids, labels)
    if num_empty:
        log.info(
            "k-means: %d empty clusters met in %d iterations (empty=%s)",
            num_empty,
            iteration,
            settings.empty,
        )
    return Run(centroids, labels, inertia, iteration, counts, num_empty)


def _stepper(rows: Rows, num_clusters: int, backend: str) -> Callable[[AssignAt, Tensor], Tensor]:
    """`lloyd_step` for these rows; on processors a version that keeps the last pass's sums."""
    sums = sums_for(backend, rows.device)
    if rows.device.type == "cpu" and sums is segment_sums:
        return RunningSums(rows, num_clusters)
    return lambda assign, labels: lloyd_step(rows, assign, num_clusters, labels, sums)


def _search(
    rows: Rows,
    assign: Assigner,
    num_clusters: int,
    backend: str,
) -> Callable[[Tensor], AssignAt]:
    """Full search, with the bfloat16 filter or group bounds around it where these can win."""
    # A backend that was asked for by name is not replaced by the filter's product.
    use_filter = backend == "auto" and Filter.worth_trying(rows, num_clusters)
    quick = Filter(rows) if use_filter else None
    bounds = GroupBounds(rows) if GroupBounds.worth_trying(rows, num_clusters) else None

    def search(centroids: Tensor) -> AssignAt:
        find = assign(centroids)

        def full(start: int, block: Tensor, part: Tensor) -> None:
            find(block, part)

        every = full
        if quick is not None:
            quick.begin(centroids, find)
            every = quick.assign
        if bounds is None:
            return every
        # Bounds go outside: the filter serves the passes in which they are not worth keeping.
        bounds.begin(centroids, every)
        return bounds.assign

    return search


def _within_tolerance(rows: Rows, moved: Tensor, centroids: Tensor, tol: float) -> Tensor:
    """1 where the summed squared movement is at most `tol` times the mean variance, else 0."""
    distance = (moved - centroids).double().square().sum()
    return (distance <= tol * rows.spread / max(rows.dim, 1)).to(moved.dtype)


def means_of(
    sums: Tensor,
    counts: Tensor,
    centroids: Tensor,
    spherical: bool,
) -> tuple[Tensor, Tensor]:
    """Means of the clusters (K, D), and which clusters have rows (K,) bool; the others stay.

    Args:
        sums: (K, D), of each cluster's rows.
        counts: (K,), their total weights.
        centroids: (K, D), kept where a cluster has no rows.
        spherical: whether means get length one.
    """
    filled = counts > 0
    stay = centroids.to(sums)
    # 0 / tiny is 0: no NaN arises, not even in the quotients of empty clusters, which go unused.
    quotients = sums / counts.clamp_min(torch.finfo(counts.dtype).tiny)[:, None]
    means = torch.where(filled[:, None], quotients, stay)
    if spherical:
        # A direction that cancels out leaves no mean; its centroid stays.
        norms = torch.linalg.vector_norm(means, dim=1, keepdim=True)
        means = torch.where(norms > 1e-12, means / norms, stay)
    return means.to(centroids.dtype), filled


def _move(
    rows: Rows,
    packed: Tensor,
    centroids: Tensor,
    settings: Settings,
    generator: torch.Generator,
) -> Tensor:
    """Means of the clusters (K, D); those without rows are refilled as `settings.empty` says."""
    counts = packed[:, -1]
    moved, filled = means_of(packed[:, :-1], counts, centroids, rows.spherical)
    if settings.empty == "keep" or bool(filled.all()):
        return moved
    if settings.empty == "random":
        seed = int(torch.randint(2**62, (1,), generator=generator))
        moved[~filled] = rows.take(draw(rows.total, int((~filled).sum()), seed, rows.device))
    else:
        split(_split_step(rows), moved, counts.clone(), generator)
    return F.normalize(moved, dim=1) if rows.spherical else moved


def _split_step(rows: Rows) -> float:
    """Movement of a split centroid along every axis."""
    if rows.spherical:
        # The components of a row of length one have a root mean square of D^-1/2.
        return SPLIT_STEP * rows.dim**-0.5
    return SPLIT_STEP * (rows.spread / max(rows.dim, 1)) ** 0.5


def split(step: float, moved: Tensor, counts: Tensor, generator: torch.Generator) -> None:
    """Puts every empty cluster's centroid beside that of the heaviest cluster, in place.

    The next pass divides the heavy cluster's rows between the two.

    Args:
        step: movement along every axis, its sign drawn at random.
        moved: (K, D) centroids, changed.
        counts: (K,) weights of the clusters, changed.
        generator: of the signs.
    """
    # The heavy centroid itself stays where it is, so that no row gets further from its nearest
    # one: the objective cannot rise.
    for cluster in torch.nonzero(counts <= 0).flatten().tolist():
        heavy = int(torch.argmax(counts))
        signs = torch.randint(0, 2, (moved.shape[1],), generator=generator)
        signs = signs.mul_(2).sub_(1).to(moved)
        moved[cluster] = moved[heavy] + step * signs
        # Each has half from now on: further empty clusters may go to another heavy one.
        half = counts[heavy] / 2
        counts[cluster] = half
        counts[heavy] = half
