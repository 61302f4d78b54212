"""What this machine has, for `deepclust doctor`."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Iterator

from deepclust.compose import conf_folder
from deepclust.errors import UserError

PACKAGES = ("deepclust", "torch", "torchvision", "timm", "hydra-core", "numpy", "scipy", "scikit-learn", "pot", "wandb")
Finding = tuple[str, str, bool]


def findings(gpu: bool = False) -> Iterator[Finding]:
    """(what, in words, whether it is good enough for a run), one after another. Imports torch.

    gpu: k-means on the GPU as well.
    """
    yield "python", f"{platform.python_version()} on {platform.platform()}", True
    versions = {name: _version(name) for name in PACKAGES}
    yield "packages", ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items()), True
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
        from deepclust.doctor_gpu import gpu_findings

        yield from gpu_findings()


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _torch() -> Iterator[Finding]:
    import torch

    from deepclust.ops.precision import has_fast_bfloat16

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if torch.cuda.is_available():
        devices = [torch.device("cuda", place) for place in range(torch.cuda.device_count())]
        names = [torch.cuda.get_device_name(device) for device in devices]
        emulated = [name for name, device in zip(names, devices) if not has_fast_bfloat16(device)]
        precision = f"not native on {', '.join(emulated)}: float16 with scaled losses is used there"
    else:
        names = [f"CPU, {cores} cores"]
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


def _disk() -> Finding:
    folder = os.path.abspath("outputs" if os.path.isdir("outputs") else ".")
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"0" * 2**20)
            file.flush()
            os.fsync(file.fileno())
        free = os.statvfs(folder) if hasattr(os, "statvfs") else None
        room = f", {free.f_bavail * free.f_frsize / 2**30:.1f} GiB free" if free else ""
        return "disk", f"{folder} can be written{room}", True
    except OSError as error:
        return "disk", f"{folder} cannot be written ({error.strerror}); use run.dir=PATH", False
