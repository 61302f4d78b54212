"""`kmeans`: the one k-means of the house."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from deepclust.ops.kmeans.assign import backend_for, rows_at_a_time
from deepclust.ops.kmeans.init import initial_centroids
from deepclust.ops.kmeans.lloyd import Run, Settings, lloyd
from deepclust.ops.kmeans.ranks import Ranks
from deepclust.ops.kmeans.rows import Rows

if TYPE_CHECKING:
    import torch.distributed as dist

INITS = ("k-means++", "random", "k-means||")
EMPTIES = ("split", "keep", "random")


@dataclass(frozen=True)
class KMeansResult:
    """What k-means found; every part belongs to the same centroids.

    Attributes:
        centroids: (…, K, D), float64 for float64 rows, else float32.
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
    """Exact Lloyd k-means; the N × K distances are never stored.

    Args:
        x: (N, D) or a batch of problems (…, N, D): tensor, NumPy array or memory map of any real dtype and layout, or an
            iterable of (n, D) chunks that can be read again and again. Half precision is computed in float32.
        num_clusters: K, at most the number of rows of all ranks.
        init: "k-means++" (greedy, on a subsample), "k-means||" (Bahmani et al. 2012), "random" rows, or (…, K, D).
        num_iters: most updates of the centroids; the labels of the result are assigned after the last one.
        tol: stop when the centroids' summed squared movement is at most `tol` times the mean variance of a feature.
        num_restarts: runs with different starts; the one of lowest inertia is returned.
        spherical: cosine similarity: rows count with length one, centroids have length one.
        empty: an empty cluster's centroid goes beside the heaviest cluster's ("split"), stays ("keep"), or becomes a
            row drawn at random ("random").
        sample_weights: (N,) non-negative weights.
        chunk_size: rows compared with all centroids at one time; chosen to suit the caches when None.
        seed: makes the result repeatable; the global random state is neither read nor changed.
        group: process group whose ranks hold the rows in rank order, `x` being this rank's (it may have none).
        backend: "auto", or one of "torch" (any device), "numpy" and "faiss" (processors).
        on_iteration: called on every rank with the number of updates done; an exception from it ends the run.

    Raises:
        ValueError: names the argument, its value and what would be valid; rows with NaN or infinity are listed.
    """
    if getattr(x, "ndim", 2) > 2:
        raise ValueError(f"x: expected shape (N, D), got {tuple(x.shape)}")
    ranks = Ranks(group)
    rows = Rows(x, ranks, weights=sample_weights, spherical=spherical)
    start = _check(rows, num_clusters, init, num_iters, tol, num_restarts, empty)
    chunk = chunk_size or rows_at_a_time(num_clusters, rows.dim)
    assign = backend_for(backend, rows.device)
    runs = []
    for restart in range(1 if isinstance(start, Tensor) else num_restarts):
        stream = int(np.random.SeedSequence([seed, restart]).generate_state(1)[0])
        settings = Settings(num_iters, tol, empty, stream, chunk, assign, on_iteration)
        runs.append(lloyd(rows, initial_centroids(rows, num_clusters, start, stream, assign), settings))
    return _result(rows, min(runs, key=lambda run: run.inertia))


def _result(rows: Rows, run: Run) -> KMeansResult:
    centroids = run.centroids if rows.shift is None else run.centroids + rows.shift
    return KMeansResult(centroids, run.labels, run.inertia, run.num_iters, run.counts, run.num_empty)


def _check(
    rows: Rows, num_clusters: int, init: Any, num_iters: int, tol: float, num_restarts: int, empty: str
) -> str | Tensor:
    """The start as a name or a tensor; refuses arguments that make no sense."""
    if not 1 <= num_clusters <= rows.total:
        raise ValueError(
            f"num_clusters={num_clusters}: must be at least 1 and at most the number of rows, {rows.total}"
        )
    if num_iters < 0 or num_restarts < 1 or not tol >= 0:
        raise ValueError(f"num_iters={num_iters}, num_restarts={num_restarts}, tol={tol}: must be >= 0, >= 1 and >= 0")
    if empty not in EMPTIES:
        raise ValueError(f"empty={empty!r}: must be one of {', '.join(EMPTIES)}")
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
