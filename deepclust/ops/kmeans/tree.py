"""Hierarchical k-means and balanced sampling from its tree (Vo et al. 2024, "Automatic data curation")."""

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
    """Clusters of rows, clusters of their centroids, and so on.

    Attributes:
        levels: finest first; the rows of level i + 1 are the centroids of level i.
    """

    levels: list[KMeansResult]

    def labels(self, level: int) -> Tensor:
        """(N,) int64: the cluster of every row at a level, 0 the finest."""
        labels = self.levels[0].labels
        for above in self.levels[1 : level + 1]:
            labels = above.labels[labels]
        return labels


def hierarchical_kmeans(x: Any, num_clusters: Sequence[int], *, seed: int = 0, **settings: Any) -> Tree:
    """k-means of the rows, then of the centroids found, once per number in `num_clusters`.

    Every centroid counts once, whatever the size of its cluster: it is this that spreads the upper levels evenly over
    the data's support instead of its density.

    Args:
        x: (N, D), anything `kmeans` takes. num_clusters: falling, finest level first.
        settings: passed on to `kmeans` at every level; weights and a given start would mean nothing above the first.

    Raises:
        ValueError: numbers that do not fall, or what `kmeans` refuses.
    """
    if not num_clusters or any(above >= below for below, above in pairwise(num_clusters)):
        raise ValueError(
            f"num_clusters={list(num_clusters)}: must hold at least one number and fall from level to level"
        )
    levels: list[KMeansResult] = []
    for level, number in enumerate(num_clusters):
        levels.append(kmeans(levels[-1].centroids if levels else x, number, seed=seed + level, **settings))
    return Tree(levels)


def balanced_sample(tree: Tree, count: int, *, seed: int = 0) -> Tensor:
    """Row indices, shared out evenly from the top of the tree down.

    Every cluster passes its share on to its children as evenly as their sizes allow (none gets more than it has), and
    rows within a finest cluster are drawn at random.

    Returns:
        (count,) int64, ascending, distinct.

    Raises:
        ValueError: more rows asked for than there are.
    """
    labels = tree.levels[0].labels.cpu().numpy()
    if not 0 <= count <= len(labels):
        raise ValueError(f"count={count}: must be from 0 to the number of rows, {len(labels)}")
    rng = np.random.default_rng(seed)
    parents = [level.labels.cpu().numpy() for level in tree.levels[1:]]
    sizes = [np.bincount(labels, minlength=len(tree.levels[0].centroids))]
    for parent, level in zip(parents, tree.levels[1:]):
        sizes.append(np.bincount(parent, sizes[-1], minlength=len(level.centroids)).astype(np.int64))
    shares = share_evenly(count, sizes[-1], rng)
    for parent, size in zip(reversed(parents), reversed(sizes[:-1])):
        lower = np.zeros(len(size), dtype=np.int64)
        for cluster in np.flatnonzero(shares):
            children = np.flatnonzero(parent == cluster)
            lower[children] = share_evenly(int(shares[cluster]), size[children], rng)
        shares = lower
    shuffled = rng.permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    rank_in_cluster = np.arange(len(labels)) - np.repeat(np.cumsum(sizes[0]) - sizes[0], sizes[0])
    return torch.from_numpy(np.sort(order[rank_in_cluster < shares[labels[order]]]))


def share_evenly(count: int, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Parts of `count`, as equal as `sizes` (K,) allow, none above its size; what does not divide falls by lot."""
    # The level up to which all are filled: between the two neighbours of the sizes where the sum passes `count`.
    ordered = np.sort(sizes)
    filled = np.concatenate([[0], np.cumsum(ordered)[:-1]]) + ordered * np.arange(len(sizes), 0, -1)
    full = int(np.searchsorted(filled, count, side="right"))
    if full == len(sizes):
        return sizes.astype(np.int64)
    level = (count - int(ordered[:full].sum())) // (len(sizes) - full)
    shares = np.minimum(sizes, level).astype(np.int64)
    lucky = rng.permutation(np.flatnonzero(sizes > level))[: count - int(shares.sum())]
    shares[lucky] += 1
    return shares
