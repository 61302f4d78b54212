"""MoCo, a contrastive pretext with a queue of keys (He et al. 2020, "Momentum Contrast"; version 2:
Chen et al. 2020).

The momentum encoder is the stage's EMA teacher: `trainer.ema`, or this head's `momentum` where the
stage sets none. It makes the keys in evaluation mode, with running batch statistics, so that no
image of a batch can give another one away and nothing has to be shuffled between ranks. Version 2
has neither batch norm in its projector nor symmetry.

Where this differs from the authors' code: the teacher's decay ramps up, it is the smaller of
`momentum` and (1 + t) / (10 + t) at step t; both queries, being views of one size, share batch
statistics where there are two.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.heads.base import Batch, Head, Output, Targets, View
from deepclust.heads.common.layers import Projector
from deepclust.ops.collectives import gather_rows
from deepclust.types import Count, Decay, Positive


def moco_loss(queries: Tensor, keys: Tensor, queue: Tensor, *, temperature: float = 0.2) -> Tensor:
    """Cross entropy of each query's own key among its key and the queue (MoCo, eq. 1), mean over
    queries.

    queries (B, E), normalised here; keys (B, E) and queue (L, E), unit rows. The logits are cosines
    / temperature.
    """
    queries = F.normalize(queries, dim=1)
    positive = (queries * keys).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, queries @ queue.T], dim=1) / temperature
    return F.cross_entropy(
        logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    )


class MoCo(Head):
    """Projector, contrastive loss against a queue of earlier keys. It predicts no clusters.

    queue_size: L, keys kept; the queue begins as random unit vectors, and every rank holds the keys
    of all ranks.
    symmetric: both views are queries for each other's key, and both keys enter the queue; False
    (the paper): the first view is the query, the second the key. separate_queues: if symmetric,
    each view's keys have a queue of L of their own, which the other view's queries are held
    against, as in MoCo v2+ of solo-learn.
    momentum: decay of the teacher where `trainer.ema` sets none.
    """

    training_buffers = ("queue", "position")
    queue: Tensor
    position: Tensor

    def __init__(
        self,
        dim: Count,
        *,
        hidden_dim: Count = 256,
        embedding_dim: Count = 64,
        batch_norm: bool = True,
        temperature: Positive = 0.2,
        queue_size: Count = 1024,
        symmetric: bool = True,
        separate_queues: bool = False,
        momentum: Decay = 0.99,
        view: str = "simclr",
    ) -> None:
        super().__init__()
        if separate_queues and not symmetric:
            raise ValueError(
                "separate_queues=true: needs symmetric=true; without, one view alone gives keys"
            )
        self.views = (View(view), View(view))
        if not symmetric:
            self.views = (View(view, used_for="loss"), View(view, used_for="targets"))
        self.temperature = temperature
        self.symmetric, self.separate_queues = symmetric, separate_queues
        self.teacher_decay = momentum
        self.projector = Projector(dim, hidden_dim, embedding_dim, batch_norm=batch_norm)
        shape = (2, queue_size, embedding_dim) if separate_queues else (queue_size, embedding_dim)
        self.register_buffer("queue", F.normalize(torch.randn(shape), dim=-1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor, view: int) -> Output:
        """(B, D) to an embedding (B, E), not normalised."""
        return Output(z, self.projector(z))

    def targets(self, outputs: Mapping[int, Output], batch: Batch) -> Targets:
        """`key0` and `key1` (B, E), the teacher's unit embeddings of each view that is a key."""
        return Targets(
            {f"key{view}": F.normalize(_embedding(outputs[view]), dim=1) for view in outputs}
        )

    def loss(
        self, outputs: Mapping[int, Output], targets: Targets, batch: Batch
    ) -> dict[str, Tensor]:
        """`moco_loss` of the first view's queries; if symmetric its mean with that of the
        second's."""
        pairs = ((0, 1), (1, 0)) if self.symmetric else ((0, 1),)
        terms = [
            moco_loss(
                _embedding(outputs[query]),
                targets[f"key{key}"],
                self._queue(key),
                temperature=self.temperature,
            )
            for query, key in pairs
        ]
        return {"loss": torch.stack(terms).mean()}

    def after_step(self, outputs: Mapping[int, Output], batch: Batch) -> None:
        """This macro batch's keys, of all ranks, take the place of the oldest."""
        views = (0, 1) if self.symmetric else (1,)
        parts = [gather_rows(batch.targets[f"key{view}"], batch.group)[0] for view in views]
        keys = torch.stack(parts) if self.separate_queues else torch.cat(parts)
        size, number = self.queue.shape[-2], keys.shape[-2]
        rows = (self.position + torch.arange(number, device=keys.device))[-size:] % size
        self.queue[..., rows, :] = keys[..., -size:, :]
        self.position.copy_((self.position + number) % size)

    def _queue(self, key: int) -> Tensor:
        """(L, E) earlier keys that queries for the keys of one view are held against."""
        return self.queue[key] if self.separate_queues else self.queue


def _embedding(output: Output) -> Tensor:
    assert output.embedding is not None
    return output.embedding
