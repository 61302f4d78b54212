"""Triton kernels of k-means: nearest centroids without the N × K scores, sums of clusters.

Both ideas are those of Flash-KMeans (arXiv 2603.09229): stream the centroids past a tile of rows
and keep only the best score so far; sort the labels, so that a cluster's rows are summed by
programs that share no memory. Unlike there, no sum is atomic: partial sums have fixed places and
are added in a fixed order, so that runs repeat bit by bit.

Importing this file imports triton. Every function works on CUDA tensors, and on CPU tensors in
triton's interpreter (`TRITON_INTERPRET=1` set before triton is first imported). Tiles follow from
shapes and dtypes alone: nothing is timed.
"""

# pyright: reportMissingImports=false, reportCallIssue=false, reportArgumentType=false
import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 256
"""Rows of a cluster that one program sums."""


@triton.jit
def _assign(
    x,
    centroids,
    bias,
    labels,
    num_rows,
    num_clusters,
    dim,
    x_stride,
    c_stride,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_N rows against all centroids, BLOCK_K at a time.

    WHOLE: a row fits into BLOCK_D; else it is read in parts.
    """
    # int64, as the offset of a row may exceed 2^31 elements.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = rows < num_rows
    column = tl.arange(0, BLOCK_D)
    x_tile = x + rows[:, None] * x_stride + column[None, :]
    if WHOLE:
        # Read once, before all centroids pass.
        values = tl.load(x_tile, mask=real[:, None] & (column < dim)[None, :], other=0.0)
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    label = tl.zeros((BLOCK_N,), tl.int32)
    for low in range(0, num_clusters, BLOCK_K):
        which = low + tl.arange(0, BLOCK_K)
        exists = which < num_clusters
        c_tile = centroids + which.to(tl.int64)[None, :] * c_stride + column[:, None]
        if WHOLE:
            turned = tl.load(c_tile, mask=exists[None, :] & (column < dim)[:, None], other=0.0)
            scores = tl.dot(values.to(tl.float32), turned, input_precision=PRECISION)
        else:
            scores = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for first in range(0, dim, BLOCK_D):
                within = column < dim - first
                part = tl.load(x_tile + first, mask=real[:, None] & within[None, :], other=0.0)
                turned = tl.load(c_tile + first, mask=exists[None, :] & within[:, None], other=0.0)
                scores = tl.dot(part.to(tl.float32), turned, acc=scores, input_precision=PRECISION)
        if BIASED:
            scores += tl.load(bias + which, mask=exists, other=0.0)[None, :]
        # Centroids beyond K have score 0, which could win.
        scores = tl.where(exists[None, :], scores, float("-inf"))
        # Within a tile the leftmost maximum, between tiles the earlier one: the lowest index among
        # equals.
        value, index = tl.max(
            scores, axis=1, return_indices=True, return_indices_tie_break_left=True
        )
        better = value > best
        label = tl.where(better, low + index, label)
        best = tl.where(better, value, best)
    tl.store(labels + rows, label.to(tl.int64), mask=real)


@triton.jit
def _sum_pieces(
    x,
    weights,
    order,
    owner,
    starts,
    piece_starts,
    partial,
    num_clusters,
    dim,
    x_stride,
    WEIGHTED: tl.constexpr,
    PIECE_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_D columns of the sum of a piece, up to PIECE_ROWS rows of one cluster."""
    piece = tl.program_id(0).to(tl.int64)
    cluster = tl.load(owner + piece)
    # The grid has room for the most pieces there can be; those that are no cluster's do nothing.
    if cluster < num_clusters:
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        first = tl.load(starts + cluster) + (piece - tl.load(piece_starts + cluster)) * PIECE_ROWS
        stop = tl.minimum(first + PIECE_ROWS, tl.load(starts + cluster + 1))
        total = tl.zeros((BLOCK_D,), tl.float32)
        for ahead in range(0, PIECE_ROWS, BLOCK_N):
            here = first + ahead + tl.arange(0, BLOCK_N)
            rows = tl.load(order + here, mask=here < stop, other=0).to(tl.int64)
            mask = (here < stop)[:, None] & (column < dim)[None, :]
            tile = x + rows[:, None] * x_stride + column[None, :]
            values = tl.load(tile, mask=mask, other=0.0).to(tl.float32)
            if WEIGHTED:
                values *= tl.load(weights + rows, mask=here < stop, other=0.0)[:, None]
            total += tl.sum(values, axis=0)
        tl.store(partial + piece * dim + column, total, mask=column < dim)


@triton.jit
def _add_pieces(partial, piece_starts, sums, dim, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: BLOCK_D columns of one cluster's sum, from its pieces, in float64."""
    cluster = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(piece_starts + cluster)
    stop = tl.load(piece_starts + cluster + 1)
    total = tl.zeros((BLOCK_D,), tl.float64)
    for low in range(first, stop, BLOCK_P):
        pieces = low + tl.arange(0, BLOCK_P)
        mask = (pieces < stop)[:, None] & (column < dim)[None, :]
        values = tl.load(partial + pieces[:, None] * dim + column[None, :], mask=mask, other=0.0)
        total += tl.sum(values.to(tl.float64), axis=0)
    tl.store(sums + cluster * dim + column, total, mask=column < dim)


@dataclass(frozen=True)
class Tile:
    """Sizes of what one program of the assignment holds."""

    rows: int
    clusters: int
    dims: int
    whole: bool
    """Whether a row fits into `dims`; else rows are read in parts."""


def tile_for(num_clusters: int, dim: int, precision: str) -> Tile:
    """Tile for centroids (K, D): at most 96 KiB of shared memory, no more registers than exist.

    precision: see `assign`.
    """
    # `tl.dot` takes powers of two, from 16 on.
    padded = max(16, triton.next_power_of_2(dim))
    clusters = min(64, max(16, triton.next_power_of_2(num_clusters)))
    # Compiled for compute capability 8.0 and 9.0, longer products than these spill registers.
    whole = padded <= (128 if precision == "tf32" else 32)
    return Tile(64, clusters, padded if whole else 32, whole)


def assign(
    x: Tensor,
    centroids: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    precision: str = "ieee",
) -> None:
    """Writes every row's nearest centroid: the largest x·c + bias, the lowest index among equals.

    Args:
        x: (N, D) float32, float16 or bfloat16, last axis contiguous. Rows in half precision are
            read as such and multiplied as float32.
        centroids: (K, D) float32, last axis contiguous.
        bias: (K,) float32 or None.
        labels: (N,) int64, contiguous, overwritten.
        precision: of float32 products: "ieee" is exact float32 and the default; "tf32x3" splits
            each factor in two and is nearly as exact; "tf32" keeps 10 bits of each factor. It holds
            for this launch alone; torch's global switches neither matter nor change.
    """
    if not len(x):
        return
    tile = tile_for(*centroids.shape, precision)
    with _on(x):
        _assign[(triton.cdiv(len(x), tile.rows),)](
            x,
            centroids,
            bias,
            labels,
            len(x),
            *centroids.shape,
            x.stride(0),
            centroids.stride(0),
            BIASED=bias is not None,
            PRECISION=precision,
            WHOLE=tile.whole,
            BLOCK_N=tile.rows,
            BLOCK_K=tile.clusters,
            BLOCK_D=tile.dims,
            num_warps=4,
            num_stages=2,
        )


def segment_sums(
    x: Tensor,
    labels: Tensor,
    num_clusters: int,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sums (K, D) and total weights (K,) of every cluster's rows, both float64, in a fixed order.

    Args:
        x: (N, D) float32, float16 or bfloat16, last axis contiguous.
        labels: (N,) int64, in [0, K).
        num_clusters: K.
        weights: (N,) float32, or None where all are one.
    """
    order = torch.sort(labels, stable=True).indices
    counts = torch.bincount(labels, minlength=num_clusters)
    pieces = _Pieces(order, counts)
    sums = pieces.sum(x, weights)
    if weights is None:
        return sums, counts.double()
    # The weights are summed as rows of one column.
    return sums, pieces.sum(weights[:, None], None)[:, 0]


class _Pieces:
    """Rows sorted by cluster, cut into pieces of at most PIECE rows of one cluster.

    order: (N,) row indices. counts: (K,) rows per cluster.
    """

    def __init__(self, order: Tensor, counts: Tensor) -> None:
        self.order = order
        self.num_clusters = len(counts)
        self.starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        self.piece_starts = torch.nn.functional.pad((-(-counts // PIECE)).cumsum(0), (1, 0))
        # The most pieces there can be: the true number is known on the device alone, and asking for
        # it would wait for it. Pieces beyond it have the owner K.
        self.number = len(order) // PIECE + self.num_clusters
        every = torch.arange(self.number, device=counts.device)
        self.owner = torch.searchsorted(self.piece_starts[1:].contiguous(), every, right=True)

    def sum(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Sums (K, D) float64 of each cluster's rows x (N, D) times their weights (N,)."""
        dim = x.shape[1]
        width = min(64, max(1, triton.next_power_of_2(dim)))
        partial = torch.empty(self.number, dim, dtype=torch.float32, device=x.device)
        sums = torch.empty(self.num_clusters, dim, dtype=torch.float64, device=x.device)
        across = triton.cdiv(dim, width)
        with _on(x):
            _sum_pieces[(self.number, across)](
                x,
                weights,
                self.order,
                self.owner,
                self.starts,
                self.piece_starts,
                partial,
                self.num_clusters,
                dim,
                x.stride(0),
                WEIGHTED=weights is not None,
                PIECE_ROWS=PIECE,
                BLOCK_N=32,
                BLOCK_D=width,
            )
            _add_pieces[(self.num_clusters, across)](
                partial, self.piece_starts, sums, dim, BLOCK_P=16, BLOCK_D=width
            )
        return sums


def _on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the device of x the current one, to which triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
