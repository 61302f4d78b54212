"""The precision in which the mathematics is done: float32 at least, whatever the surroundings."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

AMD_WITH_BFLOAT16 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
"""Architectures with bfloat16 matrix products: MI100, MI200, MI300, MI350, RX 7000 and RX 9000."""
Function = TypeVar("Function", bound=Callable[..., Any])


def exact(function: Function) -> Function:
    """Decorator that runs a function without gradients and without autocast.

    Called inside mixed precision, the function would else multiply in bfloat16. Its first argument
    tells the device.
    """

    @wraps(function)
    def run(first: Any, *args: Any, **kwargs: Any) -> Any:
        device = first.device.type if isinstance(first, Tensor) else "cpu"
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return function(first, *args, **kwargs)

    return run  # pyright: ignore[reportReturnType]


WHOLE = 2**24
"""Up to here float32 tells all whole numbers apart; float64 does up to 2^53."""
TOLD = 0.01
"""What rounding may do to rows, as a share of how far they lie apart, before they count as not told
apart.
"""


def plain(x: Tensor) -> Tensor:
    """float64 for float64 and for whole numbers beyond 2^24, such as times and ids; everything else
    as float32.
    """
    return x.to(computed_in(x))


def computed_in(x: Tensor | np.ndarray) -> torch.dtype:
    """The dtype that real numbers are computed in, see `plain`; float32 on devices that have no
    float64.
    """
    if isinstance(x, Tensor):
        double = x.dtype == torch.float64
        if x.device.type == "mps":
            return torch.float32
    else:
        double = x.dtype.kind == "f" and x.dtype.itemsize >= 8
    return torch.float64 if double or largest_whole(x) > WHOLE else torch.float32


def largest_whole(x: Tensor | np.ndarray) -> int:
    """The largest absolute value of whole numbers of four bytes or more; 0 of all others, which
    float32 holds.
    """
    if isinstance(x, Tensor):
        if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype.itemsize < 4 or not x.numel():
            return 0
        if x.dtype in (torch.int32, torch.int64):
            return max(int(x.max()), -int(x.min()))
        x = x.cpu().numpy()  # torch does little with unsigned numbers
    if x.dtype.kind not in "iu" or x.dtype.itemsize < 4 or not x.size:
        return 0
    return max(int(x.max()), -int(x.min()))


def as_rows(values: np.ndarray) -> np.ndarray:
    """Rows (N, D) as float32; as float64 where float32 could not tell them apart: times, counts,
    far from zero.
    """
    return values.astype(np.float64 if lost_by_float32(values) > TOLD else np.float32)


def lost_by_float32(values: np.ndarray) -> float:
    """What rounding rows (N, D) to float32 does to them, as a share of how far they lie from their
    mean, both in all.

    0 where there is nothing to tell: rows that are all alike or not finite, dtypes that float32
    holds. Infinite where float32 overflows.
    """
    if computed_in(values) == torch.float32 or values.ndim != 2 or not len(values):
        return 0.0
    mean = values.mean(0, dtype=np.float64)
    lost = spread = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(values), 65_536):
            part = values[start : start + 65_536].astype(np.float64)
            lost += float(np.square(part - part.astype(np.float32)).sum())
            spread += float(np.square(part - mean).sum())
    if spread == 0 or np.isnan(lost):
        return 0.0
    return (lost / spread) ** 0.5 if np.isfinite(lost) else np.inf


def wide(x: Tensor) -> Tensor:
    """x in float64, or in float32 on Apple's GPUs, which have no float64."""
    return x.float() if x.device.type == "mps" else x.double()


def has_onednn() -> bool:
    """Whether torch offers oneDNN's matrix product with a bias."""
    # A private operator, which the next torch may lack.
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in its matrix units, not in an emulation of them."""
    if device.type == "cuda":
        return cuda_has_fast_bfloat16(device)
    return device.type == "cpu" and cpu_has_fast_bfloat16()


def cuda_has_fast_bfloat16(device: torch.device) -> bool:
    """NVIDIA from compute capability 8.0 (A100, RTX 30) on; AMD as listed, where capabilities mean
    something else.

    torch.cuda.is_bf16_supported() is no answer: it is true for T4, V100 and RTX 20 and for all of
    AMD's, which may emulate.
    """
    if torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cuda.get_device_properties(device).gcnArchName.startswith(AMD_WITH_BFLOAT16)


@lru_cache
def cpu_has_fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32.

    Intel's AMX, AMD's AVX512-BF16 and Arm's bf16 do.
    """
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    # Intel's AVX512-BF16 without AMX has the instructions but was measured no faster than float32.
    amd = {"avx512_bf16", "AuthenticAMD"} <= words
    return "amx_bf16" in words or "bf16" in words or amd


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, None for plain float32.

    `auto` takes what is fast on the device: bfloat16, else float16 on a GPU (its losses are then
    scaled) and float32 on a processor.
    """
    if precision == "auto":
        if has_fast_bfloat16(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else None
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to dtype, or nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
