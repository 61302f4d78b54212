"""Which precision the mathematics is done in: float32 at least, whatever the surroundings."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def exact(function: Function) -> Function:
    """No gradient, and no autocast: what is called inside mixed precision must not multiply in bfloat16."""

    @wraps(function)
    def run(first: Any, *args: Any, **kwargs: Any) -> Any:
        device = first.device.type if isinstance(first, Tensor) else "cpu"
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return function(first, *args, **kwargs)

    return run  # pyright: ignore[reportReturnType]


def plain(x: Tensor) -> Tensor:
    """float64 as it is, everything else as float32."""
    return x if x.dtype == torch.float64 else x.float()


def wide(x: Tensor) -> Tensor:
    """float64, or float32 on devices that have no float64."""
    return x.float() if x.device.type == "mps" else x.double()
