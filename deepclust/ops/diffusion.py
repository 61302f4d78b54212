"""Clusters of the random walk on neighbour graphs: what several graphs agree on.

Spectral clustering keeps as many eigenvectors of the graph as there are clusters, all with the same
weight, and depends on that number: one more or less gives another clustering. Here all of the first
2 K count, by how slowly the walk forgets them: eigenvalue l weighs (1 - l)^-power. The power 1/2
makes distances those of the walk's commute time (Fouss et al. 2007), 1 would make them the
biharmonic distance (Lipman et al. 2010).

    four neighbour graphs -> eigenvectors, weighted by three powers each -> twelve runs of k-means
    -> clusters matched one-to-one -> votes -> votes smoothed by a walk of a few steps

Powers, number of components and graphs were settled with labels of clothing photos, digits and
Fashion-MNIST in view; `benchmarks/quality/clusterers.py` measures.
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
"""Neighbours of each row in the four graphs."""
SMOOTHING = 20
"""Neighbours in the graph on which votes are smoothed."""
POWERS = (0.5, 0.6, 0.75)
"""Exponents of the eigenvectors' weights."""
CLOSE = 1e-3
"""Least distance of an eigenvalue from 1: islands of a graph are far apart, not infinitely far."""
STEPS = 10
"""Steps of the walk that smooths votes."""
RESTART = 0.5
"""Probability of the walk, at each step, to begin anew at its row."""
MATCHING_ROUNDS = 5
"""Most rounds in which clusters are matched to the votes."""


class Diffusion:
    """Embeddings of rows (N, D) that give clusterings with any number of clusters up to `largest`.

    Neighbours and eigenvectors cost most and are computed once, in float64 on the processor; then
    each number of clusters takes a few runs of k-means on 2 K columns. A group of fewer rows than a
    graph has neighbours is no island in that graph: its rows have neighbours outside.

    Args:
        features: (N, D), compared by cosine.
        largest: the largest number of clusters that will be asked for, in 1..N-1.

    Raises:
        ValueError: `largest` is out of range.
    """

    def __init__(self, features: Tensor, largest: int) -> None:
        num = len(features)
        if not 1 <= largest < num:
            raise ValueError(
                f"{largest} clusters: choose from 1 to {num - 1}, there are {num} rows"
            )
        x = F.normalize(plain(features), dim=1)
        near = knn(x, x, k=min(max(NEIGHBORS), num - 1), exclude_self=True)[1].cpu().numpy()
        self.largest = largest
        # Of few rows several graphs would be the same.
        numbers = sorted({min(k, num - 1) for k in NEIGHBORS})
        graphs = {k: neighbor_graph(near[:, :k], shared=True) for k in numbers}
        self.parts: list[Tensor] = []
        for graph in graphs.values():
            # One component more, as the constant one is taken out.
            self.parts += _weighted(graph, 2 * largest + 1)
        smooth = graphs[min(SMOOTHING, num - 1)]
        self.walk: Any = smooth.multiply(1 / np.asarray(smooth.sum(axis=1))).tocsr()

    def votes(self, num_clusters: int, *, seed: int = 0) -> Tensor:
        """Each cluster's share of the votes (N, K), float64 on the processor; rows sum to 1.

        Raises:
            ValueError: `num_clusters` is not in 1..largest.
        """
        if not 1 <= num_clusters <= self.largest:
            raise ValueError(
                f"{num_clusters} clusters: choose from 1 to {self.largest}, for which this was made"
            )
        clusterings = []
        for number, part in enumerate(self.parts):
            embedding = F.normalize(part[:, : 2 * num_clusters + 1], dim=1).float()
            result = kmeans(
                embedding,
                num_clusters,
                num_restarts=5,
                num_iters=100,
                seed=seed + number,
            )
            clusterings.append(result.labels.numpy())
        votes = agreed(clusterings, num_clusters)
        # A random walk with restart: neighbours have a say, the row's own votes at least half.
        smooth = votes
        for _ in range(STEPS):
            smooth = (1 - RESTART) * (self.walk @ smooth) + RESTART * votes
        return torch.from_numpy(_all_used(smooth))


def diffusion_clusters(
    features: Tensor,
    num_clusters: int,
    *,
    seed: int = 0,
    group: Any = None,
) -> Tensor:
    """Labels (n,) int64 of this rank's rows, on their device: the cluster with most votes.

    All rows of all ranks are gathered; rank 0 clusters them. See `Diffusion`.

    Args:
        features: (n, D), compared by cosine.
        num_clusters: K, in 1..N-1 for the N rows of all ranks.
        seed: of k-means.
        group: process group over whose ranks the rows are spread.
    """

    def labels_of(rows: Tensor) -> Tensor:
        return Diffusion(rows, num_clusters).votes(num_clusters, seed=seed).argmax(dim=1)

    return on_first_rank(labels_of, plain(features), group)


def agreed(clusterings: list[np.ndarray], num_clusters: int) -> np.ndarray:
    """Share of the clusterings that put each row into each cluster, (N, K) float64.

    Their clusters are matched one-to-one first (Hungarian method): voting as in Dudoit and
    Fridlyand 2003.

    clusterings: labels (N,) int64 in [0, K), each with names of its own.
    """
    one_hot = [np.eye(num_clusters)[labels] for labels in clusterings]
    tensors = [torch.from_numpy(labels) for labels in clusterings]
    # The clustering that shares most information with the others names the clusters at first.
    shared = []
    for one in tensors:
        shared.append(sum(float(normalized_mutual_information(one, other)) for other in tensors))
    votes = one_hot[int(np.argmax(shared))]
    for _ in range(MATCHING_ROUNDS):
        before = votes
        votes = np.mean([_matched(each, before) for each in one_hot], axis=0)
        if np.array_equal(votes, before):
            break
    return votes


def _matched(ones: np.ndarray, votes: np.ndarray) -> np.ndarray:
    """One-hot labels (N, K), columns put in the order that overlaps most with the votes (N, K)."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(votes.T @ ones, maximize=True)
    order = np.empty(len(rows), dtype=np.int64)
    order[rows] = columns
    return ones[:, order]


def _weighted(graph: Any, num_components: int) -> list[Tensor]:
    """Eigenvectors (N, m) of a graph times their weights, once for each power."""
    values, vectors = graph_components(graph, num_components)
    # The walk's stationary state, which parts nothing, is taken out: in D^-1/2 W D^-1/2 it is the
    # root of the degrees.
    constant = torch.from_numpy(np.asarray(graph.sum(axis=1)).ravel() ** 0.5)
    constant = constant / constant.norm()
    vectors = vectors - constant[:, None] * (constant @ vectors)
    return [vectors * (1 - values + CLOSE).clamp_min(CLOSE) ** -power for power in POWERS]


def _all_used(votes: np.ndarray) -> np.ndarray:
    """Votes (N, K), changed so that every cluster has most votes of some row.

    A cluster that has none gets all votes of the row that is most for it, among those whose own
    cluster has further rows.
    """
    winners = votes.argmax(axis=1)
    sizes = np.bincount(winners, minlength=votes.shape[1])
    for cluster in np.flatnonzero(sizes == 0):
        spare = np.flatnonzero(sizes[winners] > 1)
        row = spare[votes[spare, cluster].argmax()]
        sizes[winners[row]] -= 1
        sizes[cluster] = 1
        winners[row] = cluster
        votes[row] = np.eye(votes.shape[1])[cluster]
    return votes
