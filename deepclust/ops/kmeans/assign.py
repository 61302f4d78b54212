"""Backends that find the nearest centroids: the largest x·c + bias, the lowest index of equals.

A backend is a function of the centroids, called once per iteration; it returns a function of one
block of rows. Because |x − c|² = |x|² − 2 (x·c − |c|²/2), the largest x·c + bias is the nearest.
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
from deepclust.ops.kmeans.step import Assign, Backend
from deepclust.ops.precision import has_onednn

Gemm = Callable[[Tensor, Tensor], Tensor]
"""(rows (R, D), scores (R, K) that may be written) → the tensor that holds the scores."""

TRIAL_ROUNDS = 8
"""Most timings of each product in a trial."""
TRIAL_SECONDS = 0.02
"""Time after which a trial ends, once every product has been timed three times."""


def bias_of(centroids: Tensor, spherical: bool) -> Tensor | None:
    """−‖c‖²/2 of every centroid (K,), or None where all centroids have length one."""
    if spherical:
        return None
    return centroids.square().sum(1).mul_(-0.5)


def rows_at_a_time(num_clusters: int, dim: int, device: torch.device) -> int:
    """Rows to compare with all K centroids (K, D) at one time."""
    if device.type == "cuda":
        return chunk_for(num_clusters, device)
    # 2^18 float32 scores are 1 MiB: they stay in a processor's second-level cache.
    in_cache = min(4096, (1 << 18) // num_clusters)
    # Each product packs the centroids anew, which costs as much as a few rows do. The longer the
    # rows, the more of them it takes to repay that.
    repaid = min(1024, max(256, 2 * dim))
    return max(in_cache, repaid)


def by_torch(centroids: Tensor, bias: Tensor | None, chunk_size: int) -> Assign:
    """Backend of torch's own operators, for any device and dtype."""

    def assign(block: Tensor, labels: Tensor) -> None:
        for low in range(0, len(block), chunk_size):
            rows = block[low : low + chunk_size]
            if bias is None:
                scores = torch.mm(rows, centroids.T)
            else:
                scores = torch.addmm(bias, rows, centroids.T)
            torch.argmax(scores, dim=1, out=labels[low : low + chunk_size])

    return assign


def by_numpy(centroids: Tensor, bias: Tensor | None, chunk_size: int) -> Assign:
    """Backend for processors: a matrix product fixed per processor, and NumPy's argmax.

    The product is not chosen by timing, so that runs repeat bit by bit.
    """
    return _by_product(centroids, _gemms(centroids, bias)[_steady(centroids.dtype)], chunk_size)


def by_fastest(centroids: Tensor, bias: Tensor | None, chunk_size: int) -> Assign:
    """As `by_numpy`, with the product that a short trial finds fastest.

    Two runs may choose differently and then differ in the last bits.
    """
    name = _steady(centroids.dtype)
    if centroids.dtype == torch.float32 and not torch.are_deterministic_algorithms_enabled():
        shape = (chunk_size, *centroids.T.shape)
        name = _trial(shape, bias is not None, torch.get_num_threads())
    return _by_product(centroids, _gemms(centroids, bias)[name], chunk_size)


def _by_product(centroids: Tensor, gemm: Gemm, chunk_size: int) -> Assign:
    # One buffer for the scores of all chunks: fresh pages for each would cost time.
    scores = torch.empty(chunk_size, len(centroids), dtype=centroids.dtype)

    def assign(block: Tensor, labels: Tensor) -> None:
        out = labels.numpy()
        for low in range(0, len(block), chunk_size):
            rows = block[low : low + chunk_size]
            best = gemm(rows, scores[: len(rows)]).numpy()
            # NumPy's argmax is vectorised and faster than torch's on a processor.
            np.argmax(best, axis=1, out=out[low : low + len(rows)])

    return assign


def by_faiss(centroids: Tensor, bias: Tensor | None, chunk_size: int) -> Assign:
    """Backend of faiss's exact flat search (float32, processor)."""
    import faiss

    flat = faiss.IndexFlatIP if bias is None else faiss.IndexFlatL2
    index = flat(centroids.shape[1])
    index.add(centroids.float().numpy())  # pyright: ignore[reportCallIssue]

    def assign(block: Tensor, labels: Tensor) -> None:
        _, nearest = index.search(block.float().numpy(), 1)  # pyright: ignore[reportCallIssue]
        labels.copy_(torch.from_numpy(nearest[:, 0]))

    return assign


def backend_for(name: str, device: torch.device) -> Backend:
    """The backend called `name`, for rows on a device.

    "auto" gives one that repeats bit by bit there.

    Raises:
        ValueError: unknown name, or a backend that does not work on this device or is not
            installed.
    """
    if name == "auto":
        name = _default_for(device)
    names = (*BACKENDS, *GPU_BACKENDS)
    if name not in names:
        raise ValueError(f"backend={name!r}: must be one of auto, {', '.join(names)}")
    has_faiss = find_spec("faiss") is not None
    if name in GPU_BACKENDS or (name == "faiss" and device.type == "cuda" and has_faiss):
        return gpu_backend(name, device, by_torch)
    if name in ("numpy", "fastest", "faiss") and device.type != "cpu":
        raise ValueError(f"backend={name!r}: works on the processor, the rows are on {device}")
    if name == "faiss" and not has_faiss:
        raise ValueError(
            "backend='faiss': faiss is not installed; `pip install faiss-cpu`, or choose another"
            " backend"
        )
    return BACKENDS[name]


def _default_for(device: torch.device) -> str:
    if device.type == "cpu":
        return "numpy"
    return "triton" if has_triton(device) else "torch"


BACKENDS: dict[str, Backend] = {
    "torch": by_torch,
    "numpy": by_numpy,
    "fastest": by_fastest,
    "faiss": by_faiss,
}


@functools.lru_cache
def _steady(dtype: torch.dtype) -> str:
    """Name of the product that this processor always takes."""
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        amd = False
    # torch's product is MKL's, which on AMD runs at half the speed of oneDNN's.
    return "onednn" if amd and dtype == torch.float32 and has_onednn() else "torch"


def _gemms(centroids: Tensor, bias: Tensor | None) -> dict[str, Gemm]:
    """Ways of computing x·c + bias on the processor, by name."""
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


# Cached per thread count too: which product is fastest depends on it.
@functools.lru_cache(maxsize=256)
def _trial(shape: tuple[int, int, int], biased: bool, num_threads: int) -> str:
    """Name of the fastest product for (rows, D, K): of each the best of a few interleaved runs."""
    num_rows, dim, num_clusters = shape
    rows = torch.ones(num_rows, dim)
    scores = torch.empty(num_rows, num_clusters)
    gemms = _gemms(torch.ones(num_clusters, dim), torch.ones(num_clusters) if biased else None)
    # Products of ones are exact whatever the order of the sum: only a broken product differs.
    expected = torch.full_like(scores, dim + biased)
    best: dict[str, float] = {}
    for name, gemm in gemms.items():
        try:
            if torch.equal(gemm(rows, scores), expected):
                best[name] = float("inf")
        except RuntimeError:
            continue
    deadline = time.perf_counter() + TRIAL_SECONDS
    for turn in range(TRIAL_ROUNDS):
        for name in best:
            began = time.perf_counter()
            gemms[name](rows, scores)
            best[name] = min(best[name], time.perf_counter() - began)
        if turn >= 2 and time.perf_counter() > deadline:
            break
    return min(best, key=lambda name: best[name])
