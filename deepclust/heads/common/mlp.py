"""A small net from features to clusters that can begin as a k-means clustering."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.ops import kmeans
from deepclust.ops.collectives import sum_over


class ClusterMLP(nn.Module):
    """Linear, BatchNorm, ReLU, linear, from features to cluster logits; can begin as a k-means
    clustering.

    The shape of both heads of calibrated deep clustering (Jia et al. 2025), whose initialisation
    `init_clusters` is.
    """

    num_heads = 1

    def __init__(self, dim: int, hidden_dim: int, num_clusters: int) -> None:
        super().__init__()
        self.num_clusters = num_clusters
        self.first = nn.Linear(dim, hidden_dim)
        self.norm = nn.BatchNorm1d(hidden_dim)
        self.last = nn.Linear(hidden_dim, num_clusters)

    def forward(self, z: Tensor) -> list[Tensor]:
        """(B, D) to one logits (B, K)."""
        return [self.last(F.relu(self.norm(self.first(z))))]

    @torch.no_grad()
    def init_clusters(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        steps: int = 2000,
        *,
        restarts: int = 1,
        iterations: int = 25,
        seed: int = 0,
        group: Any = None,
    ) -> None:
        """K-means centres become the rows of both linear layers, orthogonalised; biases are 0.

        features: (n, D) bank rows of this rank. Rows are z-scored one by one and brought to length
        one before each k-means; the second one sees the hidden activations of the first one's
        centres. labels: (n,) clusters in [0, K) whose means are taken in place of the second
        k-means, so that the net begins as that clustering. Where there are fewer images than hidden
        units, the units left over stay as drawn.
        restarts, iterations: of both k-means; the second, of few clusters, has at least 10 and 50.
        """
        num_rows = int(sum_over(torch.tensor(len(features), device=features.device), group))
        hidden = min(self.first.out_features, max(1, num_rows // 2))
        scaled = _standard_rows(features)
        weight = self.first.weight.clone()
        first: dict[str, Any] = {
            "num_restarts": restarts,
            "num_iters": iterations,
            "seed": seed,
            "group": group,
        }
        weight[:hidden] = kmeans(scaled, hidden, **first).centroids.to(weight)
        active = _standard_rows(F.relu(features @ weight.T / (1 + self.norm.eps) ** 0.5))
        if labels is None:
            second = {**first, "num_restarts": max(10, restarts), "num_iters": max(50, iterations)}
            centers = kmeans(active, self.num_clusters, **second).centroids
        else:
            members = F.one_hot(labels, self.num_clusters).to(active)
            counts = sum_over(members.sum(0), group).clamp_min(1)[:, None]
            centers = sum_over(members.T @ active, group) / counts
        self.first.weight.copy_(orthogonalize(weight, steps))
        self.last.weight.copy_(orthogonalize(centers.to(weight), steps))
        for layer in (self.first, self.last):
            layer.bias.zero_()

    @torch.no_grad()
    def copy_head(self, other: ClusterMLP, head: int) -> None:
        """Takes another one's weights and statistics."""
        self.load_state_dict(other.state_dict())


def _standard_rows(x: Tensor) -> Tensor:
    """Each row less its mean, over its standard deviation, then of length one; constant rows become
    0.
    """
    centered = x - x.mean(1, keepdim=True)
    return F.normalize(centered / centered.std(1, keepdim=True).clamp_min(1e-12), dim=1)


def orthogonalize(rows: Tensor, steps: int = 2000) -> Tensor:
    """Pushes the rows (n, D) apart, towards a simplex: pairwise cosines near -1 / (n - 1) where D
    is large enough.

    Two copies Z, V start at the rows and descend on the cross entropy of 5 cos(relu(Z_i), V_j)
    towards j = i: SGD, rate 0.1 by a cosine to 0, momentum 0.9, decay 1e-4. V is returned.
    """
    with torch.enable_grad():
        first, second = rows.clone().requires_grad_(True), rows.clone().requires_grad_(True)
        optimizer = torch.optim.SGD([first, second], lr=0.1, momentum=0.9, weight_decay=1e-4)
        own = torch.arange(len(rows), device=rows.device)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / steps))
            logits = 5 * F.normalize(F.relu(first), dim=1) @ F.normalize(second, dim=1).T
            optimizer.zero_grad()
            F.cross_entropy(logits, own).backward()
            optimizer.step()
    return second.detach()
