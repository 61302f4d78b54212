"""P2OT: imbalanced clustering by progressive partial transport (Zhang et al. 2024).

Pseudo-labels come from a transport problem that uses only the most confident share of the samples'
mass, a share that grows over training, and asks the clusters for about equal sizes without forcing
them. It is solved over a memory of recent logits with the batch's own rows substituted, once per
view; each view learns the other's labels.
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
from deepclust.heads.common.layers import ClusterLayer, drawn_seed
from deepclust.ops import mass_schedule, partial_transport
from deepclust.ops.collectives import gather_rows
from deepclust.ops.transport import TransportResult
from deepclust.types import Count, Natural, Positive, Share, Weight


def p2ot_loss(first: Tensor, second: Tensor, plan_first: Tensor, plan_second: Tensor) -> Tensor:
    """CE(first, plan of the second view) + CE(second, plan of the first), means over B (P2OT,
    equation 1).

    All (B, K): logits, and plans whose rows sum to at most 1: they are not renormalised, so a
    sample that is used less teaches less.
    """
    return F.cross_entropy(first, plan_second) + F.cross_entropy(second, plan_first)


class P2OT(Head):
    """Cosine sub-heads trained towards partial-transport labels.

    kl_weight: how much unequal clusters cost; .inf makes them equal. mass_start, mass_end,
    mass_shape: the share of the mass that is used; mass_start=1 uses every sample from the start.
    memory_size: rows of the transport problem, the batch's included; at most N, and 0 for the batch
    alone.
    memory_epoch: from which pass on there is a memory (the reference: 1). A sample is in it once,
    with its last logits.
    init: how each sub-head begins, as in SCAN; the paper's is `random`.

    Where the reference differs: its solver stops by the change of the scales, here by the violation
    of the columns; it keeps a sample as often as it came; it divides a pass's mean loss by the last
    step's share of the mass to compare sub-heads, here each step's loss by its own; it keeps the
    weights of the epoch with the lowest such loss, here the last epoch's are kept.
    """

    training_buffers = ("memory", "memory_index", "log_scale")
    memory: Tensor
    memory_index: Tensor
    log_scale: Tensor
    pass_loss: Tensor

    def __init__(
        self,
        dim: Count,
        num_clusters: Count,
        num_samples: Count,
        *,
        num_heads: Count = 1,
        kl_weight: Weight = 1.0,
        epsilon: Positive = 0.1,
        mass_start: Share = 0.1,
        mass_end: Share = 1.0,
        mass_shape: Literal["sigmoid", "linear"] = "sigmoid",
        memory_size: Natural = 5120,
        memory_epoch: Natural = 0,
        temperature: Positive = 0.1,
        max_iters: Count = 1000,
        tol: Positive = 1e-6,
        init: Literal["random", "kmeans", "spectral"]
        | list[Literal["random", "kmeans", "spectral"]] = "random",
        view: str = "weak",
    ) -> None:
        super().__init__()
        self.views = (View(view), View(view))
        self.num_heads = num_heads
        self.kl_weight, self.epsilon, self.max_iters, self.tol = kl_weight, epsilon, max_iters, tol
        self.mass_start, self.mass_end = mass_start, mass_end
        self.mass_shape: Literal["sigmoid", "linear"] = mass_shape
        self.memory_epoch = memory_epoch
        self.init: list[Literal["random", "kmeans", "spectral"]] = (
            [init] if isinstance(init, str) else list(init)
        )
        self.needs_prototypes = set(self.init) != {"random"}
        self.layer = ClusterLayer(
            dim, num_clusters, num_heads, kind="cosine", temperature=temperature
        )
        self.start = drawn_seed()
        rows = min(memory_size, num_samples)
        self.register_buffer("memory", torch.zeros(rows, num_heads, num_clusters))
        self.register_buffer("memory_index", torch.full((rows,), -1))
        self.register_buffer(
            "log_scale", torch.zeros(num_heads, num_clusters + 1, dtype=torch.float64)
        )
        self.register_buffer(
            "pass_loss", torch.zeros(num_heads + 1, dtype=torch.float64)
        )  # sums, and their count

    def init_prototypes(self, bank: Bank) -> None:
        """Clusters of the bank's features make the first weights."""
        self.layer.init_clusters(bank.features, self.init, seed=self.start, group=bank.group)

    def forward(self, z: Tensor, view: int) -> Output:
        """(B, D) to H logits (B, K)."""
        return Output(z, logits=self.layer(z))

    def bank_due(self, progress: Progress) -> BankSpec | None:
        """Once, at the start of pass `memory_epoch`: features of as many random samples as the
        memory holds.
        """
        due = progress.starts_epoch and progress.epoch == self.memory_epoch and len(self.memory) > 0
        return BankSpec(view=self.views[0].augment, num_samples=len(self.memory)) if due else None

    def refresh(self, bank: Bank) -> Refresh:
        """Fills the memory, from a random part of the bank where that holds more."""
        everyone, offset = gather_rows(bank.index, bank.group)
        drawn = torch.randperm(len(everyone), generator=torch.Generator().manual_seed(0)) < len(
            self.memory
        )
        mine = drawn[offset : offset + len(bank.index)].to(bank.index.device)
        logits = torch.stack(self.layer(bank.features[mine]), dim=1)
        self._remember(
            gather_rows(logits, bank.group)[0], gather_rows(bank.index[mine], bank.group)[0]
        )
        return Refresh()

    def _remember(self, logits: Tensor, index: Tensor) -> None:
        """Logits (n, H, K) of samples (n,), newest first, become the memory; what is over is
        forgotten.
        """
        rows = min(len(index), len(self.memory_index))
        self.memory_index.fill_(-1)
        self.memory_index[:rows] = index[:rows]
        self.memory[:rows] = logits[:rows]

    def mass(self, progress: Progress) -> float:
        """The share of the mass that is used at this step."""
        ends = {"start": self.mass_start, "end": self.mass_end}
        return mass_schedule(progress.step, progress.num_steps, shape=self.mass_shape, **ends)

    def targets(self, outputs: Mapping[int, Output], batch: Batch) -> Targets:
        """Both views' plans (B, H, K), over the batch of all ranks and the memory, which then holds
        the second view.
        """
        index, offset = gather_rows(batch.index, batch.group)
        views = [
            gather_rows(torch.stack(outputs[view].logits, dim=1), batch.group)[0] for view in (0, 1)
        ]
        known = (self.memory_index >= 0) & ~torch.isin(self.memory_index, index)
        known &= known.cumsum(0) <= max(0, len(self.memory_index) - len(index))
        samples = torch.cat([index, self.memory_index[known]])
        mass, plans = self.mass(batch.progress), []
        for logits in views:
            rows = torch.cat([logits, self.memory[known].to(logits)])
            plans.append(
                torch.stack(
                    [self._label(rows[:, h], samples, mass, h) for h in range(self.num_heads)], 1
                )
            )
        if (self.memory_index >= 0).any():
            self._remember(rows, samples)
        plans = [plan[: len(index)] for plan in plans]
        self._note(views, plans, mass, batch.progress)
        mine = slice(offset, offset + len(batch.index))
        return Targets(first=plans[0][mine], second=plans[1][mine])

    def _label(self, logits: Tensor, samples: Tensor, mass: float, head: int) -> Tensor:
        """Plan (n, K) of one sub-head, from where its last one ended."""
        begun = bool(self.log_scale[head].any())
        found = self.solve(logits, samples, mass, self.log_scale[head] if begun else None)
        self.log_scale[head] = found.log_cluster_scale
        return found.plan

    def solve(
        self, logits: Tensor, samples: Tensor, mass: float, warm_start: Tensor | None
    ) -> TransportResult:
        """The transport problem of logits (n, K) of samples (n,). Every rank solves the whole of
        it.
        """
        return partial_transport(
            logits,
            mass=mass,
            kl_weight=self.kl_weight,
            epsilon=self.epsilon,
            tol=self.tol,
            max_iters=self.max_iters,
            warm_start=warm_start,
        )

    def _note(
        self, views: list[Tensor], plans: list[Tensor], mass: float, progress: Progress
    ) -> None:
        """Adds each sub-head's loss over the share used to this pass's sums."""
        if progress.starts_epoch:
            self.pass_loss.zero_()
        for head in range(self.num_heads):
            loss = p2ot_loss(
                views[0][:, head], views[1][:, head], plans[0][:, head], plans[1][:, head]
            )
            self.pass_loss[head] += loss.double() / mass
        self.pass_loss[-1] += 1

    def loss(
        self, outputs: Mapping[int, Output], targets: Targets, batch: Batch
    ) -> dict[str, Tensor]:
        """Sum over sub-heads; `used` is the share of the batch's mass that its plans use."""
        plans = zip(targets["first"].unbind(1), targets["second"].unbind(1))
        pairs = zip(outputs[0].logits, outputs[1].logits, plans)
        losses = torch.stack([p2ot_loss(first, second, *plan) for first, second, plan in pairs])
        used = targets["first"].sum(dim=2).mean()
        return {
            "loss": losses.sum(),
            "used": used,
            "mass": used.new_tensor(self.mass(batch.progress)),
        }

    def predict(self, z: Tensor) -> Tensor:
        """(B, D) to (B, K) probabilities of the chosen sub-head."""
        return self.layer(z)[int(self.best)].softmax(dim=1)

    def score(self, bank: Bank) -> Tensor:
        """The last pass's mean loss over the share used, per sub-head."""
        return self.pass_loss[:-1] / self.pass_loss[-1].clamp_min(1)
