"""Agreement of clusterings with each other and with neighbour graphs, on the device they are on."""

from __future__ import annotations

import torch
from torch import Tensor

# Keeps the denominators of cases that are decided otherwise above zero.
TINY = 1e-300


def normalized_mutual_information(first: Tensor, second: Tensor) -> Tensor:
    """Mutual information of two clusterings over the arithmetic mean of their entropies (NMI).

    Args:
        first: (N,) int64 labels.
        second: (N,) int64 labels of the same samples, whatever their names.

    Returns:
        Scalar, float64, from 0 to 1; 1 where both put everything in one cluster, 0 where one does.
    """
    # Only pairs of labels that occur are counted: memory does not grow with K x K.
    pairs = torch.stack([first, second]).unique(dim=1, return_counts=True)
    joint = _entropy(pairs[1])
    of_first = _entropy(first.unique(return_counts=True)[1])
    of_second = _entropy(second.unique(return_counts=True)[1])
    information = of_first + of_second - joint
    mean = (of_first + of_second) / 2
    # Rounding may lead a little beyond the ends.
    return torch.where(mean > 0, information / mean.clamp_min(TINY), 1.0).clamp(0, 1)


def neighbor_agreement(labels: Tensor, graph: Tensor, rows: Tensor | None = None) -> Tensor:
    """How often neighbours share a cluster, corrected for what cluster sizes alone would give.

    With p the share of the edges within a cluster and e the sum of squared cluster shares, it is
    (p - e) / (1 - e), the correction for chance of Cohen 1960.

    Args:
        labels: (N,) int64 clusters.
        graph: (N, k) int64 indices of each sample's neighbours, itself not among them.
        rows: (n,) int64, the samples that count; None for all.

    Returns:
        Scalar, float64: 1 where all edges are within clusters, 0 as by chance, and 0 where there is
        one cluster.

    Raises:
        ValueError: the graph does not have one row for each label.
    """
    if graph.ndim != 2 or len(graph) != len(labels) or not graph.numel():
        raise ValueError(
            f"graph must have one row of neighbours for each of {len(labels)} labels, it is"
            f" {tuple(graph.shape)}"
        )
    clusters = labels if rows is None else labels[rows]
    neighbors = graph if rows is None else graph[rows]
    shares = clusters.unique(return_counts=True)[1].double() / len(clusters)
    chance = shares.square().sum()
    agreement = (labels[neighbors] == clusters[:, None]).double().mean()
    corrected = (agreement - chance) / (1 - chance).clamp_min(TINY)
    return torch.where(shares.amax() < 1, corrected, 0.0)


def _entropy(counts: Tensor) -> Tensor:
    """Entropy in nats of counts (M,), all positive; float64."""
    shares = counts.double() / counts.sum()
    return -(shares * shares.log()).sum()
