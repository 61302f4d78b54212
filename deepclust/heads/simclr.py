"""SimCLR, a contrastive pretext (Chen et al. 2020, "A Simple Framework for Contrastive Learning").

Negatives are the other images of the micro batch of all ranks. `one_sided=True` is the variant of
the SCAN reference, where only the first view's embeddings are anchors; the paper (and the default)
takes both.

With `neighbors_from` the second view is, late in training, one of the image's nearest neighbours on
the features of that time (itself included): positives that augmentation cannot make, in the manner
of NNCLR (Dwibedi et al. 2021), but mined over all images once a pass rather than from a queue.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
from deepclust.heads.common.layers import Projector
from deepclust.ops.collectives import gather_rows
from deepclust.ops.neighbors import neighbor_table
from deepclust.types import Count, Fraction, Positive


def nt_xent(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float = 0.5,
    one_sided: bool = False,
    group: Any = None,
) -> Tensor:
    """Normalised temperature-scaled cross entropy (SimCLR, eq. 1), mean over this rank's anchors.

    first, second: (B, E) embeddings of two views of the same images, normalised here. Candidates of
    an anchor are the 2B - 1 other embeddings of all ranks, its positive among them. Returns a
    scalar.
    """
    num = len(first)
    mine = F.normalize(torch.cat([first, second]), dim=1)
    candidates, offset = gather_rows(mine, group)
    anchors = mine[:num] if one_sided else mine
    rows = torch.arange(len(anchors), device=mine.device)
    similarity = anchors @ candidates.T / temperature
    itself = F.one_hot(offset + rows, len(candidates)).bool()
    return F.cross_entropy(
        similarity.masked_fill(itself, float("-inf")), offset + (rows + num) % (2 * num)
    )


class SimCLR(Head):
    """Projector and NT-Xent loss. The embedding is the projector's output; it predicts no clusters.

    neighbors_from: share of training after which neighbours are positives; None (the paper) for
    never.
    """

    def __init__(
        self,
        dim: Count,
        *,
        hidden_dim: Count = 256,
        embedding_dim: Count = 64,
        batch_norm: bool = True,
        temperature: Positive = 0.3,
        one_sided: bool = False,
        neighbors_from: Fraction | None = None,
        num_neighbors: Count = 5,
        view: str = "simclr",
    ) -> None:
        super().__init__()
        self.views = (View(view, used_for="loss"), View(view, source="partner", used_for="loss"))
        self.temperature = temperature
        self.one_sided = one_sided
        self.neighbors_from = neighbors_from
        self.num_neighbors = num_neighbors
        self.projector = Projector(dim, hidden_dim, embedding_dim, batch_norm=batch_norm)

    def forward(self, z: Tensor, view: int) -> Output:
        """(B, D) to an embedding (B, E), not normalised."""
        return Output(z, self.projector(z))

    def bank_due(self, progress: Progress) -> BankSpec | None:
        """Before each pass, once neighbours are wanted."""
        begun = (
            self.neighbors_from is not None
            and progress.epoch >= self.neighbors_from * progress.num_epochs
        )
        return BankSpec() if begun and progress.starts_epoch else None

    def refresh(self, bank: Bank) -> Refresh:
        """Mines this pass's neighbours. An image that could not be read is its own neighbour."""
        k, group = self.num_neighbors, bank.group
        return Refresh(
            partners=neighbor_table(bank.features, bank.index, bank.num_samples, k=k, group=group)
        )

    def loss(
        self, outputs: Mapping[int, Output], targets: Targets, batch: Batch
    ) -> dict[str, Tensor]:
        """NT-Xent over the two views."""
        first, second = outputs[0].embedding, outputs[1].embedding
        assert first is not None and second is not None
        loss = nt_xent(
            first, second, temperature=self.temperature, one_sided=self.one_sided, group=batch.group
        )
        return {"loss": loss}
