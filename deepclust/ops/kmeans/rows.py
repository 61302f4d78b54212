"""The rows to cluster, read block by block: tensors, NumPy arrays, memory maps, iterables of chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepclust.ops.kmeans.ranks import Ranks
from deepclust.ops.precision import computed_in

BLOCK_BYTES = 16 << 20
"""A block that must be copied (another dtype, a memory map, a shift) takes at most this much."""
SLICE = 2048
"""Rows that stay in the cache while several things are measured on them."""


class Rows:
    """This rank's rows, never copied whole.

    Args:
        x: (N, D) tensor or array of any real dtype and layout, a memory map, or an iterable of such chunks that gives
            a fresh pass every time `iter` is called on it. Whole numbers beyond 2^24 are computed in float64.
        weights: (N,) non-negative sample weights.
        block_size: rows per block; the default keeps a block within `BLOCK_BYTES`.
        spherical: every row counts with length one (zero rows have no direction and move no centroid).

    Raises:
        ValueError: wrong shape, one-shot iterator, NaN or infinite rows (named), rows or weights out of range.
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
        self.source, self.ranks, self.spherical = _source(x), ranks, spherical
        first = next(iter(self._chunks()), None)
        self.dim = ranks.max(0 if first is None else first.shape[1])
        self.device = first.device if isinstance(first, Tensor) else torch.device("cpu")
        double = first is not None and self._needs_double(first)
        self.dtype = torch.float64 if ranks.max(int(double)) else torch.float32
        self.block_size = block_size or max(256, BLOCK_BYTES // (max(self.dim, 1) * self.dtype.itemsize))
        self.shift: Tensor | None = None
        self.unit = False
        self.num = 0
        self._scan()
        self.weights = self._check_weights(weights)

    def _needs_double(self, first: Any) -> bool:
        """Whether float32 would round whole numbers, or the rows are float64 themselves."""
        if computed_in(first) == torch.float64:
            return True
        whole = not first.dtype.is_floating_point if isinstance(first, Tensor) else first.dtype.kind in "iu"
        return whole and any(computed_in(chunk) == torch.float64 for chunk in self._chunks())

    def _chunks(self) -> Iterator[Any]:
        if isinstance(self.source, (Tensor, np.ndarray)):
            yield self.source
            return
        for chunk in self.source:
            yield chunk if isinstance(chunk, Tensor) else np.asarray(chunk)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(index of the first row, (B, D) contiguous block in the dtype of the computation) in order."""
        start = 0
        for chunk in self._chunks():
            if chunk.ndim != 2 or chunk.shape[1] != self.dim:
                raise ValueError(f"x: expected chunks of shape (rows, {self.dim}), got {tuple(chunk.shape)}")
            for low in range(0, chunk.shape[0], self.block_size):
                block = self._as_tensor(chunk[low : low + self.block_size])
                yield start + low, block if self.shift is None else block - self.shift
            start += chunk.shape[0]

    def _as_tensor(self, block: Any) -> Tensor:
        if isinstance(block, Tensor):
            return block.detach().to(self.device, self.dtype).contiguous()
        block = np.ascontiguousarray(block, dtype=np.float64 if self.dtype == torch.float64 else np.float32)
        # torch refuses to share memory that must not be written, such as a read-only memory map.
        return torch.from_numpy(block if block.flags.writeable else block.copy())

    @property
    def copied(self) -> bool:
        """Whether blocks take memory of their own; taken for granted of an iterable's chunks."""
        if self.shift is not None or not isinstance(self.source, (Tensor, np.ndarray)):
            return True
        given = self.source[:2]
        place = given.data_ptr() if isinstance(given, Tensor) else given.ctypes.data
        return self._as_tensor(given).data_ptr() != place

    def block_weights(self, start: int, block: Tensor) -> Tensor | None:
        """(B,) factors with which the rows of a block enter the sums, or None where all are one."""
        weights = None if self.weights is None else self.weights[start : start + len(block)]
        if not self.spherical or self.unit:
            return weights
        norms = torch.linalg.vector_norm(block, dim=1)
        scale = torch.where(norms > 0, 1 / norms, 0)
        return scale if weights is None else scale * weights

    def take(self, indices: Tensor) -> Tensor:
        """Rows by global index, (M, D), the same on every rank. `indices` ascend."""
        out = torch.zeros(len(indices), self.dim, dtype=self.dtype, device=self.device)
        local = indices.to(self.device) - self.offset
        for start, block in self.blocks():
            low, high = torch.searchsorted(
                local, torch.tensor([start, start + len(block)], device=self.device)
            ).tolist()
            if high > low:
                out[low:high] = block[local[low:high] - start]
        return self.ranks.sum(out)

    def take_weights(self, indices: Tensor) -> Tensor:
        """Sample weights by global index, (M,), the same on every rank."""
        if self.weights is None:
            return torch.ones(len(indices), dtype=self.dtype, device=self.device)
        local = indices.to(self.device) - self.offset
        mine = (local >= 0) & (local < self.num)
        out = torch.zeros(len(indices), dtype=self.dtype, device=self.device)
        out[mine] = self.weights[local[mine]]
        return self.ranks.sum(out)

    def _scan(self) -> None:
        """One pass: counts rows, refuses bad ones, and finds out whether the data lie far from the origin."""
        moments = torch.zeros(self.dim + 2, dtype=torch.float64, device=self.device)
        bad: list[int] = []
        self.unit = self.spherical
        for start, block in self.blocks():
            self.num = start + len(block)
            size = SLICE if block.device.type == "cpu" else len(block)
            for low in range(0, len(block), size):
                some = block[low : low + size]
                norms = torch.linalg.vector_norm(some, dim=1)
                if not bool(torch.isfinite(norms.square().sum())):
                    rows = torch.nonzero(~torch.isfinite(norms.square())).flatten()
                    bad += (start + low + rows[: 5 - len(bad)]).tolist()
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
        mean, square = moments[:-2] / moments[-1].clamp_min(1), moments[-2] / moments[-1].clamp_min(1)
        # The mean squared length about the mean, D times the mean variance of a feature.
        self.spread = float((square - mean.square().sum()).clamp_min(0))
        # Far from the origin float32 loses the differences between rows in the square of the offset.
        if not self.spherical and float(mean.square().sum()) > 4 * self.spread:
            self.shift = mean.to(self.dtype)

    def _refuse(self, bad: list[int]) -> None:
        rows = sorted(self.offset + row for row in bad)
        rows = [row for part in self.ranks.gather(rows) for row in part][:5]
        if rows:
            raise ValueError(
                f"x: rows {', '.join(map(str, rows))}{' …' if len(rows) == 5 else ''} hold NaN, infinity or values "
                "whose squares overflow; remove or repair these rows first"
            )

    def _check_weights(self, weights: Any) -> Tensor | None:
        problem = ""
        given = self.ranks.max(int(weights is not None))
        tensor = torch.as_tensor(weights if weights is not None else torch.ones(self.num)).detach()
        if tensor.shape != (self.num,):
            problem = f"sample_weights: expected shape ({self.num},), got {tuple(tensor.shape)}"
        elif not bool((torch.isfinite(tensor) & (tensor >= 0)).all()):
            problem = "sample_weights: every weight must be finite and at least 0"
        positive = self.ranks.gather((problem, int((tensor > 0).sum())))
        problem = next((text for text, _ in positive if text), "")
        if not problem and self.total and not sum(count for _, count in positive):
            problem = "sample_weights: all are zero; at least one row must count"
        if problem:
            raise ValueError(problem)
        return tensor.to(self.device, self.dtype) if given else None


def _source(x: Any) -> Tensor | np.ndarray | Iterable[Any]:
    """`x` as a tensor, an array or something that can be read again and again."""
    is_table = isinstance(x, (list, tuple)) and len(x) > 0 and getattr(x[0], "ndim", 0) != 2
    if isinstance(x, (Tensor, np.ndarray)):
        source = x
    elif is_table or hasattr(x, "__array__"):
        source = np.asarray(x)
    else:
        if not isinstance(x, Iterable) or iter(x) is x:
            raise ValueError(
                f"x: {type(x).__name__} can be read only once or not at all; k-means passes over the data many times. "
                "Give an array, a list of chunks, or an object whose __iter__ starts a fresh pass"
            )
        return x
    if source.ndim != 2:
        raise ValueError(f"x: expected shape (N, D), got {tuple(source.shape)}")
    if source.dtype.is_complex if isinstance(source, Tensor) else source.dtype.kind not in "fiub":
        raise ValueError(f"x: expected real numbers, got {source.dtype}")
    return source
