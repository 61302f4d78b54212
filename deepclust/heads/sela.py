"""SeLa: self-labelling by optimal transport (Asano et al. 2020, "Self-labelling via simultaneous
clustering and representation learning").

At marks counted in images seen, all images get new labels: the most likely ones under the
constraint that every cluster is used equally often. In between the network learns the labels as if
they were true.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

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
from deepclust.heads.common.layers import ClusterLayer, Reading, enough_images, watched
from deepclust.ops import self_label
from deepclust.ops.collectives import gather_rows
from deepclust.ops.transport import SelfLabelResult
from deepclust.types import Count, Decay, Positive

CHUNK_BYTES = 8_388_608  # of float64 log-probabilities made at a time
# up to here a rank keeps all of its N x K while it solves; above, each round makes them anew
KEEP_BYTES = 268_435_456


def solve_mark(
    number: int, num_solves: int, num_images: int, num_samples: int, schedule: str
) -> float:
    """Images seen at which labelling `number` (from 0) of `num_solves` is due.

    (num_images + 1.01 N) (i / (n - 1))^2, dense at the start, or the same without the square; the
    first is due before the first step, and the last lies behind the end. num_images: of the whole
    stage.
    """
    share = number / max(1, num_solves - 1)
    return (num_images + 1.01 * num_samples) * (share**2 if schedule == "quadratic" else share)


class SeLa(Head):
    """H linear sub-heads on the shared features, each with labels of its own.

    num_solves: labellings in the stage. schedule: see `solve_mark`. If several marks have passed,
    one labelling is made before each of the next steps, as in the reference. solve: `all` sub-heads
    each time, or `one`, the next in turn (the reference's code for CIFAR takes the one of number
    epoch mod H).
    power: lambda; larger = nearer to the most likely labels. tol and stop: of the solver, see
    `self_label`.
    momentum: of the sub-heads' SGD, None for the stage's.
    num_prototypes: clusters that each sub-head learns, None for num_clusters, when predictions are
    those of the best sub-head. With any other number they are of a k-means of the features at the
    end (`Reading`).
    """

    training_buffers = ("labels", "solved")
    labels: Tensor
    solved: Tensor

    def __init__(
        self,
        dim: Count,
        num_clusters: Count,
        num_samples: Count,
        *,
        num_prototypes: Count | None = None,
        num_heads: Count = 10,
        num_solves: Count = 100,
        schedule: Literal["quadratic", "linear"] = "quadratic",
        solve: Literal["all", "one"] = "all",
        power: Positive = 25.0,
        tol: Positive | None = None,
        stop: Literal["marginal", "paper"] = "marginal",
        momentum: Decay | None = None,
        view: str = "strong",
    ) -> None:
        super().__init__()
        self.views = (View(view, used_for="loss"),)
        self.num_prototypes, self.num_heads = num_prototypes or num_clusters, num_heads
        self.num_solves, self.schedule, self.solve = num_solves, schedule, solve
        self.power, self.tol, self.momentum = power, tol, momentum
        self.stop: Literal["marginal", "paper"] = stop
        self.layer = ClusterLayer(dim, self.num_prototypes, num_heads)
        self.reading = None if self.num_prototypes == num_clusters else Reading(dim, num_clusters)
        balanced = torch.arange(num_samples) % self.num_prototypes
        start = torch.stack([balanced[torch.randperm(num_samples)] for _ in range(num_heads)])
        self.register_buffer("labels", start)
        self.register_buffer("solved", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor, view: int) -> Output:
        """(B, D) to H logits (B, K)."""
        return Output(z, logits=self.layer(z))

    def bank_due(self, progress: Progress) -> BankSpec | None:
        """At the next mark, inside a pass or between two: features as training sees them, of a
        fresh view.

        Raises UserError for too few images.
        """
        enough_images("num_prototypes", self.num_prototypes, self.labels.shape[1])
        number, num_samples = int(self.solved), self.labels.shape[1]
        if progress.final:
            return None if self.reading is None else BankSpec()
        if number >= self.num_solves:
            return None
        mark = solve_mark(number, self.num_solves, progress.num_images, num_samples, self.schedule)
        return (
            BankSpec(mode="train", view=self.views[0].augment)
            if progress.images_seen >= mark
            else None
        )

    @torch.no_grad()
    def refresh(self, bank: Bank) -> Refresh:
        """New labels; at the end the k-means that predictions are of."""
        if bank.final and self.reading is not None:
            self.reading.fit(bank.features, group=bank.group)
            return Refresh(reset=("reading.centroids",))
        index, _ = gather_rows(bank.index, bank.group)
        turn = int(self.solved) % self.num_heads
        for head in range(self.num_heads) if self.solve == "all" else [turn]:
            self.labels[head, index] = gather_rows(self._solve(bank, head).labels, bank.group)[0]
        self.solved += 1
        return Refresh()

    def log_probs(self, z: Tensor, head: int) -> Iterator[Tensor]:
        """(rows, K) float64 log-probabilities of features (n, D), chunk by chunk, made when they
        are asked for.
        """
        for rows in z.split(max(1, CHUNK_BYTES // (8 * self.num_prototypes))):
            yield self.layer.one(rows, head).double().log_softmax(dim=1)

    def _solve(self, bank: Bank, head: int) -> SelfLabelResult:
        def chunks() -> Iterator[Tensor]:
            return self.log_probs(bank.features, head)

        fits = 8 * len(bank.features) * self.num_prototypes <= KEEP_BYTES
        given = torch.cat(list(chunks())) if fits else chunks
        return self_label(given, power=self.power, tol=self.tol, stop=self.stop, group=bank.group)

    def targets(self, outputs: Mapping[int, Output], batch: Batch) -> Targets:
        """Labels (B, H) of the last labelling."""
        return Targets(labels=self.labels[:, batch.index].T)

    def loss(
        self, outputs: Mapping[int, Output], targets: Targets, batch: Batch
    ) -> dict[str, Tensor]:
        """Mean cross entropy over sub-heads."""
        pairs = list(zip(outputs[0].logits, targets["labels"].unbind(1)))
        loss = torch.stack([F.cross_entropy(logits, labels) for logits, labels in pairs]).mean()
        return {"loss": loss, **watched(loss, outputs[0].logits, batch.group)}

    def predict(self, z: Tensor) -> Tensor:
        """(B, D) to (B, K) probabilities."""
        return (
            self.layer.one(z, int(self.best)).softmax(dim=1)
            if self.reading is None
            else self.reading(z)
        )

    @torch.no_grad()
    def score(self, bank: Bank) -> Tensor:
        """(H,) what a labelling of the clean images would cost now: the objective, per sub-head."""
        return torch.tensor([self._solve(bank, head).cost for head in range(self.num_heads)])

    def param_groups(self) -> Iterator[tuple[list[nn.Parameter], dict[str, float]]]:
        """Sub-heads may have a momentum of their own."""
        yield list(self.parameters()), {} if self.momentum is None else {"momentum": self.momentum}
