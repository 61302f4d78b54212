"""How much of the classes the features hold: a weighted kNN vote and a linear classifier, on frozen features.

Both read labels and give a figure for the report; neither is ever used to choose a model. Without a test set they are
cross-validated: every row is scored once, by a classifier that has not seen it.
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
"""(train features, train classes, test features, number of classes) to predicted classes of the test rows."""


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
    """Accuracy in [0, 1] of a vote of the k nearest neighbours by cosine, a vote weighing exp(cosine / temperature).

    features: (N, D) tensor or array, labels: (N,). test: held-out (features, labels); else `folds`-fold
    cross-validation, rows dealt by `seed`. k is cut to the rows there are. The vote is that of Wu et al. 2018 (instance
    discrimination), section 3.4. Raises ValueError on bad labels or shapes.
    """
    from deepclust.ops import knn

    def classify(train: Tensor, classes: Tensor, queries: Tensor, num_classes: int) -> Tensor:
        similarity, index = knn(queries, train, k=min(k, len(train)), metric="cosine")
        weights = ((similarity - 1) / temperature).exp()  # <= 1: the same vote as exp(s / T), without its overflow
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
    """Accuracy in [0, 1] of multinomial logistic regression on standardised features, fitted by L-BFGS from zero.

    features: (N, D), labels: (N,); test, folds, seed as in `knn_probe`. weight_decay: factor of half the squared
    weights beside the mean cross-entropy, which makes the optimum unique. Raises ValueError on bad labels or shapes.
    """

    def classify(train: Tensor, classes: Tensor, queries: Tensor, num_classes: int) -> Tensor:
        mean, scale = train.mean(0), train.std(0, correction=0).clamp_min(1e-6)
        weight, bias = _fit_linear((train - mean) / scale, classes, num_classes, weight_decay)
        return ((queries - mean) / scale @ weight + bias).argmax(1)

    return _accuracy(classify, features, labels, test, folds, seed)


def _fit_linear(x: Tensor, classes: Tensor, num_classes: int, weight_decay: float) -> tuple[Tensor, Tensor]:
    """Weights (D, C) and bias (C,) that minimise mean cross-entropy + weight_decay / 2 · |weights|²; x: (N, D)."""
    weight = x.new_zeros(x.shape[1], num_classes).requires_grad_()
    bias = x.new_zeros(num_classes).requires_grad_()
    solver = torch.optim.LBFGS([weight, bias], max_iter=100, tolerance_grad=1e-4, line_search_fn="strong_wolfe")

    def objective() -> float:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, classes) + weight_decay / 2 * weight.square().sum()
        loss.backward()
        return float(loss.detach())

    with torch.enable_grad():
        solver.step(objective)
    return weight.detach(), bias.detach()


def _accuracy(
    classify: Classify, features: Any, labels: Any, test: tuple[Any, Any] | None, folds: int, seed: int
) -> float:
    """Share of rows classified rightly: those of `test`, or every row once in turn."""
    x, y = _checked(features, labels, "features")
    if test is not None:
        test_x, test_y = _checked(*test, "test features")
        classes = np.unique(y)
        predicted = classify(x, _codes(y, classes, x), test_x.to(x), len(classes))
        return float((classes[predicted.cpu().numpy()] == test_y).mean())
    if not 2 <= folds <= len(y):
        raise ValueError(f"folds must be between 2 and the {len(y)} rows, it is {folds}")
    classes = np.unique(y)
    codes = _codes(y, classes, x)
    fold = torch.from_numpy(np.random.default_rng(seed).permutation(len(y)) % folds).to(x.device)
    hits = 0
    for number in range(folds):
        held_out = fold == number
        predicted = classify(x[~held_out], codes[~held_out], x[held_out], len(classes))
        hits += int((predicted == codes[held_out]).sum())
    return hits / len(y)


def _checked(features: Any, labels: Any, name: str) -> tuple[Tensor, np.ndarray]:
    """Features (N, D) as float32, or float64 as `plain` has it, on their device and labels (N,) int64.

    Raises ValueError where they do not fit together.
    """
    from deepclust.ops.precision import plain

    x, y = plain(torch.as_tensor(features).detach()), as_labels(labels, f"labels of {name}")
    if x.ndim != 2 or len(x) != len(y):
        raise ValueError(f"{name} must have one row for each of {len(y)} labels, it has shape {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        row = int((~x.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"{name} must be finite, row {row} is not")
    return x, y


def _codes(labels: np.ndarray, classes: np.ndarray, like: Tensor) -> Tensor:
    """Labels as positions in `classes`, on the device of `like`."""
    return torch.from_numpy(np.searchsorted(classes, labels)).to(like.device)
