"""k-means on the GPU, checked and timed, for `deepclust doctor --gpu`: every backend against chunked torch."""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from deepclust.doctor import Finding
from deepclust.ops.kmeans import gpu
from deepclust.ops.kmeans.assign import Assign, backend_for, bias_of, rows_at_a_time
from deepclust.ops.kmeans.step import segment_sums

SHAPES = ((50_000, 128, 100), (50_000, 512, 1000), (200_000, 128, 1000), (1_000_000, 128, 1024), (100_000, 64, 3000))
"""rows, dimension, clusters."""
TINY = ((96, 16, 8),)
"""For triton's interpreter, which runs each program in Python."""
SECONDS = 110.0
CHECKED_ROWS = 4096
REPEATS = 5
TF32_POLICY = (
    "triton multiplies in exact float32, triton-tf32x3 in three TF32 products, triton-tf32 in one; each says so per "
    "launch. No global switch is changed: torch.backends.cuda.matmul.allow_tf32 is {allow} here, which only the torch "
    "backend follows"
)


def gpu_findings() -> Iterator[Finding]:
    """The TF32 policy, then correctness and speed ratios of the backends at a few shapes, within two minutes."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        yield "gpu", "no CUDA device is visible to torch here, so there is nothing to check", False
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield "tf32", TF32_POLICY.format(allow=torch.backends.cuda.matmul.allow_tf32), True
    if device.type == "cpu":
        yield (
            "gpu",
            "no CUDA device: triton's interpreter checks the kernels on the processor, times mean nothing",
            True,
        )
    yield from _backends_there(device)
    began = time.perf_counter()
    for number, shape in enumerate(SHAPES if device.type == "cuda" else TINY):
        if time.perf_counter() - began > SECONDS * 0.8:
            yield "gpu", f"{number} of {len(SHAPES)} shapes done in {SECONDS:.0f} s, the rest left out", True
            return
        try:
            yield from _shape(*shape, device)
        except torch.OutOfMemoryError:
            yield (
                "gpu",
                f"{shape[0]:,} x {shape[1]}, k {shape[2]} does not fit into the device's memory: left out",
                True,
            )


def _backends_there(device: torch.device) -> Iterator[Finding]:
    """Which backends cannot be tried, and why. None of them is needed for a run."""
    for name in (*gpu.GPU_BACKENDS, "faiss"):
        try:
            backend_for(name, device)
        except ValueError as error:
            yield "gpu", f"left out: {error}", True


def _contestants(device: torch.device) -> list[str]:
    names = ["torch"]
    for name in (*gpu.GPU_BACKENDS, *(("faiss",) if device.type == "cuda" else ())):
        try:
            backend_for(name, device)
        except ValueError:
            continue
        names.append(name)
    return names


def _shape(num: int, dim: int, num_clusters: int, device: torch.device) -> Iterator[Finding]:
    """One finding per backend: wrong labels among `CHECKED_ROWS`, and its speed over chunked torch."""
    generator = torch.Generator(device).manual_seed(0)
    modes = 3 * torch.randn(200, dim, generator=generator, device=device)
    x = modes[torch.randint(200, (num,), generator=generator, device=device)]
    x = x + torch.randn(num, dim, generator=generator, device=device)
    centroids = x[torch.randperm(num, generator=generator, device=device)[:num_clusters]].contiguous()
    title = f"{num:,} x {dim}, k {num_clusters}"
    base = 0.0
    labels = torch.empty(num, dtype=torch.int64, device=device)
    for name in _contestants(device):
        find = backend_for(name, device)(
            centroids, bias_of(centroids, False), rows_at_a_time(num_clusters, dim, device)
        )
        problem, seconds = _tried(find, x, centroids, labels, name)
        base = base or seconds
        speed = "" if problem else f"; {base / seconds:.2f} x the speed of chunked torch, {1e3 * seconds:.3g} ms"
        yield "gpu assign", f"{title}, {name}: {problem or 'labels right'}{speed}", problem is None
    yield from _sums(x, labels, num_clusters, title)


def _tried(find: Assign, x: Tensor, centroids: Tensor, labels: Tensor, name: str) -> tuple[str | None, float]:
    """(what is wrong with a backend's labels, median seconds of an assignment)."""
    precision = gpu.PRECISIONS.get(name, "tf32" if name != "torch" or torch.backends.cuda.matmul.allow_tf32 else "ieee")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            seconds = _seconds(lambda: find(x, labels), x.device)
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}", 1.0
    if any(issubclass(one.category, RuntimeWarning) for one in caught):
        return str(caught[-1].message), seconds
    chosen = torch.linspace(0, len(x) - 1, min(CHECKED_ROWS, len(x)), device=x.device, dtype=torch.float64).long()
    bias = bias_of(centroids, False)
    assert bias is not None
    exact = torch.empty(len(chosen), dtype=torch.int64, device=x.device)
    for low in range(0, len(chosen), 512):
        rows = x[chosen[low : low + 512]].double()
        exact[low : low + 512] = torch.addmm(bias.double(), rows, centroids.double().T).argmax(1)
    wrong = gpu.num_wrong(x[chosen], centroids, bias, labels[chosen], exact, precision)
    return f"{wrong} of {len(chosen)} labels wrong" if wrong else None, seconds


def _sums(x: Tensor, labels: Tensor, num_clusters: int, title: str) -> Iterator[Finding]:
    """The update: the sorted kernel against torch's sorted sums."""
    if not gpu.has_triton(x.device):
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = _seconds(lambda: gpu.by_cluster(x, labels, num_clusters, None), x.device)
    theirs = _seconds(lambda: segment_sums(x, labels, num_clusters, None), x.device)
    problem = str(caught[-1].message) if caught else ""
    text = problem or f"sums right; {theirs / ours:.2f} x the speed of torch's, {1e3 * ours:.3g} ms"
    yield "gpu update", f"{title}, triton: {text}", not problem


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median over `REPEATS` runs after two that compile and warm up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    taken = []
    for _ in range(REPEATS + 2 if device.type == "cuda" else 1):
        wait()
        began = time.perf_counter()
        run()
        wait()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[-REPEATS:])
