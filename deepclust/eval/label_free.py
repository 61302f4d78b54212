"""Scores that need no labels, and the choice between stages that rests on one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from deepclust.eval.metrics import as_labels, contingency, entropy

TIE = 1e-12
"""Agreements closer than this are equal: the earlier stage is kept."""


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
    seed: int = 0,
) -> dict[str, float | int | None]:
    """What can be said about a clustering without labels; a score is in the dict if its input is given.

    labels: (N,) clusters in [0, num_clusters). confidence: (N,) largest probability of each sample.
    features: (N, D). graph: (N, k) neighbour indices. previous: (N,) labels of the stage before.
    Returns `clusters_used`, `size_entropy` (1 = all of `num_clusters` equally large, 0 = one holds everything),
    `mean_confidence`, `silhouette` (None where it is not defined), `neighbor_agreement`, `churn`.
    """
    labels = as_labels(labels, "labels")
    sizes = np.bincount(labels)
    scores: dict[str, float | int | None] = {
        "clusters_used": int((sizes > 0).sum()),
        "size_entropy": entropy(sizes) / float(np.log(num_clusters)) if num_clusters > 1 else 1.0,
    }
    if confidence is not None:
        scores["mean_confidence"] = float(as_array(confidence).mean(dtype=np.float64))
    if features is not None:
        scores["silhouette"] = silhouette(features, labels, seed=seed)
    if graph is not None:
        scores["neighbor_agreement"] = neighbor_agreement(labels, graph)
    if previous is not None:
        scores["churn"] = churn(previous, labels)
    return scores


def silhouette(features: Any, labels: Any, *, max_samples: int = 2000, seed: int = 0) -> float | None:
    """Mean silhouette (Rousseeuw 1987) under cosine distance, on at most `max_samples` rows drawn by `seed`.

    features: (N, D), labels: (N,). None where the sample has one cluster, or a cluster for each row.
    """
    labels = as_labels(labels, "labels")
    rows = sample_rows(len(labels), max_samples, seed)
    names, own = np.unique(labels[rows], return_inverse=True)
    if not 1 < len(names) < len(rows):
        return None
    x = as_array(features[rows]).astype(np.float64)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    ones = np.eye(len(names))[own]
    sizes, each = ones.sum(0), np.arange(len(rows))
    distances = sizes - x @ (x.T @ ones)  # sums over clusters: cosines with a sum are sums of cosines
    inner = distances[each, own] - (1 - (x * x).sum(1))
    inner /= np.maximum(sizes[own] - 1, 1)
    distances /= sizes
    distances[each, own] = np.inf
    outer = distances.min(1)
    values = (outer - inner) / np.maximum(np.maximum(inner, outer), np.finfo(np.float64).tiny)
    return float(np.where(sizes[own] > 1, values, 0).mean())


def sample_rows(num_samples: int, max_samples: int, seed: int) -> np.ndarray:
    """All rows, or `max_samples` of them drawn without replacement; ascending int64."""
    if num_samples <= max_samples:
        return np.arange(num_samples)
    return np.sort(np.random.default_rng(seed).choice(num_samples, max_samples, replace=False))


def neighbor_agreement(labels: Any, graph: Any) -> float:
    """How often neighbours share a cluster beyond chance: `ops.agreement.neighbor_agreement`, of arrays.

    labels: (N,) clusters. graph: (N, k) indices of each sample's neighbours, itself not among them. Raises ValueError
    where they do not fit.
    """
    import torch

    from deepclust.ops import agreement

    labels, graph = as_labels(labels, "labels"), as_array(graph)
    if graph.ndim != 2 or len(graph) != len(labels) or not graph.size:
        raise ValueError(f"graph must have one row of neighbours for each of {len(labels)} labels, it is {graph.shape}")
    return float(agreement.neighbor_agreement(torch.as_tensor(labels), torch.as_tensor(graph)))


def churn(previous: Any, labels: Any) -> float:
    """Share of samples that changed cluster, after clusters are matched one-to-one. previous, labels: (N,)."""
    from scipy.optimize import linear_sum_assignment

    counts, _, _ = contingency(previous, labels)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return 1.0 - float(counts[rows, columns].sum() / counts.sum())


def better_stage(candidates: Mapping[str, float | None]) -> tuple[str, str]:
    """The stage whose clusters are kept, and one sentence that says why.

    candidates: neighbour agreement by stage, in the order the stages were trained. The highest is kept; ties keep the
    earlier. NaN and None, an agreement that is missing, never win; where all are, the last stage is kept, where the
    recipe ends. Raises ValueError without candidates.
    """
    if not candidates:
        raise ValueError("no stage gave clusters: there is nothing to keep")
    if len(candidates) == 1:
        (kept,) = candidates
        return kept, f"{kept} is the only stage that gives clusters."
    values = {name: float("nan") if value is None else value for name, value in candidates.items()}
    if all(value != value for value in values.values()):
        *_, kept = values
        return kept, f"{kept} is kept, the last stage: how neighbours agree on the stages' clusters is not known."
    kept, *later = values
    for name in later:
        if values[name] > values[kept] + TIE or values[kept] != values[kept]:
            kept = name
    words = {name: "is not known" if value != value else f"{value:.4f}" for name, value in values.items()}
    others = [f"{name} {text}" for name, text in words.items() if name != kept]
    return kept, (
        f"{kept} is kept: on the pretext's neighbour graph its clusters agree best beyond chance "
        f"({values[kept]:.4f}; {', '.join(others)}); no label was used, and a tie keeps the earlier stage."
    )
