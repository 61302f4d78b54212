"""Lower bounds that skip centroids which cannot be nearest (Ding et al. 2015, "Yinyang k-means").

Centroids are put in groups. Every row keeps, per group, a lower bound of its distance to the
group's centroids other than its own. By the triangle inequality a centroid that moves by d comes
nearer by at most d: a pass lowers the bounds by the furthest movement in the group, and looks again
only where a bound has fallen below the row's distance to its own centroid. The labels are those of
a full search up to ties. Bounds pay while few rows change cluster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepclust.ops.kmeans.rows import BLOCK_BYTES, SLICE, Rows
from deepclust.ops.kmeans.step import AssignAt

MIN_CLUSTERS = 500
"""Below this a full product is faster than any bookkeeping."""
GROUP_SIZE = 40
"""Centroids of a group. Smaller groups have tighter bounds, and more of them to keep."""
MAX_BYTES = 32 << 20
"""Most bytes of the bounds; with a copied block, the filter and scratch, at most 64 MB."""
START_BELOW = 0.01
"""Bounds are built when at most this share of the rows changed cluster in the last pass."""
SAMPLE = 512
"""Rows on which bounds are tried before they are built for all."""
STOP_ABOVE = 0.10
"""A block with more than this share of (row, group) pairs to search is searched in full."""


class GroupBounds:
    """Bounds of this rank's rows over the passes of one run.

    Call `begin` with the centroids of a pass, then `assign` for every block in order.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.changed = rows.num
        self.lower: Tensor | None = None
        self.losing = False
        self.start_below = START_BELOW
        self.find: AssignAt | None = None

    @staticmethod
    def worth_trying(rows: Rows, num_clusters: int) -> bool:
        """Whether bounds can win: many clusters on a processor, true distances, and room."""
        room = MAX_BYTES - (BLOCK_BYTES if rows.copied else 0)
        num_groups = -(-num_clusters // GROUP_SIZE)
        fits = rows.num * num_groups * rows.dtype.itemsize <= room
        # The triangle inequality holds for distances; rows compared by direction have them only if
        # they are of length one.
        metric = not rows.spherical or rows.unit
        return rows.device.type == "cpu" and num_clusters >= MIN_CLUSTERS and fits and metric

    def begin(self, centroids: Tensor, find: AssignAt) -> None:
        """Takes the centroids (K, D) of the next pass and the full search over them."""
        self.find = find
        settled = self.changed <= self.start_below * self.rows.num
        self.changed = 0
        if self.losing:
            # Built too early: they cost more than they saved. The next attempt waits until far
            # fewer rows change cluster.
            self.lower = None
            self.losing = False
            self.start_below /= 4
        elif not settled:
            self.lower = None
        elif self.lower is None:
            self._group(centroids)
            if self._promising(centroids):
                # −1 marks bounds not yet set: below every distance, so all are searched.
                shape = (self.num_groups, self.rows.num)
                self.lower = torch.full(shape, -1.0, dtype=self.rows.dtype)
            else:
                self.start_below /= 2
        else:
            self.lower -= self._drift(centroids)
        self.centroids = centroids
        if self.lower is not None:
            self._prepare(centroids)

    def _drift(self, centroids: Tensor) -> Tensor:
        """Furthest movement (groups, 1) of a group's centroids since the last pass."""
        drift = torch.linalg.vector_norm(self._arranged(centroids - self.centroids), dim=1)
        # A little more than measured, since it was itself rounded.
        return drift.view(self.num_groups, -1).amax(1)[:, None] * (1 + 1e-5)

    def _prepare(self, centroids: Tensor) -> None:
        """Computes from the centroids (K, D) what searches need."""
        self.centroids = centroids
        self.grouped = self._arranged(centroids)
        self.half = self.grouped.square().sum(1).mul_(0.5)
        # The padding is never nearest.
        self.half[len(centroids) :] = float("inf")
        self.reach = float(centroids.norm(dim=1).max())

    def _promising(self, centroids: Tensor) -> bool:
        """Whether bounds from the last pass would have spared most of this one, by a few rows."""
        block = next((block for _, block in self.rows.blocks()), None)
        if block is None or not len(block):
            return False
        rows = block[:: -(-len(block) // SAMPLE)].contiguous()
        drift = self._drift(centroids)
        part = torch.empty(len(rows), dtype=torch.int64)
        lower = rows.new_empty(self.num_groups, len(rows))
        self._prepare(self.centroids)
        squares = rows.square().sum(1)
        self._search_in_full(rows, part, lower, squares, self._slack(squares, rows))
        self._prepare(centroids)
        squares, best = self._lengths(rows, part)
        due = lower - drift < (best + self._slack(squares, rows)).sqrt_()
        # Half of what a pass may cost: the bounds have yet to repay being built.
        return float(due.double().mean()) <= STOP_ABOVE / 2

    def assign(self, start: int, block: Tensor, part: Tensor) -> None:
        """Writes the nearest centroids of a block to `part` (B,), which holds the last pass's.

        start: index of the block's first row. block: (B, D).
        """
        before = part.clone()
        if self.lower is None:
            assert self.find is not None
            self.find(start, block, part)
        else:
            self._assign_bounded(block, part, self.lower[:, start : start + len(block)])
        self.changed += int((before != part).sum())

    def _group(self, centroids: Tensor) -> None:
        """Groups near centroids by a few iterations of k-means on them."""
        # Any grouping gives right labels: five iterations are enough for a good one.
        number = max(2, len(centroids) // GROUP_SIZE)
        middles = centroids[:: len(centroids) // number][:number].clone()
        for _ in range(5):
            group = torch.cdist(centroids, middles).argmin(1)
            sums = torch.zeros_like(middles).index_add_(0, group, centroids)
            counts = torch.bincount(group, minlength=number)
            middles = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], middles)
        # Cut at equal sizes, wherever the groups end, so that all groups make one even array.
        self.order = torch.argsort(group, stable=True)
        self.column_of = torch.empty_like(self.order)
        self.column_of[self.order] = torch.arange(len(self.order))
        self.num_groups = -(-len(centroids) // GROUP_SIZE)

    def _arranged(self, values: Tensor) -> Tensor:
        """Values (K, D) in the order of the groups, then zeros to a multiple of the group size."""
        padding = self.num_groups * GROUP_SIZE - len(values)
        return torch.nn.functional.pad(values[self.order], (0, 0, 0, padding))

    def _assign_bounded(self, block: Tensor, part: Tensor, lower: Tensor) -> None:
        """As `assign`, with the block's bounds (groups, B), which are updated."""
        squares, best = self._lengths(block, part)
        slack = self._slack(squares, block)
        due = lower < (best + slack).sqrt_()
        if float(due.sum()) > STOP_ABOVE * due.numel():
            # The first full search is how bounds are made; any later one was to be spared.
            first = bool((lower < 0).all())
            self.losing = self.losing or not first
            self._search_in_full(block, part, lower, squares, slack)
            return
        column = self.column_of[part]
        for group in range(self.num_groups):
            index = torch.nonzero(due[group]).flatten()
            for low in range(0, len(index), SLICE):
                some = index[low : low + SLICE]
                self._search_group(group, some, block, squares, slack, best, column, lower)
        part.copy_(self.order[column])

    def _slack(self, squares: Tensor, block: Tensor) -> Tensor:
        """Bound (B,) of the rounding of a squared distance |x|² − 2x·c + |c|².

        With unit roundoff u = eps/2 a product of D terms errs by at most D u |x||c| (Higham 2002,
        equation 3.5), and 2|x||c| <= (|x| + |c|)²/2; the other few operations err by less than 4 u
        each.

        squares: (B,) squared lengths of the rows. block: (B, D).
        """
        relative = torch.finfo(block.dtype).eps * (2 + block.shape[1] / 4)
        return (squares.sqrt() + self.reach).square_() * relative

    def _lengths(self, block: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """Squared lengths of the rows (B,) and of their differences to their own centroids (B,)."""
        squares = block.new_empty(len(block))
        best = block.new_empty(len(block))
        for low in range(0, len(block), SLICE):
            here = slice(low, low + SLICE)
            torch.linalg.vector_norm(block[here], dim=1, out=squares[here])
            differences = self.centroids.index_select(0, part[here]).sub_(block[here])
            torch.linalg.vector_norm(differences, dim=1, out=best[here])
        return squares.square_(), best.square_()

    def _search_in_full(
        self,
        block: Tensor,
        part: Tensor,
        lower: Tensor,
        squares: Tensor,
        slack: Tensor,
    ) -> None:
        """Assigns a block by all centroids and sets its bounds anew."""
        # The scores of 512 rows and 500 centroids are 1 MiB: they stay in a second-level cache.
        for low in range(0, len(block), 512):
            here = slice(low, low + 512)
            scores = torch.mm(block[here], self.grouped.T).sub_(self.half)
            column = torch.from_numpy(scores.numpy().argmax(1))
            part[here] = self.order[column]
            # A bound is of the centroids other than the row's own.
            scores.scatter_(1, column[:, None], float("-inf"))
            nearest = scores.view(len(scores), self.num_groups, GROUP_SIZE).amax(2).T
            lower[:, here] = self._bound(nearest, squares[here], slack[here])

    @staticmethod
    def _bound(scores: Tensor, squares: Tensor, slack: Tensor) -> Tensor:
        """Lower bounds of the distances to the centroids whose largest x·c − |c|²/2 is `scores`."""
        return (squares - 2 * scores - slack).clamp_min_(0).sqrt_()

    def _search_group(
        self,
        group: int,
        index: Tensor,
        block: Tensor,
        squares: Tensor,
        slack: Tensor,
        best: Tensor,
        column: Tensor,
        lower: Tensor,
    ) -> None:
        """Compares the rows `index` (R,) of a block (B, D) with the centroids of one group.

        Updates in place, for these rows: best (B,), squared distance to the nearest centroid so
        far; column (B,), where that one stands in the order of the groups; lower (groups, B).
        """
        members = slice(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)
        scores = torch.mm(block[index], self.grouped[members].T).sub_(self.half[members])
        # A row's own centroid is no competitor of its own.
        inside = (column[index] >= members.start) & (column[index] < members.stop)
        scores[inside, column[index[inside]] - members.start] = float("-inf")
        winner = torch.from_numpy(scores.numpy().argmax(1))
        value = scores.gather(1, winner[:, None])[:, 0]
        distance = squares[index] - 2 * value
        lower[group, index] = self._bound(value, squares[index], slack[index])
        taken = torch.nonzero(distance < best[index]).flatten()
        if not len(taken):
            return
        rows = index[taken]
        old = column[rows]
        # Within the group the next best takes the winner's place in the bound …
        scores = scores[taken].scatter_(1, winner[taken, None], float("-inf"))
        lower[group, rows] = self._bound(scores.amax(1), squares[rows], slack[rows])
        # … and the centroid left behind is now one of the others of its own group.
        left = (best[rows] - slack[rows]).clamp_min_(0).sqrt_()
        home = old // GROUP_SIZE
        lower[home, rows] = torch.minimum(lower[home, rows], left)
        best[rows] = distance[taken].clamp_min_(0)
        column[rows] = winner[taken] + members.start
