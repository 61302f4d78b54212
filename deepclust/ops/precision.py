"""The precision in which the mathematics is done: float32 at least, whatever the surroundings."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar

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


def plain(x: Tensor) -> Tensor:
    """x in float64 if it is that, else in float32."""
    return x if x.dtype == torch.float64 else x.float()


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
    """NVIDIA from compute capability 8.0 (A100, RTX 30) on; AMD as listed, where capabilities mean something else.

    torch.cuda.is_bf16_supported() is no answer: it is true for T4, V100 and RTX 20 and for all of AMD's, which may
    emulate.
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
