"""torch.compile for a backbone, in place: its parameters keep their names, so that checkpoints fit
with and without.
"""

from __future__ import annotations

import torch
from torch import nn

BACKEND = "inductor"


def compile_in_place(module: nn.Module, device: torch.device) -> str | None:
    """Compiles what `module(x)` calls. Returns None, or why it was left as it is: no compiler works
    on this device.

    A small function is compiled and run first, since torch.compile itself finds a missing compiler
    at the first batch.
    """
    try:
        probe = torch.compile(_probe, backend=BACKEND)
        probe(torch.ones(8, device=device))
    except Exception as error:  # a missing compiler, header or driver each raise their own kind
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [
            type(error).__name__
        ]
        return (
            f"torch.compile does not work here ({' '.join(lines[:2])}); training goes on without it"
        )
    module.compile(backend=BACKEND)
    return None


def _probe(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) * 2 + 1
