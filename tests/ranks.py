"""Runs a function on several gloo processes, for tests of what ranks do together."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """`function(rank, size, *args)` on `size` processes with a default process group; their results in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_work, (size, folder, function, args), nprocs=size, start_method="spawn")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _work(rank: int, size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    torch.save(function(rank, size, *args), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
