"""Label-free scores against closed forms and scikit-learn, and the choice of a stage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

from deepclust.eval.label_free import better_stage, churn, label_free_scores, silhouette
from deepclust.ops.agreement import neighbor_agreement

X, Y = make_blobs(300, 8, centers=4, cluster_std=1.5, random_state=0)
GRAPH = NearestNeighbors(n_neighbors=6).fit(X).kneighbors(X)[1][:, 1:]


def test_agreement_with_a_graph_is_that_of_ops_whatever_holds_it() -> None:
    for labels, graph in ((Y, GRAPH), (torch.from_numpy(Y), torch.from_numpy(GRAPH))):
        scores = label_free_scores(labels, 4, graph=graph)
        expected = neighbor_agreement(torch.from_numpy(Y), torch.from_numpy(GRAPH))
        assert scores["neighbor_agreement"] == float(expected) > 0.9
    with pytest.raises(ValueError, match="300 labels"):
        label_free_scores(Y, 4, graph=GRAPH[:10])


def test_churn_counts_moves_not_names() -> None:
    labels = np.repeat(np.arange(4), 25)
    assert churn(labels, (labels + 1) % 4) == 0
    moved = labels.copy()
    moved[:10] = 1
    assert churn(labels, moved) == pytest.approx(0.1)


def test_scores_of_a_known_clustering() -> None:
    labels = np.repeat([0, 1, 2], [50, 25, 25])
    scores = label_free_scores(labels, 4, confidence=torch.linspace(0.5, 1.0, 100), previous=labels)
    assert scores["clusters_used"] == 3
    assert scores["size_entropy"] == pytest.approx(1.5 * math.log(2) / math.log(4))
    assert scores["mean_confidence"] == pytest.approx(0.75)
    assert scores["churn"] == 0
    assert "silhouette" not in scores and "neighbor_agreement" not in scores
    assert label_free_scores(np.zeros(5, int), 1)["size_entropy"] == 1


def test_silhouette_is_scikit_learns_and_none_where_undefined() -> None:
    assert silhouette(X, Y) == pytest.approx(silhouette_score(X, Y, metric="cosine"))
    assert silhouette(X, np.zeros(300, int)) is None
    assert silhouette(X, np.arange(300)) is None
    assert silhouette(X, Y, max_samples=100, seed=3) == silhouette(
        torch.from_numpy(X), Y, max_samples=100, seed=3
    )


@pytest.mark.parametrize(
    ("candidates", "kept"),
    [
        ({"scan": 0.5, "selflabel": 0.6}, "selflabel"),
        ({"scan": 0.6, "selflabel": 0.5}, "scan"),
        ({"scan": 0.6, "selflabel": 0.6}, "scan"),
        ({"scan": 0.6, "selflabel": 0.6 + 1e-13}, "scan"),
        ({"scan": 0.6, "selflabel": 0.6 + 1e-11}, "selflabel"),
        ({"a": 0.1, "b": 0.3, "c": 0.2}, "b"),
        ({"scan": math.nan, "selflabel": 0.1}, "selflabel"),
        ({"scan": 0.1, "selflabel": math.nan}, "scan"),
        ({"only": 0.0}, "only"),
    ],
)
def test_the_stage_that_agrees_best_is_kept(candidates: dict[str, float], kept: str) -> None:
    name, why = better_stage(candidates)
    assert name == kept
    assert why.startswith(kept) and why.endswith(".") and "\n" not in why
    assert all(other in why for other in candidates)


def test_nothing_to_keep_is_an_error() -> None:
    with pytest.raises(ValueError, match="no stage"):
        better_stage({})
