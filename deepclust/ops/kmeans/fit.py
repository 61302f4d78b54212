"""`kmeans`: the one k-means of the house."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from deepclust.ops.kmeans.assign import Assign, backend_for, bias_of, rows_at_a_time
from deepclust.ops.kmeans.batch import Solved, solve_all
from deepclust.ops.kmeans.init import initial_centroids
from deepclust.ops.kmeans.lloyd import Settings, lloyd
from deepclust.ops.kmeans.ranks import Ranks
from deepclust.ops.kmeans.rows import Rows
from deepclust.ops.precision import computed_in

if TYPE_CHECKING:
    import torch.distributed as dist

INITS = ("k-means++", "random", "k-means||")
EMPTIES = ("split", "keep", "random")


@dataclass(frozen=True)
class KMeansResult:
    """What k-means found; every part belongs to the same centroids.

    Attributes:
        centroids: (…, K, D), float64 for rows that are float64 or whole numbers beyond 2^24, else float32.
        labels: (…, N) int64, the nearest centroid of every row of this rank.
        inertia: sum of (weighted) squared distances over all ranks; a tensor (…) for a batch of problems.
        num_iters: iterations of the best restart (the largest in a batch).
        counts: (…, K) int64, rows per cluster over all ranks.
        num_empty: empty clusters met on the way, summed over iterations.
    """

    centroids: Tensor
    labels: Tensor
    inertia: Any
    num_iters: int
    counts: Tensor
    num_empty: int = 0


def kmeans(
    x: Any,
    num_clusters: int,
    *,
    init: Any = "k-means++",
    num_iters: int = 25,
    tol: float = 0.0,
    num_restarts: int = 1,
    spherical: bool = False,
    empty: str = "split",
    sample_weights: Any = None,
    chunk_size: int | None = None,
    seed: int = 0,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    on_iteration: Callable[[int], None] | None = None,
) -> KMeansResult:
    """Exact Lloyd k-means; the N × K distances are never stored, except of small problems in a batch (16 MB at a time).

    Args:
        x: (N, D) or a batch of problems (…, N, D): tensor, NumPy array or memory map of any real dtype and layout, or
            an iterable of (n, D) chunks that can be read again and again. Half precision is computed in float32, whole
            numbers beyond 2^24 in float64.
        num_clusters: K, at most the number of rows of all ranks.
        init: "k-means++" (greedy, on a subsample), "k-means||" (Bahmani et al. 2012), "random" rows, or (…, K, D).
        num_iters: most updates of the centroids; the labels of the result are assigned after the last one. With 0 and
            a given start, rows (any number of them) are only assigned.
        tol: stop when the centroids' summed squared movement is at most `tol` times the mean variance of a feature.
        num_restarts: runs with different starts; the one of lowest inertia is returned.
        spherical: cosine similarity: rows count with length one, centroids have length one.
        empty: an empty cluster's centroid goes beside the heaviest cluster's ("split"), stays ("keep"), or becomes a
            row drawn at random ("random").
        sample_weights: (N,) non-negative weights.
        chunk_size: rows compared with all centroids at one time; chosen to suit the caches when None.
        seed: makes the result repeatable; the global random state is neither read nor changed.
        group: process group whose ranks hold the rows in rank order, `x` being this rank's (it may have none).
        backend: "auto" repeats bit by bit on the same machine and threads; or one of "torch" (any device), "numpy",
            "faiss" and "fastest" (processors; "fastest" times several products first and may differ in the last bits),
            "triton", "triton-tf32x3", "triton-tf32", "flash-kmeans" and "faiss" (CUDA; see `ops/kmeans/gpu.py`).
        on_iteration: called on every rank with the number of updates done; an exception from it ends the run.

    Raises:
        ValueError: names the argument, its value and what would be valid; rows with NaN or infinity are listed.
    """
    settings = Settings(num_iters, tol, num_restarts, empty, chunk_size, backend, on_iteration)
    if getattr(x, "ndim", 2) > 2:
        if group is not None:
            raise ValueError(
                f"x: a batch of problems, {tuple(x.shape)}, cannot be spread over ranks; give one at a time"
            )
        return _batch(x, num_clusters, init, spherical, sample_weights, seed, settings)
    rows = Rows(x, Ranks(group), weights=sample_weights, spherical=spherical)
    return _solve(rows, num_clusters, init, seed, settings)


def _batch(
    x: Any, num_clusters: int, init: Any, spherical: bool, weights: Any, seed: int, settings: Settings
) -> KMeansResult:
    """Small problems of a (…, N, D) batch side by side, large ones one by one; each has its own random numbers."""
    lead = tuple(x.shape[:-2])
    if 0 in lead:
        raise ValueError(f"x: expected at least one problem, got shape {tuple(x.shape)}")
    if computed_in(x) == torch.float64:  # one dtype for all problems, whichever of them hold large numbers
        x = x.double() if isinstance(x, Tensor) else x.astype(np.float64)

    def rows_of(index: tuple[int, ...]) -> Rows:
        return Rows(x[index], Ranks(), weights=None if weights is None else weights[index], spherical=spherical)

    def init_of(index: tuple[int, ...]) -> Any:
        return init if isinstance(init, str) else init[index]

    first = (0,) * len(lead)
    _check(rows_of(first), num_clusters, init_of(first), settings)
    found = solve_all(x, weights, num_clusters, init, spherical, seed, settings)
    if found is None:
        found = [
            _solve(rows_of(index), num_clusters, init_of(index), seed + number, settings)
            for number, index in enumerate(np.ndindex(*lead))
        ]

    def join(name: str) -> Tensor:
        parts = [torch.as_tensor(getattr(one, name)) for one in found]
        parts = torch.cat(parts) if isinstance(found[0], Solved) else torch.stack(parts)
        return parts.reshape(*lead, *parts.shape[1:])

    tensors = {name: join(name) for name in ("centroids", "labels", "inertia", "counts")}
    return KMeansResult(**tensors, num_iters=int(join("num_iters").max()), num_empty=int(join("num_empty").sum()))


def _solve(rows: Rows, num_clusters: int, init: Any, seed: int, settings: Settings) -> KMeansResult:
    """One problem: every restart, and the best of them."""
    start = _check(rows, num_clusters, init, settings)
    backend = backend_for(settings.backend, rows.device)

    def assign(centroids: Tensor) -> Assign:
        chunk_size = settings.chunk_size or rows_at_a_time(num_clusters, rows.dim, rows.device)
        return backend(centroids, bias_of(centroids, rows.spherical), chunk_size)

    runs = []
    for restart in range(1 if isinstance(start, Tensor) else settings.num_restarts):
        stream = int(np.random.SeedSequence([seed, restart]).generate_state(1)[0])
        centroids = initial_centroids(rows, num_clusters, start, stream, backend)
        runs.append(lloyd(rows, centroids, assign, settings, stream))
    best = min(runs, key=lambda run: run.inertia)
    centroids = best.centroids if rows.shift is None else best.centroids + rows.shift
    return KMeansResult(centroids, best.labels, best.inertia, best.num_iters, best.counts, best.num_empty)


def _check(rows: Rows, num_clusters: int, init: Any, settings: Settings) -> str | Tensor:
    """The start as a name or a tensor; refuses arguments that make no sense."""
    only_assign = settings.num_iters == 0 and not isinstance(init, str)
    if not 1 <= num_clusters <= rows.total and not only_assign:
        raise ValueError(
            f"num_clusters={num_clusters}: must be at least 1 and at most the number of rows, {rows.total}"
        )
    if settings.num_iters < 0 or settings.num_restarts < 1 or not settings.tol >= 0:
        given = f"num_iters={settings.num_iters}, num_restarts={settings.num_restarts}, tol={settings.tol}"
        raise ValueError(f"{given}: must be at least 0, 1 and 0")
    if settings.chunk_size is not None and settings.chunk_size < 1:
        raise ValueError(f"chunk_size={settings.chunk_size}: must be at least 1, or None")
    if settings.empty not in EMPTIES:
        raise ValueError(f"empty={settings.empty!r}: must be one of {', '.join(EMPTIES)}")
    if isinstance(init, str):
        if init not in INITS:
            raise ValueError(f"init={init!r}: must be one of {', '.join(INITS)} or a (K, D) tensor")
        return init
    start = torch.as_tensor(init).detach()
    if start.shape != (num_clusters, rows.dim):
        raise ValueError(f"init: expected shape ({num_clusters}, {rows.dim}), got {tuple(start.shape)}")
    if not bool(torch.isfinite(start).all()):
        raise ValueError("init: the given centroids hold NaN or infinity")
    return start
