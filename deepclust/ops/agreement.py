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


def _entropy(counts: Tensor) -> Tensor:
    shares = counts.double() / counts.sum()
    return -(shares * shares.log()).sum()
