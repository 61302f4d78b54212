"""Self-labelling: the clustering learns from its own confident predictions (SCAN, section 2.3; Sohn
et al. 2020).

The stage's EMA teacher labels the clean view and the student learns the strong view. The reference
has no teacher on small data sets, which made good clusterings worse under small budgets;
`trainer.ema=null` is that variant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.heads.base import Batch, Head, Output, Targets, View
from deepclust.heads.common.layers import ClusterLayer
from deepclust.heads.common.mlp import ClusterMLP
from deepclust.ops.collectives import gather_rows, sum_over
from deepclust.types import Count, Fraction, Positive


def confident_targets(
    logits: Tensor,
    *,
    threshold: float = 0.99,
    quota: float | None = None,
    balance: bool = True,
    group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Hard labels and weights (SCAN, eq. 4 and its balanced cross entropy).

    logits: (B, K). A sample counts if its largest probability is above `threshold` or, with a
    `quota`, if it is among
    that share of the most confident samples of its cluster over all ranks: small and uncertain
    clusters then teach as well as sure ones. With `balance` each label present gets the same total
    weight over all ranks. Returns labels (B,) int64 and weights (B,) whose mean over the rows of
    all ranks is 1, or 0 where nobody is confident (the reference stops with an error there).
    """
    confidence, labels = logits.softmax(dim=1).max(dim=1)
    if quota is None:
        weights = (confidence > threshold).to(logits.dtype)
    else:
        weights = (
            confidence >= _cutoffs(confidence, labels, logits.shape[1], quota, group)[labels]
        ).to(logits.dtype)
    if balance:
        counts = sum_over(torch.zeros_like(logits[0]).index_add_(0, labels, weights), group)
        weights = weights / counts.clamp_min(1)[labels]
    total = sum_over(torch.stack([weights.sum(), weights.new_tensor(float(len(weights)))]), group)
    return labels, weights * (total[1] / total[0].clamp_min(1e-12))


def _cutoffs(
    confidence: Tensor, labels: Tensor, num_clusters: int, quota: float, group: Any
) -> Tensor:
    """(K,) confidence of the last sample that counts in each cluster."""
    everyone, whose = gather_rows(confidence, group)[0], gather_rows(labels, group)[0]
    cutoffs = confidence.new_zeros(num_clusters)
    for cluster in range(num_clusters):
        members = everyone[whose == cluster]
        if len(members):
            cutoffs[cluster] = members.topk(max(1, round(quota * len(members)))).values[-1]
    return cutoffs


class SelfLabel(Head):
    """One cluster layer, taken over from the stage before. `quota` takes the place of `threshold`
    where it is given.

    kind: `mlp` has a hidden layer of `hidden_dim` units with BatchNorm, as calibrated deep
    clustering uses it.
    """

    def __init__(
        self,
        dim: Count,
        num_clusters: Count,
        *,
        threshold: Fraction = 0.99,
        quota: Fraction | None = None,
        balance: bool = True,
        kind: Literal["linear", "cosine", "mlp"] = "linear",
        temperature: Positive = 0.1,
        hidden_dim: Count = 512,
        target_view: str = "clean",
        loss_view: str = "strong",
    ) -> None:
        super().__init__()
        self.views = (View(target_view, used_for="targets"), View(loss_view, used_for="loss"))
        self.threshold = threshold
        self.quota = quota
        self.balance = balance
        self.layer: ClusterLayer | ClusterMLP
        if kind == "mlp":
            self.layer = ClusterMLP(dim, hidden_dim, num_clusters)
        else:
            self.layer = ClusterLayer(dim, num_clusters, kind=kind, temperature=temperature)

    def init_from(self, previous: Head) -> None:
        """Takes over the sub-head that the previous stage kept, if it is of this one's shape."""
        layer = getattr(previous, "layer", None)
        if isinstance(layer, type(self.layer)):
            self.layer.copy_head(layer, int(previous.best))  # pyright: ignore[reportArgumentType]

    def forward(self, z: Tensor, view: int) -> Output:
        """(B, D) to logits (B, K)."""
        return Output(z, logits=self.layer(z))

    def targets(self, outputs: Mapping[int, Output], batch: Batch) -> Targets:
        """Labels and weights of the whole macro batch over all ranks."""
        labels, weights = confident_targets(
            outputs[0].logits[0],
            threshold=self.threshold,
            quota=self.quota,
            balance=self.balance,
            group=batch.group,
        )
        return Targets(labels=labels, weights=weights)

    def loss(
        self, outputs: Mapping[int, Output], targets: Targets, batch: Batch
    ) -> dict[str, Tensor]:
        """Weighted cross entropy; 0 where nothing was confident."""
        each = F.cross_entropy(outputs[1].logits[0], targets["labels"], reduction="none")
        selected = (targets["weights"] > 0).float().mean()
        return {"loss": (each * targets["weights"]).mean(), "selected": selected}

    def predict(self, z: Tensor) -> Tensor:
        """(B, D) to (B, K) probabilities."""
        return self.layer(z)[0].softmax(dim=1)
