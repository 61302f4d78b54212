"""DeepCluster: k-means of the network's own features, then training on the clusters (Caron et al.
2018).

Before each pass the features of all images are whitened, brought to unit length and clustered anew;
a classifier drawn anew learns the clusters, each of which is seen equally often. Cluster numbers
mean nothing from one pass to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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
from deepclust.ops import kmeans, pca_whiten
from deepclust.ops.agreement import normalized_mutual_information
from deepclust.ops.collectives import gather_rows
from deepclust.types import Count, Decay, NonNegative


def uniform_order(labels: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """(num,) int64 positions in `labels` (n,), every non-empty cluster equally often, in random
    order.

    Quotas differ by at most one. A cluster smaller than its quota repeats its members in turn, so
    that none of them comes more than once more than another; the paper draws them with replacement.
    labels and result are on the CPU.
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    members = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    live = counts.nonzero()[:, 0]
    lucky = torch.randperm(len(live), generator=generator) < num % len(live)
    quotas = num // len(live) + lucky.long()
    clusters = live.repeat_interleave(quotas)
    turns = torch.arange(num) - (quotas.cumsum(0) - quotas).repeat_interleave(quotas)
    chosen = members[(counts.cumsum(0) - counts)[clusters] + turns % counts[clusters]]
    return chosen[torch.randperm(num, generator=generator)]


class DeepCluster(Head):
    """A linear classifier of the last k-means clusters, drawn anew with them.

    num_prototypes: clusters to learn, None for num_clusters; the paper has ten times as many as
    classes.
    pca_dim: whitened directions, at most D. every: passes between clusterings.
    relu: the classifier sees relu(z), as the paper's networks, whose clustered features end before
    their last ReLU.
    momentum: of the classifier's SGD.

    Predictions are over num_clusters, of a k-means of the features at the end (`Reading`), as they
    are: whitening makes noise as loud as signal, which spreads many clusters well and divides few
    badly.
    """

    training_buffers = ("labels", "draws", "stream", "agreement")
    labels: Tensor
    draws: Tensor
    stream: Tensor
    agreement: Tensor

    def __init__(
        self,
        dim: Count,
        num_clusters: Count,
        num_samples: Count,
        *,
        num_prototypes: Count | None = None,
        pca_dim: Count = 256,
        num_iters: Count = 20,
        num_restarts: Count = 1,
        every: Count = 1,
        relu: bool = False,
        momentum: Decay = 0.0,
        init_std: NonNegative = 0.01,
        view: str = "strong",
    ) -> None:
        super().__init__()
        self.views = (View(view, used_for="loss"),)
        self.num_clusters, self.num_prototypes = num_clusters, num_prototypes or num_clusters
        self.num_iters, self.every = num_iters, every
        self.num_restarts, self.relu, self.momentum, self.init_std = (
            num_restarts,
            relu,
            momentum,
            init_std,
        )
        self.layer = nn.Linear(dim, self.num_prototypes)
        self.reading = Reading(dim, num_clusters)
        self.pca_dim = min(pca_dim, dim)
        self.register_buffer("labels", torch.zeros(num_samples, dtype=torch.int64))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self.register_buffer("stream", torch.randint(2**31, ()))
        self.register_buffer("agreement", torch.zeros(()))

    def forward(self, z: Tensor, view: int) -> Output:
        """(B, D) to logits (B, num_prototypes)."""
        return Output(z, logits=[self.layer(z.relu() if self.relu else z)])

    def bank_due(self, progress: Progress) -> BankSpec | None:
        """Before each pass that begins a new clustering, and at the end. Raises UserError for too
        few images.
        """
        enough_images("num_prototypes", self.num_prototypes, len(self.labels))
        due = progress.starts_epoch and progress.epoch % self.every == 0
        return BankSpec() if due or progress.final else None

    @torch.no_grad()
    def refresh(self, bank: Bank) -> Refresh:
        """New clusters, a new classifier, and an order in which every non-empty cluster comes
        equally often.

        At the end only the k-means that predictions are of.
        """
        group, seed = bank.group, int(self.stream + self.draws)
        if bank.final:
            self.reading.fit(bank.features, seed=seed, group=group)
            return Refresh(reset=("reading.centroids",))
        rows = F.normalize(pca_whiten(bank.features, self.pca_dim, group=group), dim=1)
        options: dict[str, Any] = {"num_iters": self.num_iters, "num_restarts": self.num_restarts}
        found = kmeans(rows, self.num_prototypes, seed=seed, group=group, **options)
        index, labels = (gather_rows(part, group)[0] for part in (bank.index, found.labels))
        if int(self.draws):
            self.agreement.copy_(normalized_mutual_information(self.labels[index], labels))
        self.labels[index] = labels
        self.draws += 1
        generator = torch.Generator().manual_seed(seed)
        self.layer.weight.copy_(
            self.init_std * torch.randn(self.layer.weight.shape, generator=generator)
        )
        self.layer.bias.zero_()
        order = index.cpu()[uniform_order(labels.cpu(), bank.num_samples, generator)]
        return Refresh(order=order, reset=("layer.weight", "layer.bias"))

    def targets(self, outputs: Mapping[int, Output], batch: Batch) -> Targets:
        """Labels of the last clustering."""
        return Targets(labels=self.labels[batch.index])

    def loss(
        self, outputs: Mapping[int, Output], targets: Targets, batch: Batch
    ) -> dict[str, Tensor]:
        """Cross entropy. `nmi`: agreement of the last two clusterings, 0 until there are two."""
        logits = outputs[0].logits[0]
        loss = F.cross_entropy(logits, targets["labels"])
        return {"loss": loss, **watched(loss, [logits], batch.group), "nmi": self.agreement}

    def predict(self, z: Tensor) -> Tensor:
        """(B, D) to (B, K) probabilities."""
        return self.reading(z)

    def param_groups(self) -> Iterator[tuple[list[nn.Parameter], dict[str, float]]]:
        """The classifier has a momentum of its own."""
        yield list(self.parameters()), {"momentum": self.momentum}
