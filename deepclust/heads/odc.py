"""ODC: online deep clustering (Zhan et al. 2020).

Labels move with every step instead of between passes. A memory keeps a feature of each image and
another one the centroid of each cluster; the images of a step are assigned anew, and clusters that
have become too small are dissolved and refilled with half of the largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.heads.base import (
    Bank,
    BankSpec,
    Batch,
    Head,
    Output,
    Progress,
    Refresh,
    Targets,
    View,
)
from deepclust.heads.common.layers import Reading, enough_images, watched
from deepclust.ops import kmeans
from deepclust.ops.collectives import gather_rows, mean_rows
from deepclust.ops.kmeans.step import segment_sums
from deepclust.types import Count, Decay, Natural


def cluster_weights(counts: Tensor) -> Tensor:
    """(K,) float32 weights proportional to (n + 1e-5)^-0.5 that sum to 1, from cluster sizes
    (K,)."""
    weights = (counts.float() + 1e-5).rsqrt()
    return weights / weights.sum()


class Memory(nn.Module):
    """Unit features of N samples, their labels, and K centroids: the same on every rank, sums
    having a fixed order.

    A centroid is the plain mean of its members' features, not of unit length: the nearest one is
    that of the largest dot product, which favours compact clusters, as in the reference.
    """

    features: Tensor
    labels: Tensor
    centroids: Tensor

    def __init__(self, num_samples: int, num_clusters: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(num_samples, dim))
        self.register_buffer("labels", torch.zeros(num_samples, dtype=torch.int64))
        self.register_buffer("centroids", torch.zeros(num_clusters, dim))

    @property
    def counts(self) -> Tensor:
        """(K,) int64 members of each cluster."""
        return self.labels.bincount(minlength=len(self.centroids))

    def update(self, index: Tensor, features: Tensor, momentum: float) -> Tensor:
        """Moves the features (B, E) of samples `index` (B,) and assigns these anew. Gives the share
        that changed.
        """
        moved = momentum * self.features[index] + (1 - momentum) * F.normalize(features, dim=1)
        self.features[index] = F.normalize(moved, dim=1)
        labels = (self.features[index] @ self.centroids.T).argmax(dim=1)
        changed = (labels != self.labels[index]).float().mean()
        self.labels[index] = labels
        return changed

    def recenter(self) -> None:
        """Every centroid becomes the mean of its members; those of empty clusters stay."""
        sums, counts = segment_sums(self.features, self.labels, len(self.centroids), None)
        self.centroids[counts > 0] = sums[counts > 0] / counts[counts > 0, None]

    def mend(self, smallest: int) -> None:
        """Dissolves clusters of fewer than `smallest` members and refills each with half of the
        largest at the time.

        Members go to the nearest centroid that is not so small; halves come from 2-means. N >= 2 K
        `smallest` samples.
        """
        counts = self.counts
        small = (counts < smallest).nonzero()[:, 0]
        large = (counts >= smallest).nonzero()[:, 0]
        if not len(small) or not len(large):
            return
        members = torch.isin(self.labels, small).nonzero()[:, 0]
        self.labels[members] = large[
            (self.features[members] @ self.centroids[large].T).argmax(dim=1)
        ]
        for cluster in small:
            largest = self.counts.argmax()
            members = (self.labels == largest).nonzero()[:, 0]
            parts = kmeans(self.features[members], 2, num_iters=20, seed=0).labels
            if int(parts.sum()) in (0, len(parts)):  # all members are alike
                parts = torch.arange(len(members), device=members.device) % 2
            for part, owner in enumerate((largest, cluster)):
                self.labels[members[parts == part]] = owner
                self.centroids[owner] = self.features[members[parts == part]].mean(0)


class ODC(Head):
    """A classifier of labels that follow the network at every step.

    embedding_dim: a neck of two layers before memory and classifier, as in the paper (hidden_dim
    512, 256); None for the features themselves. num_prototypes: clusters to learn, None for
    num_clusters.
    memory_momentum: share of the old feature that a visit keeps. centroid_every: steps between new
    centroids.
    smallest: members below which a cluster is dissolved, at most half of N / K. momentum: of the
    classifier's SGD.

    Predictions are over num_clusters, of a k-means of the features at the end (`Reading`).
    """

    training_buffers = (
        "memory.features",
        "memory.labels",
        "memory.centroids",
        "weights",
        "changed",
        "begun",
    )
    weights: Tensor
    changed: Tensor
    begun: Tensor

    def __init__(
        self,
        dim: Count,
        num_clusters: Count,
        num_samples: Count,
        *,
        num_prototypes: Count | None = None,
        embedding_dim: Count | None = None,
        hidden_dim: Count = 512,
        dropout: Decay = 0.5,
        memory_momentum: Decay = 0.5,
        centroid_every: Count = 10,
        smallest: Natural = 20,
        momentum: Decay = 0.0,
        view: str = "strong",
    ) -> None:
        super().__init__()
        self.views = (View(view, used_for="loss"),)
        self.num_prototypes = num_prototypes or num_clusters
        self.memory_momentum, self.centroid_every, self.momentum = (
            memory_momentum,
            centroid_every,
            momentum,
        )
        self.smallest = min(smallest, num_samples // (2 * self.num_prototypes))
        self.neck = (
            nn.Identity()
            if embedding_dim is None
            else _neck(dim, hidden_dim, embedding_dim, dropout)
        )
        self.layer = nn.Linear(embedding_dim or dim, self.num_prototypes)
        nn.init.normal_(self.layer.weight, 0, 0.01)
        nn.init.zeros_(self.layer.bias)
        self.memory = Memory(num_samples, self.num_prototypes, embedding_dim or dim)
        self.reading = Reading(dim, num_clusters)
        self.register_buffer("weights", torch.full((self.num_prototypes,), 1 / self.num_prototypes))
        self.register_buffer("changed", torch.zeros(()))
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))

    def forward(self, z: Tensor, view: int) -> Output:
        """(B, D) to embeddings (B, E) and logits (B, num_prototypes)."""
        embedding = self.neck(z)
        return Output(z, embedding, [self.layer(embedding)])

    def bank_due(self, progress: Progress) -> BankSpec | None:
        """Embeddings before the first step, to begin the memory; features at the end, to be read.

        Raises UserError for too few images.
        """
        enough_images("num_prototypes", self.num_prototypes, len(self.memory.labels))
        if progress.final:
            return BankSpec()
        return None if bool(self.begun) else BankSpec(of="embedding")

    @torch.no_grad()
    def refresh(self, bank: Bank) -> Refresh:
        """Begins memory and labels by k-means; at the end the k-means that predictions are of."""
        if bank.final:
            self.reading.fit(bank.features, group=bank.group)
            return Refresh(reset=("reading.centroids",))
        found = kmeans(bank.features, self.num_prototypes, num_iters=20, group=bank.group)
        index, features = (gather_rows(part, bank.group)[0] for part in (bank.index, bank.features))
        self.memory.labels[index] = gather_rows(found.labels, bank.group)[0]
        self.memory.features[index] = F.normalize(features, dim=1)
        self.memory.recenter()
        self.weights.copy_(cluster_weights(self.memory.counts))
        self.begun.fill_(True)
        return Refresh()

    def targets(self, outputs: Mapping[int, Output], batch: Batch) -> Targets:
        """Labels before this step moves them, and weights whose mean over the rows of all ranks is
        1.
        """
        labels = self.memory.labels[batch.index]
        weights = self.weights[labels]
        return Targets(labels=labels, weights=weights / mean_rows(weights[:, None], batch.group))

    def loss(
        self, outputs: Mapping[int, Output], targets: Targets, batch: Batch
    ) -> dict[str, Tensor]:
        """Weighted cross entropy. `changed`: share of the last step's images that changed their
        cluster.
        """
        logits = outputs[0].logits[0]
        each = F.cross_entropy(logits, targets["labels"], reduction="none")
        loss = (each * targets["weights"]).mean()
        return {
            "loss": loss,
            **watched(each.mean(), [logits], batch.group),
            "changed": self.changed,
        }

    def after_step(self, outputs: Mapping[int, Output], batch: Batch) -> None:
        """Moves memory and labels, centroids every few steps, mends small clusters, weighs clusters
        by their size.
        """
        assert outputs[0].embedding is not None
        index, features = (
            gather_rows(part, batch.group)[0] for part in (batch.index, outputs[0].embedding)
        )
        self.changed.copy_(self.memory.update(index, features, self.memory_momentum))
        if (batch.progress.step + 1) % self.centroid_every == 0:
            self.memory.recenter()
        self.memory.mend(self.smallest)
        self.weights.copy_(cluster_weights(self.memory.counts))

    def predict(self, z: Tensor) -> Tensor:
        """(B, D) to (B, K) probabilities."""
        return self.reading(z)

    def param_groups(self) -> Iterator[tuple[list[nn.Parameter], dict[str, float]]]:
        """The classifier has a momentum of its own."""
        yield list(self.layer.parameters()), {"momentum": self.momentum}


def _neck(dim: int, hidden_dim: int, embedding_dim: int, dropout: float) -> nn.Sequential:
    first = [
        nn.Linear(dim, hidden_dim),
        nn.BatchNorm1d(hidden_dim, momentum=0.001, affine=False),
        nn.ReLU(),
    ]
    return nn.Sequential(
        *first, nn.Dropout(dropout), nn.Linear(hidden_dim, embedding_dim), nn.ReLU()
    )
