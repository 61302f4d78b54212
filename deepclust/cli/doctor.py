"""What this machine has, for `deepclust doctor`."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Iterator

from deepclust.config.compose import conf_folder
from deepclust.errors import UserError

PACKAGES = (
    "deepclust",
    "torch",
    "torchvision",
    "timm",
    "hydra-core",
    "numpy",
    "scipy",
    "scikit-learn",
    "pot",
    "wandb",
)
Finding = tuple[str, str, bool]
"""(subject, what is there, whether that is good enough for a run)."""


def findings(gpu: bool = False) -> Iterator[Finding]:
    """What this machine has, a finding at a time, so that a slow one does not hold back the others.

    Imports torch.

    gpu: also checks and times k-means on the GPU.
    """
    yield "python", f"{platform.python_version()} on {platform.platform()}", True
    versions = [f"{name} {_version(name) or 'missing'}" for name in PACKAGES]
    yield "packages", ", ".join(versions), True
    try:
        yield "conf", str(conf_folder()), True
    except UserError as error:
        yield "conf", str(error), False
    try:
        yield from _torch()
    except ImportError as error:
        yield "torch", f"cannot be imported ({error}); install deepclust again", False
    yield _disk()
    if gpu:
        from deepclust.cli.doctor_gpu import gpu_findings

        yield from gpu_findings()


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _torch() -> Iterator[Finding]:
    """Devices, precision and threads as torch sees them."""
    import torch

    from deepclust.ops.precision import has_fast_bfloat16

    if torch.cuda.is_available():
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        names = [torch.cuda.get_device_name(device) for device in devices]
        emulated = [name for name, device in zip(names, devices) if not has_fast_bfloat16(device)]
        precision = f"not native on {', '.join(emulated)}: float16 with scaled losses is used there"
    else:
        names = [f"CPU, {_cores()} cores"]
        if torch.backends.mps.is_available():
            names.append("Apple's GPU is not used, for it has no float64")
        emulated = [] if has_fast_bfloat16(torch.device("cpu")) else names
        precision = "not native: float32 is used"
    yield "device", ", ".join(names), True
    yield "bfloat16", precision if emulated else "native", True
    yield "threads", str(torch.get_num_threads()), True
    distributed = torch.distributed.is_available()
    gloo = distributed and torch.distributed.is_gloo_available()
    yield "torchrun", "gloo is there" if gloo else "no gloo: single process on a CPU", True


def _cores() -> int | None:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    # Not on macOS and Windows.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _disk() -> Finding:
    """Whether a run could write where its folder would be."""
    folder = os.path.abspath("outputs")
    # Before the first run there is no outputs/ yet, and doctor leaves nothing behind.
    if not os.path.isdir(folder):
        folder = os.path.abspath(".")
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            # A full disk takes a name and refuses bytes, some file systems not before fsync.
            file.write(b"0" * 2**20)
            file.flush()
            os.fsync(file.fileno())
        return "disk", f"{folder} can be written{_room(folder)}", True
    except OSError as error:
        return "disk", f"{folder} cannot be written ({error.strerror}); use run.dir=PATH", False


def _room(folder: str) -> str:
    """The free space of a folder's disk in words, where the system tells it."""
    # Not on Windows.
    if not hasattr(os, "statvfs"):
        return ""
    disk = os.statvfs(folder)
    # f_bavail and not f_bfree: without the blocks that are kept for root.
    return f", {disk.f_bavail * disk.f_frsize / 2**30:.1f} GiB free"
