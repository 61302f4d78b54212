"""Processes and devices: one code path for `python train.py` and `torchrun`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepclust.ops.collectives import all_max, all_sum
from deepclust.runtime.devices import choose_device, refuse_shared_gpu

BUCKET_BYTES = 25 * 2**20


@dataclass(frozen=True)
class World:
    """This process among all: rank, number of ranks, its device, and the group (None for a single
    process).
    """

    rank: int
    size: int
    device: torch.device
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and decides."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """True on all ranks if it is true on one."""
        if self.group is None:
            return flag
        return bool(all_max(torch.tensor(int(flag), device=self.device), self.group))

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over ranks, in float64."""
        return all_sum(values.to(torch.float64, copy=True), self.group)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable object on all ranks."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """One picklable object of each rank, on all ranks."""
        if self.group is None:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value, group=self.group)
        return box

    def block(self, num_samples: int) -> range:
        """The contiguous block of samples that this rank holds of a bank."""
        return range(
            self.rank * num_samples // self.size, (self.rank + 1) * num_samples // self.size
        )


def start(device_name: str = "auto", timeout_seconds: float = 1800.0) -> World:
    """Joins the process group that torchrun announced, or stands alone.

    Raises UserError for a device that is not there, and where ranks would share a GPU.
    """
    device = choose_device(device_name)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return World(0, 1, device)
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_seconds)
        if device.type == "cuda":
            _join_gpus(device, timeout)
        else:
            dist.init_process_group("gloo", timeout=timeout)
    return World(dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD)


def _join_gpus(device: torch.device, timeout: timedelta) -> None:
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    refuse_shared_gpu(PrefixStore("gpus", store), rank, size, device)
    options = {
        "store": PrefixStore("ranks", store),
        "rank": rank,
        "world_size": size,
        "timeout": timeout,
    }
    # told its device, NCCL connects at once, and a barrier need not guess
    dist.init_process_group("nccl", device_id=device, **options)


def stop() -> None:
    """Leaves the process group."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def sum_gradients(parameters: Iterable[nn.Parameter], group: Any) -> None:
    """Sums gradients over ranks in flat buckets, in place; a parameter without gradient on this
    rank counts as zero.

    The trainer weights each rank's loss by its share of the macro batch, so the sum is the gradient
    of one big batch also where ranks hold unequal numbers of rows (a mean over ranks, as in
    DistributedDataParallel, would be off).
    """
    if group is None:
        return
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        size += parameter.grad.numel() * parameter.grad.element_size()
        if size >= BUCKET_BYTES:
            _sum_bucket(bucket, group)
            bucket, size = [], 0
    if bucket:
        _sum_bucket(bucket, group)


def _sum_bucket(grads: list[Tensor], group: Any) -> None:
    flat = all_sum(torch.cat([grad.reshape(-1) for grad in grads]), group)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
        grad.copy_(part.view_as(grad))
