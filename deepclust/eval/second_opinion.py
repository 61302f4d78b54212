"""Calibration without labels: how far clusters agree with independent clusterings of the same features.

Nobody who clusters has labels. What can be had are second opinions: clusterings made by other means from parts of the
features. If two opinions err independently and are calibrated together, the rate at which they agree is their accuracy
(Jiang et al. 2022, generalisation disagreement equality). Opinions that share errors agree on them, and the more alike
two clusterings were made, the more errors they share. So opinions come from two families, and the family that agrees
less with a clustering is taken for it. How far off the estimate is can be measured where there are labels, and is
reported there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from deepclust.eval.calibration import as_probabilities, calibration_error, equal_width_bins, reliability
from deepclust.eval.label_free import as_array
from deepclust.eval.metrics import as_labels, contingency
from deepclust.ops import kmeans
from deepclust.ops.precision import as_rows
from deepclust.ops.spectral import spectral_clusters

MAX_SPECTRAL = 100
"""The most clusters for which spectral opinions are asked: their cost grows with the square of it."""
NEIGHBORS = (10, 30)


def opinions(features: Any, num_clusters: int, *, seed: int = 0) -> dict[str, list[np.ndarray]]:
    """Clusterings (N,) of features (N, D) by family, `k-means` and `spectral`, two of each.

    Each is made from a random half of the D columns, of rows of length one. Above 100 clusters there is k-means alone.
    """
    rows = as_rows(as_array(features))
    x = torch.from_numpy(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))
    random = np.random.default_rng([seed, 11])
    found: dict[str, list[np.ndarray]] = {"k-means": [], "spectral": []}
    for number, neighbors in enumerate(NEIGHBORS):
        first, second = (x[:, np.sort(part)] for part in np.array_split(random.permutation(x.shape[1]), 2))
        second = second if second.shape[1] else first
        labels = kmeans(first, num_clusters, seed=seed + number, num_restarts=3, num_iters=50, spherical=True).labels
        found["k-means"].append(labels.numpy())
        if num_clusters <= MAX_SPECTRAL:
            labels = spectral_clusters(second, num_clusters, num_neighbors=neighbors, seed=seed + number)
            found["spectral"].append(labels.numpy())
    return {family: labels for family, labels in found.items() if labels}


def agreement(predicted: Any, others: Mapping[str, Sequence[Any]]) -> np.ndarray:
    """(N,) share of the opinions that agree with each sample's cluster, of the family that agrees least in all.

    predicted: (N,) clusters; others: by family, clusterings (N,) of the same samples, any names, any number of
    clusters, which are matched one-to-one. Raises ValueError without others, or on labels that are none.
    """
    families = [np.mean([_agree(predicted, other) for other in family], axis=0) for family in others.values()]
    if not families:
        raise ValueError("others holds no clustering: there is nothing to agree with")
    return min(families, key=lambda shares: float(shares.mean()))


def _agree(predicted: Any, other: Any) -> np.ndarray:
    """(N,) bool: whether each sample's cluster is the one that its cluster in `other` is matched to."""
    from scipy.optimize import linear_sum_assignment

    counts, mine, theirs = contingency(predicted, other)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    partner = dict(zip(mine[rows].tolist(), theirs[columns].tolist()))
    return np.array([partner.get(cluster, -1) for cluster in as_labels(predicted, "predicted").tolist()]) == other


def scale(probabilities: Any, temperature: float) -> np.ndarray:
    """(N, K) softmax of log probabilities / temperature; the order within a row stays."""
    logits = np.log(as_probabilities(probabilities).clip(1e-38, 1)) / temperature
    logits -= logits.max(1, keepdims=True)
    p = np.exp(logits)
    return p / p.sum(1, keepdims=True)


def temperature_for(probabilities: Any, mean_confidence: float) -> float:
    """The temperature at which the mean largest probability is `mean_confidence`, from 1e-3 to 1e3.

    Temperature scaling (Guo et al. 2017) without labels: they fit it to the likelihood of held-out labels. The mean
    confidence falls as the temperature rises, so that bisection finds it; what is out of reach gives the nearest end.
    """
    p = as_probabilities(probabilities)
    low, high = np.log(1e-3), np.log(1e3)
    for _ in range(40):
        middle = (low + high) / 2
        confident = float(scale(p, float(np.exp(middle))).max(1).mean()) > mean_confidence
        low, high = (middle, high) if confident else (low, middle)
    return float(np.exp((low + high) / 2))


def constant_confidence(predicted: Any, num_clusters: int, confidence: float) -> np.ndarray:
    """(N, K): every sample's cluster with the same confidence, the rest shared equally by the other clusters."""
    predicted = as_labels(predicted, "predicted")
    confidence = min(1.0, max(confidence, 1 / num_clusters))
    p = np.full((len(predicted), num_clusters), (1 - confidence) / max(1, num_clusters - 1))
    p[np.arange(len(predicted)), predicted] = confidence
    return p


def label_free_calibration(probabilities: Any, agreed: np.ndarray) -> dict[str, Any]:
    """What can be said of the calibration of (N, K) probabilities from `agreement` (N,) with second opinions.

    Returns `accuracy` (mean agreement, an estimate of the accuracy), `ece` (that of the confidences against the
    agreement, in 15 bins of equal width), `temperature` (the one at which the mean confidence is that accuracy) and
    `reliability` (its bins).
    """
    p = as_probabilities(probabilities)
    confidence = p.max(1)
    return {
        "accuracy": float(agreed.mean()),
        "ece": calibration_error(confidence, agreed, equal_width_bins(confidence, 15)),
        "temperature": temperature_for(p, float(agreed.mean())),
        "reliability": reliability(confidence, agreed),
    }
