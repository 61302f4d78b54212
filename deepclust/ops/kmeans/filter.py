"""Nearest centroids by a bfloat16 product that float32 checks again wherever it cannot be sure.

Where the processor multiplies bfloat16 at twice the speed of float32, the product is done in it,
and for all rows but a few the best score leads by more than any rounding could have caused. Only
the rows in doubt are compared in float32, and only with the centroids that may be theirs.

Why a lead beyond the margin is a proof. Let m be any vector, c' = c − m and s = x·c' − |c|²/2 +
|m|²/2 the exact score of a row; taking m off changes all scores of a row by the same amount, so the
nearest centroid is the one of largest s. What is computed is t = bf16(fl(x̃·c̃ + b)), with x̃ and
c̃ the inputs rounded to bfloat16, b the float32 value of (|m|² − |c|²)/2, and fl a float32 sum in
any order.

* Inputs: |x·c' − x̃·c̃| = |(x − x̃)·c' + x̃·(c' − c̃)| <= |x − x̃||c'| + |x̃||c' − c̃| by Cauchy
and
  Schwarz. The two lengths |x − x̃| and |c' − c̃| are measured, not bounded: they are about a third
  of what 2⁻⁸ a component would allow.
* Accumulation: products of two bfloat16 numbers are exact in float32, so the sum of D of them and
  the bias has D + 1 roundings at most: less than (D + 2) 2⁻²⁴ (|x̃||c̃| + |b|) (Higham 2002,
  section 3.1). Twice that is taken.
* Bias and c': b and c' are themselves rounded sums; (D + 4) 2⁻²² |c|² covers the first, 2⁻²² |x||c|
  the second.
* Output: bf16 rounds to the nearest, |t − v| <= 2⁻⁸ |t|, and never changes a sign.
* Numbers below 2⁻¹²⁶ may count as zero: less than 2⁻¹⁰⁰ D (1 + |x|)(1 + |c|) in all.

With E the sum of all but the output's term at the largest c, two scores t₁ >= t₂ >= 0 whose
difference exceeds 2 E + 2⁻⁸ (t₁ + t₂) belong to s₁ > s₂, and the same holds with t₂ = 0 for a
negative one. Lengths are measured in float32, so all is taken 1 % larger.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deepclust.ops.kmeans.rows import Rows
from deepclust.ops.kmeans.step import Assign
from deepclust.ops.precision import cpu_has_fast_bfloat16, has_onednn

MIN_CLUSTERS = 256
"""Below this the search for doubt costs what the product saves."""
PAIRS = 2048
"""Rows and candidates compared in float32 at one time."""
TAKEN = np.int16(-(1 << 15))
"""Minus zero: as an integer the smallest bfloat16."""


class Filter:
    """Nearest centroids of this rank's rows over the passes of one run.

    Call `begin` with the centroids of a pass and the exact search over them, then `assign` for
    every block in order. Where too many rows are in doubt, the exact search does the rest of the
    pass, and if that happens again 1, then 3, 7, … whole passes as well.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        # |x| and |x − x̃| of the rows stay from pass to pass; `known` of them are measured.
        self.lengths, self.errors = torch.empty(2, rows.num)
        self.known = 0
        # Rows of this pass, and what settling those in doubt has cost so far.
        self.seen = 0
        self.work = 0.0
        self.lost = False
        # Passes left to the exact search, and how many the next time.
        self.wait = 0
        self.patience = 0

    @staticmethod
    def worth_trying(rows: Rows, num_clusters: int) -> bool:
        """Whether bfloat16 can win: float32 rows, many clusters, a processor with fast bfloat16."""
        fits = rows.device.type == "cpu" and rows.dtype == torch.float32
        return fits and num_clusters >= MIN_CLUSTERS and has_onednn() and cpu_has_fast_bfloat16()

    def begin(self, centroids: Tensor, find: Assign) -> None:
        """Takes the centroids (K, D) of the next pass and the exact search over them."""
        self.find = find
        self.centroids = centroids
        if self.lost:
            # Early centroids are often single rows, far out; means lie nearer together and leave
            # less in doubt.
            self.wait = self.patience
            self.patience = 2 * self.patience + 1
            self.lost = False
        self.seen = 0
        self.work = 0.0
        self.wait -= 1
        if self.wait < 0:
            self._prepare(centroids)

    def _prepare(self, centroids: Tensor) -> None:
        """Computes from the centroids (K, D) the product's columns, its bias and the margin."""
        number, dim = centroids.shape
        middle = centroids.mean(0)
        centred = centroids - middle
        # Whole registers for the search of the maximum; the columns beyond K are never the best.
        self.width = number if number <= 32 else -(-number // 32) * 32
        self.columns = torch.zeros(self.width, dim, dtype=torch.bfloat16)
        self.columns[:number] = centred
        # The largest |c' − c̃| and |c'|.
        error = float(torch.linalg.vector_norm(centred - self.columns[:number], dim=1).max())
        reach = float(torch.linalg.vector_norm(centred, dim=1).max())
        # The largest |c|².
        largest = 1.0
        self.bias = torch.full((self.width,), float("-inf"))
        if self.rows.spherical:
            # All |c| are one: the bias is the same for all and may be left out.
            self.bias[:number] = 0
        else:
            squares = torch.linalg.vector_norm(centroids, dim=1).double().square_()
            self.bias[:number] = 0.5 * (middle.double().square().sum() - squares)
            largest = float(squares.max())
        # E = errors · by_error + lengths · by_length + constant; the module's text has the terms.
        tiny = 2.0**-100 * dim * (1 + reach)
        sums = ((dim + 2) * 2.0**-22 + 2.0**-22) * (reach + largest**0.5)
        self.by_error = 1.01 * reach
        self.by_length = 1.01 * (1.01 * error + sums + tiny)
        self.constant = (dim + 4) * 2.0**-21 * largest + tiny
        # 2^19 bfloat16 scores are 1 MiB: they stay in the second-level cache.
        self.chunk_size = max(1024, min(8192, (1 << 19) // self.width))

    def assign(self, start: int, block: Tensor, part: Tensor) -> None:
        """Writes the nearest centroids of a block to `part` (B,).

        start: index of the block's first row. block: (B, D).
        """
        if self.wait >= 0:
            self.find(block, part)
            return
        for low in range(0, len(block), self.chunk_size):
            here = slice(low, low + self.chunk_size)
            if self.lost:
                self.find(block[low:], part[low:])
                return
            self._assign_chunk(start + low, block[here], part[here])
            # A row compared with all centroids costs as much as K / 32 pairs. If half of the rows
            # were, the filter would save nothing; 2048 rows are enough to judge by.
            self.lost = self.work > self.seen * self.width / 64 and self.seen >= 2048

    def _assign_chunk(self, start: int, rows: Tensor, part: Tensor) -> None:
        """Writes the nearest centroids of rows (R, D), the first of which is row `start`."""
        rounded = rows.bfloat16()
        margin = self._margin(start, rows, rounded)
        product = torch.ops.mkldnn._linear_pointwise(
            rounded, self.columns, self.bias, "none", [], ""
        )
        # Non-negative bfloat16 numbers are ordered as the integers of the same bits, and negative
        # ones lie below them; integers are compared several times faster.
        scores = product.view(torch.int16).numpy()
        best = part.numpy()
        np.argmax(scores, axis=1, out=best)
        # The best is taken out to find the second best, then put back for `_decide`.
        flat = np.arange(0, len(rows) * self.width, self.width) + best
        first = scores.ravel()[flat]
        scores.ravel()[flat] = TAKEN
        second = _value(torch.from_numpy(scores).amax(1)).clamp_min_(0)
        scores.ravel()[flat] = first
        first = _value(torch.from_numpy(first))
        margin += (first + second) * (1.01 * 2.0**-8)
        # Written so that NaN (the difference of two infinities) is in doubt.
        doubt = torch.nonzero(~(first - second > margin) | (first <= 0)).flatten()
        self.seen += len(rows)
        if len(doubt):
            self._decide(rows, scores, doubt, (first - margin)[doubt], part)

    def _margin(self, start: int, rows: Tensor, rounded: Tensor) -> Tensor:
        """2 E of the rows (R,); `rounded` are the same rows in bfloat16."""
        here = slice(start, start + len(rows))
        if self.known < start + len(rows):
            torch.linalg.vector_norm(rows, dim=1, out=self.lengths[here])
            torch.linalg.vector_norm(rows - rounded, dim=1, out=self.errors[here])
            self.known = start + len(rows)
        by_row = self.errors[here] * self.by_error + self.lengths[here] * self.by_length
        return (by_row + self.constant).mul_(2)

    def _decide(
        self,
        rows: Tensor,
        scores: np.ndarray,
        doubt: Tensor,
        floor: Tensor,
        part: Tensor,
    ) -> None:
        """Settles rows in doubt by float32.

        Args:
            rows: (R, D) of the chunk.
            scores: (R, width) int16, bits of the bfloat16 scores.
            doubt: (M,) indices of the rows in doubt.
            floor: (M,) float32, the score below which no centroid can be the nearest.
            part: (R,) labels, changed for the rows in doubt.
        """
        # Of few columns, or where negative scores (whose bits are in the wrong order) come into
        # question, candidates are not worth singling out: all centroids are compared.
        few = (floor > 0) & (self.width > 64)
        rest = doubt[~few]
        if len(rest):
            labels = torch.empty(len(rest), dtype=torch.int64)
            self.find(rows[rest], labels)
            part[rest] = labels
            self.work += len(rest) * self.width / 32
        doubt = doubt[few]
        floor = floor[few]
        if not len(doubt):
            return
        # The upper half of a positive float32 is the bfloat16 next below.
        least = (floor.view(torch.int32) >> 16).to(torch.int16).numpy()
        pairs = np.flatnonzero(scores[doubt.numpy()] >= least[:, None])
        row, column = np.divmod(pairs, self.width)
        self.work += len(pairs)
        distances = self._distances(rows, doubt[torch.from_numpy(row)], torch.from_numpy(column))
        starts = np.searchsorted(row, np.arange(len(doubt)))
        nearest = np.minimum.reduceat(distances, starts)
        wins = np.flatnonzero(distances == nearest[row])[::-1]
        # Of equals the one of lowest index, written last.
        labels = np.empty(len(doubt), dtype=np.int64)
        labels[row[wins]] = column[wins]
        part[doubt] = torch.from_numpy(labels)

    def _distances(self, rows: Tensor, row: Tensor, column: Tensor) -> np.ndarray:
        """Distances (P,) of pairs; minus the products where rows are compared by direction.

        row, column: (P,) indices of the pairs' rows in (R, D) and of their centroids.
        """
        out = torch.empty(len(row))
        for low in range(0, len(row), PAIRS):
            here = slice(low, low + PAIRS)
            x = rows.index_select(0, row[here])
            c = self.centroids.index_select(0, column[here])
            if self.rows.spherical:
                out[here] = x.mul_(c).sum(1).neg_()
            else:
                torch.linalg.vector_norm(x.sub_(c), dim=1, out=out[here])
        return out.numpy()


def _value(bits: Tensor) -> Tensor:
    """The bfloat16 numbers of these bits (int16), as float32."""
    return bits.view(torch.bfloat16).float()
