"""Batches of problems, and trees of clusters with their balanced samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepclust.ops import kmeans
from deepclust.ops.kmeans.tree import balanced_sample, hierarchical_kmeans, share_evenly
from tests.ops.test_kmeans import mixture


def test_a_batch_equals_its_problems() -> None:
    x = torch.stack([mixture(200, 5, 8, seed=seed) for seed in range(6)]).reshape(2, 3, 200, 5)
    weights = torch.rand(2, 3, 200, generator=torch.Generator().manual_seed(0))
    start = x[:, :, :8]
    together = kmeans(x, 8, init=start, sample_weights=weights)
    assert together.centroids.shape == (2, 3, 8, 5)
    assert together.labels.shape == (2, 3, 200)
    for index in np.ndindex(2, 3):
        alone = kmeans(x[index], 8, init=start[index], sample_weights=weights[index])
        torch.testing.assert_close(together.centroids[index], alone.centroids)
        assert torch.equal(together.labels[index], alone.labels)
        assert torch.equal(together.counts[index], alone.counts)
        assert float(together.inertia[index]) == pytest.approx(alone.inertia)


def test_tree_of_clusters() -> None:
    x = mixture(2000, 6, 40)
    tree = hierarchical_kmeans(x, [100, 20, 4])
    assert [level.centroids.shape[0] for level in tree.levels] == [100, 20, 4]
    fine, top = tree.labels(0), tree.labels(2)
    assert all(len(torch.unique(top[fine == cluster])) <= 1 for cluster in range(100))
    with pytest.raises(ValueError, match="fall from level to level"):
        hierarchical_kmeans(x, [20, 20])


def test_balanced_sample_evens_out_a_long_tail() -> None:
    x = torch.cat([mixture(size, 4, 1, seed=seed) + 50 * seed for seed, size in enumerate([1500, 300, 100, 40])])
    tree = hierarchical_kmeans(x, [40, 4], num_restarts=3)
    chosen = balanced_sample(tree, 160)
    assert torch.equal(chosen, torch.unique(chosen))
    assert torch.equal(chosen, balanced_sample(tree, 160))
    assert torch.bincount(tree.labels(1)[chosen], minlength=4).tolist() == [40, 40, 40, 40]
    assert len(balanced_sample(tree, len(x))) == len(x)
    assert len(balanced_sample(tree, 0)) == 0
    with pytest.raises(ValueError, match="count=1941"):
        balanced_sample(tree, 1941)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12), st.floats(0, 1))
def test_even_shares(sizes: list[int], part: float) -> None:
    count = int(part * sum(sizes))
    shares = share_evenly(count, np.array(sizes), np.random.default_rng(0))
    assert shares.sum() == count
    assert bool((shares <= sizes).all())
    below = shares < np.array(sizes)
    if below.any():
        assert shares.max() <= shares[below].min() + 1
