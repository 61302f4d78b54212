"""TEMI: sub-heads that share what an image and its neighbour have in common (Adaloglou et al.
2023).

"Exploring the Limits of Deep Image Clustering using Pretrained Models": on frozen features, an
image and a random one of its nearest neighbours get predictions of high pointwise mutual
information, from a student and its EMA teacher.

Where this differs from the authors' code: no image is its own neighbour, whatever the number of
images; the last layer's rows have length one with no scale that is learned; sub-heads are compared
as the teacher is, see `_note`; the teacher's decay ramps up, it is the smaller of `momentum` and (1
+ t) / (10 + t) at step t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
from deepclust.heads.common.layers import watched
from deepclust.ops.collectives import mean_rows
from deepclust.ops.neighbors import neighbor_table
from deepclust.types import Count, Decay, Positive


def temi_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    prior: Tensor,
    *,
    beta: float = 0.6,
    weighted: bool = True,
) -> tuple[Tensor, Tensor]:
    """TEMI's objective (eq. 8 and 9) for a batch of pairs (x, x'), of H sub-heads.

    students, teachers: log p_s and log p_t (B, H, K) of x, then of x'. prior: p (H, K), shares of
    the clusters. With w = the mean over sub-heads of sum_c p_t(c|x) p_t(c|x'), or 1 where not
    `weighted`, sub-head h's loss is -w log sum_c (p_s(c|x) p_t(c|x'))^beta / p_c, the mean with
    that of x and x' exchanged. Returns losses (B, H) and w (B,), which has no gradient.
    """
    terms = [
        _log_ratio(students[0], teachers[1], prior, beta),
        _log_ratio(students[1], teachers[0], prior, beta),
    ]
    alike = (teachers[0] + teachers[1]).exp().sum(dim=2).mean(dim=1).detach()
    weight = alike if weighted else torch.ones_like(alike)
    return -weight[:, None] * (terms[0] + terms[1]) / 2, alike


def _log_ratio(student: Tensor, teacher: Tensor, prior: Tensor, beta: float) -> Tensor:
    """(B, H): log sum_c (p_s p_t)^beta / p_c."""
    return torch.logsumexp(beta * (student + teacher) - prior.log(), dim=2)


class Perceptrons(nn.Module):
    """H independent nets from features to cosines: linear, GELU, linear, length one, and unit rows
    of a last layer.
    """

    def __init__(
        self, dim: int, hidden_dim: int, bottleneck_dim: int, num_clusters: int, num_heads: int
    ) -> None:
        super().__init__()
        self.num_heads, self.hidden_dim = num_heads, hidden_dim
        self.first = nn.Linear(dim, num_heads * hidden_dim)
        second = [nn.Linear(hidden_dim, bottleneck_dim) for _ in range(num_heads)]
        self.second = nn.Parameter(torch.stack([layer.weight.detach() for layer in second]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach()[None] for layer in second]))
        self.last = nn.Parameter(
            F.normalize(torch.randn(num_heads, num_clusters, bottleneck_dim), dim=2)
        )

    def forward(self, z: Tensor, heads: slice = slice(None)) -> Tensor:
        """(B, D) to cosines (h, B, K) of some sub-heads, of all if not said."""
        weight = self.first.weight.unflatten(0, (self.num_heads, self.hidden_dim))[heads]
        bias = self.first.bias.unflatten(0, (self.num_heads, self.hidden_dim))[heads]
        hidden = F.gelu(F.linear(z, weight.flatten(0, 1), bias.flatten()))
        hidden = hidden.unflatten(1, (len(weight), self.hidden_dim)).transpose(0, 1)
        narrow = torch.baddbmm(self.bias[heads], hidden, self.second[heads].mT)
        return torch.bmm(F.normalize(narrow, dim=2), F.normalize(self.last[heads], dim=2).mT)


class TEMI(Head):
    """Sub-heads of pointwise mutual information between an image and its neighbours; a teacher
    makes the targets.

    num_neighbors: k nearest by cosine, mined once, one of them drawn for each step. beta: below 1
    it keeps sub-heads from giving every image a cluster of its own certainty. weighted: pairs count
    as far as all teachers agree on them.
    prior_momentum: of the running mean of the teacher's predictions, which begins at 1 / K and
    takes up a batch before it is used there. momentum: decay of the teacher where `trainer.ema`
    sets none. standardize: each feature less its mean, over its standard deviation, both of the
    stage's beginning.
    """

    training_buffers = ("prior",)
    prior: Tensor
    pass_loss: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        dim: Count,
        num_clusters: Count,
        *,
        num_heads: Count = 16,
        num_neighbors: Count = 50,
        hidden_dim: Count = 512,
        bottleneck_dim: Count = 256,
        beta: Positive = 0.6,
        weighted: bool = True,
        temperature: Positive = 0.1,
        teacher_temperature: Positive = 0.1,
        prior_momentum: Decay = 0.9,
        momentum: Decay = 0.996,
        standardize: bool = False,
        view: str = "clean",
    ) -> None:
        super().__init__()
        self.views = (View(view), View(view, source="partner"))
        self.num_heads, self.num_neighbors = num_heads, num_neighbors
        self.beta, self.weighted = beta, weighted
        self.temperature, self.teacher_temperature = temperature, teacher_temperature
        self.prior_momentum, self.teacher_decay, self.standardize = (
            prior_momentum,
            momentum,
            standardize,
        )
        self.layers = Perceptrons(dim, hidden_dim, bottleneck_dim, num_clusters, num_heads)
        self.register_buffer("prior", torch.full((num_heads, num_clusters), 1 / num_clusters))
        self.register_buffer(
            "pass_loss", torch.zeros(num_heads + 1, dtype=torch.float64)
        )  # sums, and their count
        self.register_buffer("shift", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def forward(self, z: Tensor, view: int) -> Output:
        """(B, D) to H logits (B, K), cosines / temperature."""
        return Output(z, logits=list(self._logits(z, slice(None)).unbind(0)))

    def _logits(self, z: Tensor, heads: slice) -> Tensor:
        return self.layers((z - self.shift) / self.scale, heads) / self.temperature

    def bank_due(self, progress: Progress) -> BankSpec | None:
        """Once, before the first step."""
        return BankSpec() if progress.step == 0 else None

    def refresh(self, bank: Bank) -> Refresh:
        """Mines neighbours; the image itself is none of its partners. Where asked for, takes the
        features' moments.
        """
        k, names = self.num_neighbors, ()
        table = neighbor_table(bank.features, bank.index, bank.num_samples, k=k, group=bank.group)
        if self.standardize:
            names = ("shift", "scale")
            self.shift.copy_(mean_rows(bank.features, bank.group))
            variance = mean_rows((bank.features - self.shift).square(), bank.group)
            self.scale.copy_(torch.where(variance > 0, variance.sqrt(), 1.0))
        return Refresh(partners=table[:, 1:] if table.shape[1] > 1 else table, reset=names)

    def targets(self, outputs: Mapping[int, Output], batch: Batch) -> Targets:
        """The teacher's log p_t (B, H, K) of both images; they enter the prior first."""
        logs = [
            _log_p(outputs[view].logits, self.temperature / self.teacher_temperature)
            for view in (0, 1)
        ]
        mean = mean_rows((logs[0].exp() + logs[1].exp()) / 2, batch.group)
        self.prior.lerp_(mean.to(self.prior), 1 - self.prior_momentum)
        self._note(logs, batch)
        return Targets(first=logs[0], second=logs[1])

    def _note(self, logs: Sequence[Tensor], batch: Batch) -> None:
        """Adds each sub-head's loss to this pass's sums, with the teacher's predictions in the
        student's place.

        It is the teacher that is evaluated and exported. The authors compare the student's training
        losses.
        """
        if batch.progress.starts_epoch:
            self.pass_loss.zero_()
        losses, _ = temi_loss(logs, logs, self.prior, beta=self.beta, weighted=self.weighted)
        self.pass_loss[:-1] += mean_rows(losses, batch.group).double()
        self.pass_loss[-1] += 1

    def loss(
        self, outputs: Mapping[int, Output], targets: Targets, batch: Batch
    ) -> dict[str, Tensor]:
        """Mean over sub-heads; `weight` is how alike the teachers find the pairs."""
        students = [_log_p(outputs[view].logits) for view in (0, 1)]
        teachers = [targets["first"], targets["second"]]
        losses, alike = temi_loss(
            students, teachers, self.prior, beta=self.beta, weighted=self.weighted
        )
        cross_entropy = -(teachers[1].exp() * students[0]).sum(dim=2).mean()
        seen = watched(cross_entropy, outputs[0].logits, batch.group)
        return {"loss": losses.mean(), "weight": alike.mean(), **seen}

    def predict(self, z: Tensor) -> Tensor:
        """(B, D) to (B, K) probabilities of the chosen sub-head."""
        best = int(self.best)
        return self._logits(z, slice(best, best + 1))[0].softmax(dim=1)

    def score(self, bank: Bank) -> Tensor:
        """The last pass's mean loss, per sub-head: what the objective itself says, free of cost and
        of labels.
        """
        return self.pass_loss[:-1] / self.pass_loss[-1].clamp_min(1)


def _log_p(logits: Sequence[Tensor], factor: float = 1.0) -> Tensor:
    """H logits (B, K) to log probabilities (B, H, K)."""
    return (torch.stack(list(logits), dim=1) * factor).log_softmax(dim=2)
