"""Calibration scores against scikit-learn, closed forms and properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from deepclust.eval import calibration_scores
from deepclust.eval.calibration import aurc, auroc, equal_mass_bins, equal_width_bins


def sample(
    seed: int = 0, rows: int = 900, classes: int = 4, noise: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, K) in which column c is class c, and classes that they are right about now
    and then.
    """
    rng = np.random.default_rng(seed)
    target = rng.integers(0, classes, rows)
    logits = 2 * np.eye(classes)[target] + noise * rng.normal(size=(rows, classes))
    p = np.exp(logits)
    return p / p.sum(1, keepdims=True), target


@pytest.mark.parametrize("seed", range(3))
def test_brier_nll_and_auroc_are_those_of_scikit_learn(seed):
    p, target = sample(seed)
    scores = calibration_scores(p, target)
    correct = p.argmax(1) == target
    assert scores["acc"] == correct.mean()
    assert scores["brier"] == pytest.approx(
        brier_score_loss(target, p, scale_by_half=False), abs=1e-12
    )
    assert scores["nll"] == pytest.approx(log_loss(target, p), abs=1e-12)
    assert scores["auroc"] == pytest.approx(roc_auc_score(correct, p.max(1)), abs=1e-12)


def test_ece_and_aurc_are_their_definitions_written_out():
    p, target = sample(3)
    confidence, correct = p.max(1), p.argmax(1) == target
    scores = calibration_scores(p, target)
    ece = 0.0
    for lower, upper in zip(np.arange(15) / 15, np.arange(1, 16) / 15):
        inside = (confidence > lower) & (confidence <= upper)
        if inside.any():
            ece += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    order = np.argsort(-confidence)
    adaptive = np.mean(
        [abs((confidence[part] - correct[part]).mean()) for part in np.split(order, 15)]
    )
    risks = [1 - correct[order[:n]].mean() for n in range(1, len(p) + 1)]
    assert scores["ece"] == pytest.approx(ece, abs=1e-12)
    assert scores["adaptive_ece"] == pytest.approx(adaptive, abs=1e-12)
    assert scores["aurc"] == pytest.approx(np.mean(risks), abs=1e-12)


def test_a_constant_confidence_shows_that_ece_alone_proves_nothing():
    _, target = sample(4)
    predicted = np.where(np.arange(len(target)) % 3 == 0, (target + 1) % 4, target)
    acc = float((predicted == target).mean())
    p = np.full((len(target), 4), (1 - acc) / 3)
    p[np.arange(len(target)), predicted] = acc
    scores = calibration_scores(p, target)
    assert scores["ece"] == pytest.approx(0, abs=1e-12) and scores["adaptive_ece"] == pytest.approx(
        0, abs=1e-12
    )
    assert scores["auroc"] == 0.5 and scores["aurc"] == pytest.approx(1 - acc)


def test_names_of_clusters_and_of_classes_do_not_matter():
    p, target = sample(5)
    order = np.array([2, 0, 3, 1])
    expected = calibration_scores(p, target)
    renamed = calibration_scores(p[:, order], target * 7 + 3)
    assert renamed.pop("brier") == pytest.approx(expected["brier"], abs=1e-12)
    assert renamed == {name: value for name, value in expected.items() if name != "brier"}
    assert calibration_scores(torch.from_numpy(p), torch.from_numpy(target)) == expected


def test_more_clusters_than_classes():
    """Class 1 in two clusters: the smaller has no class, its samples count as wrong."""
    p = np.array([[0.8, 0.1, 0.1]] * 4 + [[0.1, 0.7, 0.2]] * 3 + [[0.1, 0.3, 0.6]])
    scores = calibration_scores(p, [0, 0, 0, 0, 1, 1, 1, 1])
    assert scores["acc"] == 7 / 8
    assert scores["nll"] == pytest.approx(-(4 * np.log(0.8) + 3 * np.log(0.7) + np.log(0.3)) / 8)
    rows = (
        4 * (0.2**2 + 0.1**2 + 0.1**2) + 3 * (0.1**2 + 0.3**2 + 0.2**2) + 0.1**2 + 0.7**2 + 0.6**2
    )
    assert scores["brier"] == pytest.approx(rows / 8)


def test_fewer_clusters_than_classes():
    """Class 2 has no cluster: its probability is nought, and the floor keeps the logarithm finite."""
    p = np.array([[0.9, 0.1]] * 3 + [[0.2, 0.8]] * 3)
    scores = calibration_scores(p, [0, 0, 0, 1, 1, 2])
    assert scores["acc"] == 5 / 6
    assert scores["nll"] == pytest.approx(-(3 * np.log(0.9) + 2 * np.log(0.8) + np.log(1e-12)) / 6)
    assert scores["brier"] == pytest.approx((3 * 0.02 + 2 * 0.08 + 0.2**2 + 0.8**2 + 1) / 6)


def test_reliability_bins_add_up_to_everything():
    p, target = sample(6)
    scores = calibration_scores(p, target, num_bins=10)
    bins = scores["reliability"]
    assert sum(part["count"] for part in bins) == len(p)
    assert sum(part["count"] * part["acc"] for part in bins) == pytest.approx(
        len(p) * scores["acc"]
    )
    assert all(part["lower"] < part["confidence"] <= part["upper"] for part in bins)
    gap = sum(part["count"] * abs(part["acc"] - part["confidence"]) for part in bins) / len(p)
    assert gap == pytest.approx(scores["ece"])


def test_edges_belong_to_the_bin_below_and_ties_stay_together():
    edges = np.linspace(0, 1, 16)
    assert equal_width_bins(edges, 15).tolist() == [0, *range(15)]
    assert equal_mass_bins(np.array([0.5] * 7 + [0.1, 0.9]), 3).tolist() == [0] * 7 + [0, 2]


def test_ranking_with_ties_and_without_errors():
    confidence, correct = np.array([0.9, 0.5, 0.5, 0.1]), np.array([True, True, False, False])
    assert auroc(confidence, correct) == pytest.approx(roc_auc_score(correct, confidence))
    assert aurc(confidence, correct) == pytest.approx((0 + 0.25 + 1 / 3 + 0.5) / 4)
    assert (
        auroc(confidence, np.ones(4, dtype=bool)) is None
        and aurc(confidence, np.ones(4, dtype=bool)) == 0
    )


@pytest.mark.parametrize("seed", range(3))
def test_any_rising_map_of_confidences_keeps_the_ranking(seed):
    p, target = sample(seed)
    confidence, correct = p.max(1), p.argmax(1) == target
    assert auroc(confidence**3, correct) == pytest.approx(auroc(confidence, correct))
    assert aurc(confidence**3, correct) == pytest.approx(aurc(confidence, correct))


@pytest.mark.parametrize(
    ("p", "target", "words"),
    [
        ([[0.5, 0.6]], [0], "row 0 sums to 1.1"),
        ([[0.5, 0.5], [float("nan"), 1.0]], [0, 1], "row 1"),
        ([[1.5, -0.5]], [0], "row 0"),
        ([0.5, 0.5], [0, 1], "shape"),
        ([[0.5, 0.5]], [0, 1], "1 rows, target 2"),
        ([[0.5, 0.5]], [-1], "negative"),
    ],
)
def test_what_is_no_input_is_named(p, target, words):
    with pytest.raises(ValueError, match=words):
        calibration_scores(np.array(p), target)
