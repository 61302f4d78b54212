"""Calibrated deep clustering: a second head whose confidences can be trusted (Jia et al. 2025).

Any clustering head is wrapped (`inner`). Beside it a calibration head, on features that carry no
gradient, learns the mean of the clustering head's predictions over small neighbourhoods,
mini-clusters of the batch: where images that look alike are spread over clusters, it is unsure. Its
confidences then choose, cluster by cluster, how many images the clustering head learns from. No
gradient of the one reaches the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.errors import UserError
from deepclust.heads.base import Bank, Batch, Head, Output, Targets, View
from deepclust.heads.common.layers import drawn_seed
from deepclust.heads.common.mlp import ClusterMLP
from deepclust.heads.common.wrapper import Wrapper
from deepclust.heads.selflabel import SelfLabel
from deepclust.ops import kmeans
from deepclust.ops.collectives import gather_rows, mean_rows, sum_over
from deepclust.types import Count, NonNegative, Positive

PREFIX = "inner/"


def select(probabilities: Tensor, per_cluster: int | None = None, *, group: Any = None) -> Tensor:
    """(B,) bool: which rows the clustering head may learn from (the paper's class-wise selection).

    probabilities: (B, K), this rank's rows. Of the M = `per_cluster` rows (None: rows of all ranks
    / K) with the largest probability of cluster k, the first floor(M * their mean confidence) are
    taken; confidence is a row's largest probability. A row may be taken for a cluster that is not
    its own.
    """
    everyone, offset = gather_rows(probabilities, group)
    num_rows, num_clusters = everyone.shape
    most = min(num_rows, per_cluster or max(1, num_rows // num_clusters))
    rows = everyone.topk(most, dim=0).indices
    counts = (everyone.max(1).values[rows].double().mean(0) * most + 1e-9).floor()
    taken = torch.arange(most, device=rows.device)[:, None] < counts
    chosen = torch.zeros(num_rows, dtype=torch.bool, device=rows.device)
    chosen[rows[taken]] = True
    return chosen[offset : offset + len(probabilities)]


def neighborhood_means(
    probabilities: Tensor, labels: Tensor, num_groups: int, *, group: Any = None
) -> Tensor:
    """(B, K): for each row the mean of `probabilities` (B, K) over all rows, of all ranks, with its
    label (B,).
    """
    members = F.one_hot(labels, num_groups).to(probabilities)
    sums, counts = sum_over(members.T @ probabilities, group), sum_over(members.sum(0), group)
    return (sums / counts.clamp_min(1)[:, None])[labels]


def calibration_loss(
    logits: Tensor, targets: Tensor, *, entropy_weight: float = 1.0, group: Any = None
) -> tuple[Tensor, Tensor]:
    """Cross entropy towards soft targets (B, K) less `entropy_weight` times the entropy of the mean
    prediction.

    Returns the loss and that entropy, of all ranks' rows; the mean is kept above 1e-8 under the
    logarithm.
    """
    mean = mean_rows(logits.softmax(1), group).clamp_min(1e-8)
    entropy = -(mean * mean.log()).sum()
    return F.cross_entropy(logits, targets) - entropy_weight * entropy, entropy


class Calibration(Wrapper):
    """Wraps `inner`. With `inner=selflabel` the calibration head gives the labels as well, which is
    the paper's method.

    Other inner heads keep their targets and learn from the chosen rows alone. Of several sub-heads
    the first is calibrated. per_cluster: M of `select`. mini_clusters: into how many a macro batch
    is cut; the fewer, the wider the neighbourhoods and the softer the confidences. warm_start:
    k-means goes on from the last batch's centroids; the reference starts anew with `restarts` 10.
    lr_scale: of the calibration head's learning rate. orthogonal_steps: of the initial weights;
    start_restarts, start_iterations: of their k-means (the reference: 2000; 10 and 300).
    """

    needs_prototypes = True
    centroids: Tensor
    warm: Tensor

    def __init__(
        self,
        dim: Count,
        num_clusters: Count,
        inner: Head,
        *,
        hidden_dim: Count = 512,
        per_cluster: Count | None = None,
        mini_clusters: Count = 100,
        entropy_weight: NonNegative = 1.0,
        restarts: Count = 1,
        iterations: Count = 10,
        warm_start: bool = True,
        orthogonal_steps: Count = 2000,
        start_restarts: Count = 1,
        start_iterations: Count = 25,
        lr_scale: Positive = 1.0,
        clean_view: str = "clean",
        weak_view: str = "weak",
    ) -> None:
        gives_labels, layer = isinstance(inner, SelfLabel), getattr(inner, "layer", None)
        if isinstance(layer, ClusterMLP) and layer.first.out_features != hidden_dim:
            other = layer.first.out_features
            raise UserError(
                f"hidden_dim={hidden_dim} and inner.hidden_dim={other}: must be equal with"
                " inner.kind=mlp"
            )
        shared = [
            n for n, view in enumerate(inner.views) if gives_labels and view.used_for == "targets"
        ]
        extra = (View(weak_view, used_for="targets"), View(clean_view, used_for="targets"))
        super().__init__(inner, extra[:1] if shared else extra)
        self.gives_labels, self.fresh = gives_labels, True
        self.calibrator, self.start = ClusterMLP(dim, hidden_dim, num_clusters), drawn_seed()
        self.weak, self.clean = len(inner.views), shared[0] if shared else len(inner.views) + 1
        self.per_cluster, self.entropy_weight, self.lr_scale = per_cluster, entropy_weight, lr_scale
        self.restarts, self.iterations, self.warm_start = restarts, iterations, warm_start
        self.start_options = {
            "steps": orthogonal_steps,
            "restarts": start_restarts,
            "iterations": start_iterations,
        }
        self.register_buffer("centroids", torch.zeros(mini_clusters, dim))
        self.register_buffer("warm", torch.zeros((), dtype=torch.bool))
        self.training_buffers += ("centroids", "warm")

    def init_from(self, previous: Head) -> None:
        """`inner` takes over what it can; if it takes nothing, both heads begin as k-means."""
        before = [parameter.clone() for parameter in self.inner.parameters()]
        super().init_from(previous)
        self.fresh = all(torch.equal(a, b) for a, b in zip(before, self.inner.parameters()))

    def param_groups(self) -> Iterator[tuple[list[nn.Parameter], dict[str, float]]]:
        """Those of `inner`, and the calibration head's."""
        yield from super().param_groups()
        yield list(self.calibrator.parameters()), {"lr_scale": self.lr_scale}

    @torch.no_grad()
    def init_prototypes(self, bank: Bank) -> None:
        """Both heads begin as one clustering: that of `inner` if it has one, else k-means by way of
        a hidden layer.
        """
        if self.inner.needs_prototypes:
            self.inner.init_prototypes(bank)
        layer = getattr(self.inner, "layer", None)
        anew = self.fresh and isinstance(layer, ClusterMLP)
        training = self.inner.training
        labels = None if anew else self.inner.eval().predict(bank.features).argmax(1)
        self.inner.train(training)
        self.calibrator.init_clusters(
            bank.features, labels, **self.start_options, seed=self.start, group=bank.group
        )
        if anew and isinstance(layer, ClusterMLP):
            layer.load_state_dict(self.calibrator.state_dict())

    def forward(self, z: Tensor, view: int) -> Output:
        """(B, D) to what `inner` gives; the weak view to calibration logits (B, K), the clean one
        to `inner`'s.
        """
        if view == self.weak:
            return Output(z, logits=self.calibrator(z.detach()))
        if view < len(self.inner.views):
            return self.inner(z, view)
        return Output(z, logits=[self.inner.predict(z).clamp_min(1e-30).log()])

    def targets(self, outputs: Mapping[int, Output], batch: Batch) -> Targets:
        """Labels and choice by the calibration head; soft targets and the features that they were
        made from.
        """
        sure, group = outputs[self.weak].logits[0].softmax(1), batch.group
        z = outputs[self.clean].z
        parts, num_groups = self._mini_clusters(F.normalize(z, p=1, dim=1), group)
        soft = neighborhood_means(
            outputs[self.clean].logits[0].softmax(1), parts, num_groups, group=group
        )
        chosen = select(sure, self.per_cluster, group=group)
        if self.gives_labels:
            own = {"labels": sure.argmax(1), "weights": torch.ones_like(sure[:, 0])}
        else:
            own = self.inner.targets(self.inner_outputs(outputs), batch)
        return Targets(
            chosen=chosen, soft=soft, z=z, **{PREFIX + name: value for name, value in own.items()}
        )

    def _mini_clusters(self, x: Tensor, group: Any) -> tuple[Tensor, int]:
        """K-means of a macro batch (n, D): labels (n,), and of how many clusters."""
        num_rows = int(sum_over(torch.tensor(len(x), device=x.device), group))
        number = min(len(self.centroids), num_rows)
        init = self.centroids[:number] if self.warm_start and self.warm else "k-means++"
        found = kmeans(
            x, number, init=init, num_restarts=self.restarts, num_iters=self.iterations, group=group
        )
        self.centroids[:number] = found.centroids.to(self.centroids)
        self.warm.fill_(True)
        return found.labels, number

    def loss(
        self, outputs: Mapping[int, Output], targets: Targets, batch: Batch
    ) -> dict[str, Tensor]:
        """The clustering loss over the chosen rows plus the calibration loss over all; 0 where none
        was chosen.
        """
        chosen, group = targets["chosen"], batch.group
        counts = sum_over(
            torch.stack([chosen.sum(), chosen.new_ones(len(chosen)).sum()]).float(), group
        )
        own = self.inner_outputs(outputs)
        clustering = targets["z"].new_zeros(())
        for output in own.values():  # a gradient of nought where nothing is chosen
            clustering = clustering + 0.0 * (
                output.z.sum() + sum(each.sum() for each in output.logits)
            )
        if counts[0] > 0:
            rows = {number: output[chosen] for number, output in own.items()}
            kept = {
                n.removeprefix(PREFIX): value
                for n, value in targets[chosen].items()
                if n.startswith(PREFIX)
            }
            share = chosen.float().mean() * counts[1] / counts[0]
            mean = self.inner.loss(rows, Targets(kept), batch[chosen])["loss"]
            clustering = clustering + torch.where(share > 0, mean, 0.0) * share
        logits, soft = self.calibrator(targets["z"])[0], targets["soft"]
        calibration, entropy = calibration_loss(
            logits, soft, entropy_weight=self.entropy_weight, group=group
        )
        parts = {
            "clustering": clustering.detach(),
            "calibration": calibration.detach(),
            "entropy": entropy.detach(),
        }
        return {"loss": clustering + calibration, "selected": chosen.float().mean(), **parts}

    def predict(self, z: Tensor) -> Tensor:
        """(B, D) to calibrated probabilities (B, K)."""
        return self.calibrator(z)[0].softmax(1)

    def uncalibrated(self, z: Tensor) -> Tensor:
        """(B, D) to the clustering head's probabilities (B, K)."""
        return self.inner.predict(z)
