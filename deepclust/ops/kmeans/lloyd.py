"""Lloyd's iterations: assign, average, mend empty clusters, stop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from deepclust.ops.kmeans.assign import Assign
from deepclust.ops.kmeans.bounds import GroupBounds
from deepclust.ops.kmeans.filter import Filter
from deepclust.ops.kmeans.gpu import sums_for
from deepclust.ops.kmeans.ranks import draw
from deepclust.ops.kmeans.rows import Rows
from deepclust.ops.kmeans.step import AssignAt, final_step, lloyd_step, segment_sums
from deepclust.ops.kmeans.sums import RunningSums

Assigner = Callable[[Tensor], Assign]
"""Centroids (K, D) → what finds the nearest of them."""

log = logging.getLogger("deepclust")


@dataclass(frozen=True)
class Settings:
    """What the loop obeys; see `kmeans` for the meaning."""

    num_iters: int
    tol: float
    num_restarts: int
    empty: str
    chunk_size: int | None
    backend: str
    on_iteration: Callable[[int], None] | None


@dataclass
class Run:
    """One finished run: `labels` are the nearest of `centroids`, `inertia` and `counts` belong to both."""

    centroids: Tensor
    labels: Tensor
    inertia: float
    num_iters: int
    counts: Tensor
    num_empty: int


def lloyd(rows: Rows, centroids: Tensor, assign: Assigner, settings: Settings, seed: int) -> Run:
    """Iterates from `centroids` (K, D) until they move by no more than the tolerance or the iterations are used up."""
    labels = torch.zeros(rows.num, dtype=torch.int64, device=rows.device)
    search = _search(rows, assign, len(centroids), settings.backend)
    step = _stepper(rows, len(centroids), settings.backend)
    if rows.spherical:
        centroids = F.normalize(centroids, dim=1)
    generator = torch.Generator().manual_seed(seed)
    iteration, num_empty, settled, still = 0, 0, False, False
    while iteration < settings.num_iters and not settled:
        packed = step(search(centroids), labels)
        iteration += 1
        num_empty += int((packed[:, -1] <= 0).sum())
        moved = _move(rows, packed, centroids, settings, generator)
        # One tensor carries rank 0's decision and its centroids.
        decision = torch.cat([moved.flatten(), _travelled(rows, moved, centroids, settings.tol).reshape(1)])
        rows.ranks.broadcast(decision)
        still = torch.equal(decision[:-1].view_as(centroids), centroids)
        centroids, settled = decision[:-1].view_as(centroids).clone(), bool(decision[-1] == 1)
        if settings.on_iteration is not None:
            settings.on_iteration(iteration)
    # Centroids that did not move at all already own their labels.
    last = None if still else search(centroids)
    if isinstance(step, RunningSums) and iteration:
        inertia, counts = step.finish(last, centroids, labels)
    else:
        inertia, counts = final_step(rows, last, centroids, labels)
    if num_empty:
        log.info("k-means: %d empty clusters met in %d iterations (empty=%s)", num_empty, iteration, settings.empty)
    return Run(centroids, labels, inertia, iteration, counts, num_empty)


def _stepper(rows: Rows, num_clusters: int, backend: str) -> Callable[[AssignAt, Tensor], Tensor]:
    """`lloyd_step`, on processors with a memory for what stays the same from pass to pass."""
    sums = sums_for(backend, rows.device)
    if rows.device.type == "cpu" and sums is segment_sums:
        return RunningSums(rows, num_clusters)
    return lambda assign, labels: lloyd_step(rows, assign, num_clusters, labels, sums)


def _search(rows: Rows, assign: Assigner, num_clusters: int, backend: str) -> Callable[[Tensor], AssignAt]:
    """Full search, with the filter or group bounds around it where these can win."""
    quick = Filter(rows) if backend == "auto" and Filter.worth_trying(rows, num_clusters) else None
    bounds = GroupBounds(rows) if GroupBounds.worth_trying(rows, num_clusters) else None

    def search(centroids: Tensor) -> AssignAt:
        find = assign(centroids)

        def full(start: int, block: Tensor, part: Tensor) -> None:
            find(block, part)

        if quick is not None:
            quick.begin(centroids, find)
        every = full if quick is None else quick.assign
        if bounds is None:
            return every
        bounds.begin(centroids, every)
        return bounds.assign

    return search


def _travelled(rows: Rows, moved: Tensor, centroids: Tensor, tol: float) -> Tensor:
    """1 where the centroids moved, in all, by no more than `tol` times the mean variance of a feature, else 0."""
    distance = (moved - centroids).double().square().sum()
    return (distance <= tol * rows.spread / max(rows.dim, 1)).to(moved.dtype)


def means_of(sums: Tensor, counts: Tensor, centroids: Tensor, spherical: bool) -> tuple[Tensor, Tensor]:
    """Means of the clusters (K, D) from their sums and counts, and which clusters have rows; others stay."""
    filled, stay = counts > 0, centroids.to(sums)
    means = torch.where(filled[:, None], sums / counts.clamp_min(torch.finfo(counts.dtype).tiny)[:, None], stay)
    if spherical:
        # A direction that cancels out leaves no mean; its centroid stays.
        norms = torch.linalg.vector_norm(means, dim=1, keepdim=True)
        means = torch.where(norms > 1e-12, means / norms, stay)
    return means.to(centroids.dtype), filled


def _move(rows: Rows, packed: Tensor, centroids: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """Means of the clusters (K, D); a cluster without rows is mended as `settings.empty` says."""
    counts = packed[:, -1]
    moved, filled = means_of(packed[:, :-1], counts, centroids, rows.spherical)
    if settings.empty == "keep" or bool(filled.all()):
        return moved
    if settings.empty == "random":
        seed = int(torch.randint(2**62, (1,), generator=generator))
        moved[~filled] = rows.take(draw(rows.total, int((~filled).sum()), seed, rows.device))
    else:
        step = 2.0**-5 * (rows.spread / max(rows.dim, 1)) ** 0.5 if not rows.spherical else 2.0**-5 * rows.dim**-0.5
        split(step, moved, counts.clone(), generator)
    return F.normalize(moved, dim=1) if rows.spherical else moved


def split(step: float, moved: Tensor, counts: Tensor, generator: torch.Generator) -> None:
    """Puts every empty cluster's centroid `step` beside the heaviest one's, in place; the next pass shares its rows.

    The heavy centroid stays where it is, so no row gets further from its nearest one: the objective cannot rise.
    """
    for cluster in torch.nonzero(counts <= 0).flatten().tolist():
        heavy = int(torch.argmax(counts))
        signs = torch.randint(0, 2, (moved.shape[1],), generator=generator).mul_(2).sub_(1).to(moved)
        moved[cluster] = moved[heavy] + step * signs
        counts[cluster] = counts[heavy] = counts[heavy] / 2
