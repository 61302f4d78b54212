"""What methods with prototypes share: crops, sets of unit prototypes, and how those become
clusters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.errors import UserError
from deepclust.heads.base import Bank, BankSpec, Head, Output, Progress, Refresh, View
from deepclust.heads.common.layers import Projector
from deepclust.ops import kmeans
from deepclust.ops.collectives import sum_over
from deepclust.types import Count, Natural, Positive

CHUNK = 8192


def _sums(features: Tensor, clusters: Tensor, num: int, group: Any) -> tuple[Tensor, Tensor]:
    """Summed unit features (K, D) and rows (K,) of each cluster over all ranks."""
    unit = F.normalize(features, dim=1)
    sums = unit.new_zeros(num, unit.shape[1]).index_add_(0, clusters, unit)
    return sum_over(sums, group), sum_over(torch.bincount(clusters, minlength=num).to(unit), group)


class Prototypes(nn.Module):
    """H sets of unit prototypes, (K_h, E) each; logits are cosines / temperature.

    Rows are brought back to length one before each forward that takes part in training, outside the
    gradient, which is that of the bare product (SwAV, section 3 and its code).
    """

    def __init__(self, dim: int, sizes: Sequence[int], temperature: float) -> None:
        super().__init__()
        self.sizes, self.temperature = list(sizes), temperature
        drawn = [
            F.normalize(nn.Linear(dim, size, bias=False).weight.detach(), dim=1) for size in sizes
        ]
        self.sets = nn.ParameterList(nn.Parameter(each) for each in drawn)

    @property
    def names(self) -> list[str]:
        """Names of the sets among this module's parameters."""
        return [f"sets.{number}" for number in range(len(self.sizes))]

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, E) unit embeddings to a list of H logits (B, K_h)."""
        return [cosines / self.temperature for cosines in self.cosines(x)]

    def cosines(self, x: Tensor) -> list[Tensor]:
        """(B, E) unit embeddings to a list of H cosines (B, K_h)."""
        if not torch.is_grad_enabled():
            return [x @ F.normalize(each, dim=1).T for each in self.sets]
        for each in self.sets:
            self._renew(each)
        return [x @ each.T for each in self.sets]

    @torch.no_grad()
    def _renew(self, prototypes: Tensor) -> None:
        """Rows that are off unit length by more than rounding get it back; twice in a row changes
        nothing.
        """
        norms = prototypes.norm(dim=1, keepdim=True)
        off = (norms - 1).abs() > 1e-6
        prototypes.data.copy_(torch.where(off, prototypes / norms.clamp_min(1e-12), prototypes))


class PrototypeHead(Head):
    """Projector, unit embeddings, sets of prototypes; predictions by the set whose clusters hold
    together best.

    A set with as many prototypes as there are clusters is the clustering. A larger set is grouped
    into clusters at a stage's end: spherical k-means of the prototypes' mean features, weighted by
    how many images are nearest to each.

    num_prototypes: one number per set; None for two sets, 3 and 10 times `num_clusters`.
    num_global, num_local: crops of each kind.
    """

    def __init__(
        self,
        dim: Count,
        num_clusters: Count,
        *,
        num_prototypes: list[Count] | None = None,
        hidden_dim: Count = 256,
        embedding_dim: Count = 64,
        batch_norm: bool = True,
        temperature: Positive = 0.1,
        num_global: Count = 2,
        num_local: Natural = 0,
        global_view: str = "global",
        local_view: str = "local",
    ) -> None:
        super().__init__()
        self.num_clusters = num_clusters
        self.num_global = num_global
        self.global_view = global_view
        self.views = (View(global_view),) * num_global + (
            View(local_view, used_for="loss"),
        ) * num_local
        if len(self.views) < 2:
            raise ValueError(
                f"num_global={num_global}, num_local={num_local}: at least two crops are needed"
            )
        sizes = (
            [3 * num_clusters, 10 * num_clusters]
            if num_prototypes is None
            else list(num_prototypes)
        )
        if not sizes:
            raise ValueError(
                "num_prototypes=[]: give at least one number, or null for 3 and 10 times"
                " num_clusters"
            )
        self.num_heads = len(sizes)
        self.embedding_dim = embedding_dim
        self.projector = Projector(dim, hidden_dim, embedding_dim, batch_norm=batch_norm)
        self.prototypes = Prototypes(embedding_dim, sizes, temperature)
        for number, size in enumerate(sizes):
            self.register_buffer(f"groups{number}", torch.arange(size) % num_clusters)

    def init_from(self, previous: Head) -> None:
        """Takes over the projector of a stage before, where it has the same shape."""
        state, own = (
            getattr(previous, "projector", nn.Identity()).state_dict(),
            self.projector.state_dict(),
        )
        if {name: value.shape for name, value in state.items()} == {
            name: v.shape for name, v in own.items()
        }:
            self.projector.load_state_dict(state)

    def forward(self, z: Tensor, view: int) -> Output:
        """(B, D) to unit embeddings (B, E) and H logits (B, K_h)."""
        embedding = F.normalize(self.projector(z), dim=1)
        return Output(z, embedding, self.prototypes(embedding))

    def bank_due(self, progress: Progress) -> BankSpec | None:
        """At the end, where prototypes have to be grouped. Raises UserError for more prototypes
        than images.
        """
        num_samples = progress.num_images // max(1, progress.num_epochs)
        if progress.step == 0 and max(self.prototypes.sizes) > num_samples:
            raise UserError(
                f"head.num_prototypes={self.prototypes.sizes}: there are but {num_samples} images;"
                " a set of prototypes needs at least as many images, better many times more: give"
                f" smaller ones, as in [{self.num_clusters}]"
            )
        grouped = any(size > self.num_clusters for size in self.prototypes.sizes)
        return BankSpec() if progress.final and grouped else None

    def refresh(self, bank: Bank) -> Refresh:
        """Groups the prototypes of larger sets into clusters, by the features (n, D) of the images
        nearest to each.

        Prototypes that no image is nearest to join the group whose prototypes they resemble most.
        """
        training = self.training
        self.eval()
        parts = [[each.argmax(1) for each in self(z, 0).logits] for z in bank.features.split(CHUNK)]
        self.train(training)
        larger = [
            number for number, size in enumerate(self.prototypes.sizes) if size > self.num_clusters
        ]
        for number in larger:
            prototypes = self.prototypes.sets[number].detach()
            nearest = torch.cat([part[number] for part in parts])
            sums, sizes = _sums(bank.features, nearest, len(prototypes), bank.group)
            self.get_buffer(f"groups{number}").copy_(self._grouping(prototypes, sums, sizes))
        return Refresh(reset=tuple(f"groups{number}" for number in larger))

    def _grouping(self, prototypes: Tensor, sums: Tensor, sizes: Tensor) -> Tensor:
        """(K_h,) cluster of each prototype, from the summed features (K_h, D) and numbers (K_h,) of
        its images.
        """
        used = sizes > 0
        num, weights = min(self.num_clusters, int(used.sum())), sizes[used]
        restarts = max(
            3, min(100, 10_000 // len(prototypes))
        )  # ten left local minima 3 points worse on digits
        found = kmeans(
            sums[used],
            num,
            spherical=True,
            num_restarts=restarts,
            num_iters=100,
            sample_weights=weights,
        )
        nearest = (prototypes @ prototypes[used].T).argmax(1)
        return found.labels.to(prototypes.device)[nearest]

    def predict(self, z: Tensor) -> Tensor:
        """(B, D) to (B, K) probabilities of the chosen set: a softmax over its prototypes, summed
        over each group.
        """
        return self._grouped(z, self(z, 0).logits)[int(self.best)]

    def _grouped(self, z: Tensor, logits: Sequence[Tensor]) -> list[Tensor]:
        found = []
        for number, each in enumerate(logits):
            empty = z.new_zeros(len(z), self.num_clusters)
            found.append(
                empty.index_add_(1, self.get_buffer(f"groups{number}"), each.softmax(dim=1))
            )
        return found

    @torch.no_grad()
    def score(self, bank: Bank) -> Tensor:
        """One minus the mean cosine of an image's features with its cluster's mean, per set."""
        parts = [
            [p.argmax(1) for p in self._grouped(z, self(z, 0).logits)]
            for z in bank.features.split(CHUNK)
        ]
        scores = []
        for clusters in (torch.cat(each) for each in zip(*parts)):
            sums, sizes = _sums(bank.features, clusters, self.num_clusters, bank.group)
            scores.append(
                1 - sums.norm(dim=1).sum() / sizes.sum()
            )  # sum of cosines with a mean = norm of the sum
        return torch.stack(scores)

    def figures(self, loss: Tensor, logits: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        """The loss, and what shows a collapse: its distance from `ln_k`, and the entropy of the
        mean prediction.

        logits: for each crop the H logits (B, K_h). All are means over the sets, in nats.
        """
        means = [torch.cat(parts).detach().softmax(1).mean(0) for parts in zip(*logits)]
        entropy = torch.stack(
            [-(mean * mean.clamp_min(1e-12).log()).sum() for mean in means]
        ).mean()
        ln_k = sum(math.log(size) for size in self.prototypes.sizes) / self.num_heads
        return {
            "loss": loss,
            "cross_entropy": loss,
            "entropy": entropy,
            "ln_k": loss.new_tensor(ln_k),
        }
