"""Hierarchical k-means, and samples of rows balanced over its tree.

Vo et al. 2024, "Automatic Data Curation for Self-Supervised Learning: A Clustering-Based Approach".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepclust.ops.kmeans.fit import KMeansResult, kmeans


@dataclass(frozen=True)
class Tree:
    """Clusters of rows, clusters of their centroids, and so on."""

    levels: list[KMeansResult]
    """Finest first; the rows of level i + 1 are the centroids of level i."""

    def labels(self, level: int) -> Tensor:
        """Cluster (N,) int64 of every row at a level, 0 the finest."""
        labels = self.levels[0].labels
        for above in self.levels[1 : level + 1]:
            labels = above.labels[labels]
        return labels


def hierarchical_kmeans(
    x: Any,
    num_clusters: Sequence[int],
    *,
    seed: int = 0,
    **settings: Any,
) -> Tree:
    """Tree of clusters: k-means of the rows, then of the centroids, once per number of clusters.

    Args:
        x: (N, D), anything that `kmeans` takes.
        num_clusters: clusters of each level, finest first; the numbers must fall.
        seed: makes the result repeatable.
        settings: other arguments of `kmeans`, used at every level. Leave out `sample_weights` and a
            given `init`, which fit the rows of one level only, and `group`: the tree is of one
            process.

    Raises:
        ValueError: numbers that do not fall, or what `kmeans` refuses.

    Example:
        tree = hierarchical_kmeans(features, [1000, 100, 10])
        chosen = balanced_sample(tree, 5000)
    """
    if not num_clusters or any(above >= below for below, above in pairwise(num_clusters)):
        raise ValueError(
            f"num_clusters={list(num_clusters)}: must hold at least one number and fall from level"
            " to level"
        )
    levels: list[KMeansResult] = []
    rows = x
    for level, number in enumerate(num_clusters):
        result = kmeans(rows, number, seed=seed + level, **settings)
        levels.append(result)
        # Every centroid counts once, whatever the size of its cluster: it is this that spreads the
        # upper levels evenly over the data's support instead of its density.
        rows = result.centroids
    return Tree(levels)


def balanced_sample(tree: Tree, count: int, *, seed: int = 0) -> Tensor:
    """Rows drawn evenly from a tree's clusters: frequent kinds of rows do not crowd out rare ones.

    From the top down, every cluster divides its share among its children as evenly as their sizes
    allow (none gets more than it has). Rows within a finest cluster are drawn at random.

    Args:
        tree: of N rows.
        count: rows to draw, at most N.
        seed: makes the draw repeatable.

    Returns:
        Row indices (count,) int64, ascending, distinct.

    Raises:
        ValueError: more rows asked for than there are, or fewer than none.
    """
    labels = tree.levels[0].labels.cpu().numpy()
    if not 0 <= count <= len(labels):
        raise ValueError(f"count={count}: must be from 0 to the number of rows, {len(labels)}")
    rng = np.random.default_rng(seed)
    parents = [level.labels.cpu().numpy() for level in tree.levels[1:]]
    sizes = _rows_per_cluster(tree, labels, parents)
    shares = share_evenly(count, sizes[-1], rng)
    for parent, size in zip(reversed(parents), reversed(sizes[:-1])):
        below = np.zeros(len(size), dtype=np.int64)
        for cluster in np.flatnonzero(shares):
            children = np.flatnonzero(parent == cluster)
            below[children] = share_evenly(int(shares[cluster]), size[children], rng)
        shares = below
    # Rows in random order, then sorted by cluster: the first `share` rows of each are its draw.
    shuffled = rng.permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    first = np.cumsum(sizes[0]) - sizes[0]
    rank_in_cluster = np.arange(len(labels)) - np.repeat(first, sizes[0])
    chosen = order[rank_in_cluster < shares[labels[order]]]
    return torch.from_numpy(np.sort(chosen))


def _rows_per_cluster(
    tree: Tree,
    labels: np.ndarray,
    parents: list[np.ndarray],
) -> list[np.ndarray]:
    """Rows beneath every cluster, (K,) int64 for each level, finest first."""
    sizes = [np.bincount(labels, minlength=len(tree.levels[0].centroids))]
    for parent, level in zip(parents, tree.levels[1:]):
        # `bincount` with weights gives float64, exact for sizes up to 2^53.
        size = np.bincount(parent, sizes[-1], minlength=len(level.centroids))
        sizes.append(size.astype(np.int64))
    return sizes


def share_evenly(count: int, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Divides `count` into shares (K,) int64 as equal as the sizes (K,) allow, none above its size.

    What is left over by whole numbers goes to clusters drawn at random.
    """
    # Pour water into K glasses that are `sizes` high: all are filled to one level, small ones to
    # the brim. filled[i] is what it takes to bring the level to the i-th smallest size.
    ordered = np.sort(sizes)
    smaller = np.concatenate([[0], np.cumsum(ordered)[:-1]])
    filled = smaller + ordered * np.arange(len(sizes), 0, -1)
    full = int(np.searchsorted(filled, count, side="right"))
    if full == len(sizes):
        return sizes.astype(np.int64)
    level = (count - int(ordered[:full].sum())) // (len(sizes) - full)
    shares = np.minimum(sizes, level).astype(np.int64)
    lucky = rng.permutation(np.flatnonzero(sizes > level))[: count - int(shares.sum())]
    shares[lucky] += 1
    return shares
