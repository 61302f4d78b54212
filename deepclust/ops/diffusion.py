"""Clusters of the random walk on neighbour graphs: what several graphs agree on.

Spectral clustering keeps as many eigenvectors of the graph as there are clusters, all alike, and hangs on that number:
one more or less is another clustering. Here all of the first 2 K count, by how slowly the walk forgets them: eigenvalue
l weighs (1 - l)^-power. The power 1/2 makes distances those of the walk's commute time (Fouss et al. 2007), 1 would
make them the biharmonic distance (Lipman et al. 2010). k-means of such embeddings of four graphs, at three powers, vote
after their clusters are matched one-to-one; and a walk of a few steps lets neighbours have a say. Powers, number
of components and graphs were settled with labels of clothing photos, digits and Fashion-MNIST in view;
`scripts/compare_clusterers.py` measures.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.ops import kmeans
from deepclust.ops.agreement import normalized_mutual_information
from deepclust.ops.neighbors import knn
from deepclust.ops.precision import plain
from deepclust.ops.spectral import graph_components, neighbor_graph, on_first_rank

NEIGHBORS = (10, 15, 20, 30)
"""Of the four graphs."""
SMOOTHING = 20
"""Neighbours in the graph on which votes are smoothed."""
POWERS = (0.5, 0.6, 0.75)
CLOSE = 1e-3
"""What an eigenvalue is at least below 1: islands of a graph are far apart, not infinitely far."""
STEPS, RESTART = 10, 0.5


class Diffusion:
    """The embeddings of rows (N, D), compared by cosine, from which any number of clusters up to `largest` is found.

    Neighbours and eigenvectors cost most and are computed once, float64 on the processor; then a number of clusters
    takes a few runs of k-means on 2 K columns. Groups of fewer rows than a graph has neighbours are no islands in it.
    Raises ValueError where `largest` is not in 1..N-1.
    """

    def __init__(self, features: Tensor, largest: int) -> None:
        num = len(features)
        if not 1 <= largest < num:
            raise ValueError(f"{largest} clusters: choose from 1 to {num - 1}, there are {num} rows")
        x = F.normalize(plain(features), dim=1)
        near = knn(x, x, k=min(max(NEIGHBORS), num - 1), exclude_self=True)[1].cpu().numpy()
        self.largest = largest
        graphs = {k: neighbor_graph(near[:, :k], shared=True) for k in sorted({min(k, num - 1) for k in NEIGHBORS})}
        self.parts = [part for graph in graphs.values() for part in _weighted(graph, 2 * largest + 1)]
        smooth = graphs[min(SMOOTHING, num - 1)]
        self.walk: Any = smooth.multiply(1 / np.asarray(smooth.sum(axis=1))).tocsr()

    def votes(self, num_clusters: int, *, seed: int = 0) -> Tensor:
        """(N, K) float64 on the processor: the share of the votes that each cluster has; rows sum to 1."""
        if not 1 <= num_clusters <= self.largest:
            raise ValueError(f"{num_clusters} clusters: choose from 1 to {self.largest}, for which this was made")
        found = [
            kmeans(
                F.normalize(part[:, : 2 * num_clusters + 1], dim=1).float(),
                num_clusters,
                num_restarts=5,
                num_iters=100,
                seed=seed + number,
            ).labels
            for number, part in enumerate(self.parts)
        ]
        votes = smooth = agreed([labels.numpy() for labels in found], num_clusters)
        for _ in range(STEPS):
            smooth = (1 - RESTART) * (self.walk @ smooth) + RESTART * votes
        return torch.from_numpy(_all_used(smooth))


def diffusion_clusters(features: Tensor, num_clusters: int, *, seed: int = 0, group: Any = None) -> Tensor:
    """Labels (n,) int64 of this rank's rows (n, D), on their device: the cluster with most votes. See `Diffusion`.

    All rows of all ranks are gathered; rank 0 decides.
    """

    def labels_of(rows: Tensor) -> Tensor:
        return Diffusion(rows, num_clusters).votes(num_clusters, seed=seed).argmax(dim=1)

    return on_first_rank(labels_of, plain(features), group)


def agreed(clusterings: list[np.ndarray], num_clusters: int, *, rounds: int = 5) -> np.ndarray:
    """(N, K): the share of clusterings (N,) that put a row into a cluster, after their clusters are matched.

    They are matched one-to-one (Hungarian method) to the one that shares most information with the others, then to the
    votes, until those stay or `rounds` are over: voting as Dudoit and Fridlyand (2003) have it.
    """
    ones = [np.eye(num_clusters)[labels] for labels in clusterings]
    tensors = [torch.from_numpy(labels) for labels in clusterings]
    shared = [sum(float(normalized_mutual_information(one, other)) for other in tensors) for one in tensors]
    votes = ones[int(np.argmax(shared))]
    for _ in range(rounds):
        before, votes = votes, np.mean([_matched(each, votes) for each in ones], axis=0)
        if np.array_equal(votes, before):
            break
    return votes


def _matched(ones: np.ndarray, votes: np.ndarray) -> np.ndarray:
    """Columns (N, K) in the order in which they overlap most with those of the votes."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(votes.T @ ones, maximize=True)
    order = np.empty(len(rows), dtype=np.int64)
    order[rows] = columns
    return ones[:, order]


def _weighted(graph: Any, num_components: int) -> list[Tensor]:
    """(N, m) eigenvectors by their weight, for each power; the constant one, which parts nothing, is taken out."""
    values, vectors = graph_components(graph, num_components)
    constant = torch.from_numpy(np.asarray(graph.sum(axis=1)).ravel() ** 0.5)
    constant = constant / constant.norm()
    vectors = vectors - constant[:, None] * (constant @ vectors)
    return [vectors * (1 - values + CLOSE).clamp_min(CLOSE) ** -power for power in POWERS]


def _all_used(votes: np.ndarray) -> np.ndarray:
    """Votes (N, K); a cluster for which no row is gets all votes of the row that is most for it, one it can spare."""
    winners = votes.argmax(axis=1)
    sizes = np.bincount(winners, minlength=votes.shape[1])
    for cluster in np.flatnonzero(sizes == 0):
        spare = np.flatnonzero(sizes[winners] > 1)
        row = spare[votes[spare, cluster].argmax()]
        sizes[winners[row]] -= 1
        sizes[cluster], winners[row] = 1, cluster
        votes[row] = np.eye(votes.shape[1])[cluster]
    return votes
