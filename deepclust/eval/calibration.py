"""Calibration and ranking of confidences against labels.

A clustering names no classes, so clusters are first matched one-to-one to classes (Hungarian
matching of the predicted clusters); a sample of a cluster without a class counts as wrong. The
confidence of a sample is its largest probability. A low calibration error alone proves little: a
constant confidence equal to the accuracy has an error of 0, and an AUROC of one half.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from deepclust.eval.metrics import as_labels, clustering_scores

NUM_BINS = 15
"""Bins of the calibration errors, as many as in Guo et al. 2017."""
FLOOR = 1e-12
"""The least probability whose logarithm is taken; a class without a cluster has none."""
ROUNDING = 1e-3
"""How far a row of probabilities may be from a sum of 1: room for those kept in half precision."""


class Matched(NamedTuple):
    """Probabilities in terms of classes."""

    confidence: np.ndarray
    """(N,) probability of the predicted cluster."""
    correct: np.ndarray
    """(N,) bool, whether that cluster is matched to the true class."""
    of_class: np.ndarray
    """(N,) probability of the cluster that is matched to the true class, 0 where there is none."""


def as_probabilities(values: Any) -> np.ndarray:
    """Probabilities (N, K) float64 from a tensor or array whose rows are distributions.

    Raises:
        ValueError: another shape, NaN, values outside [0, 1] or sums that are not 1; the first bad
            row is named.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu().double()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(
            "probabilities must have one row of K probabilities for each sample, it has shape"
            f" {array.shape}"
        )
    sums_to_one = np.abs(array.sum(1) - 1) <= ROUNDING
    good = np.isfinite(array).all(1) & (array >= 0).all(1) & sums_to_one
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise ValueError(
            f"probabilities must be at least 0 and sum to 1 in each row, row {row} sums to"
            f" {array[row].sum():.6g}"
        )
    return array


def calibration_scores(
    probabilities: Any,
    target: Any,
    *,
    predicted: Any = None,
    num_bins: int = NUM_BINS,
) -> dict[str, Any]:
    """Calibration of cluster probabilities against classes, whose numbers K and C may differ.

    Args:
        probabilities: (N, K), rows sum to 1.
        target: (N,) classes, whole numbers >= 0.
        predicted: (N,) clusters, the most probable ones if None; the confidence of a sample is the
            probability of its predicted cluster.
        num_bins: bins of the calibration errors.

    Returns:
        `acc`: accuracy after one-to-one matching.
        `confidence`: the mean.
        `ece`: expected calibration error (Guo et al. 2017) in bins of equal width over [0, 1], each
        with its upper edge.
        `adaptive_ece`: the same in bins of equally many samples (Nguyen and O'Connor 2015).
        `brier`: squared error summed over clusters, in [0, 2]; a class without a cluster adds its
        1.
        `nll`: negative log-likelihood of the true class in nats, probabilities kept above 1e-12.
        `auroc`: of confidence for being correct, ties count half; None where all or none are.
        `aurc`: area under the risk-coverage curve (Geifman et al. 2019): mean error of the n most
        confident, over n; ties in expectation.
        `reliability`: see `reliability`.

    Raises:
        ValueError: input that is none, or whose rows do not fit together.
    """
    p = as_probabilities(probabilities)
    confidence, correct, of_class = matched(p, target, predicted)
    squares = (p**2).sum(1)
    # The Brier score Σ (p − y)² with y one-hot is Σ p² − 2 p of the true class + 1.
    return {
        "acc": float(correct.mean()),
        "confidence": float(confidence.mean()),
        "ece": calibration_error(confidence, correct, equal_width_bins(confidence, num_bins)),
        "adaptive_ece": calibration_error(
            confidence, correct, equal_mass_bins(confidence, num_bins)
        ),
        "brier": float((squares - 2 * of_class + 1).mean()),
        "nll": float(-np.log(of_class.clip(FLOOR, 1)).mean()),
        "auroc": auroc(confidence, correct),
        "aurc": aurc(confidence, correct),
        "reliability": reliability(confidence, correct, num_bins),
    }


def matched(p: np.ndarray, target: Any, predicted: Any = None) -> Matched:
    """Probabilities (N, K) in terms of classes, after clusters are matched to classes (N,).

    predicted: (N,) clusters, the most probable ones if None. Raises ValueError where they do not
    fit together.
    """
    target = as_labels(target, "target")
    predicted = p.argmax(1) if predicted is None else as_labels(predicted, "predicted")
    if len(p) != len(target) or len(p) != len(predicted):
        raise ValueError(
            f"probabilities have {len(p)} rows, target {len(target)}, predicted {len(predicted)}"
        )
    if predicted.max() >= p.shape[1]:
        raise ValueError(
            f"predicted has cluster {predicted.max()}, probabilities have {p.shape[1]} columns"
        )
    matching = clustering_scores(predicted, target)["matching"]
    cluster_of = {name: cluster for cluster, name in matching.items()}
    # −1: a class that no cluster is matched to.
    names, codes = np.unique(target, return_inverse=True)
    of_names = np.array([cluster_of.get(int(name), -1) for name in names])
    right = of_names[codes]
    rows = np.arange(len(p))
    of_class = np.where(right >= 0, p[rows, right], 0.0)
    return Matched(p[rows, predicted], predicted == right, of_class)


def equal_width_bins(confidence: np.ndarray, num_bins: int) -> np.ndarray:
    """Bin (N,) of each confidence among equal parts of [0, 1]; an edge belongs to the bin below."""
    edges = np.linspace(0, 1, num_bins + 1)[1:-1]
    return np.searchsorted(edges, confidence, side="left")


def equal_mass_bins(confidence: np.ndarray, num_bins: int) -> np.ndarray:
    """Bin (N,) of each confidence among bins of equally many samples; equal ones stay together."""
    from scipy.stats import rankdata

    ranks = rankdata(confidence, method="min") - 1
    return (ranks * num_bins // len(confidence)).astype(np.int64)


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: np.ndarray) -> float:
    """Mean over samples of |mean confidence - share correct| of their bin.

    confidence: (N,). correct: (N,) bool, or shares in [0, 1]. bins: (N,) int64.
    """
    # The sums of a bin, not its means: the size that weighs it cancels.
    gaps = np.bincount(bins, weights=confidence) - np.bincount(bins, weights=correct)
    return float(np.abs(gaps).sum() / len(confidence))


def auroc(confidence: np.ndarray, correct: np.ndarray) -> float | None:
    """Probability that a correct sample is more confident than a wrong one; ties count half.

    None where all or none are correct.
    """
    from scipy.stats import rankdata

    right = int(correct.sum())
    wrong = len(correct) - right
    if not right or not wrong:
        return None
    # The Mann-Whitney statistic, from the sum of the ranks of correct samples.
    ranks = rankdata(confidence)
    return float((ranks[correct].sum() - right * (right + 1) / 2) / (right * wrong))


def aurc(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Mean over n = 1..N of the error rate among the n most confident samples.

    A constant confidence gives the error rate itself.
    """
    # Samples of equal confidence share their errors: the mean over all orders that they may have.
    _, block = np.unique(-confidence, return_inverse=True)
    error = np.bincount(block, weights=~correct) / np.bincount(block)
    each = error[np.sort(block)]
    return float((np.cumsum(each) / np.arange(1, len(each) + 1)).mean())


def reliability(
    confidence: np.ndarray,
    correct: np.ndarray,
    num_bins: int = NUM_BINS,
) -> list[dict[str, float]]:
    """Bins of a reliability diagram: `lower`, `upper`, `count`, mean `confidence`, `acc`.

    They are of equal width; those without samples are left out.
    """
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
