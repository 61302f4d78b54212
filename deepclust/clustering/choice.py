"""Criteria for choosing among several clusterings of the same features, where nobody has labels.

Every criterion is larger for the better clustering. How well each chooses on sets that have labels
is measured by `benchmarks/quality/clusterers.py`. None chooses better than somebody who always
takes
`diffusion`: of 20 sets and subsets, each clustered by diffusion, spectral, spherical k-means and
Ward, that costs 1.1 points of accuracy against the best of the four; the mean rank costs 1.2,
consensus 1.4, neighbour agreement 2.8, silhouette 2.9, self-prediction 3.6. So the default is a
preference for diffusion with a guard, which none of these sets needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from deepclust.clustering.methods import neighbors_of
from deepclust.eval.label_free import as_array, sample_rows, silhouette
from deepclust.eval.metrics import as_labels, entropy
from deepclust.ops.agreement import neighbor_agreement, normalized_mutual_information
from deepclust.ops.eigen import dense
from deepclust.ops.precision import as_rows

SINGLE = ("neighbor_agreement", "silhouette", "consensus", "self_prediction")
"""Criteria that are measured; the others are made of these."""
CRITERIA = (*SINGLE, "mean_rank", "preference")
DEFAULT = "preference"
PREFERRED = "diffusion"
"""The clusterer that is preferred, unless another's clusters lead by more than `LEAD`."""
LEAD = 0.02
"""Neighbour agreement by which another clustering must be better than the preferred one."""
FEWER = 0.5
"""Share of the median number of clusters below which a clustering is not preferred.

Few large clusters agree easily. They count by their sizes, as the exponential of the entropy."""
MAX_ROWS = 5000
"""Rows to which a linear map is fitted; the other criteria see as many as they draw, or all."""
TINY = 1e-12
"""Least denominator: rows, variances and chances below it count as this much."""


def criteria(
    features: Any,
    clusterings: Mapping[str, Any],
    *,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Criteria of each clustering by name, all shares of one but for the rank.

    `neighbor_agreement`: how often the 15 nearest neighbours share a cluster, beyond chance.
    `silhouette`: mean under cosine distance.
    `consensus`: mean normalised mutual information with the other clusterings (Strehl and Ghosh
    2002), 0 where there are none.
    `self_prediction`: how well a linear map that has not seen a row predicts its cluster, beyond
    chance.
    `mean_rank`: the mean rank by these four, 0 for the last to 1 for the first.
    `preference`: neighbour agreement, 0.02 more for the clustering called `diffusion`, and 1 less
    for one with far fewer clusters (`FEWER`).

    Args:
        features: (N, D), compared by direction.
        clusterings: name to labels (N,).
        seed: of the rows that are drawn.
    """
    rows = as_rows(as_array(features))
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), TINY)
    labels = {name: as_labels(each, name) for name, each in clusterings.items()}
    graph = torch.from_numpy(neighbors_of(rows))
    part = sample_rows(len(rows), MAX_ROWS, seed)
    predict = _left_out(rows[part])
    agreements = consensus(labels)
    scores: dict[str, dict[str, float]] = {}
    for name, each in labels.items():
        scores[name] = {
            "neighbor_agreement": float(neighbor_agreement(torch.from_numpy(each), graph)),
            "silhouette": silhouette(rows, each, seed=seed) or 0.0,
            "consensus": agreements[name],
            "self_prediction": predict(each[part]),
        }
    for name, rank in _mean_ranks(scores).items():
        scores[name]["mean_rank"] = rank
    counts = {name: _effective_number(each) for name, each in labels.items()}
    for name, each in scores.items():
        few = counts[name] < FEWER * np.median(list(counts.values()))
        each["preference"] = each["neighbor_agreement"] + LEAD * (name == PREFERRED) - float(few)
    return scores


def _effective_number(labels: np.ndarray) -> float:
    """Number of clusters, by their sizes: K where all are equal, 1 where one holds nearly all."""
    return np.exp(entropy(np.unique(labels, return_counts=True)[1]))


def choose(scores: Mapping[str, Mapping[str, float]], by: str = DEFAULT) -> str:
    """Name of the clustering with the largest criterion, the first of equals.

    Args:
        scores: of `criteria`.
        by: one of `CRITERIA`.

    Raises:
        ValueError: an unknown criterion, or no clusterings.
    """
    if by not in CRITERIA or not scores:
        raise ValueError(
            f"criterion {by!r} of {len(scores)} clusterings: choose one of {', '.join(CRITERIA)}"
        )
    return max(scores, key=lambda name: scores[name][by])


def consensus(labels: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean normalised mutual information of each clustering (N,) with the others, by name.

    0 where there are no others.
    """
    names = list(labels)
    tensors = [torch.from_numpy(labels[name]) for name in names]
    table = np.zeros((len(names), len(names)))
    for row in range(len(names)):
        for column in range(row):
            shared = float(normalized_mutual_information(tensors[row], tensors[column]))
            table[row, column] = shared
            table[column, row] = shared
    return dict(zip(names, (table.sum(1) / max(1, len(names) - 1)).tolist()))


def _left_out(rows: np.ndarray) -> Callable[[np.ndarray], float]:
    """Function of labels (n,): Cohen's kappa with what ridge regression predicts for left-out rows.

    The regression of all rows gives each left-out row's prediction: (fitted - leverage y) /
    (1 - leverage) (Allen's PRESS, 1974), so one decomposition of the rows (n, D) serves all
    clusterings. The ridge is the mean eigenvalue.
    """
    centred = rows.astype(np.float64) - rows.mean(0, dtype=np.float64)
    # The smaller of the two products has the same eigenvalues, but for zeros.
    wide = centred.shape[1] > len(centred)
    values, vectors = dense(centred @ centred.T if wide else centred.T @ centred)
    # Rounding makes eigenvalues of 0 a little negative; 1e-300 keeps equal rows from 0 / 0.
    values = values.clip(0)
    shrink = values / (values + max(values.mean(), 1e-300))
    if wide:
        basis = vectors
    else:
        smallest = TINY * max(values.max(), 1e-300)
        basis = centred @ vectors / np.sqrt(np.maximum(values, smallest))
    # 1 / n is the leverage of the intercept.
    leverage = (basis**2) @ shrink + 1 / len(rows)

    def kappa(labels: np.ndarray) -> float:
        names, codes = np.unique(labels, return_inverse=True)
        if len(names) < 2:
            return 0.0
        targets = np.eye(len(names))[codes]
        shares = targets.mean(0)
        fitted = basis @ (shrink[:, None] * (basis.T @ targets)) + shares
        rest = np.maximum(1 - leverage, 1e-9)[:, None]
        predicted = ((fitted - leverage[:, None] * targets) / rest).argmax(1)
        predicted_sizes = np.bincount(predicted, minlength=len(names))
        chance = float((shares * predicted_sizes / len(rows)).sum())
        return (float((predicted == codes).mean()) - chance) / max(1 - chance, TINY)

    return kappa


def _mean_ranks(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Mean rank of each clustering by the criteria of `SINGLE`, from 0 (last) to 1 (first)."""
    names = list(scores)
    columns = np.array([[scores[name][criterion] for name in names] for criterion in SINGLE])
    below = (columns[:, None, :] < columns[:, :, None]).sum(2)
    # Equals share their ranks; each equals itself.
    equal = (columns[:, None, :] == columns[:, :, None]).sum(2) - 1
    ranks = (below + equal / 2).mean(0) / max(1, len(names) - 1)
    return dict(zip(names, ranks.tolist()))
