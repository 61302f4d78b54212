"""Scores that need no labels, and the choice of the stage to keep that rests on one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from deepclust.eval.metrics import as_labels, contingency, entropy
from deepclust.ops.agreement import neighbor_agreement

TIE = 1e-12
"""Agreements closer than this are equal, as rounding may make them differ."""


def as_array(values: Any) -> np.ndarray:
    """A tensor on any device, or an array, as NumPy."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def label_free_scores(
    labels: Any,
    num_clusters: int,
    *,
    confidence: Any = None,
    features: Any = None,
    graph: Any = None,
    previous: Any = None,
) -> dict[str, float | int | None]:
    """Scores of a clustering that need no labels, each where its input is given.

    Args:
        labels: (N,) clusters in [0, num_clusters).
        num_clusters: K.
        confidence: (N,) largest probability of each sample.
        features: (N, D).
        graph: (N, k) indices of each sample's neighbours, itself not among them.
        previous: (N,) labels of the stage before.

    Returns:
        `clusters_used`; `size_entropy`, 1 where all K are equally large, 0 where one holds
        everything; `mean_confidence`; `silhouette`, None where it is not defined;
        `neighbor_agreement`; `churn`.

    Raises:
        ValueError: labels that are none, or a graph of other rows.
    """
    labels = as_labels(labels, "labels")
    sizes = np.bincount(labels)
    # One cluster is as equal as can be.
    size_entropy = 1.0
    if num_clusters > 1:
        size_entropy = entropy(sizes) / float(np.log(num_clusters))
    scores: dict[str, float | int | None] = {
        "clusters_used": int((sizes > 0).sum()),
        "size_entropy": size_entropy,
    }
    if confidence is not None:
        scores["mean_confidence"] = float(as_array(confidence).mean(dtype=np.float64))
    if features is not None:
        scores["silhouette"] = silhouette(features, labels)
    if graph is not None:
        table = torch.as_tensor(as_array(graph))
        scores["neighbor_agreement"] = float(neighbor_agreement(torch.from_numpy(labels), table))
    if previous is not None:
        scores["churn"] = churn(previous, labels)
    return scores


def silhouette(
    features: Any,
    labels: Any,
    *,
    max_samples: int = 2000,
    seed: int = 0,
) -> float | None:
    """Mean silhouette (Rousseeuw 1987) under cosine distance.

    Args:
        features: (N, D).
        labels: (N,).
        max_samples: rows that are looked at; of more, so many are drawn. The mean of 2,000 has a
            standard error of about a hundredth.
        seed: of the draw.

    Returns:
        From −1 to 1; None where the sample has one cluster, or a cluster for each row.
    """
    labels = as_labels(labels, "labels")
    rows = sample_rows(len(labels), max_samples, seed)
    names, codes = np.unique(labels[rows], return_inverse=True)
    if not 1 < len(names) < len(rows):
        return None
    tiny = np.finfo(np.float64).tiny
    x = as_array(features[rows]).astype(np.float64)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), tiny)
    one_hot = np.eye(len(names))[codes]
    sizes = one_hot.sum(0)
    each = np.arange(len(rows))
    # Summed distances (n, K) to the rows of every cluster: a cosine with a sum is a sum of cosines,
    # so that no n × n matrix is needed.
    distances = sizes - x @ (x.T @ one_hot)
    # A row's distance to itself (0 but for zero rows and rounding) is no part of its own cluster's.
    inner = distances[each, codes] - (1 - (x * x).sum(1))
    inner /= np.maximum(sizes[codes] - 1, 1)
    distances /= sizes
    distances[each, codes] = np.inf
    outer = distances.min(1)
    values = (outer - inner) / np.maximum(np.maximum(inner, outer), tiny)
    # A row alone in its cluster counts 0, as Rousseeuw has it.
    return float(np.where(sizes[codes] > 1, values, 0).mean())


def sample_rows(num_samples: int, max_samples: int, seed: int) -> np.ndarray:
    """Indices, ascending int64, of all rows, or of `max_samples` drawn without replacement."""
    if num_samples <= max_samples:
        return np.arange(num_samples)
    return np.sort(np.random.default_rng(seed).choice(num_samples, max_samples, replace=False))


def churn(previous: Any, labels: Any) -> float:
    """Share of samples that changed cluster, after clusters are matched one-to-one.

    previous, labels: (N,) clusters of the same samples.
    """
    from scipy.optimize import linear_sum_assignment

    counts, _, _ = contingency(previous, labels)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return 1.0 - float(counts[rows, columns].sum() / counts.sum())


def better_stage(candidates: Mapping[str, float | None]) -> tuple[str, str]:
    """Name of the stage whose clusters are kept, and one sentence that says why.

    The highest neighbour agreement wins, and a tie keeps the earlier stage. NaN and None, an
    agreement that is missing, never win; where all are, the last stage is kept.

    Args:
        candidates: neighbour agreement by stage, in the order the stages were trained.

    Raises:
        ValueError: there are no candidates.
    """
    if not candidates:
        raise ValueError("no stage gave clusters: there is nothing to keep")
    if len(candidates) == 1:
        (kept,) = candidates
        return kept, f"{kept} is the only stage that gives clusters."
    nan = float("nan")
    values = {name: nan if value is None else value for name, value in candidates.items()}
    # NaN alone differs from itself.
    if all(value != value for value in values.values()):
        *_, kept = values
        return (
            kept,
            (
                f"{kept} is kept, the last stage: how neighbours agree on the stages' clusters is"
                " not known."
            ),
        )
    kept, *later = values
    for name in later:
        if values[name] > values[kept] + TIE or values[kept] != values[kept]:
            kept = name
    others = [
        f"{name} {'is not known' if value != value else f'{value:.4f}'}"
        for name, value in values.items()
        if name != kept
    ]
    return (
        kept,
        (
            f"{kept} is kept: on the pretext's neighbour graph its clusters agree best beyond"
            f" chance ({values[kept]:.4f}; {', '.join(others)}); no label was used, and a tie keeps"
            " the earlier stage."
        ),
    )
