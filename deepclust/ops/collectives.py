"""Sums and concatenations over the ranks of a process group, with exact gradients.

Convention of the house: each rank's loss is weighted by its share of the rows before `backward`,
and gradients are summed over ranks. The adjoint of a sum is then a sum, and two ranks give the
gradient of one.

All tensors that go from rank to rank go through here: NCCL takes contiguous ones alone (gloo takes
any), and results of `eigh`, transposes and channels-last gradients are none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size(group: Any = None) -> int:
    """Number of ranks; 1 where no process group is given."""
    return 1 if group is None else dist.get_world_size(group)


def all_sum(x: Tensor, group: Any = None) -> Tensor:
    """x itself, now the elementwise sum over ranks; x may have any layout, and keeps it. Not
    differentiable.
    """
    return _reduced(x, dist.ReduceOp.SUM, group)


def all_max(x: Tensor, group: Any = None) -> Tensor:
    """x itself, now the elementwise maximum over ranks; x may have any layout, and keeps it."""
    return _reduced(x, dist.ReduceOp.MAX, group)


def _reduced(x: Tensor, operation: Any, group: Any) -> Tensor:
    if group is not None:
        sent = x.contiguous()
        dist.all_reduce(sent, op=operation, group=group)
        if sent is not x:
            x.copy_(sent)
    return x


def broadcast(x: Tensor, source: int, group: Any = None) -> Tensor:
    """x itself, now the values of x on rank `source` of the group; x may have any layout, and keeps
    it.
    """
    if group is not None:
        sent = x.contiguous()
        dist.broadcast(sent, src=dist.get_global_rank(group, source), group=group)
        if sent is not x:
            x.copy_(sent)
    return x


def gather_equal(x: Tensor, group: Any = None) -> list[Tensor]:
    """x of every rank, in rank order; its shape is the same on all of them. Not differentiable."""
    if group is None:
        return [x]
    parts = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size(group))
    ]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts


def row_counts(num_rows: int, group: Any = None, device: torch.device | str = "cpu") -> list[int]:
    """How many rows each rank holds, in rank order."""
    if group is None:
        return [num_rows]
    counts = gather_equal(torch.tensor([num_rows], dtype=torch.int64, device=device), group)
    return torch.cat(counts).tolist()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], group: Any) -> Tensor:
        rank, longest = dist.get_rank(group), max(counts)
        ctx.group, ctx.start, ctx.rows = group, sum(counts[:rank]), counts[rank]
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        parts = gather_equal(padded, group)
        return torch.cat([part[:count] for part, count in zip(parts, counts)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = all_sum(grads[0].clone(), ctx.group)
        return grad[ctx.start : ctx.start + ctx.rows], None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return all_sum(x.clone(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_sum(grads[0].clone(), ctx.group), None


def gather_rows(x: Tensor, group: Any = None) -> tuple[Tensor, int]:
    """Rows of all ranks in rank order, and the position of this rank's first row in them.

    x: (n, ...), n may differ by rank and be 0. Returns ((sum of n, ...), offset). Differentiable.
    """
    if group is None:
        return x, 0
    counts = row_counts(len(x), group, x.device)
    gathered = _Gather.apply(x, counts, group)
    assert isinstance(gathered, Tensor)
    return gathered, sum(counts[: dist.get_rank(group)])


def sum_over(x: Tensor, group: Any = None) -> Tensor:
    """Elementwise sum of a tensor of equal shape over all ranks. Differentiable."""
    if group is None:
        return x
    total = _Sum.apply(x, group)
    assert isinstance(total, Tensor)
    return total


def mean_rows(x: Tensor, group: Any = None) -> Tensor:
    """Mean over the rows of all ranks of x (n, ...), n may differ by rank. Differentiable."""
    if group is None:
        return x.mean(0)
    count = torch.tensor(float(len(x)), device=x.device, dtype=x.dtype)
    return sum_over(x.sum(0), group) / sum_over(count, group)
