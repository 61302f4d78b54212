"""MoCo, a contrastive pretext with a queue of keys (He et al. 2020, "Momentum Contrast"; version 2: Chen et al. 2020).

The momentum encoder is the stage's EMA teacher: `trainer.ema`, or this head's `momentum` where the stage sets none. It
makes the keys in evaluation mode, with running batch statistics, so that no image of a batch can give another one away
and nothing has to be shuffled between ranks. Version 2 has neither batch norm in its projector nor symmetry.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.heads.base import Batch, Head, Output, Targets, View
from deepclust.heads.layers import Projector
from deepclust.ops.collectives import gather_rows
from deepclust.schema import Count, Decay, Positive


def moco_loss(queries: Tensor, keys: Tensor, queue: Tensor, *, temperature: float = 0.2) -> Tensor:
    """Cross entropy of each query's own key among its key and the queue (MoCo, eq. 1), mean over queries.

    queries (B, E), normalised here; keys (B, E) and queue (L, E), unit rows. The logits are cosines / temperature.
    """
    queries = F.normalize(queries, dim=1)
    positive = (queries * keys).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, queries @ queue.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


class MoCo(Head):
    """Projector, contrastive loss against a queue of earlier keys. It predicts no clusters.

    queue_size: L, keys kept; the queue begins as random unit vectors, and every rank holds the keys of all ranks.
    symmetric: both views are queries for each other's key, and both keys enter the queue; False (the paper): the first
    view is the query, the second the key. momentum: decay of the teacher where `trainer.ema` sets none.
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
        momentum: Decay = 0.99,
        view: str = "simclr",
    ) -> None:
        super().__init__()
        self.views = (View(view), View(view))
        if not symmetric:
            self.views = (View(view, used_for="loss"), View(view, used_for="targets"))
        self.temperature = temperature
        self.symmetric = symmetric
        self.teacher_decay = momentum
        self.projector = Projector(dim, hidden_dim, embedding_dim, batch_norm=batch_norm)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, embedding_dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor, view: int) -> Output:
        """(B, D) to an embedding (B, E), not normalised."""
        return Output(z, self.projector(z))

    def targets(self, outputs: Mapping[int, Output], batch: Batch) -> Targets:
        """`key0` and `key1` (B, E), the teacher's unit embeddings of each view that is a key."""
        return Targets({f"key{view}": F.normalize(_embedding(outputs[view]), dim=1) for view in outputs})

    def loss(self, outputs: Mapping[int, Output], targets: Targets, batch: Batch) -> dict[str, Tensor]:
        """`moco_loss` of the first view's queries; if symmetric its mean with that of the second's."""
        pairs = ((0, 1), (1, 0)) if self.symmetric else ((0, 1),)
        terms = [
            moco_loss(_embedding(outputs[query]), targets[f"key{key}"], self.queue, temperature=self.temperature)
            for query, key in pairs
        ]
        return {"loss": torch.stack(terms).mean()}

    def after_step(self, outputs: Mapping[int, Output], batch: Batch) -> None:
        """This macro batch's keys, of all ranks, take the place of the oldest."""
        views = (0, 1) if self.symmetric else (1,)
        keys = torch.cat([gather_rows(batch.targets[f"key{view}"], batch.group)[0] for view in views])
        size = len(self.queue)
        rows = (self.position + torch.arange(len(keys), device=keys.device))[-size:] % size
        self.queue[rows] = keys[-size:]
        self.position.copy_((self.position + len(keys)) % size)


def _embedding(output: Output) -> Tensor:
    assert output.embedding is not None
    return output.embedding
