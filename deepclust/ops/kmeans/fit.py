"""`kmeans`: exact k-means of one problem, of rows spread over ranks, or of a batch of problems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from deepclust.ops.kmeans.assign import backend_for, bias_of, rows_at_a_time
from deepclust.ops.kmeans.batch import Solved, solve_all
from deepclust.ops.kmeans.init import initial_centroids, restart_seed
from deepclust.ops.kmeans.lloyd import Settings, lloyd
from deepclust.ops.kmeans.ranks import Ranks
from deepclust.ops.kmeans.rows import Rows
from deepclust.ops.kmeans.step import Assign
from deepclust.ops.precision import computed_in

if TYPE_CHECKING:
    import torch.distributed as dist

INITS = ("k-means++", "random", "k-means||")
EMPTIES = ("split", "keep", "random")


@dataclass(frozen=True)
class KMeansResult:
    """Result of k-means; all fields belong to the same centroids, those of the best restart."""

    centroids: Tensor
    """(…, K, D), float64 for rows that are float64 or whole numbers beyond 2^24, else float32."""
    labels: Tensor
    """(…, N) int64, the nearest centroid of every row of this rank."""
    inertia: Any
    """Sum of (weighted) squared distances over all ranks: a float, or a tensor (…) for a batch."""
    num_iters: int
    """Iterations of the best restart (the largest number in a batch)."""
    counts: Tensor
    """(…, K) int64, rows per cluster over all ranks."""
    num_empty: int = 0
    """Empty clusters met on the way, summed over iterations."""


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
    """Exact Lloyd k-means (Lloyd 1982) of rows, which may be spread over ranks.

    The N × K distances are never stored, except of small problems in a batch (16 MB at a time).

    Args:
        x: (N, D) or a batch of problems (…, N, D): tensor, NumPy array or memory map of any real
            dtype and layout, or an iterable of (n, D) chunks that can be read again and again.
            Half precision is computed in float32, whole numbers beyond 2^24 in float64.
        num_clusters: K, at most the number of rows of all ranks.
        init: "k-means++" (greedy, on a subsample), "k-means||" (Bahmani et al. 2012), "random"
            rows, or centroids (…, K, D).
        num_iters: most updates of the centroids; the labels of the result are assigned after the
            last one. With 0 and a given start, rows (any number of them) are only assigned.
        tol: stop when the centroids' summed squared movement is at most `tol` times the mean
            variance of a feature; 0 goes on to a fixed point.
        num_restarts: runs with different starts; the one of lowest inertia is returned.
        spherical: cosine similarity: rows count with length one, centroids have length one.
        empty: what becomes of an empty cluster's centroid: it moves beside the heaviest cluster's
            ("split"), stays ("keep"), or becomes a row drawn at random ("random").
        sample_weights: (N,) or (…, N), non-negative; None where all are one.
        chunk_size: rows compared with all centroids at one time; None suits the caches.
        seed: makes the result repeatable; the global random state is neither read nor changed.
        group: process group whose ranks hold the rows in rank order, `x` being this rank's (which
            may be none).
        backend: "auto" repeats bit by bit on the same machine and threads; or one of "torch" (any
            device), "numpy", "faiss" and "fastest" (processors; "fastest" times several products
            first and may differ in the last bits), "triton", "triton-tf32x3", "triton-tf32",
            "flash-kmeans" and "faiss" (CUDA; see `ops/kmeans/gpu.py`).
        on_iteration: called on every rank with the number of updates done; an exception from it
            ends the run.

    Raises:
        ValueError: names the argument, its value and what would be valid; rows with NaN or infinity
            are listed.
    """
    settings = Settings(num_iters, tol, num_restarts, empty, chunk_size, backend, on_iteration)
    if getattr(x, "ndim", 2) > 2:
        if group is not None:
            raise ValueError(
                f"x: a batch of problems, {tuple(x.shape)}, cannot be spread over ranks; give one"
                " at a time"
            )
        return _batch(x, num_clusters, init, spherical, sample_weights, seed, settings)
    rows = Rows(x, Ranks(group), weights=sample_weights, spherical=spherical)
    return _solve(rows, num_clusters, init, seed, settings)


def _batch(
    x: Any,
    num_clusters: int,
    init: Any,
    spherical: bool,
    weights: Any,
    seed: int,
    settings: Settings,
) -> KMeansResult:
    """k-means of every problem in x (…, N, D): small ones side by side, large ones one by one."""
    lead = tuple(x.shape[:-2])
    if 0 in lead:
        raise ValueError(f"x: expected at least one problem, got shape {tuple(x.shape)}")
    if (
        computed_in(x) == torch.float64
    ):  # one dtype for all problems, whichever of them hold large numbers
        x = x.double() if isinstance(x, Tensor) else x.astype(np.float64)

    def rows_of(index: tuple[int, ...]) -> Rows:
        some = None if weights is None else weights[index]
        return Rows(x[index], Ranks(), weights=some, spherical=spherical)

    def init_of(index: tuple[int, ...]) -> Any:
        return init if isinstance(init, str) else init[index]

    # The first problem stands for all in what is refused: settings, shapes, kinds of start.
    first = (0,) * len(lead)
    _check(rows_of(first), num_clusters, init_of(first), settings)
    results = solve_all(x, weights, num_clusters, init, spherical, seed, settings)
    if results is None:
        # A seed of its own for each, so that equal problems do not start alike; `solve_all` counts
        # in the same way.
        results = [
            _solve(rows_of(index), num_clusters, init_of(index), seed + number, settings)
            for number, index in enumerate(np.ndindex(*lead))
        ]

    def join(name: str) -> Tensor:
        parts = [torch.as_tensor(getattr(result, name)) for result in results]
        # Groups have an axis of problems already, single results have not.
        joined = torch.cat(parts) if isinstance(results[0], Solved) else torch.stack(parts)
        return joined.reshape(*lead, *joined.shape[1:])

    return KMeansResult(
        centroids=join("centroids"),
        labels=join("labels"),
        inertia=join("inertia"),
        counts=join("counts"),
        num_iters=int(join("num_iters").max()),
        num_empty=int(join("num_empty").sum()),
    )


def _solve(
    rows: Rows,
    num_clusters: int,
    init: Any,
    seed: int,
    settings: Settings,
) -> KMeansResult:
    """k-means of one problem: the best of all restarts."""
    start = _check(rows, num_clusters, init, settings)
    backend = backend_for(settings.backend, rows.device)

    def assign(centroids: Tensor) -> Assign:
        chunk_size = settings.chunk_size or rows_at_a_time(num_clusters, rows.dim, rows.device)
        return backend(centroids, bias_of(centroids, rows.spherical), chunk_size)

    runs = []
    # A given start would be the same in every restart.
    num_restarts = 1 if isinstance(start, Tensor) else settings.num_restarts
    for restart in range(num_restarts):
        stream = restart_seed(seed, restart)
        centroids = initial_centroids(rows, num_clusters, start, stream, backend)
        runs.append(lloyd(rows, centroids, assign, settings, stream))
    best = min(runs, key=lambda run: run.inertia)
    centroids = best.centroids
    if rows.shift is not None:
        centroids = centroids + rows.shift
    return KMeansResult(
        centroids, best.labels, best.inertia, best.num_iters, best.counts, best.num_empty
    )


def _check(rows: Rows, num_clusters: int, init: Any, settings: Settings) -> str | Tensor:
    """The start as a name or a tensor (K, D). Raises ValueError for arguments out of range."""
    # Rows may be fewer than centroids where they are only assigned to them.
    only_assign = settings.num_iters == 0 and not isinstance(init, str)
    if not 1 <= num_clusters <= rows.total and not only_assign:
        raise ValueError(
            f"num_clusters={num_clusters}: must be at least 1 and at most the number of rows,"
            f" {rows.total}"
        )
    if settings.num_iters < 0 or settings.num_restarts < 1 or not settings.tol >= 0:
        raise ValueError(
            f"num_iters={settings.num_iters}, num_restarts={settings.num_restarts}, "
            f"tol={settings.tol}: must be at least 0, 1 and 0"
        )
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
        raise ValueError(
            f"init: expected shape ({num_clusters}, {rows.dim}), got {tuple(start.shape)}"
        )
    if not bool(torch.isfinite(start).all()):
        raise ValueError("init: the given centroids hold NaN or infinity")
    return start
