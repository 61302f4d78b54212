"""k-means on the GPU, checked and timed, for `deepclust doctor --gpu`.

Every backend is held against chunked torch and against labels computed in float64.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepclust.ops.kmeans import gpu
from deepclust.ops.kmeans.assign import Assign, backend_for, bias_of, rows_at_a_time
from deepclust.ops.kmeans.step import segment_sums

if TYPE_CHECKING:
    from deepclust.cli.doctor import Finding

SHAPES = (
    (50_000, 128, 100),
    (50_000, 512, 1000),
    (200_000, 128, 1000),
    (1_000_000, 128, 1024),
    (100_000, 64, 3000),
)
"""Rows, dimension, clusters."""
TINY = ((96, 16, 8),)
"""For triton's interpreter, which runs each program in Python."""

# `doctor --gpu` promises two minutes; no shape begins after 80 % of these seconds.
SECONDS = 110.0
LAST_START = 0.8
# Enough rows to meet every block of a kernel, few enough for a check in float64.
CHECKED_ROWS = 4096
REPEATS = 5
TF32_POLICY = (
    "triton multiplies in exact float32, triton-tf32x3 in three TF32 products, triton-tf32 in one; "
    "each says so per launch. No global switch is changed: torch.backends.cuda.matmul.allow_tf32 "
    "is {allow} here, which only the torch backend follows"
)


def gpu_findings() -> Iterator[Finding]:
    """The TF32 policy, then whether each backend is right and how fast, within two minutes."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        yield "gpu", "no CUDA device is visible to torch here, so there is nothing to check", False
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield "tf32", TF32_POLICY.format(allow=torch.backends.cuda.matmul.allow_tf32), True
    if device.type == "cpu":
        text = "no CUDA device: triton's interpreter checks the kernels on the processor, times "
        yield "gpu", f"{text}mean nothing", True
    yield from _missing_backends(device)
    shapes = SHAPES
    if device.type == "cpu":
        shapes = TINY
    yield from _shapes(shapes, device)


def _shapes(shapes: Sequence[tuple[int, int, int]], device: torch.device) -> Iterator[Finding]:
    """The findings at one shape after another, as many as there is time for."""
    began = time.perf_counter()
    for number, shape in enumerate(shapes):
        if time.perf_counter() - began > SECONDS * LAST_START:
            text = f"{number} of {len(shapes)} shapes done in {SECONDS:.0f} s, the rest left out"
            yield "gpu", text, True
            return
        try:
            yield from _shape(*shape, device)
        except torch.OutOfMemoryError:
            num, dim, num_clusters = shape
            text = f"{num:,} x {dim}, k {num_clusters} does not fit into the device's memory"
            yield "gpu", f"{text}: left out", True


def _missing_backends(device: torch.device) -> Iterator[Finding]:
    """Which backends cannot be tried, and why. None of them is needed for a run."""
    for name in (*gpu.GPU_BACKENDS, "faiss"):
        try:
            backend_for(name, device)
        except ValueError as error:
            yield "gpu", f"left out: {error}", True


def _backends(device: torch.device) -> list[str]:
    """The backends that work here, chunked torch first: the others' speeds are told in its."""
    names = ["torch"]
    candidates = list(gpu.GPU_BACKENDS)
    if device.type == "cuda":
        candidates.append("faiss")
    for name in candidates:
        try:
            backend_for(name, device)
        except ValueError:
            continue
        names.append(name)
    return names


def _shape(num: int, dim: int, num_clusters: int, device: torch.device) -> Iterator[Finding]:
    """A finding per backend: wrong labels of `CHECKED_ROWS` rows, and its speed beside torch's."""
    generator = torch.Generator(device).manual_seed(0)
    # A mixture of 200 normal distributions: rows of noise alone are about equally far from all
    # centroids, so that rounding would decide their labels.
    modes = 3 * torch.randn(200, dim, generator=generator, device=device)
    x = modes[torch.randint(200, (num,), generator=generator, device=device)]
    x = x + torch.randn(num, dim, generator=generator, device=device)
    drawn = torch.randperm(num, generator=generator, device=device)[:num_clusters]
    centroids = x[drawn].contiguous()
    title = f"{num:,} x {dim}, k {num_clusters}"
    labels = torch.empty(num, dtype=torch.int64, device=device)
    torch_seconds = 0.0
    for name in _backends(device):
        chunk = rows_at_a_time(num_clusters, dim, device)
        assign = backend_for(name, device)(centroids, bias_of(centroids, False), chunk)
        problem, seconds = _try(assign, x, centroids, labels, name)
        torch_seconds = torch_seconds or seconds
        if problem:
            yield "gpu assign", f"{title}, {name}: {problem}", False
            continue
        ratio = f"{torch_seconds / seconds:.2f} x the speed of chunked torch"
        speed = f"{ratio}, {1e3 * seconds:.3g} ms"
        yield "gpu assign", f"{title}, {name}: labels right; {speed}", True
    yield from _sums(x, labels, num_clusters, title)


def _try(
    assign: Assign, x: Tensor, centroids: Tensor, labels: Tensor, name: str
) -> tuple[str | None, float]:
    """(what is wrong with a backend's labels, median seconds of an assignment)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            seconds = _seconds(lambda: assign(x, labels), x.device)
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}", 1.0
    # A kernel that fails its own check warns and gives way to torch: right labels, but not its own.
    if any(issubclass(warning.category, RuntimeWarning) for warning in caught):
        return str(caught[-1].message), seconds
    wrong = _num_wrong(x, centroids, labels, _precision(name))
    checked = min(CHECKED_ROWS, len(x))
    if wrong:
        return f"{wrong} of {checked} labels wrong", seconds
    return None, seconds


def _precision(name: str) -> str:
    """In which precision a backend multiplies, so that its rounding is allowed for."""
    if name in gpu.PRECISIONS:
        return gpu.PRECISIONS[name]
    exact = name == "torch" and not torch.backends.cuda.matmul.allow_tf32
    return "ieee" if exact else "tf32"


def _num_wrong(x: Tensor, centroids: Tensor, labels: Tensor, precision: str) -> int:
    """How many of `CHECKED_ROWS` evenly spread rows are not at their nearest centroid."""
    last = len(x) - 1
    spread = torch.linspace(
        0, last, min(CHECKED_ROWS, len(x)), device=x.device, dtype=torch.float64
    )
    rows = spread.long()
    bias = bias_of(centroids, False)
    assert bias is not None
    exact = torch.empty(len(rows), dtype=torch.int64, device=x.device)
    # 512 rows at a time: 4,096 x 3,000 scores in float64 would take 100 MB beside the data.
    for low in range(0, len(rows), 512):
        part = x[rows[low : low + 512]].double()
        scores = torch.addmm(bias.double(), part, centroids.double().T)
        exact[low : low + 512] = scores.argmax(1)
    return gpu.num_wrong(x[rows], centroids, bias, labels[rows], exact, precision)


def _sums(x: Tensor, labels: Tensor, num_clusters: int, title: str) -> Iterator[Finding]:
    """The update of the centroids: the sorted kernel against torch's sorted sums."""
    if not gpu.has_triton(x.device):
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = _seconds(lambda: gpu.by_cluster(x, labels, num_clusters, None), x.device)
    theirs = _seconds(lambda: segment_sums(x, labels, num_clusters, None), x.device)
    if caught:
        yield "gpu update", f"{title}, triton: {caught[-1].message}", False
        return
    speed = f"{theirs / ours:.2f} x the speed of torch's, {1e3 * ours:.3g} ms"
    yield "gpu update", f"{title}, triton: sums right; {speed}", True


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median over `REPEATS` runs after two that compile and warm up."""

    def wait() -> None:
        # CUDA calls return before the work is done.
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    runs = REPEATS + 2
    # In the interpreter times mean nothing.
    if device.type != "cuda":
        runs = 1
    taken = []
    for _ in range(runs):
        wait()
        began = time.perf_counter()
        run()
        wait()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[-REPEATS:])
