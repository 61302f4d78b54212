"""Numbers of clusters where they are known, the parts against networkx and by hand, and what cannot
be told.
"""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import make_blobs
from sklearn.neighbors import NearestNeighbors

from deepclust.clustering.number import (
    CRITERIA,
    agrees,
    density_peaks,
    estimate_num_clusters,
    modularity,
    prediction_strength,
    statement,
)


def blobs(num_clusters: int, num: int = 240, spread: float = 0.6, seed: int = 0) -> np.ndarray:
    """Gaussians whose centres are unit rows at right angles."""
    labels = np.random.default_rng(seed).permutation(np.arange(num) % num_clusters)
    noise = np.random.default_rng(seed + 1).normal(size=(num, 24)) * spread / np.sqrt(24)
    return (np.eye(24)[labels] + noise).astype(np.float32)


@pytest.mark.parametrize("num_clusters", [3, 8])
def test_plain_clusters_are_counted(num_clusters: int) -> None:
    found = estimate_num_clusters(blobs(num_clusters, spread=0.4), largest=12)
    assert found.k == num_clusters and found.sure == "clear"
    assert found.low <= num_clusters <= found.high <= num_clusters + 3
    assert found.statement.startswith(f"{num_clusters} clusters: 5 of 5 criteria")


def test_unequal_clusters_are_counted() -> None:
    x = np.concatenate([blobs(2, 300), blobs(5, 120, seed=3)])
    assert estimate_num_clusters(x, largest=10).k == 5


def test_the_order_of_rows_and_their_lengths_do_not_matter() -> None:
    x = blobs(6, 200, spread=0.9)
    random = np.random.default_rng(0)
    first = estimate_num_clusters(x, largest=9)
    other = estimate_num_clusters(
        (x * random.uniform(0.5, 2, size=(200, 1)))[random.permutation(200)], largest=9
    )
    assert (first.k, first.sure) == (other.k, other.sure)
    assert (
        first.votes["peaks"] == other.votes["peaks"]
        and first.votes["eigengap"] == other.votes["eigengap"]
    )
    assert estimate_num_clusters(x, largest=9) == first


def test_curves_and_votes_belong_together() -> None:
    found = estimate_num_clusters(blobs(4, 200), smallest=3, largest=9)
    assert tuple(found.votes) == tuple(found.curves) == CRITERIA
    for name, (ks, values) in found.curves.items():
        assert len(ks) == len(values) and np.isfinite(values).all() and ks == sorted(ks), name
        assert ks[0] == 3 and ks[-1] == 9 and found.votes[name] in ks
    ks, values = found.curves["modularity"]
    assert found.votes["modularity"] == ks[int(np.argmax(values))]
    heights = found.curves["peaks"][1]
    assert (
        heights == sorted(heights, reverse=True)
        and sum(height >= 2.5 for height in heights) == 4 - 2
    )


def test_noise_is_not_sure() -> None:
    found = estimate_num_clusters(np.random.default_rng(0).normal(size=(200, 10)), largest=12)
    assert found.sure == "unclear" and found.low < found.high
    assert "no two groups of images stand apart" in found.statement
    assert f"-k {found.high}" in found.statement and f"-k {found.k} " not in found.statement
    assert "easier to merge" in found.statement


def test_the_statement_says_what_the_votes_say() -> None:
    votes = {"peaks": 9, "modularity": 10, "eigengap": 11, "agreement": 4, "prediction": 2}
    text = statement(9, 4, 10, votes)
    assert text.startswith("Probably 9 clusters, between 4 and 10: 3 of 5 criteria")
    assert "peaks 9, modularity 10, eigengap 11, agreement 4, prediction 2" in text
    assert "unclear, 6 is a guess between 4 and 10: 0 of 5" in statement(6, 4, 10, votes)
    assert "no two groups" not in text and "no two groups" in statement(
        9, 4, 10, votes, apart=False
    )
    assert (
        agrees(3, 4)
        and agrees(8, 10)
        and agrees(25, 20)
        and not agrees(26, 20)
        and not agrees(2, 4)
    )


@pytest.mark.parametrize(
    ("x", "k"),
    [
        (np.ones((50, 4)), 1),
        (np.zeros((50, 4)), 1),
        (np.eye(2), 1),
        (np.ones((1, 3)), 1),
        (np.zeros((0, 3)), 1),
        (np.eye(7), 2),
        (np.repeat(np.eye(4), 20, axis=0), 2),
    ],
)
def test_where_nothing_can_be_told(x: np.ndarray, k: int) -> None:
    found = estimate_num_clusters(x)
    assert (found.k, found.low, found.high, found.sure) == (k, k, k, "unclear")
    assert "too few to tell" in found.statement and not found.votes and not found.curves


def test_more_clusters_than_rows_may_be_asked_for() -> None:
    found = estimate_num_clusters(blobs(3, 30), largest=1000)
    assert found.k <= 6 and max(found.curves["eigengap"][0]) == 6
    assert estimate_num_clusters(np.repeat(blobs(3, 60), 3, axis=0)).k >= 2  # every row three times


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="smallest=1"):
        estimate_num_clusters(blobs(3), smallest=1)
    with pytest.raises(ValueError, match="smallest=5, largest=4"):
        estimate_num_clusters(blobs(3), smallest=5, largest=4)
    with pytest.raises(ValueError, match="finite"):
        estimate_num_clusters(np.full((20, 3), np.nan))


def test_peaks_of_blobs_stand_out_and_those_of_one_do_not() -> None:
    x, _ = make_blobs(500, 3, centers=[[0, 0, 0], [9, 0, 0], [0, 9, 0]], random_state=0)
    distances, near = NearestNeighbors(n_neighbors=21).fit(x).kneighbors(x)
    peaks = density_peaks(distances[:, 1:] ** 2, near[:, 1:])
    assert (peaks > 4).sum() == 3 and (np.diff(peaks) <= 0).all() and (peaks > 0).all()
    one = np.random.default_rng(0).normal(size=(500, 3))
    distances, near = NearestNeighbors(n_neighbors=21).fit(one).kneighbors(one)
    assert (density_peaks(distances[:, 1:] ** 2, near[:, 1:]) > 2.5).sum() == 1


def test_modularity_is_that_of_networkx() -> None:
    networkx = pytest.importorskip("networkx")
    x = np.random.default_rng(0).normal(size=(60, 3))
    near = NearestNeighbors(n_neighbors=5).fit(x).kneighbors(return_distance=False)
    graph = networkx.MultiGraph([(row, other) for row in range(60) for other in near[row]])
    labels = np.arange(60) % 4
    parts = [set(np.flatnonzero(labels == label)) for label in range(4)]
    assert modularity(labels, near) == pytest.approx(
        networkx.algorithms.community.modularity(graph, parts)
    )


def test_prediction_strength_by_counting_pairs() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    assigned = np.array([0, 0, 1, 1, 1, 0])
    same = [
        [assigned[i] == assigned[j] for j in range(6) if labels[j] == labels[i] and j != i]
        for i in range(6)
    ]
    expected = np.mean([np.mean(row) if row else 0 for row in same])
    assert prediction_strength(labels, assigned) == pytest.approx(expected)
    assert prediction_strength(np.arange(9) // 3, np.arange(9) // 3) == 1
