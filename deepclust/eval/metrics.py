"""Scores of a clustering against labels, all from one contingency table.

Accuracies need clusters to be named after classes. `acc` names them one-to-one (Hungarian matching:
a cluster without a class counts as wrong), `majority_acc` many-to-one (each cluster takes its
commonest class), the usual figure when there are more clusters than classes. NMI and ARI need no
names. Where classes differ in size, `acc` counts images (micro) and `macro_acc` classes;
`head_acc`, `medium_acc` and `tail_acc` are its parts by frequency.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

LONG_TAILED = 2.0
"""Images of the largest class per image of the smallest from which runs give scores by class."""
BY_CLASS = ("macro_acc", "macro_f1", "head_acc", "medium_acc", "tail_acc")
"""Scores to which every class counts the same."""


def as_labels(values: Any, name: str) -> np.ndarray:
    """Labels (N,) int64 from a tensor, array or sequence of whole numbers >= 0.

    Raises:
        ValueError: an empty or non-flat input, NaN, fractions or negative values; it calls the
            input `name`.
    """
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if array.ndim != 1 or not array.size:
        raise ValueError(
            f"{name} must be a flat, non-empty list of labels, it has shape {array.shape}"
        )
    if array.dtype.kind not in "iubf":
        raise ValueError(f"{name} must hold whole numbers, it holds {array.dtype}")
    if array.dtype.kind == "f":
        # Labels read from files are often floats: whole ones are taken.
        whole = np.isfinite(array) & (array == np.round(array))
        if not whole.all():
            row = int(np.flatnonzero(~whole)[0])
            raise ValueError(f"{name} must hold whole numbers, row {row} is {array[row]}")
    if array.dtype.kind in "if" and array.min() < 0:
        row = int(array.argmin())
        raise ValueError(
            f"{name} must not be negative, row {row} is {array[row]}: leave out what has no label"
        )
    return array.astype(np.int64)


def contingency(predicted: Any, target: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Contingency table of clusters and classes: how often each cluster meets each class.

    Args:
        predicted: (N,) clusters, whole numbers >= 0.
        target: (N,) classes, whole numbers >= 0.

    Returns:
        Counts (K, C) int64, the K cluster values and the C class values, ascending.

    Raises:
        ValueError: labels that are no labels, or lengths that differ.
    """
    predicted = as_labels(predicted, "predicted")
    target = as_labels(target, "target")
    if len(predicted) != len(target):
        raise ValueError(
            f"predicted has {len(predicted)} rows, target has {len(target)}: they must be as many"
        )
    clusters, rows = np.unique(predicted, return_inverse=True)
    classes, columns = np.unique(target, return_inverse=True)
    # Each pair is one number, so that one count of numbers makes the table.
    pairs = rows * len(classes) + columns
    counts = np.bincount(pairs, minlength=len(clusters) * len(classes))
    return counts.reshape(len(clusters), len(classes)), clusters, classes


def clustering_scores(
    predicted: Any,
    target: Any,
    *,
    class_sizes: Mapping[int, int] | None = None,
) -> dict[str, Any]:
    """Agreement of clusters with classes; their numbers may differ.

    Args:
        predicted: (N,) clusters, whole numbers >= 0, tensor, array or sequence.
        target: (N,) classes, likewise.
        class_sizes: {class: images} by which classes are told frequent from rare, where another set
            was trained on; the frequencies in `target` if None.

    Returns:
        Fractions, of which each has a key:
        `acc`: accuracy after one-to-one matching.
        `nmi`: normalised mutual information, by the arithmetic mean.
        `ari`: adjusted Rand index (Hubert and Arabie 1985).
        `macro_acc`, `macro_f1`: means over classes of recall and F1 after the one-to-one matching;
        a class without a cluster counts 0.
        `majority_acc`: accuracy if each cluster is named after its commonest class.
        `head_acc`, `medium_acc`, `tail_acc`: see `group_accuracies`.
        And `matching` {cluster: class}, `class_recall` {class: recall}.

    Raises:
        ValueError: as `contingency`.
    """
    import torch
    from scipy.optimize import linear_sum_assignment

    from deepclust.ops.agreement import normalized_mutual_information

    predicted = as_labels(predicted, "predicted")
    target = as_labels(target, "target")
    counts, clusters, classes = contingency(predicted, target)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    hits = np.zeros(len(classes))
    hits[columns] = counts[rows, columns]
    matched_sizes = np.zeros(len(classes))
    matched_sizes[columns] = counts.sum(1)[rows]
    recall = hits / counts.sum(0)
    # F1 = 2 tp / (2 tp + fp + fn), and the two sizes hold tp + fn and tp + fp.
    f1 = 2 * hits / (counts.sum(0) + matched_sizes)
    class_recall = {int(name): float(value) for name, value in zip(classes, recall)}
    if class_sizes is None:
        class_sizes = {int(name): int(size) for name, size in zip(classes, counts.sum(0))}
    nmi = normalized_mutual_information(torch.from_numpy(predicted), torch.from_numpy(target))
    matching = {int(clusters[row]): int(classes[column]) for row, column in zip(rows, columns)}
    return {
        "acc": float(hits.sum() / counts.sum()),
        "nmi": float(nmi),
        "ari": adjusted_rand_index(counts),
        "macro_acc": float(recall.mean()),
        "macro_f1": float(f1.mean()),
        "majority_acc": float(counts.max(1).sum() / counts.sum()),
        **group_accuracies(class_recall, class_sizes),
        "matching": matching,
        "class_recall": class_recall,
    }


def group_accuracies(
    class_recall: Mapping[int, float],
    class_sizes: Mapping[int, int],
) -> dict[str, float]:
    """Mean recall of the 30 % most frequent classes, the next 40 % and the 30 % rarest.

    The parts are those of P2OT (Zhang et al. 2024, section 5.1). Head and tail have 3 C // 10
    classes each, at least one. Empty for fewer than 3 classes, which have no such parts.

    Args:
        class_recall: {class: recall}.
        class_sizes: {class: images}; a class that is not in it has none.

    Returns:
        `head_acc`, `medium_acc` and `tail_acc`.
    """
    if len(class_recall) < 3:
        return {}
    # Among equally frequent classes the smaller number comes first, so that the parts are fixed.
    names = sorted(class_recall, key=lambda name: (-class_sizes.get(name, 0), name))
    edge = max(1, 3 * len(names) // 10)

    def mean_recall(members: list[int]) -> float:
        return float(np.mean([class_recall[name] for name in members]))

    return {
        "head_acc": mean_recall(names[:edge]),
        "medium_acc": mean_recall(names[edge:-edge]),
        "tail_acc": mean_recall(names[-edge:]),
    }


def imbalance(classes: Any) -> float:
    """Images of the largest class per image of the smallest, of the classes that occur in (N,)."""
    sizes = np.unique(as_labels(classes, "classes"), return_counts=True)[1]
    return float(sizes.max() / sizes.min())


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution in proportion to counts (any shape, sum > 0)."""
    positive = counts[counts > 0].astype(np.float64)
    total = positive.sum()
    # −Σ p log p with p = n / total, without dividing first. Rounding may lead just below 0.
    return max(0.0, float(np.log(total) - (positive * np.log(positive)).sum() / total))


def adjusted_rand_index(counts: np.ndarray) -> float:
    """Rand index corrected for chance (Hubert and Arabie 1985, equation 5), from counts (K, C)."""

    def pairs(sizes: np.ndarray) -> float:
        # float64, as products of two numbers of pairs go beyond int64.
        sizes = sizes.astype(np.float64)
        return float((sizes * (sizes - 1) / 2).sum())

    together = pairs(counts)
    of_clusters = pairs(counts.sum(1))
    of_classes = pairs(counts.sum(0))
    # All pairs are together on both sides, or none is: the quotient would be 0 / 0.
    if together == of_clusters == of_classes:
        return 1.0
    expected = of_clusters * of_classes / pairs(counts.sum(keepdims=True))
    return (together - expected) / ((of_clusters + of_classes) / 2 - expected)
