"""Report on a stage's confidences: scored where there are labels, else estimated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepclust.eval.calibration import (
    NUM_BINS,
    as_probabilities,
    calibration_error,
    calibration_scores,
    equal_width_bins,
    reliability,
)
from deepclust.eval.label_free import as_array, sample_rows
from deepclust.eval.metrics import as_labels, contingency
from deepclust.heads.base import Head
from deepclust.model import Network
from deepclust.ops import kmeans
from deepclust.ops.precision import as_rows
from deepclust.ops.spectral import spectral_clusters

MAX_SCORED = 50_000
"""Samples whose confidences are scored; of more, so many are drawn."""
MAX_REFERENCE = 5_000
"""Samples that are clustered for reference; of more, so many are drawn."""
CHUNK = 4096
"""Samples that a head sees at a time."""


@dataclass(frozen=True)
class Reference:
    """Independent clusterings of some samples, by which all stages' confidences are measured."""

    rows: np.ndarray
    """(M,) int64, the samples that were clustered."""
    families: Mapping[str, list[np.ndarray]]
    """Clusterings (M,) of them by family; see `independent_clusterings`."""


def reference_clusterings(features: np.ndarray, num_clusters: int) -> Reference:
    """Independent clusterings of at most 5,000 of the features (N, D)."""
    # The same rows for every stage, as the seed is fixed.
    rows = sample_rows(len(features), MAX_REFERENCE, 0)
    clusterings = independent_clusterings(features[rows], min(num_clusters, len(rows)))
    return Reference(rows, clusterings)


def confidence_report(
    network: Network,
    features: np.ndarray,
    classes: np.ndarray | None,
    reference: Reference,
    num_clusters: int,
) -> dict[str, Any]:
    """A stage's `calibration` for summary.json.

    It compares variants of the probabilities, none of which saw a label:
    `predicted`, what the run gives out;
    `uncalibrated`, those of the head beneath a calibration, where there is one;
    `temperature`, the head's (those beneath a calibration) scaled so that their mean confidence is
    the estimated accuracy;
    `constant`, that estimate for every sample.

    Args:
        network: the stage's.
        features: (N, D) of the stage's samples.
        classes: (N,), None without labels.
        reference: independent clusterings of the same samples.
        num_clusters: K.

    Returns:
        `samples`: how many were scored, 50,000 at most.
        `estimate`: without labels, `accuracy`, `ece` and `temperature`; where there are labels also
        `accuracy_error` and `ece_error`, estimate - truth.
        `scores`: those of `calibration_scores` by variant, empty without labels.
        `reliability`: bins by variant; without labels those of the estimate, as `predicted`.
    """
    rows = sample_rows(len(features), MAX_SCORED, 0)
    estimate = _estimate(network, features, reference, network.head.predict)
    bins = estimate.pop("reliability")
    if classes is None:
        return {
            "samples": len(rows),
            "estimate": estimate,
            "scores": {},
            "reliability": {"predicted": bins},
        }
    variants = _variants(network, features, rows, reference, num_clusters)
    scores = {name: calibration_scores(p, classes[rows]) for name, p in variants.items()}
    truth = scores["predicted"]
    estimate["accuracy_error"] = estimate["accuracy"] - truth["acc"]
    estimate["ece_error"] = estimate["ece"] - truth["ece"]
    reliability = {name: each.pop("reliability") for name, each in scores.items()}
    return {
        "samples": len(rows),
        "estimate": estimate,
        "scores": scores,
        "reliability": reliability,
    }


def _variants(
    network: Network,
    features: np.ndarray,
    rows: np.ndarray,
    reference: Reference,
    num_clusters: int,
) -> dict[str, np.ndarray]:
    """Probabilities (M, K) of the scored rows (M,) by variant; see `confidence_report`."""
    head = network.head
    raw = _probabilities(network, features[rows], head.predict)
    variants = {"predicted": raw}
    # A head that does not calibrate has no probabilities beneath: `uncalibrated` gives `predict`'s.
    if type(head).uncalibrated is not Head.uncalibrated:
        raw = _probabilities(network, features[rows], head.uncalibrated)
        variants["uncalibrated"] = raw
    estimate = _estimate(network, features, reference, head.uncalibrated)
    variants["temperature"] = scale(raw, estimate["temperature"])
    variants["constant"] = constant_confidence(raw.argmax(1), num_clusters, estimate["accuracy"])
    return variants


def _estimate(
    network: Network,
    features: np.ndarray,
    reference: Reference,
    function: Callable[[Tensor], Tensor],
) -> dict[str, Any]:
    """`label_free_calibration` of the probabilities that a function gives the reference's rows."""
    p = _probabilities(network, features[reference.rows], function)
    return label_free_calibration(p, agreement(p.argmax(1), reference.families))


@torch.no_grad()
def _probabilities(
    network: Network,
    features: np.ndarray,
    function: Callable[[Tensor], Tensor],
) -> np.ndarray:
    """Probabilities (N, K) of features (N, D) by a function of the network's head."""
    device = next(network.parameters()).device
    network.eval()
    parts = torch.from_numpy(features).split(CHUNK)
    return torch.cat([function(part.to(device)).cpu() for part in parts]).numpy()


MAX_SPECTRAL = 100
"""The most clusters for which there is a spectral family: its cost grows with the square of it."""
NEIGHBORS = (10, 30)
"""Neighbours in the graphs of the two spectral clusterings: unlike graphs err unlike."""
TEMPERATURES = (1e-3, 1e3)
"""Range in which a temperature is sought: one-hot to uniform for any usual probabilities."""
BISECTIONS = 40
"""Halvings of that range's logarithm: to the 11th digit."""


def independent_clusterings(
    features: Any,
    num_clusters: int,
    *,
    seed: int = 0,
) -> dict[str, list[np.ndarray]]:
    """Clusterings (N,) of features by family, `k-means` and `spectral`, two of each.

    Each is made from a random half of the D columns. Above 100 clusters there is k-means alone.

    Args:
        features: (N, D), tensor or array, compared by direction.
        num_clusters: K.
        seed: makes the result repeatable.
    """
    rows = as_rows(as_array(features))
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    x = torch.from_numpy(rows / np.maximum(lengths, 1e-12))
    # The second entry keeps this stream apart from other draws by the same seed.
    random = np.random.default_rng([seed, 11])
    families: dict[str, list[np.ndarray]] = {"k-means": [], "spectral": []}
    for number, neighbors in enumerate(NEIGHBORS):
        halves = np.array_split(random.permutation(x.shape[1]), 2)
        first, second = (x[:, np.sort(half)] for half in halves)
        # One column has no second half.
        second = second if second.shape[1] else first
        result = kmeans(
            first,
            num_clusters,
            seed=seed + number,
            num_restarts=3,
            num_iters=50,
            spherical=True,
        )
        families["k-means"].append(result.labels.numpy())
        if num_clusters <= MAX_SPECTRAL:
            labels = spectral_clusters(
                second, num_clusters, num_neighbors=neighbors, seed=seed + number
            )
            families["spectral"].append(labels.numpy())
    return {family: clusterings for family, clusterings in families.items() if clusterings}


def agreement(predicted: Any, others: Mapping[str, Sequence[Any]]) -> np.ndarray:
    """Share (N,) of clusterings that agree with each sample's cluster, of the family with least.

    Args:
        predicted: (N,) clusters.
        others: by family, clusterings (N,) of the same samples, with any names and any number of
            clusters, which are matched one-to-one.

    Raises:
        ValueError: others is empty, or labels are none.
    """
    families = []
    for clusterings in others.values():
        families.append(np.mean([_agree(predicted, other) for other in clusterings], axis=0))
    if not families:
        raise ValueError("others holds no clustering: there is nothing to agree with")
    return min(families, key=lambda shares: float(shares.mean()))


def _agree(predicted: Any, other: Any) -> np.ndarray:
    """Whether each sample's cluster is the one its cluster in `other` is matched to, (N,) bool."""
    from scipy.optimize import linear_sum_assignment

    counts, clusters, other_clusters = contingency(predicted, other)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    partner_of = dict(zip(clusters[rows].tolist(), other_clusters[columns].tolist()))
    labels = as_labels(predicted, "predicted").tolist()
    # −1 is no cluster: those that were left without a partner agree with none.
    partners = np.array([partner_of.get(cluster, -1) for cluster in labels])
    return partners == other


def scale(probabilities: Any, temperature: float) -> np.ndarray:
    """Softmax (N, K) of log probabilities / temperature; the order within a row stays."""
    # 1e-38: just above the least normal float32; a probability of 0 has no logarithm.
    logits = np.log(as_probabilities(probabilities).clip(1e-38, 1)) / temperature
    logits -= logits.max(1, keepdims=True)
    p = np.exp(logits)
    return p / p.sum(1, keepdims=True)


def temperature_for(probabilities: Any, mean_confidence: float) -> float:
    """Temperature at which the mean largest probability is `mean_confidence`, from 1e-3 to 1e3.

    It is temperature scaling (Guo et al. 2017) without labels: they fit the temperature to the
    likelihood of held-out labels. What is out of reach gives the nearest end.
    """
    p = as_probabilities(probabilities)
    # The mean confidence falls as the temperature rises, so that bisection finds it.
    low = np.log(TEMPERATURES[0])
    high = np.log(TEMPERATURES[1])
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        mean = float(scale(p, float(np.exp(middle))).max(1).mean())
        if mean > mean_confidence:
            low = middle
        else:
            high = middle
    return float(np.exp((low + high) / 2))


def constant_confidence(predicted: Any, num_clusters: int, confidence: float) -> np.ndarray:
    """Probabilities (N, K) that give every sample's cluster (N,) the same confidence.

    The other clusters share the rest equally. The confidence is at least 1/K, so that the cluster
    stays the most probable.
    """
    predicted = as_labels(predicted, "predicted")
    confidence = min(1.0, max(confidence, 1 / num_clusters))
    p = np.full((len(predicted), num_clusters), (1 - confidence) / max(1, num_clusters - 1))
    p[np.arange(len(predicted)), predicted] = confidence
    return p


def label_free_calibration(probabilities: Any, agreed: np.ndarray) -> dict[str, Any]:
    """Estimate of a clustering's calibration from its agreement with independent clusterings.

    Args:
        probabilities: (N, K), rows sum to 1.
        agreed: (N,) from `agreement`.

    Returns:
        `accuracy`: mean agreement, an estimate of the accuracy.
        `ece`: calibration error of the confidences against the agreement, in 15 bins of equal
        width.
        `temperature`: the one at which the mean confidence is that accuracy.
        `reliability`: the bins.
    """
    p = as_probabilities(probabilities)
    confidence = p.max(1)
    return {
        "accuracy": float(agreed.mean()),
        "ece": calibration_error(confidence, agreed, equal_width_bins(confidence, NUM_BINS)),
        "temperature": temperature_for(p, float(agreed.mean())),
        "reliability": reliability(confidence, agreed),
    }
