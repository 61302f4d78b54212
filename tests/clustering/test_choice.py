"""Criteria without labels: against scikit-learn and closed forms, and on a choice that is plain."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import make_blobs
from sklearn.linear_model import Ridge
from sklearn.metrics import cohen_kappa_score, normalized_mutual_info_score

from deepclust.clustering.choice import CRITERIA, _left_out, choose, consensus, criteria

X, Y = make_blobs(80, 6, centers=4, cluster_std=1.0, random_state=1)
RANDOM = np.random.default_rng(0).integers(0, 4, 80)
NEARLY = np.where(np.arange(80) < 8, RANDOM, Y)


def test_every_criterion_prefers_the_plain_clusters() -> None:
    scores = criteria(X, {"random": RANDOM, "nearly": NEARLY, "right": Y})
    for criterion in CRITERIA:
        assert (
            scores["right"][criterion] >= scores["nearly"][criterion] > scores["random"][criterion]
        ), criterion
    assert all(choose(scores, criterion) in ("right", "nearly") for criterion in CRITERIA)
    assert choose(scores, "self_prediction") == "right" and scores["right"]["mean_rank"] > 0.8
    with pytest.raises(ValueError, match="choose one of neighbor_agreement"):
        choose(scores, "size")


def test_diffusion_is_preferred_unless_neighbours_tell_plainly_otherwise() -> None:
    x, y = make_blobs(400, 6, centers=4, cluster_std=1.0, random_state=1)
    slightly = np.where(np.arange(400) < 1, (y + 1) % 4, y)
    assert choose(criteria(x, {"ward": y, "diffusion": slightly})) == "diffusion"
    assert choose(criteria(X, {"ward": Y, "diffusion": RANDOM})) == "ward"
    assert choose(criteria(X, {"ward": NEARLY, "kmeans": Y})) == "kmeans"
    merged = criteria(X, {"hdbscan": np.where(Y == 3, 1, 0), "ward": NEARLY, "diffusion": NEARLY})
    assert choose(merged, "neighbor_agreement") == "hdbscan" and choose(merged) == "diffusion"


@pytest.mark.parametrize("dim", [6, 200])
def test_left_out_predictions_are_those_of_as_many_regressions(dim: int) -> None:
    x = np.random.default_rng(1).normal(size=(40, dim)) + np.eye(4, dim)[np.arange(40) % 4]
    labels, centred = np.arange(40) % 4, x - x.mean(0)
    size = min(centred.shape)
    ridge = (centred**2).sum() / (len(x) if dim > len(x) else dim)
    assert size > 3
    fitted = []
    for row in range(40):
        rest = np.delete(np.arange(40), row)
        model = Ridge(alpha=ridge).fit(x[rest], np.eye(4)[labels[rest]])
        fitted.append(model.predict(x[row : row + 1])[0])
    expected = cohen_kappa_score(labels, np.argmax(fitted, 1))
    assert _left_out(x)(labels) == pytest.approx(expected, abs=1e-9)
    assert _left_out(x)(np.zeros(40, int)) == 0


def test_consensus_is_the_mean_information_shared() -> None:
    found = consensus({"a": Y, "b": RANDOM, "c": NEARLY})
    expected = [normalized_mutual_info_score(Y, other) for other in (RANDOM, NEARLY)]
    assert found["a"] == pytest.approx(np.mean(expected))
    assert consensus({"a": Y}) == {"a": 0.0}
