"""How one piece of a bank is searched for each query's best rows; `neighbors` lays the pieces together.

Each search yields (rows (n,), values (n, k), columns (n, k)) for every query once, by chunks. Larger values are
better; euclidean distances come negated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.ops.precision import cpu_has_fast_bfloat16, has_onednn

Metric = Literal["cosine", "dot", "euclidean"]
Found = Iterator[tuple[Tensor, Tensor, Tensor]]
Search = Callable[[Tensor, Tensor, Metric, int, "int | None"], Found]
"""(queries (Q, D), piece (P, D), metric, k, self_column): query i's own row is column i + self_column, if given."""

SCORES_CPU = 30_000_000  # bytes of scores at a time: what malloc gives again without asking the system for pages
SCORES_GPU = 268_435_456  # the same on a GPU: enough rows to fill it
BLOCK = 16  # columns per block maximum
FILTER_DIM = 48  # below that a product is too short for bfloat16 to repay looking twice
TILE = 2048  # rows and columns of a tile of all pairs
PAIRS_DIM = 1024  # from here on all pairs are faster with each product made once
MIN_APPROXIMATE = 4096  # rows: below that looking at all is as fast
CELLS_SEEN = 16  # one in so many cells is looked into
MAX_LOST = 0.2  # share of queries that the filter may hand back before it counts as useless here


def search_exact(
    queries: Tensor, piece: Tensor, metric: Metric, k: int, self_column: int | None, which: Tensor | None = None
) -> Found:
    """All scores in the precision of the queries; `which` (n,) int64 leaves out the other queries."""
    step = _rows_at_a_time(piece)
    bias = -0.5 * piece.square().sum(1) if metric == "euclidean" else None
    which = torch.arange(len(queries), device=queries.device) if which is None else which
    for rows in which.split(step) if len(which) else ():
        chunk = queries[rows]
        scores = _product(chunk, piece, bias)
        if self_column is not None:
            _mask(scores, rows + self_column)
        best, column = _top(scores, k)
        if metric == "euclidean":
            distance = -torch.linalg.vector_norm(chunk[:, None] - piece[column], dim=2)
            best = torch.where(best == -torch.inf, best, distance)
        yield rows, best, column


def search_pairs(bank: Tensor, k: int, exclude_self: bool) -> Found:
    """Every row of the bank against all of them, by dot products of which each is made once.

    Unlike the other searches it yields the best of a part of the columns, and every row as often as there are parts.
    """
    blocks = torch.arange(len(bank), device=bank.device).split(TILE)
    for number, rows in enumerate(blocks):
        for others in blocks[number:]:
            scores = _product(bank[rows], bank[others])
            if exclude_self and rows is others:
                scores.fill_diagonal_(-torch.inf)
            best, column = _top(scores, min(k, len(others)))
            yield rows, best, others[column]
            if rows is not others:
                best, column = _top(scores.T.contiguous(), min(k, len(rows)))
                yield others, best, rows[column]


def pairs_pay(bank: Tensor, metric: Metric) -> bool:
    """Whether `search_pairs` is faster on a bank (N, D): half of the product is saved, none of the choosing."""
    return metric != "euclidean" and bank.shape[1] >= PAIRS_DIM and len(bank) > TILE


def _rows_at_a_time(piece: Tensor) -> int:
    budget = SCORES_CPU if piece.device.type == "cpu" else SCORES_GPU
    return min(max(budget // (piece.element_size() * len(piece)) // 16 * 16, 16), 512)


def _product(chunk: Tensor, piece: Tensor, bias: Tensor | None = None) -> Tensor:
    """chunk @ piece.T + bias. oneDNN's product is fast on CPUs of every make, MKL's is not; its operator is private."""
    if chunk.device.type == "cpu" and chunk.dtype != torch.float64 and has_onednn():
        return torch.ops.mkldnn._linear_pointwise(chunk, piece, bias, "none", [], "")
    return F.linear(chunk, piece, bias)


def _mask(scores: Tensor, own: Tensor) -> None:
    """Takes out each row's column own (R,); outside the piece there is nothing to take."""
    inside = ((own >= 0) & (own < scores.shape[1])).nonzero().flatten()
    scores[inside, own[inside]] = -torch.inf


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top k per row. The k best lie in the k blocks with the best maxima, so only those are sorted: exact.

    Block j holds the columns j, j + blocks, j + 2 blocks, ...: the maximum then runs over whole vectors. bfloat16 is
    compared as integers, several times faster: the maximum is right where a block has any score >= 0, else negative.
    """
    blocks = scores.shape[1] // BLOCK
    if blocks < 4 * k:
        return scores.topk(k, dim=1)
    body = scores[:, : blocks * BLOCK].unflatten(1, (BLOCK, blocks))
    half = scores.dtype == torch.bfloat16
    maxima = body.view(torch.int16).amax(1).view(torch.bfloat16) if half else body.amax(1)
    chosen = _top(maxima, k)[1]
    columns = (chosen[:, None, :] + blocks * torch.arange(BLOCK, device=scores.device)[:, None]).flatten(1)
    tail = torch.arange(blocks * BLOCK, scores.shape[1], device=scores.device).expand(len(scores), -1)
    columns = torch.cat([columns, tail], 1)
    best, order = scores.gather(1, columns).topk(k, dim=1)
    return best, columns.gather(1, order)


def search_fast(queries: Tensor, piece: Tensor, metric: Metric, k: int, self_column: int | None) -> Found:
    """As `search_exact`, to the same neighbours: a bfloat16 product proposes, where that is fast, float32 decides."""
    proposals = k + max(12, k // 2)
    fits = metric != "euclidean" and queries.dtype == torch.float32 and queries.shape[1] >= FILTER_DIM
    fits = fits and queries.device.type == "cpu" and len(piece) >= 8 * BLOCK * proposals
    if not (fits and has_onednn() and cpu_has_fast_bfloat16()):
        yield from search_exact(queries, piece, metric, k, self_column)
        return
    half = piece.bfloat16()
    largest = torch.stack([_lengths(piece).amax(), _lengths(half).amax(), _lengths(piece - half).amax()])
    step = _rows_at_a_time(half)
    lost, first = queries.new_empty(0, dtype=torch.int64), 0
    while first < len(queries) and len(lost) <= MAX_LOST * (first + 4 * step):
        rows = torch.arange(first, min(first + step, len(queries)))
        own = None if self_column is None else rows + self_column
        best, column, sure = _propose(queries[rows], piece, half, largest, k, proposals, own)
        lost, first = torch.cat([lost, rows[~sure]]), first + step
        yield rows[sure], best[sure], column[sure]
    lost = torch.cat([lost, torch.arange(min(first, len(queries)), len(queries))])
    yield from search_exact(queries, piece, metric, k, self_column, lost)


def _lengths(x: Tensor) -> Tensor:
    """(rows,) norms, a little larger than rounding could make them."""
    return 1.001 * torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)


def _propose(
    chunk: Tensor, piece: Tensor, half: Tensor, largest: Tensor, k: int, proposals: int, own: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Best k of the proposed columns by float32, and for which rows they are the best of all columns.

    Let q', c' be the rows rounded to bfloat16 and s' = round(fl(q'.c')) the proposed score. Then
    * |q.c - q'.c'| <= |q - q'| |c| + |q'| |c - c'| (Cauchy-Schwarz; the lengths are measured, not bounded),
    * products of two bfloat16 are exact in float32 and a sum of D of them, in any order, is off by at most
      D 2^-23 |q'| |c'|; the float32 scores that decide are off by half as much: together below D 2^-22,
    * numbers below 2^-126 may count as zero: less than 2^-100 a component,
    * rounding to bfloat16 keeps signs and changes a score v by at most 2^-8 |v|: v <= 1.004 max(s', 0).
    The proposals are the largest s' wherever these are >= 0, so a column that is none of them has s' <= max(last, 0),
    where `last` is the least proposal, and q.c at most `limit`. Where the k-th best of the proposals is beyond that,
    nothing better was left out. Infinite and NaN scores fail the comparison.
    """
    rounded = chunk.bfloat16()
    scores = _product(rounded, half)
    if own is not None:
        _mask(scores, own)
    proposed, columns = _top(scores, proposals)
    exact = torch.bmm(piece[columns], chunk[:, :, None]).squeeze(2)
    exact.masked_fill_(proposed == -torch.inf, -torch.inf)
    best, order = exact.topk(k, dim=1)
    length, length_half, error = largest
    of_query, of_half, of_error = _lengths(chunk), _lengths(rounded), _lengths(chunk - rounded)
    margin = of_error * length + of_half * error + chunk.shape[1] * 2.0**-22 * of_half * length_half
    margin += chunk.shape[1] * (2.0**-22 * of_query * length + 2.0**-100)
    limit = 1.004 * proposed[:, -1].float().clamp_min(0.0) + margin
    return best, columns.gather(1, order), limit < best[:, -1]


def search_faiss(
    queries: Tensor, piece: Tensor, metric: Metric, k: int, self_column: int | None, *, approximate: bool = False
) -> Found:
    """By faiss in float32: all scores, or those in a share of the cells of a coarse quantiser that it trains."""
    import faiss

    if not len(queries):
        return
    kind = faiss.METRIC_L2 if metric == "euclidean" else faiss.METRIC_INNER_PRODUCT
    wanted = min(k + (self_column is not None), len(piece))  # one more, where self may be among them
    rows, bank = queries.float().cpu().numpy(), piece.float().cpu().numpy()
    if approximate and len(piece) >= MIN_APPROXIMATE:
        found, columns = _by_cells(rows, bank, wanted, kind)
    else:
        found, columns = faiss.knn(rows, bank, wanted, metric=kind)
    best, column = torch.from_numpy(found).to(queries), torch.from_numpy(columns).to(queries.device)
    best = -best.clamp_min(0).sqrt() if metric == "euclidean" else best
    every = torch.arange(len(queries), device=queries.device)
    best = best.masked_fill(column < 0, -torch.inf)  # a cell had too few rows
    if self_column is not None:
        best = best.masked_fill(column == every[:, None] + self_column, -torch.inf)
    best, order = best.topk(min(k, wanted), dim=1)
    yield every, best, column.gather(1, order)


def _by_cells(rows: np.ndarray, bank: np.ndarray, k: int, kind: int) -> tuple[np.ndarray, np.ndarray]:
    """faiss's inverted file: 2 sqrt(rows) cells, of which every query looks into those nearest to it."""
    import faiss

    cells = int(2 * len(bank) ** 0.5)
    quantiser = (faiss.IndexFlatL2 if kind == faiss.METRIC_L2 else faiss.IndexFlatIP)(bank.shape[1])
    index: Any = faiss.IndexIVFFlat(quantiser, bank.shape[1], cells, kind)
    index.cp.max_points_per_centroid = 64
    index.train(bank)
    index.add(bank)
    index.nprobe = max(1, cells // CELLS_SEEN)
    return index.search(rows, k)
