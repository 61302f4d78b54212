"""Running sums of every cluster's rows: while few rows change cluster, only these are moved."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from deepclust.ops.kmeans.rows import Rows
from deepclust.ops.kmeans.step import AssignAt, by_cluster, final_step, segment_sums

MOVE_BELOW = 0.3
"""A pass moves rows instead of summing all when at most this share changed cluster in the last."""
SHRINK = 8
"""A cluster shrunk by more than this factor is summed anew: its sum has its old size's rounding."""
COARSE = 0.05
"""Share of Σ|x|² below which the inertia is measured."""


class RunningSums:
    """`lloyd_step` for processors that keeps the sums of the last pass.

    Rows are subtracted from one sum and added to another, so a pass in which nothing changes gives
    the very same sums. Once as many rows have moved as there are, all are summed anew: the rounding
    is that of two additions at most.
    """

    def __init__(self, rows: Rows, num_clusters: int) -> None:
        self.rows = rows
        self.num_clusters = num_clusters
        self.changed = rows.num
        self.travelled = rows.num
        self.packed: Tensor | None = None
        # Weights that cancel would leave a remainder in a cluster that has become empty.
        self.exact = rows.weights is None and (not rows.spherical or rows.unit)

    def __call__(self, assign: AssignAt, labels: Tensor) -> Tensor:
        """As `lloyd_step`: (K, D + 1) float64, the sums and total weights over all ranks.

        labels: (N,) int64, holds those of the last pass and is overwritten.
        """
        keep = self.exact and self.packed is not None and self.changed <= MOVE_BELOW * self.rows.num
        packed = self.packed if keep and self.packed is not None else self._zeros()
        self.changed = 0
        for start, block in self.rows.blocks():
            part = labels[start : start + len(block)]
            before = part.clone()
            assign(start, block, part)
            moved = torch.nonzero(before != part).flatten()
            self.changed += len(moved)
            if keep:
                self._move(packed, block, moved, before, part)
            else:
                self._add(packed, start, block, part)
        self.travelled += self.changed
        if not keep:
            self._start_over(packed)
        elif self._worn(packed):
            packed = self._zeros()
            for start, block in self.rows.blocks():
                self._add(packed, start, block, labels[start : start + len(block)])
            self._start_over(packed)
        else:
            torch.maximum(self.largest, packed[:, -1], out=self.largest)
        self.packed = packed
        # Summed over ranks in a copy: this rank goes on from its own share.
        self.last = self.rows.ranks.sum(packed.clone())
        return self.last

    def finish(
        self,
        assign: AssignAt | None,
        centroids: Tensor,
        labels: Tensor,
    ) -> tuple[float, Tensor]:
        """Inertia and rows per cluster (K,), as `final_step`, mostly without a pass over the rows.

        Assigns once more unless `assign` is None.
        """
        if not self.exact or self.rows.shift is not None:
            return final_step(self.rows, assign, centroids, labels)
        packed = self.last if assign is None else self(assign, labels)
        counts = packed[:, -1]
        wide = centroids.double()
        # Σ|x − c|² = Σ|x|² − 2 Σ s·c + Σ n|c|², with s and n the clusters' sums and counts.
        shared = torch.dot(packed[:, :-1].flatten(), wide.flatten())
        value = self.rows.squares - 2 * shared + torch.dot(counts, wide.square().sum(1))
        inertia = float(self.rows.ranks.broadcast(value.reshape(1)))
        # It errs by about float32's rounding of Σ|x|²; where the inertia is small beside that, the
        # differences are measured instead.
        if inertia < COARSE * self.rows.squares:
            return final_step(self.rows, None, centroids, labels)
        return inertia, counts.long()

    def _zeros(self) -> Tensor:
        return torch.zeros(self.num_clusters, self.rows.dim + 1, dtype=torch.float64)

    def _start_over(self, packed: Tensor) -> None:
        """Takes sums that were just made of all rows."""
        self.largest = packed[:, -1].clone()
        self.travelled = 0

    def _worn(self, packed: Tensor) -> bool:
        """Whether the sums have collected too much rounding since they were made of all rows."""
        if self.travelled > self.rows.num:
            return True
        return bool((packed[:, -1] * SHRINK < self.largest).any())

    def _add(self, packed: Tensor, start: int, block: Tensor, part: Tensor) -> None:
        """Adds all rows of a block to the sums of their clusters `part` (B,)."""
        weights = self.rows.block_weights(start, block)
        sums, counts = segment_sums(block, part, self.num_clusters, weights)
        packed[:, :-1] += sums
        packed[:, -1] += counts

    def _move(
        self,
        packed: Tensor,
        block: Tensor,
        moved: Tensor,
        before: Tensor,
        part: Tensor,
    ) -> None:
        """Moves the rows `moved` (M,) from the sums of `before` (B,) to those of `part` (B,)."""
        for labels, sign in ((part[moved], 1), (before[moved], -1)):
            if len(moved) < self.num_clusters:
                packed[:, :-1].index_add_(0, labels, block[moved].double(), alpha=sign)
            else:
                # With many rows for each cluster, sums by segment read them without a copy.
                order, starts = by_cluster(labels, self.num_clusters)
                sums = F.embedding_bag(moved.int()[order], block, starts, mode="sum")
                packed[:, :-1].add_(sums, alpha=sign)
            packed[:, -1].add_(torch.bincount(labels, minlength=self.num_clusters), alpha=sign)
