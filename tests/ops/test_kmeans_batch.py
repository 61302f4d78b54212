"""Batches of problems, and trees of clusters with their balanced samples."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepclust.ops import balanced_sample, hierarchical_kmeans, kmeans
from deepclust.ops.kmeans import batch
from deepclust.ops.kmeans.fit import KMeansResult
from deepclust.ops.kmeans.tree import share_evenly
from tests.ops.test_kmeans import assert_nearest, mixture


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


def alike(together: KMeansResult, alone: KMeansResult, index: tuple[int, ...]) -> None:
    torch.testing.assert_close(together.centroids[index], alone.centroids, rtol=1e-4, atol=1e-4)
    assert torch.equal(together.labels[index], alone.labels)
    assert torch.equal(together.counts[index], alone.counts)
    assert float(together.inertia[index]) == pytest.approx(alone.inertia, rel=1e-5)


@pytest.mark.parametrize("init", ["k-means++", "random", "k-means||"])
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_draws_as_its_problems_do(init: str, spherical: bool, dtype: torch.dtype) -> None:
    far = 0 if spherical else 40
    x = torch.stack(
        [mixture(150, 6, 12, seed=seed, spread=2.0).to(dtype) + far * seed for seed in range(5)]
    )
    settings = {
        "init": init,
        "num_restarts": 2,
        "tol": 1e-3,
        "spherical": spherical,
        "num_iters": 7,
    }
    together = kmeans(x, 9, **settings)
    for number in range(5):
        alike(together, kmeans(x[number], 9, seed=number, **settings), (number,))
    in_array = kmeans(x.numpy(), 9, **settings)
    assert torch.equal(in_array.labels, together.labels)


@pytest.mark.parametrize("empty", ["split", "keep", "random"])
def test_empty_clusters_of_a_batch(empty: str) -> None:
    x = torch.stack([mixture(120, 4, 5, seed=seed) for seed in range(3)])
    start = x[:, :8].clone()
    start[1, 2:] = 1e4
    together = kmeans(x, 8, init=start, empty=empty)
    assert together.num_empty == sum(
        kmeans(x[p], 8, init=start[p], seed=p, empty=empty).num_empty for p in range(3)
    )
    for number in range(3):
        alike(
            together, kmeans(x[number], 8, init=start[number], seed=number, empty=empty), (number,)
        )


def test_small_and_large_groups_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.stack([mixture(60, 3, 5, seed=seed) for seed in range(7)])
    whole = kmeans(x, 5, sample_weights=torch.ones(7, 60))
    monkeypatch.setattr(batch, "GROUP_BYTES", 3 * 4 * 60 * 60)
    assert torch.equal(kmeans(x, 5).labels, whole.labels)
    monkeypatch.setattr(batch, "GROUP_BYTES", 0)
    assert torch.equal(kmeans(x, 5).labels, whole.labels)


def test_nearest_in_every_problem() -> None:
    x = torch.stack([mixture(400, 8, 30, seed=seed) for seed in range(4)])
    found = kmeans(x, 30, num_iters=3)
    for number in range(4):
        assert_nearest(x[number], found.centroids[number], found.labels[number])
    again = kmeans(x, 30, init=found.centroids, num_iters=0)
    assert torch.equal(again.labels, found.labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": float("nan")}, "rows 3 hold NaN"),
        ({"sample_weights": torch.zeros(2, 20)}, "all are zero"),
        ({"sample_weights": torch.ones(2, 19)}, r"expected shape \(20,\)"),
        ({"init": torch.zeros(2, 4, 2)}, r"expected shape \(3, 2\)"),
        ({"init": "best"}, "init='best'"),
        ({"tol": -1.0}, "tol=-1.0"),
        ({"num_clusters": 21}, "num_clusters=21"),
    ],
)
def test_nonsense_in_a_batch_is_refused(change: dict, message: str) -> None:
    x = torch.randn(2, 20, 2, generator=torch.Generator().manual_seed(0))
    change = dict(change)
    x[1, 3, 0] = change.pop("x", 0.0)
    with pytest.raises(ValueError, match=message):
        kmeans(x, change.pop("num_clusters", 3), **change)


def test_tree_of_clusters() -> None:
    x = mixture(2000, 6, 40)
    tree = hierarchical_kmeans(x, [100, 20, 4])
    assert [level.centroids.shape[0] for level in tree.levels] == [100, 20, 4]
    fine, top = tree.labels(0), tree.labels(2)
    assert all(len(torch.unique(top[fine == cluster])) <= 1 for cluster in range(100))
    with pytest.raises(ValueError, match="fall from level to level"):
        hierarchical_kmeans(x, [20, 20])


def test_every_level_is_the_k_means_of_the_level_below() -> None:
    x = mixture(900, 5, 30)
    tree = hierarchical_kmeans(x, [60, 12, 3], seed=7, num_restarts=2)
    rows = x
    for number, level in enumerate(tree.levels):
        again = kmeans(rows, len(level.centroids), seed=7 + number, num_restarts=2)
        assert torch.equal(level.centroids, again.centroids)
        assert torch.equal(level.labels, again.labels)
        assert_nearest(rows, level.centroids, level.labels)
        rows = level.centroids
    for row in range(0, 900, 37):
        cluster = row
        for number, level in enumerate(tree.levels):
            cluster = int(level.labels[cluster])
            assert int(tree.labels(number)[row]) == cluster


@pytest.mark.parametrize("count", [1, 37, 160, 700, 899])
def test_a_balanced_sample_is_even_among_the_children_of_every_cluster(count: int) -> None:
    """The shares of siblings differ by one at most, but for those that have no more rows."""
    x = torch.cat([mixture(size, 4, 6, seed=seed) for seed, size in enumerate([600, 250, 50])])
    tree = hierarchical_kmeans(x, [50, 10, 3])
    chosen = balanced_sample(tree, count, seed=count)
    assert len(chosen) == len(torch.unique(chosen)) == count
    clusters = [tree.labels(level) for level in range(3)]
    clusters.append(torch.zeros(len(x), dtype=torch.int64))  # the root, above all of the top
    for below, above in pairwise(clusters):
        for parent in torch.unique(above):
            children = torch.unique(below[above == parent])
            shares = torch.stack([(below[chosen] == child).sum() for child in children])
            sizes = torch.stack([(below == child).sum() for child in children])
            assert bool((shares <= sizes).all())
            unfilled = shares[shares < sizes]
            assert not len(unfilled) or int(unfilled.min()) >= int(shares.max()) - 1


def test_balanced_sample_evens_out_a_long_tail() -> None:
    x = torch.cat(
        [
            mixture(size, 4, 1, seed=seed) + 50 * seed
            for seed, size in enumerate([1500, 300, 100, 40])
        ]
    )
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
