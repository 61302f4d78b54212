"""What every transport solver needs: sums over ranks, full precision, refusal of values that are not finite."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")


def exact(solver: Callable[..., Result]) -> Callable[..., Result]:
    """No gradient, and no autocast: a solver called inside mixed precision must not multiply in bfloat16."""

    @wraps(solver)
    def run(scores: Any, *args: Any, **kwargs: Any) -> Result:
        device = scores.device.type if isinstance(scores, Tensor) else "cpu"
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return solver(scores, *args, **kwargs)

    return run


def all_sum(x: Tensor, group: Any) -> Tensor:
    """Sum over the ranks of the group, in place; without a group x itself."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


def all_max(x: Tensor, group: Any) -> Tensor:
    """Largest over the ranks of the group, in place; without a group x itself."""
    if group is not None:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x


def wide(x: Tensor) -> Tensor:
    """float64, or float32 on devices that have no float64."""
    return x.float() if x.device.type == "mps" else x.double()


def plain(x: Tensor) -> Tensor:
    """float64 as it is, everything else as float32."""
    return x if x.dtype == torch.float64 else x.float()


def refuse_not_finite(x: Tensor, name: str, group: Any) -> None:
    """Raises ValueError on all ranks together if any rank's (rows, ...) has NaN or infinite entries."""
    bad = (~x.isfinite().flatten(1).all(1)).nonzero().flatten()
    if all_max(torch.tensor(float(len(bad)), device=x.device), group) > 0:
        raise ValueError(f"{name}: NaN or infinite values; first bad rows of this rank: {bad[:5].tolist()}")
