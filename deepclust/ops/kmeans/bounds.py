"""Skips centroids that cannot be nearest, while few rows change cluster (Ding et al. 2015, "Yinyang k-means").

Centroids are put in groups. Every row keeps, per group, a lower bound of its distance to the group's centroids other
than its own; a pass lowers the bounds by the furthest movement in the group and looks again only where a bound has
fallen below the row's distance to its own centroid. The labels are those of a full search up to ties.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepclust.ops.kmeans.rows import BLOCK_BYTES, SLICE, Rows
from deepclust.ops.kmeans.step import AssignAt

MIN_CLUSTERS = 500
"""Below this a full product is faster than any bookkeeping."""
GROUP_SIZE = 40
MAX_BYTES = 32 << 20
"""Of the bounds; with a copied block, the filter and scratch they stay within 64 MB."""
START_BELOW = 0.01
"""Bounds are built when at most this part of the rows changed cluster in the last pass."""
SAMPLE = 512
"""Rows on which bounds are tried before they are built for all."""
STOP_ABOVE = 0.10
"""A block with more than this part of (row, group) pairs to search is searched in full."""


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
        """Whether bounds can win here: many clusters on a processor, true distances, and room for the bounds."""
        room = MAX_BYTES - (BLOCK_BYTES if rows.copied else 0)
        fits = rows.num * -(-num_clusters // GROUP_SIZE) * rows.dtype.itemsize <= room
        metric = not rows.spherical or rows.unit
        return rows.device.type == "cpu" and num_clusters >= MIN_CLUSTERS and fits and metric

    def begin(self, centroids: Tensor, find: AssignAt) -> None:
        """Takes the centroids (K, D) of the next pass and the full search over them."""
        self.find = find
        settled = self.changed <= self.start_below * self.rows.num
        self.changed = 0
        if self.losing:
            # Built too early: the bounds cost more than they saved. The next attempt waits for calmer passes.
            self.lower, self.losing, self.start_below = None, False, self.start_below / 4
        elif not settled:
            self.lower = None
        elif self.lower is None:
            self._group(centroids)
            if self._promising(centroids):
                self.lower = torch.full((self.num_groups, self.rows.num), -1.0, dtype=self.rows.dtype)
            else:
                self.start_below /= 2
        else:
            self.lower -= self._drift(centroids)
        self.centroids = centroids
        if self.lower is not None:
            self._prepare(centroids)

    def _drift(self, centroids: Tensor) -> Tensor:
        """(groups, 1) furthest movement since the last pass, a whit more, since it was itself rounded."""
        drift = torch.linalg.vector_norm(self._arranged(centroids - self.centroids), dim=1)
        return drift.view(self.num_groups, -1).amax(1)[:, None] * (1 + 1e-5)

    def _prepare(self, centroids: Tensor) -> None:
        self.centroids, self.grouped = centroids, self._arranged(centroids)
        self.half = self.grouped.square().sum(1).mul_(0.5)
        self.half[len(centroids) :] = float("inf")
        self.reach = float(centroids.norm(dim=1).max())

    def _promising(self, centroids: Tensor) -> bool:
        """Whether bounds from the last pass would have spared most of this one, judged by some rows."""
        block = next((block for _, block in self.rows.blocks()), None)
        if block is None or not len(block):
            return False
        rows = block[:: -(-len(block) // SAMPLE)].contiguous()
        drift, part = self._drift(centroids), torch.empty(len(rows), dtype=torch.int64)
        lower = rows.new_empty(self.num_groups, len(rows))
        self._prepare(self.centroids)
        squares = rows.square().sum(1)
        self._search_in_full(rows, part, lower, squares, self._slack(squares, rows))
        self._prepare(centroids)
        squares, best = self._lengths(rows, part)
        due = lower - drift < (best + self._slack(squares, rows)).sqrt_()
        return float(due.double().mean()) <= STOP_ABOVE / 2

    def assign(self, start: int, block: Tensor, part: Tensor) -> None:
        """Nearest centroids of a block; `part` holds the labels of the pass before and is overwritten."""
        before = part.clone()
        if self.lower is None:
            assert self.find is not None
            self.find(start, block, part)
        else:
            self._assign_bounded(block, part, self.lower[:, start : start + len(block)])
        self.changed += int((before != part).sum())

    def _group(self, centroids: Tensor) -> None:
        """Groups near centroids by a few iterations of k-means on them."""
        number = max(2, len(centroids) // GROUP_SIZE)
        middles = centroids[:: len(centroids) // number][:number].clone()
        for _ in range(5):
            group = torch.cdist(centroids, middles).argmin(1)
            sums = torch.zeros_like(middles).index_add_(0, group, centroids)
            counts = torch.bincount(group, minlength=number)
            middles = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], middles)
        # Cut at equal sizes, wherever the groups end, so that all groups make one even array.
        self.order = torch.argsort(group, stable=True)
        self.place = torch.empty_like(self.order)
        self.place[self.order] = torch.arange(len(self.order))
        self.num_groups = -(-len(centroids) // GROUP_SIZE)

    def _arranged(self, values: Tensor) -> Tensor:
        """(K, D) in the order of the groups, with rows of zeros up to a multiple of the group size."""
        padding = self.num_groups * GROUP_SIZE - len(values)
        return torch.nn.functional.pad(values[self.order], (0, 0, 0, padding))

    def _assign_bounded(self, block: Tensor, part: Tensor, lower: Tensor) -> None:
        squares, best = self._lengths(block, part)
        slack = self._slack(squares, block)
        due = lower < (best + slack).sqrt_()
        if float(due.sum()) > STOP_ABOVE * due.numel():
            first = bool((lower < 0).all())
            self.losing = self.losing or not first
            self._search_in_full(block, part, lower, squares, slack)
            return
        own = self.place[part]
        for group in range(self.num_groups):
            index = torch.nonzero(due[group]).flatten()
            for low in range(0, len(index), SLICE):
                self._search_group(group, index[low : low + SLICE], block, squares, slack, best, own, lower)
        part.copy_(self.order[own])

    def _slack(self, squares: Tensor, block: Tensor) -> Tensor:
        """(B,) what rounding may do to a squared distance |x|² − 2x·c + |c|².

        With unit roundoff u = eps/2 a product of D terms errs by at most D u |x||c| (Higham 2002, equation 3.5), and
        2|x||c| <= (|x| + |c|)²/2; the other few operations err by less than 4 u each.
        """
        return (squares.sqrt() + self.reach).square_() * (torch.finfo(block.dtype).eps * (2 + block.shape[1] / 4))

    def _lengths(self, block: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """Squared lengths of the rows (B,) and of their differences to their own centroids (B,)."""
        squares, best = block.new_empty(len(block)), block.new_empty(len(block))
        for low in range(0, len(block), SLICE):
            here = slice(low, low + SLICE)
            torch.linalg.vector_norm(block[here], dim=1, out=squares[here])
            differences = self.centroids.index_select(0, part[here]).sub_(block[here])
            torch.linalg.vector_norm(differences, dim=1, out=best[here])
        return squares.square_(), best.square_()

    def _search_in_full(self, block: Tensor, part: Tensor, lower: Tensor, squares: Tensor, slack: Tensor) -> None:
        """Assigns a block by all centroids and sets its bounds anew."""
        for low in range(0, len(block), 512):
            here = slice(low, low + 512)
            scores = torch.mm(block[here], self.grouped.T).sub_(self.half)
            own = torch.from_numpy(scores.numpy().argmax(1))
            part[here] = self.order[own]
            scores.scatter_(1, own[:, None], float("-inf"))
            nearest = scores.view(len(scores), self.num_groups, GROUP_SIZE).amax(2).T
            lower[:, here] = self._bound(nearest, squares[here], slack[here])

    @staticmethod
    def _bound(scores: Tensor, squares: Tensor, slack: Tensor) -> Tensor:
        """Lower bounds of distances from the largest x·c − |c|²/2."""
        return (squares - 2 * scores - slack).clamp_min_(0).sqrt_()

    def _search_group(
        self,
        group: int,
        index: Tensor,
        block: Tensor,
        squares: Tensor,
        slack: Tensor,
        best: Tensor,
        own: Tensor,
        lower: Tensor,
    ) -> None:
        """Compares the rows `index` with one group; updates their best distance, own centroid and bounds in place."""
        members = slice(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)
        scores = torch.mm(block[index], self.grouped[members].T).sub_(self.half[members])
        inside = (own[index] >= members.start) & (own[index] < members.stop)
        scores[inside, own[index[inside]] - members.start] = float("-inf")
        winner = torch.from_numpy(scores.numpy().argmax(1))
        value = scores.gather(1, winner[:, None])[:, 0]
        distance = squares[index] - 2 * value
        lower[group, index] = self._bound(value, squares[index], slack[index])
        taken = torch.nonzero(distance < best[index]).flatten()
        if not len(taken):
            return
        rows, old = index[taken], own[index[taken]]
        # Within the group the next best takes the winner's place in the bound …
        scores = scores[taken].scatter_(1, winner[taken, None], float("-inf"))
        lower[group, rows] = self._bound(scores.amax(1), squares[rows], slack[rows])
        # … and the centroid left behind is now one of the others of its own group.
        left = (best[rows] - slack[rows]).clamp_min_(0).sqrt_()
        home = old // GROUP_SIZE
        lower[home, rows] = torch.minimum(lower[home, rows], left)
        best[rows], own[rows] = distance[taken].clamp_min_(0), winner[taken] + members.start
