"""Interchangeable ways of finding every row's nearest centroid: the largest x·c + bias, the lowest index among equals.

Each is a function that takes the centroids once per iteration and gives a function of one block of rows.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepclust.ops.kmeans.gpu import GPU_BACKENDS, chunk_for, gpu_backend, has_triton
from deepclust.ops.precision import has_onednn

Assign = Callable[[Tensor, Tensor], None]
"""(block (B, D), labels (B,) int64, written)."""
Backend = Callable[[Tensor, "Tensor | None", int], Assign]
"""(centroids (K, D), bias (K,) or None, rows at a time)."""
Gemm = Callable[[Tensor, Tensor], Tensor]
"""(rows (R, D), scores (R, K) that may be written) → the tensor that holds the scores."""


def bias_of(centroids: Tensor, spherical: bool) -> Tensor | None:
    """(K,) −‖c‖²/2, or None where all centroids have length one."""
    return None if spherical else centroids.square().sum(1).mul_(-0.5)


def rows_at_a_time(num_clusters: int, dim: int, device: torch.device) -> int:
    """Rows whose scores stay in the second-level cache; long rows repay packing the centroids only in larger lots."""
    if device.type == "cuda":
        return chunk_for(num_clusters, device)
    return max(min(4096, (1 << 18) // num_clusters), min(1024, max(256, 2 * dim)))


def by_torch(centroids: Tensor, bias: Tensor | None, chunk_size: int) -> Assign:
    """Any device and dtype."""

    def assign(block: Tensor, labels: Tensor) -> None:
        for low in range(0, len(block), chunk_size):
            rows = block[low : low + chunk_size]
            scores = torch.mm(rows, centroids.T) if bias is None else torch.addmm(bias, rows, centroids.T)
            torch.argmax(scores, dim=1, out=labels[low : low + chunk_size])

    return assign


def by_numpy(centroids: Tensor, bias: Tensor | None, chunk_size: int) -> Assign:
    """Processors: one fixed product per processor, so that runs repeat bit by bit, and NumPy's vectorised argmax."""
    return _by_product(centroids, _gemms(centroids, bias)[_steady(centroids.dtype)], chunk_size)


def by_fastest(centroids: Tensor, bias: Tensor | None, chunk_size: int) -> Assign:
    """As `by_numpy` with the product that a short trial finds fastest: two runs may differ in the last bits."""
    name = _steady(centroids.dtype)
    if centroids.dtype == torch.float32 and not torch.are_deterministic_algorithms_enabled():
        name = _trial((chunk_size, *centroids.T.shape), bias is not None, torch.get_num_threads())
    return _by_product(centroids, _gemms(centroids, bias)[name], chunk_size)


def _by_product(centroids: Tensor, gemm: Gemm, chunk_size: int) -> Assign:
    scores = torch.empty(chunk_size, len(centroids), dtype=centroids.dtype)

    def assign(block: Tensor, labels: Tensor) -> None:
        out = labels.numpy()
        for low in range(0, len(block), chunk_size):
            rows = block[low : low + chunk_size]
            np.argmax(gemm(rows, scores[: len(rows)]).numpy(), axis=1, out=out[low : low + len(rows)])

    return assign


def by_faiss(centroids: Tensor, bias: Tensor | None, chunk_size: int) -> Assign:
    """faiss's exact flat search (float32, processor)."""
    import faiss

    index = (faiss.IndexFlatIP if bias is None else faiss.IndexFlatL2)(centroids.shape[1])
    index.add(centroids.float().numpy())  # pyright: ignore[reportCallIssue]

    def assign(block: Tensor, labels: Tensor) -> None:
        found = index.search(block.float().numpy(), 1)[1]  # pyright: ignore[reportCallIssue]
        labels.copy_(torch.from_numpy(found[:, 0]))

    return assign


def backend_for(name: str, device: torch.device) -> Backend:
    """The backend called `name`; "auto" takes one that repeats bit by bit on this device.

    Raises:
        ValueError: unknown name, or one that does not work here.
    """
    if name == "auto":
        name = "numpy" if device.type == "cpu" else "triton" if has_triton(device) else "torch"
    if name not in (*BACKENDS, *GPU_BACKENDS):
        raise ValueError(f"backend={name!r}: must be one of auto, {', '.join((*BACKENDS, *GPU_BACKENDS))}")
    if name in GPU_BACKENDS or (name == "faiss" and device.type == "cuda" and find_spec("faiss") is not None):
        return gpu_backend(name, device, by_torch)
    if name in ("numpy", "fastest", "faiss") and device.type != "cpu":
        raise ValueError(f"backend={name!r}: works on the processor, the rows are on {device}")
    if name == "faiss" and find_spec("faiss") is None:
        raise ValueError("backend='faiss': faiss is not installed; `pip install faiss-cpu`, or choose another backend")
    return BACKENDS[name]


BACKENDS: dict[str, Backend] = {"torch": by_torch, "numpy": by_numpy, "fastest": by_fastest, "faiss": by_faiss}


@functools.lru_cache
def _steady(dtype: torch.dtype) -> str:
    """Name of the product for this processor: torch's own, but oneDNN's on AMD, where MKL gives half the speed."""
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        amd = False
    return "onednn" if amd and dtype == torch.float32 and has_onednn() else "torch"


def _gemms(centroids: Tensor, bias: Tensor | None) -> dict[str, Gemm]:
    array = centroids.numpy()

    def shifted(scores: Tensor) -> Tensor:
        return scores if bias is None else scores.add_(bias)

    def with_torch(rows: Tensor, scores: Tensor) -> Tensor:
        return shifted(torch.mm(rows, centroids.T, out=scores))

    def with_numpy(rows: Tensor, scores: Tensor) -> Tensor:
        np.dot(rows.numpy(), array.T, out=scores.numpy())
        return shifted(scores)

    def with_onednn(rows: Tensor, scores: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, centroids, bias, "none", [], "")

    gemms = {"torch": with_torch, "numpy": with_numpy}
    if has_onednn():
        gemms["onednn"] = with_onednn
    return gemms


@functools.lru_cache(maxsize=256)
def _trial(shape: tuple[int, int, int], biased: bool, num_threads: int) -> str:
    """Name of the fastest product for (rows, D, K), by the best of a few interleaved runs on the given thread count."""
    num_rows, dim, num_clusters = shape
    rows, scores = torch.ones(num_rows, dim), torch.empty(num_rows, num_clusters)
    gemms = _gemms(torch.ones(num_clusters, dim), torch.ones(num_clusters) if biased else None)
    expected = torch.full_like(scores, dim + biased)
    best: dict[str, float] = {}
    for name, gemm in gemms.items():
        try:
            if torch.equal(gemm(rows, scores), expected):
                best[name] = float("inf")
        except RuntimeError:
            continue
    deadline = time.perf_counter() + 0.02
    for turn in range(8):
        for name in best:
            began = time.perf_counter()
            gemms[name](rows, scores)
            best[name] = min(best[name], time.perf_counter() - began)
        if turn >= 2 and time.perf_counter() > deadline:
            break
    return min(best, key=lambda name: best[name])
