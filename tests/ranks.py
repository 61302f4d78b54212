"""Runs a function on several gloo processes, for tests of what ranks do together, under NCCL's rule
of layouts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._pytree import tree_leaves

TENSOR_COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
)


def run_ranks(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """`function(rank, size, *args)` on `size` processes with a default process group; their results
    in rank order.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_work, (size, folder, function, args), nprocs=size, start_method="spawn")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _work(
    rank: int, size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    for name in TENSOR_COLLECTIVES:
        setattr(dist, name, contiguous_only(getattr(dist, name)))
    torch.save(function(rank, size, *args), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def contiguous_only(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective that refuses what NCCL refuses and gloo takes: tensors that are sparse or not
    contiguous.
    """

    @wraps(collective)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and (
                leaf.layout != torch.strided or not leaf.is_contiguous()
            ):
                raise ValueError(
                    f"{collective.__name__}: Tensors must be contiguous, not {leaf.shape}, {leaf.stride()}"
                )
        return collective(*args, **kwargs)

    return checked
