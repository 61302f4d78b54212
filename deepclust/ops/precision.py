"""Which precision the mathematics is done in: float32 at least, whatever the surroundings."""

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


def has_onednn() -> bool:
    """Whether torch offers oneDNN's product with a bias: a private operator, which any torch may lack."""
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
    """Whether bfloat16 is faster than float32 on this processor: Intel's AMX, AMD's AVX512-BF16, Arm's bf16.

    Intel's AVX512-BF16 without AMX has the instructions but was measured no faster than float32.
    """
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return "amx_bf16" in words or "bf16" in words or {"avx512_bf16", "AuthenticAMD"} <= words
