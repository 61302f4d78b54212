"""Mixed precision chosen by what the device does natively."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from deepclust.ops.precision import has_fast_bfloat16


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, None for plain float32.

    `auto` takes what is fast on the device: bfloat16, else float16 on a GPU (its losses are then scaled) and float32
    on a processor.
    """
    if precision == "auto":
        if has_fast_bfloat16(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else None
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to dtype, or nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
