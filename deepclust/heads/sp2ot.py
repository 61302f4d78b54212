"""SP2OT: P2OT whose labels also agree between similar samples (Zhang et al. 2024b).

The transport problem gains a term that rewards neighbours on a graph of the features that the stage
begins with for sharing clusters; it is solved by a generalised conditional gradient around the same
solver.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepclust.heads.base import Bank, BankSpec, Progress, Refresh
from deepclust.heads.p2ot import P2OT
from deepclust.ops import knn, partial_transport, semantic_partial_transport
from deepclust.ops.collectives import gather_rows
from deepclust.ops.transport import TransportResult
from deepclust.types import Count, NonNegative, Positive

REFERENCE_ROWS = 5120
"""Rows of the reference's memory, for which its weight of 1000 is meant."""


class SP2OT(P2OT):
    """P2OT with a sparse similarity between samples; what is not said here is said there.

    num_neighbors, bandwidth: each sample has its k nearest others by Euclidean distance d on the
    features z at the start, with similarity exp(-d^2 / (2 bandwidth^2 D)); it need not be mutual.
    similarity_weight: of the term in a problem of 5120 rows; it grows in proportion to the rows,
    for the term itself shrinks like one over them (the reference does not scale it, and with fewer
    rows collapses to one cluster).
    similarity_decay: times 1 - mass, as in the reference, so that the graph guides the start and
    lets go at the end.
    max_linearisations: of the new term for one labelling, which ends when its plan stands still.
    The limit is there for safety alone: digits and Fashion-MNIST take 3 to 870. The reference has
    100, and stops when the objective does.
    """

    training_buffers = (*P2OT.training_buffers, "neighbors", "similarity")
    neighbors: Tensor
    similarity: Tensor

    def __init__(
        self,
        dim: Count,
        num_clusters: Count,
        num_samples: Count,
        *,
        num_neighbors: Count = 20,
        bandwidth: Positive = 2.0,
        similarity_weight: NonNegative = 1000.0,
        similarity_decay: bool = True,
        max_linearisations: Count = 5000,
        **inherited: Any,
    ) -> None:
        super().__init__(dim, num_clusters, num_samples, **inherited)
        self.num_neighbors = min(num_neighbors, num_samples - 1)
        self.bandwidth, self.max_linearisations = bandwidth, max_linearisations
        self.similarity_weight, self.similarity_decay = similarity_weight, similarity_decay
        self.register_buffer(
            "neighbors", torch.arange(num_samples)[:, None].repeat(1, self.num_neighbors)
        )
        self.register_buffer("similarity", torch.zeros(num_samples, self.num_neighbors))

    def bank_due(self, progress: Progress) -> BankSpec | None:
        """All features before the first step; later as P2OT."""
        return BankSpec() if progress.step == 0 else super().bank_due(progress)

    def refresh(self, bank: Bank) -> Refresh:
        """The first time the graph, and the memory unless it begins later; then the memory."""
        if bool(self.similarity.any()):
            return super().refresh(bank)
        index, _ = gather_rows(bank.index, bank.group)
        k = min(self.num_neighbors, len(index) - 1)
        distance, rows = knn(
            bank.features,
            bank.features,
            k=k,
            metric="euclidean",
            exclude_self=True,
            group=bank.group,
        )
        self.neighbors[index, :k] = gather_rows(index[rows], bank.group)[0]
        width = 2 * self.bandwidth**2 * bank.features.shape[1]
        self.similarity[index, :k] = gather_rows(torch.exp(-distance.square() / width), bank.group)[
            0
        ]
        return super().refresh(bank) if self.memory_epoch == 0 and len(self.memory) else Refresh()

    def solve(
        self, logits: Tensor, samples: Tensor, mass: float, warm_start: Tensor | None
    ) -> TransportResult:
        """The problem of P2OT with the term on the graph between these samples (n,)."""
        settings = {
            "kl_weight": self.kl_weight,
            "epsilon": self.epsilon,
            "tol": self.tol,
            "max_iters": self.max_iters,
        }
        weight = self.similarity_weight * len(samples) / REFERENCE_ROWS
        weight *= 1 - mass if self.similarity_decay else 1
        if weight == 0:
            return partial_transport(logits, mass=mass, warm_start=warm_start, **settings)
        return semantic_partial_transport(
            logits,
            self.among(samples),
            mass=mass,
            similarity_weight=weight,
            max_linearisations=self.max_linearisations,
            warm_start=warm_start,
            **settings,
        )

    def among(self, samples: Tensor) -> Tensor:
        """Sparse (n, n) similarities between samples (n,); what is no neighbour has none."""
        place = torch.full((len(self.neighbors),), -1, device=samples.device)
        place[samples] = torch.arange(len(samples), device=samples.device)
        columns = place[self.neighbors[samples]]
        rows, slots = (columns >= 0).nonzero(as_tuple=True)
        where = torch.stack([rows, columns[rows, slots]])
        values = self.similarity[samples][rows, slots]
        size = (len(samples), len(samples))
        return torch.sparse_coo_tensor(where, values, size, check_invariants=False).coalesce()
