"""Spectral clustering of features on a nearest-neighbour graph (Ng, Jordan, Weiss 2001)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from deepclust.ops import kmeans
from deepclust.ops.collectives import broadcast, gather_rows
from deepclust.ops.eigen import leading
from deepclust.ops.neighbors import knn
from deepclust.ops.precision import plain

CHUNK = 2048
"""Rows whose shared neighbours are counted at a time."""


def spectral_clusters(
    features: Tensor,
    num_clusters: int,
    *,
    num_neighbors: int = 20,
    extra_components: int = 2,
    shared: bool = False,
    seed: int = 0,
    group: Any = None,
) -> Tensor:
    """Clusters of rows that are connected by a k-nearest-neighbour graph.

    features: (n, D), this rank's rows, compared by cosine. The embedding has `extra_components`
    more eigenvectors than clusters (the paper takes none more): they keep clusters apart that a few
    outlying groups would otherwise push out of the leading K. shared: edges weigh as
    `neighbor_graph` says. Returns labels (n,) int64. All rows of all ranks are gathered; rank 0
    decides.
    """

    def labels_of(rows: Tensor) -> Tensor:
        size = num_clusters + extra_components
        embedding = spectral_embedding(rows, size, num_neighbors=num_neighbors, shared=shared)
        return kmeans(embedding, num_clusters, num_restarts=20, num_iters=100, seed=seed).labels

    return on_first_rank(labels_of, F.normalize(plain(features), dim=1), group)


def on_first_rank(labels_of: Callable[[Tensor], Tensor], rows: Tensor, group: Any = None) -> Tensor:
    """Labels (n,) int64 of this rank's rows (n, D), of what rank 0 finds for all (N, D)
    together."""
    everyone, offset = gather_rows(rows, group)
    labels = torch.zeros(len(everyone), dtype=torch.int64, device=rows.device)
    if group is None or dist.get_rank(group) == 0:
        labels.copy_(labels_of(everyone))
    broadcast(labels, 0, group)
    return labels[offset : offset + len(rows)]


def spectral_embedding(
    features: Tensor, num_components: int, *, num_neighbors: int = 20, shared: bool = False
) -> Tensor:
    """(N, m) unit rows: leading eigenvectors of the normalised adjacency D^-1/2 W D^-1/2 of the
    symmetrised graph.

    features: (N, D) unit rows. W is the `neighbor_graph`. m is cut to N - 2.
    """
    _, vectors = spectral_components(
        features, num_components, num_neighbors=num_neighbors, shared=shared
    )
    return F.normalize(vectors, dim=1).float().to(features.device)


def spectral_components(
    features: Tensor, num_components: int, *, num_neighbors: int = 20, shared: bool = False
) -> tuple[Tensor, Tensor]:
    """Eigenvalues (m,), largest first, and eigenvectors (N, m), in columns of length one; float64
    on the processor.

    They are those of `spectral_embedding`. The first columns are those of any smaller number of
    components: one decomposition serves all numbers of clusters. shared: edges weigh as
    `neighbor_graph` says.
    """
    k = min(num_neighbors, len(features) - 1)
    _, neighbors = knn(features, features, k=k, exclude_self=True)
    return graph_components(neighbor_graph(neighbors.cpu().numpy(), shared=shared), num_components)


def neighbor_graph(neighbors: np.ndarray, *, shared: bool = False) -> Any:
    """Sparse symmetric (N, N) adjacency from the indices (N, k) of each row's nearest others.

    All rows have a self-loop of weight 1. An edge weighs 1 where both are neighbours of each other,
    else 0.5; or where `shared`, the share of the neighbours of either that are neighbours of both,
    everyone its own first (Jaccard's
    index, as PhenoGraph has it: Levine et al. 2015): bridges between groups weigh little.
    """
    import scipy.sparse as sparse

    num, k = neighbors.shape
    columns = np.concatenate([np.arange(num)[:, None], neighbors], axis=1)
    starts = np.arange(0, columns.size + 1, k + 1)
    graph = sparse.csr_matrix((np.ones(columns.size), columns.ravel(), starts), shape=(num, num))
    if not shared:
        return 0.5 * (graph + graph.T)
    linked, turned, parts = graph.maximum(graph.T).tocsr(), graph.T.tocsr(), []
    for start in range(0, num, CHUNK):
        common = (
            (graph[start : start + CHUNK] @ turned).multiply(linked[start : start + CHUNK]).tocsr()
        )
        common.data /= 2 * (k + 1) - common.data
        parts.append(common)
    return sparse.vstack(parts, format="csr")


def graph_components(graph: Any, num_components: int) -> tuple[Tensor, Tensor]:
    """What `spectral_components` gives, of a sparse symmetric adjacency (N, N) without empty
    rows."""
    import scipy.sparse as sparse

    degrees = np.asarray(graph.sum(axis=1)).ravel()
    scale = sparse.diags(degrees**-0.5)
    size = max(1, min(num_components, len(degrees) - 2))
    values, vectors = _leading(scale @ graph @ scale, degrees, size)
    return torch.from_numpy(values), torch.from_numpy(np.ascontiguousarray(vectors))


def _leading(
    matrix: Any, degrees: np.ndarray, num_components: int
) -> tuple[np.ndarray, np.ndarray]:
    """Leading eigenvalues and vectors of a normalised adjacency (N, N), sparse.

    Of a graph in pieces the eigenvalue 1 comes once for each, of which a Krylov space from one
    start may miss some. So pieces, largest first, give their known vectors, and the others are
    sought with those out of the way, at -1.
    """
    from scipy.sparse.csgraph import connected_components
    from scipy.sparse.linalg import aslinearoperator

    num = len(degrees)
    pieces, piece_of = connected_components(matrix, directed=False)
    if pieces == 1:
        return leading(matrix, num_components, np.ones(num))
    chosen = np.argsort(-np.bincount(piece_of), kind="stable")[:num_components]
    known = np.sqrt(degrees)[:, None] * (piece_of[:, None] == chosen)
    known /= np.linalg.norm(known, axis=0)
    rest = num_components - len(chosen)
    if not rest:
        return np.ones(num_components), known
    found: Any = aslinearoperator(known)
    operator = aslinearoperator(matrix) - 2 * (found @ found.T)
    start = np.random.default_rng(0).normal(size=num)
    values, vectors = leading(operator, rest, start - known @ (known.T @ start))
    return np.append(np.ones(len(chosen)), values), np.hstack([known, vectors])
