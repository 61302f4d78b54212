"""Estimates without labels, against mixtures whose truth is known and against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepclust.eval import calibration_scores, clustering_scores
from deepclust.eval.confidence import (
    agreement,
    constant_confidence,
    independent_clusterings,
    label_free_calibration,
    scale,
    temperature_for,
)


def probabilities(seed: int = 0, rows: int = 400, clusters: int = 5) -> np.ndarray:
    logits = torch.randn(rows, clusters, generator=torch.Generator().manual_seed(seed)) * 3
    return logits.softmax(1).numpy()


def test_agreement_does_not_depend_on_names_and_is_of_the_family_that_agrees_least():
    mine = np.array([0, 0, 1, 1, 2, 2])
    renamed, other = np.array([5, 5, 0, 0, 3, 3]), np.array([7, 1, 1, 1, 2, 2])
    assert agreement(mine, {"a": [renamed]}).tolist() == [1.0] * 6
    assert agreement(mine, {"a": [renamed], "b": [renamed, other]}).tolist() == [1, 0.5, 1, 1, 1, 1]


def test_other_numbers_of_clusters_agree_where_they_can():
    mine = np.array([0, 0, 0, 1, 1])
    assert agreement(mine, {"a": [np.array([0, 0, 1, 2, 2])]}).tolist() == [1, 1, 0, 1, 1]
    assert agreement(mine, {"a": [np.zeros(5, dtype=int)]}).tolist() == [1, 1, 1, 0, 0]
    with pytest.raises(ValueError, match="nothing to agree with"):
        agreement(mine, {})


def test_clusterings_that_err_independently_estimate_the_accuracy():
    """Errors at random towards one other class each: two calibrated clusterings agree as often as
    they are right.
    """
    random = np.random.default_rng(0)
    target = random.integers(0, 4, 20_000)
    hard = (
        random.random(20_000) < 0.4
    )  # on these every clustering tosses a coin between two classes
    drawn = [
        np.where(hard & (random.random(20_000) < 0.5), (target + 1) % 4, target) for _ in range(3)
    ]
    estimate = agreement(drawn[0], {"a": drawn[1:]}).mean()
    assert estimate == pytest.approx(clustering_scores(drawn[0], target)["acc"], abs=0.01)


@pytest.mark.parametrize("distance", [3.0, 9.0])
def test_independent_clusterings_find_clusters_that_are_there(distance):
    random = np.random.default_rng(1)
    target = random.integers(0, 4, 400)
    features = (distance * random.normal(size=(4, 24)) / 24**0.5)[target] + random.normal(
        size=(400, 24)
    ) / 5
    found = independent_clusterings(features, 4)
    assert {family: len(each) for family, each in found.items()} == {"k-means": 2, "spectral": 2}
    for labels in [labels for each in found.values() for labels in each]:
        assert labels.shape == (400,)
        assert clustering_scores(labels, target)["acc"] > 0.95
    again = independent_clusterings(torch.from_numpy(features), 4)
    assert all(
        np.array_equal(a, b) for family in found for a, b in zip(found[family], again[family])
    )


def test_a_temperature_of_one_changes_nothing_and_the_order_stays():
    p = probabilities()
    np.testing.assert_allclose(scale(p, 1.0), p, atol=1e-6)
    for temperature in (0.2, 5.0):
        scaled = scale(p, temperature)
        assert np.array_equal(scaled.argmax(1), p.argmax(1))
        np.testing.assert_allclose(scaled.sum(1), 1)
        logits = torch.from_numpy(p).double().log() / temperature
        np.testing.assert_allclose(scaled, logits.softmax(1).numpy(), atol=1e-12)


@pytest.mark.parametrize("wanted", [0.3, 0.6, 0.95])
def test_the_temperature_gives_the_mean_confidence_that_is_asked_for(wanted):
    p = probabilities()
    assert scale(p, temperature_for(p, wanted)).max(1).mean() == pytest.approx(wanted, abs=1e-6)


def test_saturated_probabilities_can_be_scaled():
    p = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    scaled = scale(p, temperature_for(p, 0.7))
    assert np.isfinite(scaled).all() and scaled.max(1).mean() == pytest.approx(0.7, abs=1e-6)


def test_a_constant_confidence_keeps_the_clusters():
    predicted = np.array([2, 0, 1, 1])
    p = constant_confidence(predicted, 3, 0.6)
    assert (
        np.array_equal(p.argmax(1), predicted)
        and np.allclose(p.max(1), 0.6)
        and np.allclose(p.sum(1), 1)
    )
    scores = calibration_scores(p, [2, 0, 1, 0])
    assert scores["ece"] == pytest.approx(abs(0.75 - 0.6)) and scores["auroc"] == 0.5


def test_what_the_estimate_says_is_what_labels_would_say_if_agreement_were_correctness():
    p = probabilities(3)
    target = np.random.default_rng(0).integers(0, 5, len(p))
    correct = p.argmax(1) == target
    estimate = label_free_calibration(p, correct.astype(float))
    assert estimate["accuracy"] == correct.mean()
    gap = sum(
        part["count"] * abs(part["acc"] - part["confidence"]) for part in estimate["reliability"]
    ) / len(p)
    assert estimate["ece"] == pytest.approx(gap)
