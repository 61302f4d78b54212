"""Layers that several methods put on top of a backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.errors import UserError
from deepclust.ops import kmeans
from deepclust.ops.collectives import mean_rows, sum_over
from deepclust.ops.diffusion import diffusion_clusters
from deepclust.ops.spectral import spectral_clusters

SPECTRAL_NEIGHBORS = (15, 20, 30, 40)


def watched(
    cross_entropy: Tensor, logits: Sequence[Tensor], group: Any = None
) -> dict[str, Tensor]:
    """What is watched for a collapse: `cross_entropy`, `entropy` and `ln_k`, scalars in nats.

    logits: per sub-head (B, K). `entropy` is that of the mean prediction over the rows of all
    ranks, ln K where all clusters are used alike; the mean over sub-heads.
    """
    means = [mean_rows(each.detach().softmax(dim=1), group) for each in logits]
    entropy = torch.stack([torch.special.entr(mean).sum() for mean in means]).mean()
    ln_k = torch.tensor(math.log(logits[0].shape[1]), device=entropy.device)
    return {"cross_entropy": cross_entropy.detach(), "entropy": entropy, "ln_k": ln_k}


def enough_images(key: str, num_clusters: int, num_samples: int) -> None:
    """Raises UserError, naming the head's key, where there are more clusters than images."""
    if num_clusters > num_samples:
        raise UserError(
            f"head.{key}={num_clusters} is more than the {num_samples} images; give at most as"
            " many, at best a tenth"
        )


class Projector(nn.Sequential):
    """Linear, batch norm, ReLU, linear: features (B, D) to embeddings (B, E), not normalised.

    Without `batch_norm` the first layer has a bias.
    """

    def __init__(
        self, dim: int, hidden_dim: int, embedding_dim: int, *, batch_norm: bool = True
    ) -> None:
        norm: nn.Module = nn.BatchNorm1d(hidden_dim) if batch_norm else nn.Identity()
        first = nn.Linear(dim, hidden_dim, bias=not batch_norm)
        super().__init__(first, norm, nn.ReLU(inplace=True), nn.Linear(hidden_dim, embedding_dim))


class Reading(nn.Module):
    """How a head that learns other clusters than those asked for is read: spherical k-means of its
    features.

    Probabilities are a softmax over cosine / temperature. Before `fit` all clusters are as likely.
    """

    centroids: Tensor

    def __init__(
        self, dim: int, num_clusters: int, *, temperature: float = 0.1, num_restarts: int = 10
    ) -> None:
        super().__init__()
        self.temperature, self.num_restarts = temperature, num_restarts
        self.register_buffer("centroids", torch.zeros(num_clusters, dim))

    def fit(self, features: Tensor, *, seed: int = 0, group: Any = None) -> None:
        """Centroids of this rank's rows (n, D) and those of the other ranks."""
        options: dict[str, Any] = {
            "num_restarts": self.num_restarts,
            "num_iters": 50,
            "seed": seed,
            "group": group,
        }
        self.centroids.copy_(
            kmeans(features, len(self.centroids), spherical=True, **options).centroids
        )

    def forward(self, z: Tensor) -> Tensor:
        """(B, D) to probabilities (B, K)."""
        return (F.normalize(z, dim=1) @ self.centroids.T / self.temperature).softmax(dim=1)


def drawn_seed() -> int:
    """A seed from the global random state: drawn where a head is built, it follows the run and is
    one for all ranks.
    """
    return int(torch.randint(2**31, (), device="cpu"))


class ClusterLayer(nn.Module):
    """H independent sub-heads from features to cluster logits, evaluated in one product.

    kind `linear`: logits = z W^T + b, as in SCAN. kind `cosine`: logits = cos(z, W_k) /
    temperature, so that a row of W is a prototype and the head can begin as a k-means clustering.
    """

    def __init__(
        self,
        dim: int,
        num_clusters: int,
        num_heads: int = 1,
        *,
        kind: Literal["linear", "cosine"] = "linear",
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        self.num_clusters, self.num_heads = num_clusters, num_heads
        self.kind, self.temperature = kind, temperature
        linear = nn.Linear(dim, num_heads * num_clusters)
        self.weight = linear.weight
        self.bias = linear.bias if kind == "linear" else None

    def forward(self, z: Tensor) -> list[Tensor]:
        """(B, D) to a list of H logits (B, K)."""
        if self.bias is None:
            logits = (
                F.linear(F.normalize(z, dim=1), F.normalize(self.weight, dim=1)) / self.temperature
            )
        else:
            logits = F.linear(z, self.weight, self.bias)
        return list(logits.split(self.num_clusters, dim=1))

    def one(self, z: Tensor, head: int) -> Tensor:
        """(B, D) to the logits (B, K) of one sub-head alone."""
        rows = slice(head * self.num_clusters, (head + 1) * self.num_clusters)
        if self.bias is None:
            return (
                F.linear(F.normalize(z, dim=1), F.normalize(self.weight[rows], dim=1))
                / self.temperature
            )
        return F.linear(z, self.weight[rows], self.bias[rows])

    @torch.no_grad()
    def set_prototypes(self, head: int, centroids: Tensor, scale: float = 1.0) -> None:
        """Makes (K, D) unit centroids the weights of one sub-head.

        `scale` is the typical norm of a feature: a linear sub-head divides by it to begin near the
        cosine's logits.
        """
        rows = slice(head * self.num_clusters, (head + 1) * self.num_clusters)
        if self.bias is None:
            self.weight[rows] = centroids
        else:
            self.weight[rows] = centroids / (self.temperature * scale)
            self.bias[rows] = 0

    def init_clusters(
        self,
        features: Tensor,
        methods: Sequence[str],
        *,
        num_restarts: int = 3,
        seed: int = 0,
        group: Any = None,
    ) -> None:
        """Clusters of the bank's features (n, D) become weights: sub-head h begins by `methods[h %
        len(methods)]`.

        `kmeans`: spherical k-means. `spectral`: means of spectral clusters, on graphs of 15, 20, 30
        and 40 neighbours in turn, then fitted to give those very clusters. `diffusion`: the same of
        diffusion clusters, which hardly
        depend on the seed: for one sub-head. `random`: left as drawn. Sub-head h has `seed` + h,
        the same on all ranks.
        """
        scale = float(mean_rows(features.norm(dim=1, keepdim=True), group))
        for head in range(self.num_heads):
            method = methods[head % len(methods)]
            if method == "kmeans":
                found = kmeans(
                    features,
                    self.num_clusters,
                    spherical=True,
                    num_restarts=num_restarts,
                    num_iters=50,
                    seed=seed + head,
                    group=group,
                )
                self.set_prototypes(head, found.centroids.to(self.weight), scale)
            elif method != "random":
                labels = self._graph_clusters(method, head, features, seed=seed + head, group=group)
                members = F.one_hot(labels, self.num_clusters).to(features)
                sums = sum_over(members.T @ F.normalize(features, dim=1), group)
                self.set_prototypes(head, F.normalize(sums, dim=1).to(self.weight), scale)
                self._fit(head, features, labels, group)

    def _graph_clusters(self, method: str, head: int, features: Tensor, **options: Any) -> Tensor:
        if method == "diffusion":
            return diffusion_clusters(features, self.num_clusters, **options)
        near = SPECTRAL_NEIGHBORS[head % len(SPECTRAL_NEIGHBORS)]
        return spectral_clusters(features, self.num_clusters, num_neighbors=near, **options)

    def _fit(
        self,
        head: int,
        features: Tensor,
        labels: Tensor,
        group: Any,
        steps: int = 100,
        lr: float = 5e-3,
    ) -> None:
        """Cross entropy on the frozen features, whole bank per step: nearest means are not spectral
        clusters.
        """
        with torch.enable_grad():
            parameters = [self.weight] if self.bias is None else [self.weight, self.bias]
            optimizer = torch.optim.Adam(parameters, lr=lr)
            num = sum_over(torch.tensor(float(len(labels)), device=features.device), group)
            for _ in range(steps):
                loss = F.cross_entropy(self(features)[head], labels, reduction="sum") / num
                for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters)):
                    parameter.grad = sum_over(grad, group)
                optimizer.step()
            for parameter in parameters:
                parameter.grad = None

    @torch.no_grad()
    def copy_head(self, other: ClusterLayer, head: int) -> None:
        """Takes one sub-head of another layer as all of this one's."""
        rows = slice(head * other.num_clusters, (head + 1) * other.num_clusters)
        self.weight.copy_(other.weight[rows].repeat(self.num_heads, 1))
        if self.bias is not None and other.bias is not None:
            self.bias.copy_(other.bias[rows].repeat(self.num_heads))
