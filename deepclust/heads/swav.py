"""SwAV: clusters by swapped prediction of balanced codes over several crops (Caron et al. 2020).

Where this differs from the authors' code: the projector sees one crop at a time, so that its batch
statistics are of one crop; codes count the true number of rows over all ranks, which may differ by
rank; the queue's length is in rows over all ranks and need not be a multiple of the batch. Where a
stage has a teacher, codes and queue hold its features.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.errors import Advice, UserError
from deepclust.heads.base import Batch, Output, Progress, Targets
from deepclust.heads.common.prototypes import PrototypeHead
from deepclust.heads.common.queue import FeatureQueue
from deepclust.ops import sinkhorn
from deepclust.ops.collectives import row_counts
from deepclust.types import Count, Fraction, Natural, NonNegative, Positive


def swapped_prediction_loss(codes: Sequence[Tensor], logits: Sequence[Tensor]) -> Tensor:
    """Cross entropy of each crop's prediction towards the codes of the other crops (SwAV, eq. 2 and
    6).

    codes: (B, K) for each of the A assigned crops, rows sum to 1. logits: (B, K) for each of all V
    crops, cosines divided by the temperature; the first A are the assigned crops'. Mean over
    assigned crops, their V - 1 others and the batch. Returns a scalar.
    """
    log_p = [each.log_softmax(dim=1) for each in logits]
    everyone = torch.stack(log_p).sum(0)
    terms = [-(code * (everyone - own)).sum(1).mean() for code, own in zip(codes, log_p)]
    return torch.stack(terms).mean() / (len(logits) - 1)


def power_law(num_clusters: int, exponent: float) -> Tensor:
    """(K,) shares in proportion to k^-exponent, k = 1 .. K."""
    shares = torch.arange(1, num_clusters + 1, dtype=torch.float32) ** -exponent
    return shares / shares.sum()


class SwAV(PrototypeHead):
    """Balanced codes of the global crops, predicted from every other crop.

    epsilon, num_iters: of the balanced assignment; a lower epsilon (0.03) gives harder codes, which
    helps against collapse. marginal: shares of the prototypes: `uniform`, the exponent of a power
    law, or the shares themselves.
    freeze_steps: macro batches in which the prototypes stay as drawn. hard_steps: those in which
    codes are one-hot.
    queue_length: rows of features over all ranks, per global crop, 0 for none; used when full.
    queue_from: share of training after which rows are stored.
    """

    def __init__(
        self,
        dim: Count,
        num_clusters: Count,
        *,
        epsilon: Positive = 0.05,
        num_iters: Count = 3,
        marginal: Literal["uniform"] | NonNegative | list[NonNegative] = "uniform",
        freeze_steps: Natural = 0,
        hard_steps: Natural = 0,
        queue_length: Natural = 0,
        queue_from: Fraction = 0.0,
        **inherited: Any,
    ) -> None:
        super().__init__(dim, num_clusters, **inherited)
        self.epsilon, self.num_iters = epsilon, num_iters
        self.freeze_steps, self.hard_steps, self.queue_from = freeze_steps, hard_steps, queue_from
        self.marginals = [_marginal(marginal, size) for size in self.prototypes.sizes]
        self.queue = (
            FeatureQueue(self.num_global, queue_length, self.embedding_dim)
            if queue_length
            else None
        )
        if self.queue is not None:
            self.sharded_buffers = ("queue.rows", "queue.serial")
            self.training_buffers = (*self.sharded_buffers, "queue.count")

    def frozen(self, progress: Progress) -> tuple[str, ...]:
        """The prototypes, in the first steps."""
        names = tuple(f"prototypes.{name}" for name in self.prototypes.names)
        return names if progress.step < self.freeze_steps else ()

    def targets(self, outputs: Mapping[int, Output], batch: Batch) -> Targets:
        """Codes (B, sum of K_h) of each global crop, balanced over macro batch, queue and ranks;
        fills the queue.
        """
        embeddings = [outputs[crop].embedding for crop in range(self.num_global)]
        features = [_unit(embedding) for embedding in embeddings if embedding is not None]
        self._check_rows(len(features[0]), batch)
        targets = Targets()
        for crop, embedding in enumerate(features):
            held = (
                embedding[:0]
                if self.queue is None or not self.queue.full
                else self.queue.held(crop)
            )
            cosines = self.prototypes.cosines(torch.cat([held, embedding]))
            codes = [self._codes(s, m, batch)[len(held) :] for s, m in zip(cosines, self.marginals)]
            targets[f"codes{crop}"] = torch.cat(codes, dim=1)
        progress = batch.progress
        if self.queue is not None and progress.epoch >= self.queue_from * progress.num_epochs:
            self.queue.push(features, batch.group)
        return targets

    def _codes(self, cosines: Tensor, marginal: Tensor | None, batch: Batch) -> Tensor:
        codes = sinkhorn(
            cosines,
            epsilon=self.epsilon,
            num_iters=self.num_iters,
            column_marginal=marginal,
            group=batch.group,
        )
        if batch.progress.step < self.hard_steps:
            return F.one_hot(codes.argmax(1), codes.shape[1]).to(codes)
        return codes

    def loss(
        self, outputs: Mapping[int, Output], targets: Targets, batch: Batch
    ) -> dict[str, Tensor]:
        """Swapped prediction over all crops, mean over the sets of prototypes."""
        logits = [outputs[crop].logits for crop in range(len(self.views))]
        codes = [
            targets[f"codes{crop}"].split(self.prototypes.sizes, dim=1)
            for crop in range(self.num_global)
        ]
        terms = [
            swapped_prediction_loss(code, predicted)
            for code, predicted in zip(zip(*codes), zip(*logits))
        ]
        return self.figures(torch.stack(terms).mean(), logits)

    def _check_rows(self, num_rows: int, batch: Batch) -> None:
        """Says once, at the start, that balance over too few rows is impossible."""
        if batch.progress.step:
            return
        rows, most = (
            sum(row_counts(num_rows, batch.group, batch.index.device)),
            max(self.prototypes.sizes),
        )
        queue = 0 if self.queue is None else self.queue.length
        if rows + queue < most:
            warnings.warn(
                f"codes of {rows} images and a queue of {queue} cannot be balanced over {most}"
                " prototypes: give a larger trainer.batch_size,"
                f" head.queue_length={-(-2 * most // rows) * rows} or smaller sets"
                " (head.num_prototypes)",
                Advice,
                stacklevel=2,
            )


def _marginal(marginal: Any, size: int) -> Tensor | None:
    """(K,) shares, None for equal ones. Raises ValueError where their number is wrong."""
    if marginal == "uniform":
        return None
    if isinstance(marginal, int | float):
        return power_law(size, marginal)
    if len(marginal) != size or not sum(marginal) > 0:
        raise ValueError(
            f"marginal={list(marginal)}: must be {size} shares, one for each prototype, not all 0"
        )
    return torch.tensor(marginal, dtype=torch.float32)


def _unit(embedding: Tensor) -> Tensor:
    """The embedding itself; UserError where rows have not length one: exp(cosine / epsilon) would
    overflow.
    """
    off = (embedding.norm(dim=1) - 1).abs()
    if len(embedding) and not bool(off.max() <= 1e-2):
        raise UserError(
            f"SwAV needs features of length one; here a norm is off by {float(off.max()):.3g}."
            " Normalise them (F.normalize(x, dim=1)); if they are not finite, try a lower optim.lr"
            " or trainer.precision=float32"
        )
    return embedding
