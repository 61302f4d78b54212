"""Spectral clustering of features on a nearest-neighbour graph (Ng, Jordan, Weiss 2001)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from deepclust.ops import kmeans
from deepclust.ops.collectives import gather_rows
from deepclust.ops.neighbors import knn


def spectral_clusters(
    features: Tensor,
    num_clusters: int,
    *,
    num_neighbors: int = 20,
    extra_components: int = 2,
    seed: int = 0,
    group: Any = None,
) -> Tensor:
    """Clusters of rows that are connected by a k-nearest-neighbour graph.

    features: (n, D), this rank's rows, compared by cosine. The embedding has `extra_components` more eigenvectors than
    clusters (the paper takes none more): they keep clusters apart that a few outlying groups would otherwise push out
    of the leading K. Returns labels (n,) int64. All rows of all ranks are gathered; rank 0 decides.
    """
    everyone, offset = gather_rows(F.normalize(features.float(), dim=1), group)
    labels = torch.zeros(len(everyone), dtype=torch.int64, device=features.device)
    if group is None or dist.get_rank(group) == 0:
        embedding = spectral_embedding(everyone, num_clusters + extra_components, num_neighbors=num_neighbors)
        labels.copy_(kmeans(embedding, num_clusters, num_restarts=20, num_iters=100, seed=seed).labels)
    if group is not None:
        dist.broadcast(labels, src=dist.get_global_rank(group, 0), group=group)
    return labels[offset : offset + len(features)]


def spectral_embedding(features: Tensor, num_components: int, *, num_neighbors: int = 20) -> Tensor:
    """(N, m) unit rows: leading eigenvectors of the normalised adjacency D^-1/2 W D^-1/2 of the symmetrised graph.

    features: (N, D) unit rows. W is the mean of the graph (self-loops included) and its transpose. m is cut to N - 2.
    """
    _, vectors = spectral_components(features, num_components, num_neighbors=num_neighbors)
    return F.normalize(vectors, dim=1).float().to(features.device)


def spectral_components(features: Tensor, num_components: int, *, num_neighbors: int = 20) -> tuple[Tensor, Tensor]:
    """Eigenvalues (m,), largest first, and eigenvectors (N, m), in columns of length one; float64 on the processor.

    They are those of `spectral_embedding`. The first columns are those of any smaller number of components: one
    decomposition serves all numbers of clusters.
    """
    import scipy.sparse as sparse
    from scipy.sparse.linalg import eigsh

    num = len(features)
    k = min(num_neighbors, num - 1)
    _, neighbors = knn(features, features, k=k, exclude_self=True)
    columns = torch.cat([torch.arange(num, device=neighbors.device)[:, None], neighbors], dim=1).cpu().numpy()
    starts = np.arange(0, columns.size + 1, k + 1)
    graph = sparse.csr_matrix((np.ones(columns.size), columns.ravel(), starts), shape=(num, num))
    graph = 0.5 * (graph + graph.T)
    scale = sparse.diags(np.asarray(graph.sum(axis=1)).ravel() ** -0.5)
    values, vectors = eigsh(scale @ graph @ scale, k=max(1, min(num_components, num - 2)), which="LA", v0=np.ones(num))
    order = np.argsort(-values)
    return torch.from_numpy(values[order]), torch.from_numpy(np.ascontiguousarray(vectors[:, order]))
