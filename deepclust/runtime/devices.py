"""Which device a process computes on, and that no two ranks compute on one GPU."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch

from deepclust.errors import UserError


def choose_device(name: str, key: str = "trainer.device=") -> torch.device:
    """The device that is meant. `auto` is this process's GPU if there is one, else the CPU, also on
    Macs.

    Under torchrun `auto` and `cuda` are the GPU of this rank: number LOCAL_RANK of those that it
    sees, counted round, for a launcher may show each rank its own GPU alone. key: what the user
    gave the name to, for messages. Raises UserError for a device that is not there or cannot do
    what is needed.
    """
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        device = torch.device("cuda" if name == "auto" else name)
    except RuntimeError as error:
        raise UserError(
            f"{key}{name} is no device ({_first_line(error)}); use auto, cuda or cpu"
        ) from None
    if device.type == "mps":
        raise UserError(
            f"{key}{name} is not supported: sums and the buffers of several heads are float64,"
            " which Apple's MPS does not have; use cpu, which auto is on a Mac"
        )
    if device.type == "cuda" and device.index is not None and _ranks_of_this_node() > 1:
        raise UserError(
            f"{key}{name} would put all {_ranks_of_this_node()} ranks of this machine on one GPU;"
            f" use {key}cuda, which gives each rank the GPU of its LOCAL_RANK"
        )
    try:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", _own_index())
        _use(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"{key}{name} is not available here ({_first_line(error)}); use auto or cpu"
        ) from None
    return device


def _own_index() -> int:
    """Of this process's GPU among those that it sees."""
    if _num_ranks() == 1:
        return torch.cuda.current_device()
    return int(os.environ.get("LOCAL_RANK", 0)) % max(1, torch.cuda.device_count())


def _num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _ranks_of_this_node() -> int:
    """As torchrun says; where another launcher does not, perhaps all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", _num_ranks()))


def _use(device: torch.device) -> None:
    """Raises what torch raises where the device is not there."""
    torch.empty(1, device=device)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def refuse_shared_gpu(store: Any, rank: int, size: int, device: torch.device) -> None:
    """Raises UserError, on all ranks together, if two of them are on one GPU.

    store: a torch.distributed.Store that all ranks know. It is asked before NCCL, which would fail
    in words of its own.
    """
    store.set(f"gpu of rank {rank}", address_of(device))
    addresses = [
        found.decode()
        for found in store.multi_get([f"gpu of rank {other}" for other in range(size)])
    ]
    store.set(f"rank {rank} has read", "yes")
    if rank == 0:
        # Rank 0 holds the store: were it to raise and end at once, the others could not read on.
        store.wait([f"rank {other} has read" for other in range(size)])
    ranks: dict[str, list[int]] = {}
    for other, address in enumerate(addresses):
        ranks.setdefault(address, []).append(other)
    for address, together in ranks.items():
        if address and len(together) > 1:
            raise UserError(
                f"ranks {', '.join(map(str, together))} are on one GPU ({address}): each needs its"
                " own. Start as many processes per machine as it has GPUs (torchrun"
                " --nproc-per-node, with LOCAL_RANK set), or use trainer.device=cpu"
            )


def address_of(device: torch.device) -> str:
    """What tells a GPU from all others on all machines; empty where torch does not say."""
    facts = torch.cuda.get_device_properties(device)
    if torch.version.cuda is not None and hasattr(facts, "uuid"):
        return f"UUID {facts.uuid}"
    # AMD's UUIDs are not always there, older torch gives no UUIDs at all
    if hasattr(facts, "pci_bus_id"):
        place = f"{facts.pci_domain_id:04x}:{facts.pci_bus_id:02x}:{facts.pci_device_id:02x}"
        return f"PCI {place} of {socket.gethostname()}"
    return ""
