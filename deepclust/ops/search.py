"""Searches of one piece of a bank for each query's best rows; `neighbors` puts the pieces together.

Each search yields (rows (n,), values (n, k), columns (n, k)) for every query once, by chunks.
Larger values are better; euclidean distances come negated.
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
"""(queries (Q, D), piece (P, D), metric, k, self_column or None) → what is found.

Query i is no neighbour of itself, which is column i + self_column."""

# Bytes of scores at a time: what malloc gives again without asking the system for pages.
SCORES_CPU = 30_000_000
# The same on a GPU: enough rows to fill it.
SCORES_GPU = 268_435_456
# Columns per block maximum, when the best of a row are chosen.
BLOCK = 16
# Width of rows below which a product is too short for bfloat16 to repay looking twice.
FILTER_DIM = 48
# Rows and columns of a tile of all pairs.
TILE = 2048
# Width of rows from which all pairs are faster with each product made once.
PAIRS_DIM = 1024
# Rows below which an approximate search looks at all: that is as fast.
MIN_APPROXIMATE = 4096
# An approximate search looks into one in so many cells.
CELLS_SEEN = 16
# Share of queries that the filter may hand back before it counts as useless here.
MAX_LOST = 0.2


def search_exact(
    queries: Tensor,
    piece: Tensor,
    metric: Metric,
    k: int,
    self_column: int | None,
    which: Tensor | None = None,
) -> Found:
    """Search by all scores, in the precision of the queries.

    which: (n,) int64, the queries that are searched for; all if None.
    """
    step = _rows_at_a_time(piece)
    # The nearest c to q has the largest q·c − |c|²/2.
    bias = -0.5 * piece.square().sum(1) if metric == "euclidean" else None
    if which is None:
        which = torch.arange(len(queries), device=queries.device)
    for rows in which.split(step) if len(which) else ():
        chunk = queries[rows]
        scores = _product(chunk, piece, bias)
        if self_column is not None:
            _mask(scores, rows + self_column)
        best, column = _top(scores, k)
        if metric == "euclidean":
            # Measured anew from the differences: scores have lost the digits of small distances.
            distance = -torch.linalg.vector_norm(chunk[:, None] - piece[column], dim=2)
            best = torch.where(best == -torch.inf, best, distance)
        yield rows, best, column


def search_pairs(bank: Tensor, k: int, exclude_self: bool) -> Found:
    """Search of every row of the bank against all of them, each dot product made once.

    Unlike the other searches it yields the best of a part of the columns, and every row as often as
    there are parts.
    """
    blocks = torch.arange(len(bank), device=bank.device).split(TILE)
    for number, rows in enumerate(blocks):
        for others in blocks[number:]:
            scores = _product(bank[rows], bank[others])
            if exclude_self and rows is others:
                scores.fill_diagonal_(-torch.inf)
            best, column = _top(scores, min(k, len(others)))
            yield rows, best, others[column]
            # The same products serve the other way round.
            if rows is not others:
                best, column = _top(scores.T.contiguous(), min(k, len(rows)))
                yield others, best, rows[column]


def pairs_pay(bank: Tensor, metric: Metric) -> bool:
    """Whether `search_pairs` is faster on a bank (N, D)."""
    # It saves half of the product and none of the choosing: rows have to be long.
    return metric != "euclidean" and bank.shape[1] >= PAIRS_DIM and len(bank) > TILE


def _rows_at_a_time(piece: Tensor) -> int:
    budget = SCORES_CPU if piece.device.type == "cpu" else SCORES_GPU
    rows = budget // (piece.element_size() * len(piece))
    # Multiples of 16 suit the tiles of matrix products.
    return min(max(rows // 16 * 16, 16), 512)


def _product(chunk: Tensor, piece: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scores chunk @ piece.T + bias (n, P)."""
    # oneDNN's product is fast on processors of every make, MKL's is not; its operator is private.
    if chunk.device.type == "cpu" and chunk.dtype != torch.float64 and has_onednn():
        return torch.ops.mkldnn._linear_pointwise(chunk, piece, bias, "none", [], "")
    return F.linear(chunk, piece, bias)


def _mask(scores: Tensor, columns: Tensor) -> None:
    """Sets one column of each row (R,) to −∞; a column outside the piece is passed over."""
    inside = ((columns >= 0) & (columns < scores.shape[1])).nonzero().flatten()
    scores[inside, columns[inside]] = -torch.inf


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row and their columns, (R, k) each.

    Exact for float32 and float64. Of bfloat16 scores only those >= 0 are sure to be the largest.
    """
    # The k best lie in the k blocks with the best maxima, so only those are sorted. With few blocks
    # for each of the k, that saves nothing.
    blocks = scores.shape[1] // BLOCK
    if blocks < 4 * k:
        return scores.topk(k, dim=1)
    # Block j holds the columns j, j + blocks, j + 2 blocks, ...: the maximum then runs over whole
    # vectors.
    body = scores[:, : blocks * BLOCK].unflatten(1, (BLOCK, blocks))
    if scores.dtype == torch.bfloat16:
        # Compared as integers, several times faster: the maximum is right where a block has any
        # score >= 0, else it is some negative one.
        maxima = body.view(torch.int16).amax(1).view(torch.bfloat16)
    else:
        maxima = body.amax(1)
    chosen = _top(maxima, k)[1]
    offsets = blocks * torch.arange(BLOCK, device=scores.device)
    columns = (chosen[:, None, :] + offsets[:, None]).flatten(1)
    # Columns after the last whole block.
    tail = torch.arange(blocks * BLOCK, scores.shape[1], device=scores.device)
    columns = torch.cat([columns, tail.expand(len(scores), -1)], 1)
    best, order = scores.gather(1, columns).topk(k, dim=1)
    return best, columns.gather(1, order)


def search_fast(
    queries: Tensor,
    piece: Tensor,
    metric: Metric,
    k: int,
    self_column: int | None,
) -> Found:
    """Search for the same neighbours as `search_exact`, by two looks where bfloat16 is fast.

    A bfloat16 product proposes, float32 decides; queries for which the proposals do not prove
    enough go to `search_exact`.
    """
    # A dozen more than asked for, or half as many: the k-th best must stand clear of what is left
    # out.
    proposals = k + max(12, k // 2)
    if not _filter_pays(queries, piece, metric, proposals):
        yield from search_exact(queries, piece, metric, k, self_column)
        return
    half = piece.bfloat16()
    lengths = (_lengths(piece).amax(), _lengths(half).amax(), _lengths(piece - half).amax())
    largest = torch.stack(lengths)
    step = _rows_at_a_time(half)
    lost = queries.new_empty(0, dtype=torch.int64)
    first = 0
    # As if four chunks without a loss had gone before: an unlucky beginning does not end it.
    while first < len(queries) and len(lost) <= MAX_LOST * (first + 4 * step):
        rows = torch.arange(first, min(first + step, len(queries)))
        masked = None if self_column is None else rows + self_column
        best, column, sure = _propose(queries[rows], piece, half, largest, k, proposals, masked)
        lost = torch.cat([lost, rows[~sure]])
        first += step
        yield rows[sure], best[sure], column[sure]
    lost = torch.cat([lost, torch.arange(min(first, len(queries)), len(queries))])
    yield from search_exact(queries, piece, metric, k, self_column, lost)


def _filter_pays(queries: Tensor, piece: Tensor, metric: Metric, proposals: int) -> bool:
    """Whether a first look in bfloat16 is possible and saves time."""
    if metric == "euclidean" or queries.dtype != torch.float32 or queries.device.type != "cpu":
        return False
    if queries.shape[1] < FILTER_DIM:
        return False
    # With fewer blocks for each proposal, choosing them costs what the product saves.
    if len(piece) < 8 * BLOCK * proposals:
        return False
    return has_onednn() and cpu_has_fast_bfloat16()


def _lengths(x: Tensor) -> Tensor:
    """Norms (rows,), a little larger than rounding could make them."""
    return 1.001 * torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)


def _propose(
    chunk: Tensor,
    piece: Tensor,
    half: Tensor,
    largest: Tensor,
    k: int,
    proposals: int,
    masked: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Best k of the proposed columns by float32, and for which rows they are the best of all.

    Let q', c' be the rows rounded to bfloat16 and s' = round(fl(q'.c')) the proposed score. Then
    * |q.c - q'.c'| <= |q - q'| |c| + |q'| |c - c'| (Cauchy-Schwarz; the lengths are measured, not
      bounded),
    * products of two bfloat16 are exact in float32 and a sum of D of them, in any order, is off by
      at most D 2^-23 |q'| |c'|; the float32 scores that decide are off by half as much: together
      below D 2^-22,
    * numbers below 2^-126 may count as zero: less than 2^-100 a component,
    * rounding to bfloat16 keeps signs and changes a score v by at most 2^-8 |v|: v <= 1.004
      max(s', 0).
    The proposals are the largest s' wherever these are >= 0, so a column that is none of them has
    s' <= max(last, 0), where `last` is the least proposal, and q.c at most `limit`. Where the k-th
    best of the proposals is beyond that, nothing better was left out. Infinite and NaN scores fail
    the comparison.

    Args:
        chunk: (n, D) queries, float32.
        piece: (P, D) float32.
        half: the piece in bfloat16.
        largest: (3,) the largest |c|, |c'| and |c - c'|.
        k: neighbours.
        proposals: columns that are proposed for each query.
        masked: (n,) the column that is no neighbour of each query, or None.
    """
    rounded = chunk.bfloat16()
    scores = _product(rounded, half)
    if masked is not None:
        _mask(scores, masked)
    proposed, columns = _top(scores, proposals)
    exact = torch.bmm(piece[columns], chunk[:, :, None]).squeeze(2)
    # A masked column is proposed only where there is nothing else.
    exact.masked_fill_(proposed == -torch.inf, -torch.inf)
    best, order = exact.topk(k, dim=1)
    dim = chunk.shape[1]
    length, length_half, error = largest
    of_query = _lengths(chunk)
    of_half = _lengths(rounded)
    of_error = _lengths(chunk - rounded)
    margin = of_error * length + of_half * error + dim * 2.0**-22 * of_half * length_half
    margin += dim * (2.0**-22 * of_query * length + 2.0**-100)
    limit = 1.004 * proposed[:, -1].float().clamp_min(0.0) + margin
    return best, columns.gather(1, order), limit < best[:, -1]


def search_faiss(
    queries: Tensor,
    piece: Tensor,
    metric: Metric,
    k: int,
    self_column: int | None,
    *,
    approximate: bool = False,
) -> Found:
    """Search by faiss in float32.

    approximate: whether it looks only into some cells of a coarse quantiser, which it trains.
    """
    import faiss

    if not len(queries):
        return
    kind = faiss.METRIC_L2 if metric == "euclidean" else faiss.METRIC_INNER_PRODUCT
    # One more, where the query itself may be among them.
    wanted = min(k + (self_column is not None), len(piece))
    rows = queries.float().cpu().numpy()
    bank = piece.float().cpu().numpy()
    if approximate and len(piece) >= MIN_APPROXIMATE:
        values, indices = _by_cells(rows, bank, wanted, kind)
    else:
        values, indices = faiss.knn(rows, bank, wanted, metric=kind)
    best = torch.from_numpy(values).to(queries)
    column = torch.from_numpy(indices).to(queries.device)
    if metric == "euclidean":
        # faiss gives squared distances, which rounding may make negative.
        best = -best.clamp_min(0).sqrt()
    every = torch.arange(len(queries), device=queries.device)
    # faiss's index is -1 where the cells that were looked into had too few rows.
    best = best.masked_fill(column < 0, -torch.inf)
    if self_column is not None:
        best = best.masked_fill(column == every[:, None] + self_column, -torch.inf)
    best, order = best.topk(min(k, wanted), dim=1)
    yield every, best, column.gather(1, order)


def _by_cells(
    rows: np.ndarray,
    bank: np.ndarray,
    k: int,
    kind: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Values and indices (Q, k) by faiss's inverted file.

    It has 2 sqrt(N) cells, of which every query looks into those nearest to it.
    """
    import faiss

    cells = int(2 * len(bank) ** 0.5)
    flat = faiss.IndexFlatL2 if kind == faiss.METRIC_L2 else faiss.IndexFlatIP
    index: Any = faiss.IndexIVFFlat(flat(bank.shape[1]), bank.shape[1], cells, kind)
    # A quarter of faiss's default, which trains four times as fast.
    index.cp.max_points_per_centroid = 64
    index.train(bank)
    index.add(bank)
    index.nprobe = max(1, cells // CELLS_SEEN)
    return index.search(rows, k)
