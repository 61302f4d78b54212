"""Probes against scikit-learn's classifiers on the same folds, and their habits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from deepclust.eval import knn_probe, linear_probe

DIGITS = load_digits()
X, Y = DIGITS.data[:600].astype(np.float32), DIGITS.target[:600]
TRAIN, TEST = (X[:400], Y[:400]), (X[400:], Y[400:])


def test_knn_vote_equals_scikit_learns() -> None:
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (TRAIN[0], TEST[0])]
    # on unit vectors cosine = 1 - d²/2
    reference = KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07)).fit(
        unit[0], TRAIN[1]
    )
    assert knn_probe(*TRAIN, test=TEST) == pytest.approx(
        reference.score(unit[1], TEST[1]), abs=2 / 200
    )


def test_linear_probe_reaches_scikit_learns_optimum() -> None:
    scaler = StandardScaler().fit(TRAIN[0])
    # mean loss + decay/2 |w|² is scikit-learn's sum of losses + |w|² / 2C with C = 1 / (decay · N)
    reference = LogisticRegression(C=1 / (1e-3 * 400), max_iter=500).fit(
        scaler.transform(TRAIN[0]), TRAIN[1]
    )
    expected = reference.score(scaler.transform(TEST[0]), TEST[1])
    assert linear_probe(*TRAIN, test=TEST) == pytest.approx(expected, abs=2 / 200)


@pytest.mark.parametrize("probe", [knn_probe, linear_probe])
def test_cross_validation_is_seeded_and_blind_to_names(probe) -> None:
    first = probe(X, Y)
    assert 0.93 < first < 1
    assert probe(torch.from_numpy(X), torch.from_numpy(Y)) == first
    assert probe(X, 1000 - 7 * Y) == pytest.approx(first, abs=2 / 600)


@pytest.mark.parametrize("probe", [knn_probe, linear_probe])
def test_shuffled_labels_are_at_chance(probe) -> None:
    assert probe(X, np.random.default_rng(0).permutation(Y)) < 0.2


@pytest.mark.parametrize("probe", [knn_probe, linear_probe])
def test_held_out_rows_are_never_their_own_neighbours(probe) -> None:
    """A feature that only names the row is of no use for rows not seen."""
    assert probe(np.eye(60, dtype=np.float32), np.arange(60) % 2) < 0.75


def test_bad_input_is_refused_in_words() -> None:
    broken = X.copy()
    broken[7, 0] = np.nan
    with pytest.raises(ValueError, match="row 7"):
        knn_probe(broken, Y)
    with pytest.raises(ValueError, match="599 labels"):
        linear_probe(X, Y[1:])
    with pytest.raises(ValueError, match="folds"):
        knn_probe(X, Y, folds=1)


def test_few_rows_and_unseen_test_classes() -> None:
    assert knn_probe(X[:6], Y[:6], k=20, folds=3) <= 1
    assert linear_probe(X[:50], np.zeros(50, int), test=(X[50:60], np.ones(10, int))) == 0
