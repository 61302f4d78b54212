"""Clusterers against scikit-learn's, on clusters that all can find; a missing package and noise."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from sklearn.neighbors import NearestNeighbors

from deepclust.clustering.methods import METHODS, cluster, hdbscan, neighbor_confidence
from deepclust.errors import UserError
from deepclust.eval import clustering_scores

X, Y = make_blobs(150, 16, centers=4, cluster_std=1.0, random_state=1)
X = X.astype(np.float32)
FAST = [name for name in METHODS if name not in ("tsne_gmm", "umap_hdbscan")]


@pytest.mark.parametrize("name", FAST)
def test_plain_clusters_are_found_and_a_second_run_finds_the_same(name: str) -> None:
    found, again = cluster(name, X, 4, seed=5), cluster(name, torch.from_numpy(7 * X), 4, seed=5)
    assert found.labels.dtype == np.int64 and found.labels.shape == found.confidence.shape == (150,)
    assert clustering_scores(found.labels, Y)["acc"] > 0.95
    assert (
        (found.confidence >= 0) & (found.confidence <= 1)
    ).all() and found.confidence.mean() > 0.9
    assert clustering_scores(found.labels, again.labels)["ari"] == 1, "length is no matter"


def test_votes_are_the_confidence_of_diffusion_and_lie_between_clusters() -> None:
    x = X + np.random.default_rng(0).normal(0, 9, X.shape).astype(np.float32)
    found = cluster("diffusion", x, 4, seed=3)
    right = clustering_scores(found.labels, Y)["matching"]
    wrong = np.array([right[label] for label in found.labels]) != Y
    assert 0.02 < wrong.mean() < 0.4
    assert found.confidence[wrong].mean() < found.confidence[~wrong].mean() - 0.05


def test_large_ward_merges_along_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cluster("ward", X, 4).labels
    monkeypatch.setattr("deepclust.clustering.methods.MAX_DENSE", 100)
    assert clustering_scores(cluster("ward", X, 4).labels, whole)["acc"] > 0.95


def test_neighbours_vote_on_confidence() -> None:
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    labels = np.random.default_rng(0).integers(0, 3, 150)
    near = NearestNeighbors(n_neighbors=16).fit(unit).kneighbors(unit, return_distance=False)
    expected = (labels[near] == labels[:, None]).mean(1)
    np.testing.assert_allclose(neighbor_confidence(unit, labels), expected, atol=1e-6)


def test_noise_stays_or_joins_the_nearest_cluster() -> None:
    points, y = make_blobs(
        200, 2, centers=[(0, 0), (9, 0), (0, 9)], cluster_std=0.5, random_state=0
    )
    points = np.concatenate([points, [(-15.0, -15.0), (20.0, 0.0)]])
    labels, confidence = hdbscan(points, None)
    assert (labels[-2:] == -1).all() and confidence is not None and (confidence[-2:] == 0).all()
    given, confidence = hdbscan(points, 3)
    assert set(given) == {0, 1, 2} and clustering_scores(given[:-2], y)["acc"] == 1
    assert given[-1] == given[:-2][y == 1][0] and confidence is not None and confidence[-1] == 0


def test_what_cannot_be_done_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UserError, match=r"pip install 'deepclust\[umap\]'"):
        cluster("umap_hdbscan", X, 4)
    with pytest.raises(UserError, match="kmean: choose one of kmeans"):
        cluster("kmean", X, 4)
    with pytest.raises(UserError, match="umap_hdbscan finds its own"):
        cluster("ward", X, None)
    with pytest.raises(ValueError, match="more than 4 images"):
        cluster("gmm", X[:4], 4)
