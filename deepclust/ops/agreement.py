"""How far two clusterings of the same samples agree, on the device where they are."""

from __future__ import annotations

import torch
from torch import Tensor


def normalized_mutual_information(first: Tensor, second: Tensor) -> Tensor:
    """Mutual information of two label vectors (N,) int64, divided by the mean of their entropies.

    Returns a float64 scalar from 0 to 1, 1 where both put everything in one cluster. Memory grows with the number of
    pairs of labels that occur, not with K x K. DeepCluster (Caron et al. 2018, section 4.1) follows its labels by it.
    """
    pairs = torch.stack([first, second]).unique(dim=1, return_counts=True)
    both = _entropy(pairs[1])
    own = [_entropy(labels.unique(return_counts=True)[1]) for labels in (first, second)]
    mean = (own[0] + own[1]) / 2
    return torch.where(mean > 0, (own[0] + own[1] - both) / mean.clamp_min(1e-300), 1.0).clamp(0, 1)


def neighbor_agreement(labels: Tensor, graph: Tensor, rows: Tensor | None = None) -> Tensor:
    """How often neighbours share a cluster, corrected for what cluster sizes alone would give.

    labels: (N,) int64 clusters. graph: (N, k) int64 indices of each sample's neighbours, itself not among them. rows:
    (n,) int64, the samples that count; all if not given. Returns (p - e) / (1 - e) as a float64 scalar, p = share of
    the edges within a cluster, e = sum of squared cluster shares (the correction of Cohen 1960): 1 = all edges within
    clusters, 0 = as by chance, and 0 where there is one cluster.
    """
    mine, around = (labels, graph) if rows is None else (labels[rows], graph[rows])
    shares = mine.unique(return_counts=True)[1].double() / len(mine)
    chance = shares.square().sum()
    agreement = (labels[around] == mine[:, None]).double().mean()
    return torch.where(shares.amax() < 1, (agreement - chance) / (1 - chance).clamp_min(1e-300), 0.0)


def _entropy(counts: Tensor) -> Tensor:
    shares = counts.double() / counts.sum()
    return -(shares * shares.log()).sum()
