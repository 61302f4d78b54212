"""Exact nearest neighbours in chunks, on one rank or on rows spread over many."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from deepclust.ops.collectives import gather_rows
from deepclust.ops.precision import exact, plain

Metric = Literal["cosine", "dot", "euclidean"]
Found = Iterator[tuple[slice, Tensor, Tensor]]
Search = Callable[[Tensor, Tensor, Metric, int, "int | None"], Found]

PIECE_ROWS = 65_536  # rows of the bank that are looked at (and broadcast) at a time
SCORES_CPU = 4_194_304  # scores in memory at a time: 16 MB of float32 stay in a CPU's last-level cache
SCORES_GPU = 67_108_864  # 256 MB: enough rows to fill a GPU
BLOCK = 16  # columns per block maximum


@exact
def knn(
    queries: Tensor,
    bank: Tensor,
    *,
    k: int,
    metric: Metric = "cosine",
    exclude_self: bool = False,
    group: Any = None,
    backend: Literal["own", "faiss"] = "own",
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of the bank for every query, exact up to rounding; ties fall either way.

    queries: (Q, D), bank: (N, D), any floating dtype (float16 and bfloat16 are computed in float32). With a process
    `group` both are this rank's rows; empty shards are fine. exclude_self: row i of `queries` is row i of `bank`, and
    is no neighbour of itself. Extra memory does not grow with Q x N. backend "faiss" lets that library search.

    Returns values (Q, k), similarities in descending order for cosine and dot, distances in ascending order for
    euclidean, and indices (Q, k) int64 into the bank of all ranks laid end to end.

    Raises ValueError if shapes do not fit, k is not in 1..N (1..N-1 without self), a row is not finite, or faiss is
    asked for and not installed.
    """
    search = _searches(backend)
    queries, bank = _prepare(queries, metric), _prepare(bank, metric)
    sizes = _check(queries, bank, k, metric, exclude_self, group)
    if metric == "euclidean":
        # a common shift leaves distances as they are and takes the cancellation out of |q|^2 - 2qc + |c|^2
        shift = _mean(bank, sum(sizes), group)
        queries, bank = queries - shift, bank - shift
    offset = sum(sizes[: _rank(group)])
    values = queries.new_full((len(queries), k), -torch.inf)
    indices = torch.full((len(queries), k), -1, dtype=torch.int64, device=queries.device)
    for start, piece in _pieces(bank, sizes, group):
        self_column = offset - start if exclude_self else None
        for rows, best, column in search(queries, piece, metric, min(k, len(piece)), self_column):
            values[rows], order = torch.cat([values[rows], best], 1).topk(k, dim=1)
            indices[rows] = torch.cat([indices[rows], column + start], 1).gather(1, order)
    return (-values if metric == "euclidean" else values), indices


def _prepare(x: Tensor, metric: Metric) -> Tensor:
    x = plain(torch.as_tensor(x))
    if metric != "cosine" or not x.numel():
        return x
    # the largest entry goes first, so that no norm overflows or underflows; a zero row has similarity 0 to everything
    return F.normalize(x / x.abs().amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny), dim=1)


def _rank(group: Any) -> int:
    return 0 if group is None else dist.get_rank(group)


def _check(queries: Tensor, bank: Tensor, k: int, metric: str, exclude_self: bool, group: Any) -> list[int]:
    """Rows of the bank on every rank. All ranks raise together, so that none waits for another."""
    if metric not in ("cosine", "dot", "euclidean"):
        raise ValueError(f"metric {metric!r} is unknown; valid are 'cosine', 'dot' and 'euclidean'")
    fits = queries.ndim == 2 and bank.ndim == 2 and queries.shape[1] == bank.shape[1]
    fits = fits and (not exclude_self or len(queries) == len(bank))
    bad = fits and not (bool(queries.isfinite().all()) and bool(bank.isfinite().all()))
    facts = torch.tensor([len(bank), int(not fits), int(bad)], device=bank.device)
    table = facts[None]
    if group is not None:
        table = facts.new_empty(dist.get_world_size(group), 3)
        dist.all_gather(list(table.unbind(0)), facts, group=group)
    sizes = table[:, 0].tolist()
    if table[:, 1].any():
        raise ValueError(
            f"queries {tuple(queries.shape)} and bank {tuple(bank.shape)} do not fit (this rank's shapes): both are "
            "(rows, dim) with the same dim, and exclude_self needs queries that are the bank's rows"
        )
    if table[:, 2].any():
        rows = {name: (~x.isfinite().all(1)).nonzero().flatten()[:5].tolist() for name, x in _named(queries, bank)}
        raise ValueError(f"NaN or infinite values; first bad rows of this rank: {rows}")
    if not 1 <= k <= sum(sizes) - exclude_self:
        without = " without self" if exclude_self else ""
        raise ValueError(f"k={k} neighbours, but the bank offers 1 to {sum(sizes) - exclude_self}{without}")
    return sizes


def _named(queries: Tensor, bank: Tensor) -> tuple[tuple[str, Tensor], ...]:
    return ("queries", queries), ("bank", bank)


def _mean(bank: Tensor, total: int, group: Any) -> Tensor:
    mean = bank.double().sum(0) / total
    if group is not None:
        dist.all_reduce(mean, group=group)
    return mean.to(bank.dtype)


def _pieces(bank: Tensor, sizes: list[int], group: Any) -> Iterator[tuple[int, Tensor]]:
    """(global first row, rows) of the whole bank, each rank's rows broadcast in turn."""
    start = 0
    for rank, size in enumerate(sizes):
        for local in range(0, size, PIECE_ROWS):
            rows = min(PIECE_ROWS, size - local)
            mine = rank == _rank(group)
            piece = bank[local : local + rows].contiguous() if mine else bank.new_empty(rows, bank.shape[1])
            if group is not None:
                dist.broadcast(piece, dist.get_global_rank(group, rank), group=group)
            yield start + local, piece
        start += size


def _searches(backend: str) -> Search:
    if backend == "own":
        return _search
    if backend != "faiss":
        raise ValueError(f"backend {backend!r} is unknown; valid are 'own' and 'faiss'")
    if importlib.util.find_spec("faiss") is None:
        raise ValueError("backend 'faiss' is not installed: `pip install faiss-cpu`, or use the default backend")
    return _search_faiss


def _search(queries: Tensor, piece: Tensor, metric: Metric, k: int, self_column: int | None) -> Found:
    """The k best of one piece, by chunks of the queries: (rows, values, columns of the piece). Larger is better."""
    budget = SCORES_CPU if queries.device.type == "cpu" else SCORES_GPU
    step = max(16, budget // len(piece))
    bias = -0.5 * piece.square().sum(1) if metric == "euclidean" else None
    for first in range(0, len(queries), step):
        chunk = queries[first : first + step]
        scores = _product(chunk, piece, bias)
        if self_column is not None:
            _mask_self(scores, first + self_column)
        best, column = _top(scores, k)
        if metric == "euclidean":
            distance = -torch.linalg.vector_norm(chunk[:, None] - piece[column], dim=2)
            best = torch.where(best == -torch.inf, best, distance)
        yield slice(first, first + len(chunk)), best, column


def _product(chunk: Tensor, piece: Tensor, bias: Tensor | None) -> Tensor:
    """chunk @ piece.T + bias. oneDNN's product is fast on CPUs of every make, MKL's is not; its operator is private."""
    if chunk.device.type == "cpu" and chunk.dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return torch.ops.mkldnn._linear_pointwise(chunk, piece, bias, "none", [], "")
    return F.linear(chunk, piece, bias)


def _search_faiss(queries: Tensor, piece: Tensor, metric: Metric, k: int, self_column: int | None) -> Found:
    """As `_search`, by faiss's exact search in float32. One more is asked for where self may be among them."""
    import faiss

    if not len(queries):
        return
    kind = faiss.METRIC_L2 if metric == "euclidean" else faiss.METRIC_INNER_PRODUCT
    wanted = min(k + (self_column is not None), len(piece))
    found, columns = faiss.knn(queries.float().cpu().numpy(), piece.float().cpu().numpy(), wanted, metric=kind)
    best = torch.from_numpy(found).to(queries)
    best = -best.clamp_min(0).sqrt() if metric == "euclidean" else best
    column = torch.from_numpy(columns).to(queries.device)
    if self_column is not None:
        own = torch.arange(len(queries), device=queries.device)[:, None] + self_column
        best = best.masked_fill(column == own, -torch.inf)
    best, order = best.topk(k, dim=1)
    yield slice(0, len(queries)), best, column.gather(1, order)


def _mask_self(scores: Tensor, shift: int) -> None:
    """Row i's own column is i + shift; outside the piece there is nothing to mask."""
    low, high = max(0, -shift), min(len(scores), scores.shape[1] - shift)
    if low < high:
        rows = torch.arange(low, high, device=scores.device)
        scores[rows, rows + shift] = -torch.inf


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top k per row. The k best lie in the k blocks with the best maxima, so only those are sorted: exact.

    Block j holds the columns j, j + blocks, j + 2 blocks, ...: the maximum then runs over whole vectors.
    """
    blocks = scores.shape[1] // BLOCK
    if blocks < 4 * k:
        return scores.topk(k, dim=1)
    body = scores[:, : blocks * BLOCK]
    chosen = body.unflatten(1, (BLOCK, blocks)).amax(1).topk(k, dim=1).indices
    columns = (chosen[:, None, :] + blocks * torch.arange(BLOCK, device=scores.device)[:, None]).flatten(1)
    tail = torch.arange(blocks * BLOCK, scores.shape[1], device=scores.device).expand(len(scores), -1)
    columns = torch.cat([columns, tail], 1)
    best, order = scores.gather(1, columns).topk(k, dim=1)
    return best, columns.gather(1, order)


def neighbor_table(features: Tensor, index: Tensor, num_samples: int, *, k: int, group: Any = None) -> Tensor:
    """Each sample's k nearest neighbours by cosine as sample indices, itself first.

    features: (n, D) and index: (n,) int64 are this rank's rows and their sample indices; n may be less than its share
    where images could not be read. Returns (num_samples, k + 1) int64, equal on all ranks; k is cut to the other rows
    there are. A sample that is in no rank's rows is its own neighbour.
    """
    everyone, _ = gather_rows(index, group)
    k = min(k, len(everyone) - 1)
    _, rows = knn(features, features, k=k, exclude_self=True, group=group)
    found, _ = gather_rows(torch.cat([index[:, None], everyone[rows]], dim=1), group)
    table = torch.arange(num_samples, device=found.device)[:, None].repeat(1, k + 1)
    table[everyone] = found
    return table
