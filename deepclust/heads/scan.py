"""SCAN: semantic clustering by adopting nearest neighbours (Van Gansbeke et al. 2020).

Neighbours are mined once, on the features that the stage begins with. Switches that differ from the
reference are named in the constructor; its defaults are the paper's where the paper says them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

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
from deepclust.heads.common.layers import ClusterLayer, drawn_seed
from deepclust.ops.collectives import gather_rows, mean_rows
from deepclust.ops.neighbors import neighbor_table
from deepclust.types import Count, NonNegative, Positive

LOG_FLOOR = -100.0


def scan_loss(
    anchors: Tensor, neighbors: Tensor, *, entropy_weight: float = 5.0, group: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """SCAN's objective (eq. 2) for one sub-head: consistency - entropy_weight * entropy.

    anchors, neighbors: (B, K) logits of images and of one neighbour each. Consistency is the mean
    of -log <p_i, q_i>, with the logarithm kept above -100; entropy is that of the mean anchor
    prediction over all ranks.
    Returns three scalars: loss, consistency, entropy.
    """
    log_p, log_q = F.log_softmax(anchors, dim=1), F.log_softmax(neighbors, dim=1)
    consistency = -torch.logsumexp(log_p + log_q, dim=1).clamp_min(LOG_FLOOR).mean()
    mean = mean_rows(log_p.exp(), group).clamp_min(1e-8)
    entropy = -(mean * mean.log()).sum()
    return consistency - entropy_weight * entropy, consistency, entropy


class SCAN(Head):
    """Sub-heads trained so that an image and its mined neighbours share a confident cluster.

    num_neighbors: k nearest neighbours, on the features z or on the pretext's embedding
    (`mine_on`).
    include_self: the reference draws the image itself with probability 1 / (k + 1).
    init: how each sub-head begins; a list is gone through in turn. `kmeans` and `spectral` make the
    clusters' centroids in the bank the first weights; the paper's is `random`.
    selection_entropy_weight: sub-heads are compared with weight 1 in the reference, whatever the
    training's weight is.
    """

    training_buffers = ("neighbors",)
    neighbors: Tensor

    def __init__(
        self,
        dim: Count,
        num_clusters: Count,
        num_samples: Count,
        *,
        num_heads: Count = 1,
        num_neighbors: Count = 20,
        mine_on: Literal["z", "embedding"] = "z",
        include_self: bool = True,
        entropy_weight: NonNegative = 5.0,
        selection_entropy_weight: NonNegative = 1.0,
        kind: Literal["linear", "cosine"] = "linear",
        temperature: Positive = 0.1,
        init: Literal["random", "kmeans", "spectral"]
        | list[Literal["random", "kmeans", "spectral"]] = "random",
        view: str = "strong",
    ) -> None:
        super().__init__()
        self.views = (View(view, used_for="loss"), View(view, source="partner", used_for="loss"))
        self.num_heads = num_heads
        self.num_neighbors = min(num_neighbors, num_samples - 1)
        self.mine_on: Literal["z", "embedding"] = mine_on
        self.include_self = include_self
        self.entropy_weight = entropy_weight
        self.selection_entropy_weight = selection_entropy_weight
        self.init: list[Literal["random", "kmeans", "spectral"]] = (
            [init] if isinstance(init, str) else list(init)
        )
        self.needs_prototypes = set(self.init) != {"random"}
        self.layer = ClusterLayer(dim, num_clusters, num_heads, kind=kind, temperature=temperature)
        self.start = drawn_seed()
        self.embedder: list[nn.Module] = []
        self.register_buffer(
            "neighbors", torch.arange(num_samples)[:, None].repeat(1, self.num_neighbors + 1)
        )

    def init_from(self, previous: Head) -> None:
        """Keeps a pretext's projector for the mining, outside this head's own state."""
        projector = getattr(previous, "projector", None)
        self.embedder = (
            [] if projector is None else [copy.deepcopy(projector).requires_grad_(False).eval()]
        )

    def init_prototypes(self, bank: Bank) -> None:
        """Clusters of the bank's features make the first weights."""
        self.layer.init_clusters(bank.features, self.init, seed=self.start, group=bank.group)

    def forward(self, z: Tensor, view: int) -> Output:
        """(B, D) to H logits (B, K)."""
        return Output(z, logits=self.layer(z))

    def bank_due(self, progress: Progress) -> BankSpec | None:
        """Once, before the first step."""
        return BankSpec() if progress.step == 0 else None

    def refresh(self, bank: Bank) -> Refresh:
        """Mines neighbours. The stored rows begin with the sample itself."""
        features = bank.features
        if self.mine_on == "embedding" and self.embedder:
            features = torch.cat(
                [self.embedder[0].to(part.device)(part) for part in features.split(4096)]
            )
        k, group = self.num_neighbors, bank.group
        table = neighbor_table(features, bank.index, bank.num_samples, k=k, group=group)
        self.neighbors[:, : table.shape[1]] = table
        return Refresh(partners=self.neighbors if self.include_self else self.neighbors[:, 1:])

    def loss(
        self, outputs: Mapping[int, Output], targets: Targets, batch: Batch
    ) -> dict[str, Tensor]:
        """Sum over sub-heads, as in the reference; what is logged is the mean over them."""
        terms = [
            scan_loss(p, q, entropy_weight=self.entropy_weight, group=batch.group)
            for p, q in zip(outputs[0].logits, outputs[1].logits)
        ]
        loss, consistency, entropy = (torch.stack(part) for part in zip(*terms))
        return {"loss": loss.sum(), "consistency": consistency.mean(), "entropy": entropy.mean()}

    def predict(self, z: Tensor) -> Tensor:
        """(B, D) to (B, K) probabilities of the chosen sub-head."""
        return self.layer(z)[int(self.best)].softmax(dim=1)

    @torch.no_grad()
    def score(self, bank: Bank) -> Tensor:
        """Consistency over all stored neighbours minus the entropy of the mean, per sub-head."""
        index, _ = gather_rows(bank.index, bank.group)
        scores = []
        for logits in self.layer(bank.features):
            everyone = torch.empty(len(self.neighbors), logits.shape[1], device=logits.device)
            everyone[index] = gather_rows(logits.log_softmax(dim=1), bank.group)[0]
            own = self.neighbors[bank.index].split(4096)
            mine = logits.log_softmax(dim=1).split(4096)
            agreement = [
                torch.logsumexp(p[:, None] + everyone[n], dim=2) for p, n in zip(mine, own)
            ]
            consistency = -mean_rows(torch.cat(agreement).clamp_min(LOG_FLOOR).mean(1), bank.group)
            mean = everyone[index].exp().mean(0).clamp_min(1e-8)
            scores.append(consistency + self.selection_entropy_weight * (mean * mean.log()).sum())
        return torch.stack(scores)
