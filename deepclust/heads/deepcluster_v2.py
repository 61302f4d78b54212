"""DeepCluster-v2: k-means on the last epoch's embeddings gives labels and prototypes (Caron et al.
2020, SwAV).

Where this differs from the authors' code: the memory holds all images on every rank, by index, so
that clusters do not depend on the number of ranks; the first epoch's labels come from one augmented
crop per image, not from two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from deepclust.errors import UserError
from deepclust.heads.base import Bank, BankSpec, Batch, Output, Progress, Refresh, Targets
from deepclust.heads.common.prototypes import PrototypeHead
from deepclust.ops import kmeans
from deepclust.ops.collectives import gather_rows, world_size
from deepclust.types import Count

UNSEEN = -100


def multicrop_cross_entropy(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Cross entropy of all crops towards one label per image, mean over crops and labelled images.

    logits: (B, K) for each crop. labels: (B,) int64, -100 where there is none. Returns a scalar, 0
    without labels.
    """
    total = torch.stack(
        [F.cross_entropy(each, labels, ignore_index=UNSEEN, reduction="sum") for each in logits]
    ).sum()
    return total / ((labels != UNSEEN).sum() * len(logits)).clamp_min(1)


class DeepClusterV2(PrototypeHead):
    """Cross entropy towards frozen prototypes: the centroids of spherical k-means at each epoch's
    start.

    The embeddings of the global crops are kept as training makes them, one bank per crop; set h of
    prototypes is clustered from bank h modulo their number. Only before the first epoch there is a
    pass, in training mode. An image that training has not seen (it could not be read) has no label
    and teaches nothing.
    num_iters: updates of the centroids; an empty cluster keeps its old one.
    """

    training_buffers = ("memory", "seen", "labels", "rounds")
    memory: Tensor
    seen: Tensor
    labels: Tensor
    rounds: Tensor

    def __init__(
        self,
        dim: Count,
        num_clusters: Count,
        num_samples: Count,
        *,
        num_iters: Count = 10,
        **inherited: Any,
    ) -> None:
        super().__init__(dim, num_clusters, **inherited)
        self.num_iters = num_iters
        self.prototypes.requires_grad_(False)
        self.register_buffer(
            "memory", torch.zeros(self.num_global, num_samples, self.embedding_dim)
        )
        self.register_buffer("seen", torch.zeros(num_samples, dtype=torch.bool))
        self.register_buffer("labels", torch.full((self.num_heads, num_samples), UNSEEN))
        self.register_buffer("rounds", torch.zeros((), dtype=torch.int64))

    def bank_due(self, progress: Progress) -> BankSpec | None:
        """Each epoch's start; the first time with a pass, as training would see the images."""
        due = super().bank_due(progress)
        if not progress.starts_epoch:
            return due
        if progress.step == 0:
            return BankSpec(mode="train", view=self.global_view, of="embedding")
        return BankSpec(needs_pass=False)

    def refresh(self, bank: Bank) -> Refresh:
        """K-means on what was collected; at the stage's end, larger sets are grouped into
        clusters."""
        collected = bank.features.ndim == 1
        if not collected and int(self.rounds):
            return super().refresh(bank)
        if not collected:
            self._keep([bank.features] * len(self.memory), bank.index, bank.group)
        rows = self.seen.nonzero()[:, 0]
        rank = 0 if bank.group is None else dist.get_rank(bank.group)
        mine = rows.tensor_split(world_size(bank.group))[rank]
        for number, size in enumerate(self.prototypes.sizes):
            if size > len(rows):
                raise UserError(
                    f"head.num_prototypes={self.prototypes.sizes}: only {len(rows)} images could be"
                    " read; a set of prototypes needs at least as many: give smaller ones, as in"
                    f" [{self.num_clusters}]"
                )
            found = kmeans(
                self.memory[number % len(self.memory)][mine],
                size,
                init="random",
                num_iters=self.num_iters,
                spherical=True,
                empty="keep",
                seed=int(self.rounds) * self.num_heads + number,
                group=bank.group,
            )
            self.prototypes.sets[number].data.copy_(found.centroids)
            self.labels[number].fill_(UNSEEN)
            self.labels[number][rows] = gather_rows(found.labels, bank.group)[0]
        self.rounds += 1
        return Refresh(reset=tuple(f"prototypes.{name}" for name in self.prototypes.names))

    def targets(self, outputs: Mapping[int, Output], batch: Batch) -> Targets:
        """Labels (B, H) of the last clustering."""
        return Targets(labels=self.labels[:, batch.index].T)

    def loss(
        self, outputs: Mapping[int, Output], targets: Targets, batch: Batch
    ) -> dict[str, Tensor]:
        """Cross entropy over all crops, small ones counting like large ones; mean over the sets of
        prototypes.
        """
        logits = [outputs[crop].logits for crop in range(len(self.views))]
        terms = [
            multicrop_cross_entropy(each, labels)
            for each, labels in zip(zip(*logits), targets["labels"].T)
        ]
        return self.figures(torch.stack(terms).mean(), logits)

    def after_step(self, outputs: Mapping[int, Output], batch: Batch) -> None:
        """Keeps the embeddings of the global crops."""
        embeddings = [outputs[crop].embedding for crop in range(self.num_global)]
        self._keep([each for each in embeddings if each is not None], batch.index, batch.group)

    def _keep(self, embeddings: Sequence[Tensor], index: Tensor, group: object) -> None:
        """(n, E) for each bank and their indices (n,), from all ranks."""
        rows, _ = gather_rows(torch.stack(list(embeddings), dim=1), group)
        everyone, _ = gather_rows(index, group)
        self.memory[:, everyone] = rows.transpose(0, 1)
        self.seen[everyone] = True
