"""Probes of frozen features by labels: accuracy of a weighted kNN vote and of a linear classifier.

Both give a figure for the report; neither is ever used to choose a model. Without a test set they
are cross-validated: every row is scored once, by a classifier that has not seen it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from deepclust.eval.metrics import as_labels

Classify = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(train features (N, D), train classes (N,), test features (M, D), C) → predicted classes (M,)."""


def knn_probe(
    features: Any,
    labels: Any,
    *,
    k: int = 20,
    temperature: float = 0.07,
    folds: int = 5,
    test: tuple[Any, Any] | None = None,
    seed: int = 0,
) -> float:
    """Accuracy in [0, 1] of a weighted vote of the k nearest neighbours by cosine.

    A vote weighs exp(cosine / temperature), as in Wu et al. 2018 (instance discrimination, section
    3.4).

    Args:
        features: (N, D) tensor or array.
        labels: (N,) classes, whole numbers >= 0.
        k: neighbours that vote, cut to the rows there are.
        temperature: the paper's.
        folds: of the cross-validation where there is no test set.
        test: held-out (features, labels), or None for cross-validation.
        seed: of the deal of rows to folds.

    Raises:
        ValueError: bad labels or shapes.
    """
    from deepclust.ops import knn

    def classify(train: Tensor, classes: Tensor, queries: Tensor, num_classes: int) -> Tensor:
        similarity, index = knn(queries, train, k=min(k, len(train)), metric="cosine")
        # exp((s - 1) / T) is at most 1: the same vote as exp(s / T), without its overflow.
        weights = ((similarity - 1) / temperature).exp()
        votes = torch.zeros(len(queries), num_classes, dtype=weights.dtype, device=weights.device)
        return votes.scatter_add_(1, classes[index], weights).argmax(1)

    return _accuracy(classify, features, labels, test, folds, seed)


def linear_probe(
    features: Any,
    labels: Any,
    *,
    weight_decay: float = 1e-3,
    folds: int = 5,
    test: tuple[Any, Any] | None = None,
    seed: int = 0,
) -> float:
    """Accuracy in [0, 1] of multinomial logistic regression on standardised features.

    Args:
        features: (N, D) tensor or array.
        labels: (N,) classes, whole numbers >= 0.
        weight_decay: factor of half the squared weights beside the mean cross-entropy; any positive
            one makes the optimum unique.
        folds: of the cross-validation where there is no test set.
        test: held-out (features, labels), or None for cross-validation.
        seed: of the deal of rows to folds.

    Raises:
        ValueError: bad labels or shapes.
    """

    def classify(train: Tensor, classes: Tensor, queries: Tensor, num_classes: int) -> Tensor:
        # By the training rows' moments alone: the test rows are not to be seen. A constant column
        # stays 0.
        mean = train.mean(0)
        scale = train.std(0, correction=0).clamp_min(1e-6)
        weight, bias = _fit_linear((train - mean) / scale, classes, num_classes, weight_decay)
        return ((queries - mean) / scale @ weight + bias).argmax(1)

    return _accuracy(classify, features, labels, test, folds, seed)


def _fit_linear(
    x: Tensor, classes: Tensor, num_classes: int, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """Weights (D, C) and bias (C,) of least mean cross-entropy + weight_decay / 2 · |weights|².

    x: (N, D). classes: (N,) int64.
    """
    # The problem is convex, so that the start does not matter: L-BFGS from zero.
    weight = x.new_zeros(x.shape[1], num_classes).requires_grad_()
    bias = x.new_zeros(num_classes).requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=100,
        tolerance_grad=1e-4,
        line_search_fn="strong_wolfe",
    )

    def objective() -> float:
        solver.zero_grad()
        penalty = weight_decay / 2 * weight.square().sum()
        loss = F.cross_entropy(x @ weight + bias, classes) + penalty
        loss.backward()
        return float(loss.detach())

    with torch.enable_grad():
        solver.step(objective)
    return weight.detach(), bias.detach()


def _accuracy(
    classify: Classify,
    features: Any,
    labels: Any,
    test: tuple[Any, Any] | None,
    folds: int,
    seed: int,
) -> float:
    """Share of rows classified rightly: those of `test`, or all by cross-validation."""
    x, y = _checked(features, labels, "features")
    classes = np.unique(y)
    codes = torch.from_numpy(np.searchsorted(classes, y)).to(x.device)
    if test is not None:
        test_x, test_y = _checked(*test, "test features")
        predicted = classify(x, codes, test_x.to(x), len(classes))
        # As class values: a class of the test rows that was not trained on counts as wrong.
        return float((classes[predicted.cpu().numpy()] == test_y).mean())
    if not 2 <= folds <= len(y):
        raise ValueError(f"folds must be between 2 and the {len(y)} rows, it is {folds}")
    # Folds of equal size, up to one row.
    fold = torch.from_numpy(np.random.default_rng(seed).permutation(len(y)) % folds).to(x.device)
    hits = 0
    for number in range(folds):
        held_out = fold == number
        predicted = classify(x[~held_out], codes[~held_out], x[held_out], len(classes))
        hits += int((predicted == codes[held_out]).sum())
    return hits / len(y)


def _checked(features: Any, labels: Any, name: str) -> tuple[Tensor, np.ndarray]:
    """Features (N, D) float32, or float64 as `plain` has it, on their device and labels (N,) int64.

    Raises ValueError, with the name, where they do not fit together or a row is not finite.
    """
    from deepclust.ops.precision import plain

    x = plain(torch.as_tensor(features).detach())
    y = as_labels(labels, f"labels of {name}")
    if x.ndim != 2 or len(x) != len(y):
        raise ValueError(
            f"{name} must have one row for each of {len(y)} labels, it has shape {tuple(x.shape)}"
        )
    if not bool(x.isfinite().all()):
        row = int((~x.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"{name} must be finite, row {row} is not")
    return x, y
