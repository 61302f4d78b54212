"""Scores of a clustering against labels, all from one contingency table.

Accuracies need clusters to be named after classes. `acc` names them one-to-one (Hungarian matching: a cluster without a
class counts as wrong), `majority_acc` many-to-one (each cluster takes its commonest class), the usual figure when there
are more clusters than classes. NMI and ARI need no names. Where classes differ in size, `acc` counts images (micro) and
`macro_acc` classes; `head_acc`, `medium_acc` and `tail_acc` are its parts by frequency.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

LONG_TAILED = 2.0
"""A set whose largest class has so many times the images of its smallest is reported by class as well."""
BY_CLASS = ("macro_acc", "macro_f1", "head_acc", "medium_acc", "tail_acc")
"""Scores to which every class counts the same."""


def as_labels(values: Any, name: str) -> np.ndarray:
    """(N,) int64 from a tensor, array or sequence of whole numbers >= 0.

    Raises ValueError, naming `name`, on an empty or non-flat input, NaN, fractions and negative values.
    """
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} must be a flat, non-empty list of labels, it has shape {array.shape}")
    if array.dtype.kind not in "iubf":
        raise ValueError(f"{name} must hold whole numbers, it holds {array.dtype}")
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.round(array)).all()):
        row = int(np.flatnonzero(~(np.isfinite(array) & (array == np.round(array))))[0])
        raise ValueError(f"{name} must hold whole numbers, row {row} is {array[row]}")
    if array.dtype.kind in "if" and array.min() < 0:
        row = int(array.argmin())
        raise ValueError(f"{name} must not be negative, row {row} is {array[row]}: leave out what has no label")
    return array.astype(np.int64)


def contingency(predicted: Any, target: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often each cluster meets each class.

    predicted, target: (N,) labels of any values. Returns counts (K, C) int64, the K cluster values and the C class
    values, ascending. Raises ValueError on labels that are no labels or lengths that differ.
    """
    predicted, target = as_labels(predicted, "predicted"), as_labels(target, "target")
    if len(predicted) != len(target):
        raise ValueError(f"predicted has {len(predicted)} rows, target has {len(target)}: they must be as many")
    clusters, rows = np.unique(predicted, return_inverse=True)
    classes, columns = np.unique(target, return_inverse=True)
    counts = np.bincount(rows * len(classes) + columns, minlength=len(clusters) * len(classes))
    return counts.reshape(len(clusters), len(classes)), clusters, classes


def clustering_scores(predicted: Any, target: Any, *, class_sizes: Mapping[int, int] | None = None) -> dict[str, Any]:
    """Agreement of clusters with classes; the number of clusters may differ from the number of classes.

    predicted, target: (N,) whole numbers >= 0, tensor or NumPy, any values. Returns, as fractions,
    `acc` (one-to-one matched / N), `nmi` (arithmetic mean), `ari` (Hubert and Arabie 1985), `macro_acc` and `macro_f1`
    (means over classes of recall and F1 after the one-to-one matching; a class without a cluster counts 0),
    `majority_acc`, `head_acc`, `medium_acc`, `tail_acc` (see `group_accuracies`; by the frequencies in `target`, or by
    `class_sizes` {class: images} where another set was trained on), and `matching` {cluster: class},
    `class_recall` {class: recall}.
    Raises ValueError as `contingency` does.
    """
    from scipy.optimize import linear_sum_assignment

    counts, clusters, classes = contingency(predicted, target)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    hits = np.zeros(len(classes))
    hits[columns] = counts[rows, columns]
    matched_sizes = np.zeros(len(classes))
    matched_sizes[columns] = counts.sum(1)[rows]
    recall = hits / counts.sum(0)
    f1 = 2 * hits / (counts.sum(0) + matched_sizes)
    class_recall = {int(name): float(value) for name, value in zip(classes, recall)}
    own_sizes = {int(name): int(size) for name, size in zip(classes, counts.sum(0))}
    return {
        "acc": float(hits.sum() / counts.sum()),
        "nmi": normalized_mutual_information(counts),
        "ari": adjusted_rand_index(counts),
        "macro_acc": float(recall.mean()),
        "macro_f1": float(f1.mean()),
        "majority_acc": float(counts.max(1).sum() / counts.sum()),
        **group_accuracies(class_recall, own_sizes if class_sizes is None else class_sizes),
        "matching": {int(clusters[row]): int(classes[column]) for row, column in zip(rows, columns)},
        "class_recall": class_recall,
    }


def group_accuracies(class_recall: Mapping[int, float], class_sizes: Mapping[int, int]) -> dict[str, float]:
    """Mean recall of the 30 % most frequent classes, of the next 40 % and of the 30 % rarest (P2OT, section 5.1).

    class_recall: {class: recall}. class_sizes: {class: images}, 0 where a class is not in it; among equally frequent
    classes the smaller number comes first. Head and tail have 3 C // 10 classes each, at least one. Empty for C < 3.
    """
    if len(class_recall) < 3:
        return {}
    names = sorted(class_recall, key=lambda name: (-class_sizes.get(name, 0), name))
    edge = max(1, 3 * len(names) // 10)
    groups = {"head_acc": names[:edge], "medium_acc": names[edge:-edge], "tail_acc": names[-edge:]}
    return {group: float(np.mean([class_recall[name] for name in members])) for group, members in groups.items()}


def imbalance(classes: Any) -> float:
    """Images of the largest class per image of the smallest one among those that occur in (N,) `classes`."""
    sizes = np.unique(as_labels(classes, "classes"), return_counts=True)[1]
    return float(sizes.max() / sizes.min())


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that `counts` (any shape, sum > 0) are in proportion to."""
    positive = counts[counts > 0].astype(np.float64)
    total = positive.sum()
    return max(0.0, float(np.log(total) - (positive * np.log(positive)).sum() / total))


def normalized_mutual_information(counts: np.ndarray) -> float:
    """Mutual information over the arithmetic mean of both entropies, from counts (K, C).

    1 when both sides are one group, 0 when only one is.
    """
    if counts.shape == (1, 1):
        return 1.0
    of_clusters, of_classes = entropy(counts.sum(1)), entropy(counts.sum(0))
    information = of_clusters + of_classes - entropy(counts)
    return float(np.clip(2 * information / (of_clusters + of_classes), 0.0, 1.0))


def adjusted_rand_index(counts: np.ndarray) -> float:
    """Rand index corrected for chance (Hubert and Arabie 1985, equation 5), from counts (K, C), in float64."""

    def pairs(sizes: np.ndarray) -> float:
        sizes = sizes.astype(np.float64)
        return float((sizes * (sizes - 1) / 2).sum())

    together, of_clusters, of_classes = pairs(counts), pairs(counts.sum(1)), pairs(counts.sum(0))
    if together == of_clusters == of_classes:
        return 1.0
    expected = of_clusters * of_classes / pairs(counts.sum(keepdims=True))
    return (together - expected) / ((of_clusters + of_classes) / 2 - expected)
