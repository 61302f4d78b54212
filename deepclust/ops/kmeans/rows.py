"""The rows to cluster, read in blocks: tensors, arrays, memory maps, iterables of chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepclust.ops.kmeans.ranks import Ranks
from deepclust.ops.precision import computed_in

BLOCK_BYTES = 16 << 20
"""Most bytes of a block that must be copied (another dtype, a memory map, a shift)."""
SLICE = 2048
"""Rows that stay in the cache while several things are measured on them."""
MAX_NAMED = 5
"""Most bad rows that an error message names."""


class Rows:
    """This rank's rows, never copied whole.

    Args:
        x: (N, D) tensor or array of any real dtype and layout, a memory map, or an iterable of such
            chunks that gives a fresh pass every time `iter` is called on it. Whole
            numbers beyond 2^24 are computed in float64.
        ranks: the process group over whose ranks the rows are spread.
        weights: (N,) non-negative sample weights, or None where all are one.
        block_size: rows per block; by default a block takes at most `BLOCK_BYTES`.
        spherical: every row counts with length one (zero rows have no direction and move no
            centroid).

    Raises:
        ValueError: wrong shape, one-shot iterator, NaN or infinite rows (named), rows or weights
            out of range.
    """

    def __init__(
        self,
        x: Any,
        ranks: Ranks,
        *,
        weights: Any = None,
        block_size: int | None = None,
        spherical: bool = False,
    ) -> None:
        self.source = _source(x)
        self.ranks = ranks
        self.spherical = spherical
        first = next(iter(self._chunks()), None)
        # A rank may have no chunk at all: it learns the width and the dtype from the others.
        self.dim = ranks.max(0 if first is None else first.shape[1])
        self.device = first.device if isinstance(first, Tensor) else torch.device("cpu")
        double = first is not None and self._needs_double(first)
        self.dtype = torch.float64 if ranks.max(int(double)) else torch.float32
        # At least 256 rows: shorter blocks would spend their time on calls, however wide a row is.
        row_bytes = max(self.dim, 1) * self.dtype.itemsize
        self.block_size = block_size or max(256, BLOCK_BYTES // row_bytes)
        self.shift: Tensor | None = None
        self.unit = False
        self.num = 0
        self._scan()
        self.weights = self._check_weights(weights)

    def _needs_double(self, first: Any) -> bool:
        """Whether float32 would round whole numbers, or the rows are float64 themselves."""
        if computed_in(first) == torch.float64:
            return True
        whole = (
            not first.dtype.is_floating_point
            if isinstance(first, Tensor)
            else first.dtype.kind in "iu"
        )
        return whole and any(computed_in(chunk) == torch.float64 for chunk in self._chunks())

    def _chunks(self) -> Iterator[Any]:
        if isinstance(self.source, (Tensor, np.ndarray)):
            yield self.source
            return
        for chunk in self.source:
            yield chunk if isinstance(chunk, Tensor) else np.asarray(chunk)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields the blocks in order: index of the first row, rows (B, D).

        The rows are contiguous, in the dtype of the computation, less the shift where there is one.
        """
        start = 0
        for chunk in self._chunks():
            if chunk.ndim != 2 or chunk.shape[1] != self.dim:
                raise ValueError(
                    f"x: expected chunks of shape (rows, {self.dim}), got {tuple(chunk.shape)}"
                )
            for low in range(0, chunk.shape[0], self.block_size):
                block = self._as_tensor(chunk[low : low + self.block_size])
                if self.shift is not None:
                    block = block - self.shift
                yield start + low, block
            start += chunk.shape[0]

    def _as_tensor(self, block: Any) -> Tensor:
        if isinstance(block, Tensor):
            return block.detach().to(self.device, self.dtype).contiguous()
        dtype = np.float64 if self.dtype == torch.float64 else np.float32
        block = np.ascontiguousarray(block, dtype=dtype)
        # torch refuses to share memory that must not be written, such as a read-only memory map.
        return torch.from_numpy(block if block.flags.writeable else block.copy())

    @property
    def copied(self) -> bool:
        """Whether blocks take memory of their own; assumed of an iterable's chunks."""
        if self.shift is not None or not isinstance(self.source, (Tensor, np.ndarray)):
            return True
        # Two rows tell: a conversion gives them another address.
        sample = self.source[:2]
        address = sample.data_ptr() if isinstance(sample, Tensor) else sample.ctypes.data
        return self._as_tensor(sample).data_ptr() != address

    def block_weights(self, start: int, block: Tensor) -> Tensor | None:
        """Factors (B,) with which the rows of a block enter the sums, or None where all are one."""
        weights = None
        if self.weights is not None:
            weights = self.weights[start : start + len(block)]
        if not self.spherical or self.unit:
            return weights
        # Dividing by the length here spares a normalised copy of the block.
        norms = torch.linalg.vector_norm(block, dim=1)
        scale = torch.where(norms > 0, 1 / norms, 0)
        return scale if weights is None else scale * weights

    def take(self, indices: Tensor) -> Tensor:
        """Rows (M, D) by global index, the same on every rank.

        indices: (M,) int64, ascending.
        """
        rows = torch.zeros(len(indices), self.dim, dtype=self.dtype, device=self.device)
        local = indices.to(self.device) - self.offset
        for start, block in self.blocks():
            edges = torch.tensor([start, start + len(block)], device=self.device)
            low, high = torch.searchsorted(local, edges).tolist()
            if high > low:
                rows[low:high] = block[local[low:high] - start]
        # Every row is one rank's and zero elsewhere: the sum over ranks puts them together.
        return self.ranks.sum(rows)

    def take_weights(self, indices: Tensor) -> Tensor:
        """Sample weights (M,) by global index, the same on every rank."""
        if self.weights is None:
            return torch.ones(len(indices), dtype=self.dtype, device=self.device)
        local = indices.to(self.device) - self.offset
        here = (local >= 0) & (local < self.num)
        weights = torch.zeros(len(indices), dtype=self.dtype, device=self.device)
        weights[here] = self.weights[local[here]]
        return self.ranks.sum(weights)

    def _scan(self) -> None:
        """Counts rows, refuses bad ones and decides on the shift, in one pass over the data."""
        # D sums of columns, the sum of squared lengths and the number of rows, in one tensor for
        # one reduction over ranks.
        moments = torch.zeros(self.dim + 2, dtype=torch.float64, device=self.device)
        bad: list[int] = []
        self.unit = self.spherical
        for start, block in self.blocks():
            self.num = start + len(block)
            size = SLICE if block.device.type == "cpu" else len(block)
            for low in range(0, len(block), size):
                some = block[low : low + size]
                norms = torch.linalg.vector_norm(some, dim=1)
                # A sum is finite only if all terms are: rows are looked at only in a bad slice.
                if not bool(torch.isfinite(norms.square().sum())):
                    rows = torch.nonzero(~torch.isfinite(norms.square())).flatten()
                    bad += (start + low + rows[: MAX_NAMED - len(bad)]).tolist()
                if self.unit:
                    self.unit = bool(((norms - 1).abs() < 1e-6).all())
                moments[:-2] += torch.mv(some.T, some.new_ones(len(some)))
                moments[-2] += norms.double().square_().sum()
            moments[-1] += len(block)
        self.offset, self.total = self.ranks.offset(self.num)
        self._refuse(bad)
        self.unit = all(self.ranks.gather(self.unit))
        self.ranks.sum(moments)
        self.squares = float(moments[-2])
        count = moments[-1].clamp_min(1)
        mean = moments[:-2] / count
        square = moments[-2] / count
        # The mean squared length about the mean, D times the mean variance of a feature.
        self.spread = float((square - mean.square().sum()).clamp_min(0))
        # Far from the origin float32 loses the differences between rows in the square of the
        # offset. Far means: the mean is further from the origin than twice the rows' RMS distance
        # from the mean.
        if not self.spherical and float(mean.square().sum()) > 4 * self.spread:
            self.shift = mean.to(self.dtype)

    def _refuse(self, bad: list[int]) -> None:
        """Raises ValueError on every rank if any rank has bad rows, named by global index."""
        rows = sorted(self.offset + row for row in bad)
        rows = [row for part in self.ranks.gather(rows) for row in part][:MAX_NAMED]
        if rows:
            raise ValueError(
                f"x: rows {', '.join(map(str, rows))}{' …' if len(rows) == MAX_NAMED else ''} hold "
                "NaN, infinity or values whose squares overflow; remove or repair these rows first"
            )

    def _check_weights(self, weights: Any) -> Tensor | None:
        """Weights (N,) in the dtype of the computation; None where no rank was given any."""
        problem = ""
        given = self.ranks.max(int(weights is not None))
        tensor = torch.as_tensor(weights if weights is not None else torch.ones(self.num)).detach()
        if tensor.shape != (self.num,):
            problem = f"sample_weights: expected shape ({self.num},), got {tuple(tensor.shape)}"
        elif not bool((torch.isfinite(tensor) & (tensor >= 0)).all()):
            problem = "sample_weights: every weight must be finite and at least 0"
        # All ranks raise together: one that stopped alone would leave the others waiting.
        reports = self.ranks.gather((problem, int((tensor > 0).sum())))
        problem = next((text for text, _ in reports if text), "")
        if not problem and self.total and not sum(count for _, count in reports):
            problem = "sample_weights: all are zero; at least one row must count"
        if problem:
            raise ValueError(problem)
        return tensor.to(self.device, self.dtype) if given else None


def _source(x: Any) -> Tensor | np.ndarray | Iterable[Any]:
    """`x` as a tensor, an array or something that can be read again and again."""
    # A list of matrices is an iterable of chunks; any other list is a table of numbers.
    is_table = isinstance(x, (list, tuple)) and len(x) > 0 and getattr(x[0], "ndim", 0) != 2
    if isinstance(x, (Tensor, np.ndarray)):
        source = x
    elif is_table or hasattr(x, "__array__"):
        source = np.asarray(x)
    else:
        # An iterator is its own `iter`: it would be empty on the second pass.
        if not isinstance(x, Iterable) or iter(x) is x:
            raise ValueError(
                f"x: {type(x).__name__} can be read only once or not at all; k-means passes over "
                "the data many times. Give an array, a list of chunks, or an object whose __iter__ "
                "starts a fresh pass"
            )
        return x
    if source.ndim != 2:
        raise ValueError(f"x: expected shape (N, D), got {tuple(source.shape)}")
    if isinstance(source, Tensor):
        real = not source.dtype.is_complex
    else:
        real = source.dtype.kind in "fiub"
    if not real:
        raise ValueError(f"x: expected real numbers, got {source.dtype}")
    return source
