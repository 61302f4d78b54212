"""Baselines on clusters that all of them can find; failures are told, not raised."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from threadpoolctl import threadpool_info

from deepclust.clustering.baselines import NAMES, baselines
from deepclust.errors import UserError
from deepclust.eval import clustering_scores

X, Y = make_blobs(150, 16, centers=4, cluster_std=1.0, random_state=1)
X = X.astype(np.float32)


def test_all_find_plain_clusters_and_a_second_run_the_same() -> None:
    found, again = (baselines(X, 4, pixels=X, seed=5) for _ in range(2))
    assert tuple(found.labels) == NAMES and not found.reasons
    assert (found.index == np.arange(150)).all()
    for name, labels in found.labels.items():
        assert labels is not None and labels.dtype == np.int64 and labels.shape == (150,)
        assert clustering_scores(labels, Y)["acc"] > 0.95, name
        assert (labels == again.labels[name]).all()
        assert found.seconds[name] > 0


def test_features_are_compared_by_direction_alone() -> None:
    scaled = torch.from_numpy(X) * torch.rand(
        150, 1, generator=torch.Generator().manual_seed(0)
    ).add(0.1)
    plain, other = (baselines(x, 4, which=["kmeans", "spectral"]) for x in (X, scaled))
    for name in ("kmeans", "spectral"):
        assert clustering_scores(plain.labels[name], other.labels[name])["ari"] == 1


def test_a_sample_is_drawn_by_seed_and_says_which_rows() -> None:
    found = baselines(X, 4, which="kmeans", max_samples=60, seed=1)
    assert len(set(found.index)) == 60 and (np.diff(found.index) > 0).all()
    assert clustering_scores(found.labels["kmeans"], Y[found.index])["acc"] > 0.95
    assert (baselines(X, 4, which="none", max_samples=60, seed=1).index == found.index).all()
    assert (baselines(X, 4, which="none", max_samples=60, seed=2).index != found.index).any()


def test_failures_are_reasons() -> None:
    found = baselines(X[:4], 4, pixels=X[:4])
    assert all(labels is None for labels in found.labels.values())
    assert all("more than 4 images" in reason for reason in found.reasons.values())
    broken = X.copy()
    broken[3] = np.inf
    found = baselines(broken, 4, which=["gmm", "pixels"])
    assert "1 of 150 rows are not finite" in found.reasons["gmm"]
    assert "no pixels" in found.reasons["pixels"]


def test_equal_rows_end_no_run() -> None:
    found = baselines(np.ones((40, 8), np.float32), 3, pixels=np.ones((40, 4)))
    assert all(
        found.labels[name] is None and "same features" in found.reasons[name] for name in NAMES
    )
    two = np.eye(2, 8, dtype=np.float32)[np.arange(40) % 2]
    found = baselines(two, 3)
    assert set(found.labels) == set(NAMES)
    assert all((found.labels[name] is None) == (name in found.reasons) for name in NAMES)


def test_threads_are_as_before_and_names_are_checked() -> None:
    before = [pool["num_threads"] for pool in threadpool_info()]
    assert baselines(X, 4, which="none").labels == {}
    baselines(X, 4, which=["kmeans"])
    assert [pool["num_threads"] for pool in threadpool_info()] == before
    with pytest.raises(UserError, match="kmean: choose all, none or a list of kmeans"):
        baselines(X, 4, which=["kmean"])
