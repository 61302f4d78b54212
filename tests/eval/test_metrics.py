"""Scores against scikit-learn, SciPy and every permutation."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference
from sklearn.metrics.cluster import contingency_matrix

from deepclust.eval import clustering_scores
from deepclust.eval.metrics import contingency, group_accuracies, imbalance

SCALARS = ("acc", "nmi", "ari", "macro_acc", "macro_f1", "majority_acc")


@st.composite
def labelings(draw: st.DrawFn, max_groups: int = 5) -> tuple[np.ndarray, np.ndarray]:
    pairs = st.tuples(st.integers(0, max_groups - 1), st.integers(0, max_groups - 1))
    rows = np.array(draw(st.lists(pairs, min_size=1, max_size=60)))
    return rows[:, 0], rows[:, 1]


def best_by_permutation(predicted: np.ndarray, target: np.ndarray) -> int:
    """Most rows that agree under any one-to-one naming of clusters."""
    clusters, classes = np.unique(predicted), np.unique(target)
    names = [*classes, *[-1 - i for i in range(len(clusters))]]
    hits = 0
    for naming in permutations(names, len(clusters)):
        table = dict(zip(clusters, naming))
        hits = max(hits, sum(table[p] == t for p, t in zip(predicted, target)))
    return hits


@settings(max_examples=40, deadline=None)
@given(labelings())
def test_equals_scikit_learn(labels: tuple[np.ndarray, np.ndarray]) -> None:
    predicted, target = labels
    scores = clustering_scores(predicted, target)
    counts, _, _ = contingency(predicted, target)
    assert (counts == contingency_matrix(target, predicted).T).all()
    assert scores["nmi"] == pytest.approx(
        reference.normalized_mutual_info_score(target, predicted), abs=1e-7
    )
    assert scores["ari"] == pytest.approx(
        reference.adjusted_rand_score(target, predicted), abs=1e-12
    )
    named = np.array([scores["matching"].get(int(cluster), -1) for cluster in predicted])
    classes = np.unique(target)
    assert scores["acc"] == pytest.approx(reference.accuracy_score(target, named))
    settings_ = {"labels": classes, "average": "macro", "zero_division": 0}
    assert scores["macro_acc"] == pytest.approx(reference.recall_score(target, named, **settings_))
    assert scores["macro_f1"] == pytest.approx(reference.f1_score(target, named, **settings_))
    recall = reference.recall_score(target, named, labels=classes, average=None, zero_division=0)
    assert list(scores["class_recall"].values()) == pytest.approx(list(recall))
    assert list(scores["class_recall"]) == list(classes)


@settings(max_examples=60, deadline=None)
@given(labelings(max_groups=4))
def test_accuracy_is_the_best_over_all_permutations(labels: tuple[np.ndarray, np.ndarray]) -> None:
    predicted, target = labels
    assert clustering_scores(predicted, target)["acc"] == pytest.approx(
        best_by_permutation(predicted, target) / len(target)
    )


@settings(max_examples=60, deadline=None)
@given(labelings(), st.permutations(range(5)), st.randoms(use_true_random=False))
def test_names_and_order_do_not_matter(labels, names, random) -> None:
    predicted, target = labels
    scores = clustering_scores(predicted, target)
    renamed = clustering_scores(np.array(names)[predicted] * 7 + 3, target)
    for name in ("acc", "nmi", "ari", "majority_acc"):
        assert renamed[name] == pytest.approx(scores[name], abs=1e-12)
    order = list(range(len(target)))
    random.shuffle(order)
    assert clustering_scores(predicted[order], target[order]) == scores


@settings(max_examples=60, deadline=None)
@given(labelings())
def test_bounds_and_perfect_score(labels: tuple[np.ndarray, np.ndarray]) -> None:
    predicted, target = labels
    scores = clustering_scores(predicted, target)
    assert all(0 <= scores[name] <= 1 for name in SCALARS if name != "ari")
    assert scores["majority_acc"] >= scores["acc"] - 1e-12
    assert -1 <= scores["ari"] <= 1
    perfect = clustering_scores(target * 3, target)
    assert all(perfect[name] == pytest.approx(1) for name in SCALARS)


def test_more_clusters_than_classes_and_fewer() -> None:
    target = np.repeat(np.arange(7), 20)
    over = np.arange(140) // 10  # each class split in two
    scores = clustering_scores(over, target)
    assert scores["acc"] == pytest.approx(0.5)
    assert scores["majority_acc"] == 1
    assert len(scores["matching"]) == 7
    under = clustering_scores(target // 4, target)
    assert under["acc"] == pytest.approx(2 / 7)
    assert sum(value == 0 for value in under["class_recall"].values()) == 5


def test_head_medium_and_tail_are_told_by_frequency_not_by_name() -> None:
    sizes = {7: 5, 3: 100, 0: 60, 9: 40, 1: 40, 2: 30, 4: 20, 5: 10, 6: 80, 8: 2}
    target = np.concatenate([np.full(size, name) for name, size in sizes.items()])
    wrong = np.isin(
        target, (3, 5, 8)
    )  # one class of the head and two of the tail get no cluster of their own
    scores = clustering_scores(np.where(wrong, 0, target), target)
    assert (scores["head_acc"], scores["medium_acc"]) == (
        pytest.approx(2 / 3),
        1,
    )  # 3 and 0 share, 3 has more
    assert scores["tail_acc"] == pytest.approx(1 / 3)
    groups = {"head_acc": [3, 6, 0], "medium_acc": [1, 9, 2, 4], "tail_acc": [5, 7, 8]}
    recall = scores["class_recall"]
    for group, members in groups.items():
        assert scores[group] == pytest.approx(np.mean([recall[name] for name in members])), group
    balanced = np.repeat(np.arange(10), 4)
    held_out = clustering_scores(np.where(balanced == 8, 0, balanced), balanced, class_sizes=sizes)
    assert held_out["tail_acc"] == pytest.approx(2 / 3) and held_out["head_acc"] in (
        1,
        pytest.approx(2 / 3),
    )


def test_groups_of_few_classes_and_of_a_hundred() -> None:
    assert group_accuracies({0: 1.0, 1: 0.5}, {0: 9, 1: 1}) == {}
    assert group_accuracies({0: 0.1, 1: 0.2, 2: 0.3}, {0: 1, 1: 2, 2: 3}) == {
        "head_acc": 0.3,
        "medium_acc": 0.2,
        "tail_acc": 0.1,
    }
    hundred = group_accuracies(
        dict(enumerate(range(100))), {name: 100 - name for name in range(100)}
    )
    assert hundred == {"head_acc": 14.5, "medium_acc": 49.5, "tail_acc": 84.5}
    assert imbalance([3, 3, 3, 3, 5, 9, 9]) == 4


def test_tensors_and_arrays_give_the_same() -> None:
    rng = np.random.default_rng(0)
    predicted, target = rng.integers(0, 13, 500), rng.integers(0, 7, 500)
    expected = clustering_scores(predicted, target)
    assert (
        clustering_scores(torch.from_numpy(predicted), torch.from_numpy(target).float()) == expected
    )
    assert clustering_scores(predicted.tolist(), target.astype(np.uint8)) == expected


def test_large_counts_do_not_overflow() -> None:
    predicted = np.repeat([0, 1], 200_000)
    target = np.roll(predicted, 1000)
    scores = clustering_scores(predicted, target)
    assert scores["ari"] == pytest.approx(
        reference.adjusted_rand_score(target, predicted), abs=1e-12
    )


@pytest.mark.parametrize(
    ("predicted", "target", "words"),
    [
        ([0.0, float("nan")], [0, 1], "predicted .*row 1 is nan"),
        ([0, 1], [0.5, 1], "target .*row 0 is 0.5"),
        ([0, 1], [0, -1], "target must not be negative, row 1"),
        ([0, 1, 1], [0, 1], "3 rows, target has 2"),
        ([], [], "non-empty"),
        ([[0], [1]], [0, 1], r"shape \(2, 1\)"),
        (["a", "b"], [0, 1], "whole numbers"),
    ],
)
def test_what_is_no_label_is_refused_in_words(predicted, target, words) -> None:
    with pytest.raises(ValueError, match=words):
        clustering_scores(predicted, target)
