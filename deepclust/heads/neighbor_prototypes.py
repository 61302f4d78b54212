"""Prototypes that begin as a clustering and learn from neighbours: swapped prediction of balanced
codes.

SwAV's objective (Caron et al. 2020) with neighbours in place of crops (as SCAN, Van Gansbeke et al.
2020, has them in place of augmentations), on prototypes that begin at k-means or spectral clusters.
For frozen features, and for a
backbone that knows something already: there is no layer before the prototypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

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
from deepclust.heads.common.layers import ClusterLayer, drawn_seed, watched
from deepclust.heads.swav import swapped_prediction_loss
from deepclust.ops import sinkhorn
from deepclust.ops.agreement import neighbor_agreement
from deepclust.ops.collectives import gather_rows, mean_rows
from deepclust.ops.neighbors import neighbor_table
from deepclust.types import Count, Fraction, Positive

Start = Literal["random", "kmeans", "spectral", "diffusion"]


class NeighborPrototypes(Head):
    """Cosine prototypes; an image's balanced code is predicted from its neighbour, and the
    neighbour's from the image.

    init: how each sub-head begins; a list is gone through in turn (`ClusterLayer.init_clusters`).
    Sub-heads differ in their start alone; the one whose clusters neighbours share most is kept.
    balance: shares of the clusters that codes are brought to, 1: all equal, 0: as the sub-head
    begins, between: a mixture; a random start has equal shares. epsilon, num_iters: of Sinkhorn's
    rounds, on cosines, over the macro batch of all ranks; codes are softer for a larger epsilon.
    num_neighbors: k nearest by cosine, mined once.
    """

    training_buffers = ("neighbors", "shares")
    neighbors: Tensor
    shares: Tensor

    def __init__(
        self,
        dim: Count,
        num_clusters: Count,
        num_samples: Count,
        *,
        num_heads: Count = 4,
        num_neighbors: Count = 10,
        temperature: Positive = 0.1,
        epsilon: Positive = 0.025,
        num_iters: Count = 20,
        balance: Fraction = 0.0,
        init: Start | list[Start] = "spectral",
        view: str = "strong",
    ) -> None:
        super().__init__()
        self.views = (View(view), View(view, source="partner"))
        self.num_heads = num_heads
        self.num_neighbors = min(num_neighbors, num_samples - 1)
        self.temperature, self.epsilon, self.num_iters, self.balance = (
            temperature,
            epsilon,
            num_iters,
            balance,
        )
        self.init: list[Start] = [init] if isinstance(init, str) else list(init)
        self.needs_prototypes = set(self.init) != {"random"}
        self.layer = ClusterLayer(
            dim, num_clusters, num_heads, kind="cosine", temperature=temperature
        )
        self.start = drawn_seed()  # of the clusterings it may begin with; the same on all ranks
        self.register_buffer(
            "neighbors", torch.arange(num_samples)[:, None].repeat(1, self.num_neighbors)
        )
        self.register_buffer("shares", torch.full((num_heads, num_clusters), 1 / num_clusters))

    def init_prototypes(self, bank: Bank) -> None:
        """Clusters of the bank's features make the first weights, their sizes the shares."""
        self.layer.init_clusters(bank.features, self.init, seed=self.start, group=bank.group)
        num = self.shares.shape[1]
        for head, logits in enumerate(self.layer(bank.features)):
            if self.init[head % len(self.init)] != "random":
                found = mean_rows(F.one_hot(logits.argmax(dim=1), num).to(self.shares), bank.group)
                self.shares[head] = self.balance / num + (1 - self.balance) * found

    def forward(self, z: Tensor, view: int) -> Output:
        """(B, D) to H logits (B, K)."""
        return Output(z, logits=self.layer(z))

    def bank_due(self, progress: Progress) -> BankSpec | None:
        """Once, before the first step."""
        return BankSpec() if progress.step == 0 else None

    def refresh(self, bank: Bank) -> Refresh:
        """Mines neighbours; the image itself is none of its partners."""
        k = self.num_neighbors
        table = neighbor_table(bank.features, bank.index, bank.num_samples, k=k, group=bank.group)[
            :, 1:
        ]
        self.neighbors[:, : table.shape[1]] = table
        return Refresh(partners=self.neighbors if self.num_neighbors else None)

    def targets(self, outputs: Mapping[int, Output], batch: Batch) -> Targets:
        """Codes (B, H, K) of the image and of its neighbour."""
        return Targets({f"codes{view}": self._codes(outputs[view], batch) for view in (0, 1)})

    def _codes(self, output: Output, batch: Batch) -> Tensor:
        codes = [
            sinkhorn(
                logits * self.temperature,
                epsilon=self.epsilon,
                num_iters=self.num_iters,
                column_marginal=self.shares[head],
                group=batch.group,
            )
            for head, logits in enumerate(output.logits)
        ]
        return torch.stack(codes, dim=1)

    def loss(
        self, outputs: Mapping[int, Output], targets: Targets, batch: Batch
    ) -> dict[str, Tensor]:
        """Swapped prediction, mean over sub-heads."""
        codes = zip(*(targets[f"codes{view}"].unbind(1) for view in (0, 1)))
        pairs = zip(outputs[0].logits, outputs[1].logits)
        loss = torch.stack(
            [swapped_prediction_loss(code, pair) for code, pair in zip(codes, pairs)]
        ).mean()
        return {"loss": loss, **watched(loss, outputs[0].logits, batch.group)}

    def predict(self, z: Tensor) -> Tensor:
        """(B, D) to (B, K) probabilities of the chosen sub-head."""
        return self.layer.one(z, int(self.best)).softmax(dim=1)

    @torch.no_grad()
    def score(self, bank: Bank) -> Tensor:
        """One minus how far neighbours share a cluster, beyond chance, per sub-head."""
        index, _ = gather_rows(bank.index, bank.group)
        scores = []
        for logits in self.layer(bank.features):
            labels = torch.zeros(len(self.neighbors), dtype=torch.int64, device=logits.device)
            labels[index], _ = gather_rows(logits.argmax(dim=1), bank.group)
            scores.append(1 - neighbor_agreement(labels, self.neighbors, index))
        return torch.stack(scores)
