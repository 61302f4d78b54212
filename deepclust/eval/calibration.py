"""How far probabilities can be trusted: calibration and ranking of confidences against labels.

A clustering names no classes, so clusters are first matched one-to-one to classes (Hungarian, on the predicted
clusters); a sample of a cluster without a class counts as wrong. The confidence of a sample is its largest probability.
A low calibration error alone proves little: a constant confidence equal to the accuracy has an error of 0, and an AUROC
of one half.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from deepclust.eval.metrics import as_labels, clustering_scores

NUM_BINS = 15
FLOOR = 1e-12
"""The least probability whose logarithm is taken; a class without a cluster has none."""


class Matched(NamedTuple):
    """Probabilities in terms of classes: confidence (N,), correct (N,) bool, of_class (N,) = p of the true class."""

    confidence: np.ndarray
    correct: np.ndarray
    of_class: np.ndarray


def as_probabilities(values: Any, name: str = "probabilities") -> np.ndarray:
    """(N, K) float64 from a tensor or array whose rows are distributions.

    Raises ValueError, naming the first bad row, on another shape, NaN, values outside [0, 1] and sums that are not 1.
    """
    array = np.asarray(values.detach().cpu().double() if hasattr(values, "detach") else values, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{name} must have one row of K probabilities for each sample, it has shape {array.shape}")
    bad = ~(np.isfinite(array).all(1) & (array >= 0).all(1) & (np.abs(array.sum(1) - 1) <= 1e-3))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"{name} must be at least 0 and sum to 1 in each row, row {row} sums to {array[row].sum():.6g}"
        )
    return array


def calibration_scores(
    probabilities: Any, target: Any, *, predicted: Any = None, num_bins: int = NUM_BINS
) -> dict[str, Any]:
    """Calibration of cluster probabilities against classes; K may differ from the number of classes C.

    probabilities: (N, K), rows sum to 1. target: (N,) classes, whole numbers >= 0. predicted: (N,) clusters, by default
    the most probable ones; the confidence of a sample is the probability of its predicted cluster. Returns
    `acc` (after matching), `confidence` (mean), `ece` (expected calibration error, Guo et al. 2017, `num_bins` bins of
    equal width over [0, 1], each with its upper edge), `adaptive_ece` (bins of equally many samples; Nguyen and
    O'Connor 2015), `brier` (squared error summed over clusters, in [0, 2]; a class without a cluster adds its 1),
    `nll` (of the true class in nats, probabilities kept above 1e-12), `auroc` (of confidence for being correct, ties
    count half; None where all or none are correct), `aurc` (area under the risk-coverage curve, Geifman et al. 2019:
    mean error of the n most confident, over n; ties in expectation), `reliability` (`reliability`'s bins).
    Raises ValueError on input that is none.
    """
    p = as_probabilities(probabilities)
    found = matched(p, target, predicted)
    confidence, correct = found.confidence, found.correct
    squares = (p**2).sum(1)
    return {
        "acc": float(correct.mean()),
        "confidence": float(confidence.mean()),
        "ece": calibration_error(confidence, correct, equal_width_bins(confidence, num_bins)),
        "adaptive_ece": calibration_error(confidence, correct, equal_mass_bins(confidence, num_bins)),
        "brier": float((squares - 2 * found.of_class + 1).mean()),
        "nll": float(-np.log(found.of_class.clip(FLOOR, 1)).mean()),
        "auroc": auroc(confidence, correct),
        "aurc": aurc(confidence, correct),
        "reliability": reliability(confidence, correct, num_bins),
    }


def matched(p: np.ndarray, target: Any, predicted: Any = None) -> Matched:
    """Confidence, correctness and probability of the true class, after clusters are matched to classes."""
    target = as_labels(target, "target")
    predicted = p.argmax(1) if predicted is None else as_labels(predicted, "predicted")
    if len(p) != len(target) or len(p) != len(predicted):
        raise ValueError(f"probabilities have {len(p)} rows, target {len(target)}, predicted {len(predicted)}")
    if predicted.max() >= p.shape[1]:
        raise ValueError(f"predicted has cluster {predicted.max()}, probabilities have {p.shape[1]} columns")
    rows = np.arange(len(p))
    matching = clustering_scores(predicted, target)["matching"]
    cluster_of = {name: cluster for cluster, name in matching.items()}
    cluster = np.array([cluster_of.get(int(name), -1) for name in np.unique(target)])
    own = cluster[np.unique(target, return_inverse=True)[1]]
    of_class = np.where(own >= 0, p[rows, own], 0.0)
    return Matched(p[rows, predicted], predicted == own, of_class)


def equal_width_bins(confidence: np.ndarray, num_bins: int) -> np.ndarray:
    """(N,) bin of each confidence among equal parts of [0, 1]; an edge belongs to the bin below it."""
    return np.searchsorted(np.linspace(0, 1, num_bins + 1)[1:-1], confidence, side="left")


def equal_mass_bins(confidence: np.ndarray, num_bins: int) -> np.ndarray:
    """(N,) bin of each confidence among `num_bins` with as equally many samples as may be; equal ones stay together."""
    from scipy.stats import rankdata

    ranks = rankdata(confidence, method="min") - 1
    return (ranks * num_bins // len(confidence)).astype(np.int64)


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: np.ndarray) -> float:
    """Mean over samples of |mean confidence - share correct| of their bin. correct: (N,) bool, or shares in [0, 1]."""
    gaps = np.bincount(bins, weights=confidence) - np.bincount(bins, weights=correct)
    return float(np.abs(gaps).sum() / len(confidence))


def auroc(confidence: np.ndarray, correct: np.ndarray) -> float | None:
    """Probability that a correct sample is more confident than a wrong one (Mann-Whitney); ties count half."""
    from scipy.stats import rankdata

    right = int(correct.sum())
    wrong = len(correct) - right
    if not right or not wrong:
        return None
    ranks = rankdata(confidence)
    return float((ranks[correct].sum() - right * (right + 1) / 2) / (right * wrong))


def aurc(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Mean over n = 1..N of the error rate among the n most confident; samples of equal confidence share their errors.

    A constant confidence gives the error rate itself.
    """
    _, block = np.unique(-confidence, return_inverse=True)
    error = np.bincount(block, weights=~correct) / np.bincount(block)
    each = error[np.sort(block)]
    return float((np.cumsum(each) / np.arange(1, len(each) + 1)).mean())


def reliability(confidence: np.ndarray, correct: np.ndarray, num_bins: int = NUM_BINS) -> list[dict[str, float]]:
    """The bins of equal width that have samples: `lower`, `upper`, `count`, mean `confidence`, `acc`."""
    bins = equal_width_bins(confidence, num_bins)
    counts = np.bincount(bins, minlength=num_bins)
    sums = np.bincount(bins, weights=confidence, minlength=num_bins)
    hits = np.bincount(bins, weights=correct, minlength=num_bins)
    return [
        {
            "lower": number / num_bins,
            "upper": (number + 1) / num_bins,
            "count": int(counts[number]),
            "confidence": float(sums[number] / counts[number]),
            "acc": float(hits[number] / counts[number]),
        }
        for number in np.flatnonzero(counts)
    ]
