"""Which of several clusterings of the same features to believe, where nobody has labels.

Every criterion is larger for the better clustering. How well each chooses on sets that have labels is measured by
`scripts/compare_clusterers.py`. None chooses better than somebody who always takes `diffusion`: of 20 sets and subsets,
each clustered by diffusion, spectral, spherical k-means and Ward, that costs 1.1 points of accuracy against the best of
the four; the mean rank costs 1.2, consensus 1.4, neighbour agreement 2.8, silhouette 2.9, self-prediction 3.6. So the
default is a preference with a guard, which none of these sets needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from deepclust.clusterers import neighbors_of
from deepclust.eval.label_free import as_array, neighbor_agreement, sample_rows, silhouette
from deepclust.eval.metrics import as_labels, entropy
from deepclust.ops.agreement import normalized_mutual_information
from deepclust.ops.eigen import dense
from deepclust.ops.precision import as_rows

SINGLE = ("neighbor_agreement", "silhouette", "consensus", "self_prediction")
CRITERIA = (*SINGLE, "mean_rank", "preference")
DEFAULT = "preference"
PREFERRED, LEAD = "diffusion", 0.02
"""The clusterer that is preferred, unless neighbours agree by so much better on another's clusters."""
FEWER = 0.5
"""Share of the median number of clusters below which a clustering is not preferred: few large ones agree easily.

Clusters count by their sizes, as the exponential of the entropy."""
MAX_ROWS = 5000
"""Rows on which a linear map is fitted; the other criteria see as many as `silhouette` draws, or all."""


def criteria(features: Any, clusterings: Mapping[str, Any], *, seed: int = 0) -> dict[str, dict[str, float]]:
    """Each clustering's criteria by name, all in the unit of a share but for the rank.

    features: (N, D). clusterings: name to labels (N,); at least two for `consensus`, which is else 0.

    neighbor_agreement: how often the 15 nearest neighbours share a cluster, beyond chance. silhouette: mean under
    cosine distance. consensus: mean normalised mutual information with the other clusterings (Strehl and Ghosh 2002).
    self_prediction: how well a linear map that has not seen a row tells its cluster, beyond chance.
    mean_rank: the mean place, 0 for the last to 1 for the first, by these four. preference: neighbour agreement, 0.02
    more for the clustering that is called `diffusion`, and 1 less for one with far fewer clusters (`FEWER`).
    """
    rows = as_rows(as_array(features))
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    labels = {name: as_labels(each, name) for name, each in clusterings.items()}
    graph, part = neighbors_of(rows), sample_rows(len(rows), MAX_ROWS, seed)
    predict, others = _left_out(rows[part]), consensus(labels)
    scores: dict[str, dict[str, float]] = {}
    for name, each in labels.items():
        scores[name] = {
            "neighbor_agreement": neighbor_agreement(each, graph),
            "silhouette": silhouette(rows, each, seed=seed) or 0.0,
            "consensus": others[name],
            "self_prediction": predict(each[part]),
        }
    for name, place in _mean_ranks(scores).items():
        scores[name]["mean_rank"] = place
    counts = {name: np.exp(entropy(np.unique(each, return_counts=True)[1])) for name, each in labels.items()}
    for name, each in scores.items():
        lost = counts[name] < FEWER * np.median(list(counts.values()))
        each["preference"] = each["neighbor_agreement"] + LEAD * (name == PREFERRED) - float(lost)
    return scores


def choose(scores: Mapping[str, Mapping[str, float]], by: str = DEFAULT) -> str:
    """The name with the largest criterion, the first of equals. Raises ValueError for an unknown criterion."""
    if by not in CRITERIA or not scores:
        raise ValueError(f"criterion {by!r} of {len(scores)} clusterings: choose one of {', '.join(CRITERIA)}")
    return max(scores, key=lambda name: scores[name][by])


def consensus(labels: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean normalised mutual information of each clustering with the others; 0 where there are none."""
    names, tensors = list(labels), {name: torch.from_numpy(each) for name, each in labels.items()}
    table = np.zeros((len(names), len(names)))
    for row, first in enumerate(names):
        for column in range(row):
            found = float(normalized_mutual_information(tensors[first], tensors[names[column]]))
            table[row, column] = table[column, row] = found
    return dict(zip(names, (table.sum(1) / max(1, len(names) - 1)).tolist()))


def _left_out(rows: np.ndarray) -> Callable[[np.ndarray], float]:
    """A function of labels (n,): Cohen's kappa of them with those that ridge regression predicts for left-out rows.

    The regression of all rows tells each left-out row's prediction: (fitted - leverage y) / (1 - leverage) (Allen's
    PRESS, 1974), so one decomposition of the rows (n, D) serves all clusterings. The ridge is the mean eigenvalue.
    """
    centred = rows.astype(np.float64) - rows.mean(0, dtype=np.float64)
    wide = centred.shape[1] > len(centred)
    values, vectors = dense(centred @ centred.T if wide else centred.T @ centred)
    values = values.clip(0)
    shrink = values / (values + max(values.mean(), 1e-300))
    if wide:
        basis = vectors
    else:
        basis = centred @ vectors / np.sqrt(np.maximum(values, 1e-12 * max(values.max(), 1e-300)))
    leverage = (basis**2) @ shrink + 1 / len(rows)

    def kappa(labels: np.ndarray) -> float:
        names, codes = np.unique(labels, return_inverse=True)
        if len(names) < 2:
            return 0.0
        targets = np.eye(len(names))[codes]
        fitted = basis @ (shrink[:, None] * (basis.T @ targets)) + targets.mean(0)
        left_out = (fitted - leverage[:, None] * targets) / np.maximum(1 - leverage, 1e-9)[:, None]
        predicted = left_out.argmax(1)
        chance = float((targets.mean(0) * np.bincount(predicted, minlength=len(names)) / len(rows)).sum())
        return (float((predicted == codes).mean()) - chance) / max(1 - chance, 1e-12)

    return kappa


def _mean_ranks(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    names = list(scores)
    columns = np.array([[scores[name][criterion] for name in names] for criterion in SINGLE])
    below = (columns[:, None, :] < columns[:, :, None]).sum(2)
    equal = (columns[:, None, :] == columns[:, :, None]).sum(2) - 1
    places = (below + equal / 2).mean(0) / max(1, len(names) - 1)
    return dict(zip(names, places.tolist()))
