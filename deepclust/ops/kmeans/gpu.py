"""Backends for CUDA devices, and the guard that lets a kernel nobody here could run on one prove itself first.

| name | nearest centroids | float32 products |
| --- | --- | --- |
| triton | own kernel, N × K never stored | exact float32, whatever torch's switches say |
| triton-tf32x3 | the same | three TF32 products for one: as good as float32 but for the last bits |
| triton-tf32 | the same | TF32, 10 bits of every factor: the fastest, labels within that rounding |
| flash-kmeans | flash_kmeans or flashlib, where installed | theirs: TF32 |
| faiss | faiss-gpu, where installed | faiss's own |
| torch | chunked `addmm` and `argmax` | as `torch.backends.cuda.matmul` says; exact by default |

Nothing here changes a global switch. "auto" is `triton` where it is installed and the guard content, else `torch`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from deepclust.ops.kmeans.step import Sums, segment_sums

Assign = Callable[[Tensor, Tensor], None]
Backend = Callable[[Tensor, "Tensor | None", int], Assign]

PRECISIONS = {"triton": "ieee", "triton-tf32x3": "tf32x3", "triton-tf32": "tf32"}
"""Backend → `input_precision` of its products."""
GUARDED_ROWS = 4096
INPUT_ROUNDING = {"ieee": 0.0, "tf32x3": 2.0**-18, "tf32": 2.0**-9}
"""Relative error of a product of two float32 numbers by what is dropped of each: TF32 keeps 10 bits and may cut off the
rest, 2^-10 of each factor; split in two such parts, 2^-20 of each and the product of the two remainders."""


def chunk_for(num_clusters: int, device: torch.device) -> int:
    """Rows whose scores fill at most half of the device's second-level cache (at least 64 rows)."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 4 << 20
    return max(64, cache // 2 // (4 * num_clusters))


def has_triton(device: torch.device) -> bool:
    """Whether triton is installed and can run there: on a CUDA device, or in its interpreter on the processor."""
    return find_spec("triton") is not None and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def gpu_backend(name: str, device: torch.device, plain: Backend) -> Backend:
    """The backend of that name; `plain` is the chunked path that checks a kernel and stands in for it.

    Raises ValueError where the backend does not work, with what would.
    """
    if name in PRECISIONS:
        if find_spec("triton") is None:
            raise ValueError(
                f"backend={name!r}: triton is not installed; `pip install triton`, or take backend='torch'"
            )
        if not has_triton(device):
            raise ValueError(f"backend={name!r}: works on CUDA devices, the rows are on {device}; take backend='auto'")
        return lambda centroids, bias, chunk_size: by_triton(
            centroids, bias, plain(centroids, bias, chunk_size), PRECISIONS[name]
        )
    if device.type != "cuda":
        raise ValueError(f"backend={name!r}: works on CUDA devices, the rows are on {device}; take backend='auto'")
    if name == "faiss":
        import faiss

        if not hasattr(faiss, "StandardGpuResources"):
            raise ValueError(
                "backend='faiss': this faiss works on the processor only; install faiss-gpu, or take 'auto'"
            )
        return by_faiss_gpu
    if not flash_package():
        raise ValueError(
            "backend='flash-kmeans': neither flash_kmeans nor flashlib is installed; "
            "`pip install flash-kmeans`, or take backend='auto'"
        )
    return by_flash


GPU_BACKENDS = (*PRECISIONS, "flash-kmeans")


def sums_for(name: str, device: torch.device) -> Sums:
    """How a backend sums the clusters."""
    own = name in PRECISIONS or (name == "auto" and device.type == "cuda" and has_triton(device))
    return by_cluster if own else segment_sums


# --- the guard ------------------------------------------------------------------------------------------------------


class Guard:
    """Lets a kernel answer on its own only after it has proved itself on rows of the actual data.

    On each device and for each dtype (and tile) the first `GUARDED_ROWS` rows are compared with the plain path. A
    single wrong answer, or any exception when the kernel is compiled or launched, costs one warning, and from then on
    the plain path answers alone. A fault that kills the CUDA context, such as an illegal address, cannot be survived.
    """

    def __init__(self) -> None:
        self.left: dict[tuple[object, ...], int] = {}
        self.distrusted: set[tuple[object, ...]] = set()

    def distrusts(self, *about: object) -> bool:
        """Whether the kernel failed with this device, dtype and purpose before."""
        return about in self.distrusted

    def unproven(self, *key: object) -> int:
        """Rows that are still to be compared."""
        return self.left.get(key, GUARDED_ROWS)

    def proved(self, rows: int, *key: object) -> None:
        """So many rows were right."""
        self.left[key] = max(0, self.unproven(*key) - rows)

    def distrust(self, problem: str, *about: object) -> None:
        """Warns once; the kernel is not asked again."""
        if about not in self.distrusted:
            self.distrusted.add(about)
            words = ", ".join(str(part) for part in about)
            warnings.warn(
                f"k-means: the triton kernel is not used here ({words}): {problem}. torch answers instead, correctly "
                "but slower; backend='torch' avoids the attempt",
                RuntimeWarning,
                stacklevel=3,
            )


GUARD = Guard()


def by_triton(centroids: Tensor, bias: Tensor | None, plain: Assign, precision: str = "ieee") -> Assign:
    """The fused kernel, guarded; float64 centroids go the plain way, since the kernels work in float32."""

    def assign(block: Tensor, labels: Tensor) -> None:
        about = (str(block.device), block.dtype, precision)
        if centroids.dtype == torch.float32 and not GUARD.distrusts(*about):
            problem = _tried(block, centroids, bias, labels, plain, precision)
            if problem is None:
                return
            GUARD.distrust(problem, *about)
        plain(block.to(centroids.dtype), labels)

    return assign


def _tried(
    block: Tensor, centroids: Tensor, bias: Tensor | None, labels: Tensor, plain: Assign, precision: str
) -> str | None:
    """Runs the kernel and, as long as it has to prove itself, compares. Returns what is wrong, or None."""
    try:
        from deepclust.ops.kmeans import kernels

        key = (str(block.device), block.dtype, precision, kernels.tile_for(len(centroids), block.shape[1], precision))
        kernels.assign(block, centroids.contiguous(), bias, labels, precision)
        count = min(GUARD.unproven(*key), len(block))
        if count:
            chosen = torch.linspace(0, len(block) - 1, count, device=block.device, dtype=torch.float64).long()
            rows, found = block[chosen], labels[chosen]
            expected = torch.empty_like(found)
            plain(rows.to(centroids.dtype), expected)
            wrong = num_wrong(rows, centroids, bias, found, expected, precision)
            if wrong:
                return f"{wrong} of {count} labels were wrong"
            GUARD.proved(count, *key)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def num_wrong(
    rows: Tensor, centroids: Tensor, bias: Tensor | None, found: Tensor, expected: Tensor, precision: str = "ieee"
) -> int:
    """How many of the labels `found` (B,) are not the nearest centroid, ties within rounding aside.

    A label that differs from `expected` is a proven tie if its score, in float64, falls short by no more than rounding
    explains: an inner product of D terms errs by at most D u |x||c|, u = 2^-24 (Higham 2002, equation 3.5), plus what
    the precision drops of the factors; adding the bias errs by u of the sum; and both scores may err.
    """
    if bool(((found < 0) | (found >= len(centroids))).any()):
        return int(((found < 0) | (found >= len(centroids))).sum())
    differ = torch.nonzero(found != expected).flatten()
    if not len(differ):
        return 0
    x, dim = rows[differ].double(), rows.shape[1]
    scores, sizes = [], []
    for label in (found[differ], expected[differ]):
        own = centroids[label].double()
        shift = torch.zeros(len(label), dtype=torch.float64, device=x.device) if bias is None else bias[label].double()
        scores.append((x * own).sum(1) + shift)
        length = x.norm(dim=1) * own.norm(dim=1)
        sizes.append(length * (2.0**-24 * (dim + 2) + INPUT_ROUNDING[precision]) + 2.0**-24 * shift.abs())
    gap, bound = scores[1] - scores[0], sizes[0] + sizes[1]
    # Written so that a score that is not a number is wrong.
    return int((~(gap <= bound)).sum())


def by_cluster(block: Tensor, labels: Tensor, num_clusters: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums and total weights of the clusters by the sorted kernel, guarded; see `step.segment_sums`."""
    about = (str(block.device), block.dtype, "sums")
    if block.dtype == torch.float64 or GUARD.distrusts(*about):
        return segment_sums(block, labels, num_clusters, weights)
    try:
        from deepclust.ops.kmeans import kernels

        found = kernels.segment_sums(block, labels, num_clusters, weights)
        if not GUARD.unproven(*about) or _same_sums(found, block, labels, weights):
            GUARD.proved(len(block), *about)
            return found
        problem = "sums of clusters were wrong"
    except Exception as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    GUARD.distrust(problem, *about)
    return segment_sums(block, labels, num_clusters, weights)


def _same_sums(found: tuple[Tensor, Tensor], block: Tensor, labels: Tensor, weights: Tensor | None) -> bool:
    """Whether sums (K, D) and weights (K,) are those of float64, within the rounding of float32 sums of their size."""
    factors = torch.ones(len(block), dtype=torch.float64, device=block.device) if weights is None else weights.double()
    rows = block.double() * factors[:, None]
    for result, terms in zip(found, (rows, factors)):
        exact = torch.zeros_like(result).index_add_(0, labels, terms)
        size = torch.zeros_like(result).index_add_(0, labels, terms.abs())
        # A piece has at most 256 rows, each product rounded once.
        if not bool(((result - exact).abs() <= 2.0**-24 * 260 * size).all()):
            return False
    return True


# --- other libraries ------------------------------------------------------------------------------------------------


def flash_package() -> str | None:
    """The installed package that brings Flash-KMeans' assignment."""
    return next((name for name in ("flash_kmeans", "flashlib") if find_spec(name) is not None), None)


def by_flash(centroids: Tensor, bias: Tensor | None, chunk_size: int) -> Assign:
    """Flash-KMeans' own assignment by Euclidean distance, which for centroids of length one is that by cosine.

    It multiplies float32 rows in TF32; labels may differ from ours by that rounding.
    """
    own = centroids[None].contiguous()
    if flash_package() == "flash_kmeans":
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton  # pyright: ignore[reportMissingImports]

        def find(rows: Tensor) -> Tensor:
            return euclid_assign_triton(rows, own, rows.float().square().sum(2))

    else:
        from flashlib.primitives.kmeans.triton.assign import (  # pyright: ignore[reportMissingImports]
            euclid_assign_triton,
        )

        def find(rows: Tensor) -> Tensor:
            return euclid_assign_triton(rows, own)

    def assign(block: Tensor, labels: Tensor) -> None:
        with torch.cuda.device(block.device):
            labels.copy_(find(block[None])[0])

    return assign


def by_faiss_gpu(centroids: Tensor, bias: Tensor | None, chunk_size: int) -> Assign:
    """faiss's exact search on the device (float32)."""
    import faiss
    import faiss.contrib.torch_utils

    resources = faiss.StandardGpuResources()  # pyright: ignore[reportAttributeAccessIssue]
    metric = faiss.METRIC_INNER_PRODUCT if bias is None else faiss.METRIC_L2
    own = centroids.float().contiguous()

    def assign(block: Tensor, labels: Tensor) -> None:
        found = faiss.knn_gpu(  # pyright: ignore[reportAttributeAccessIssue]
            resources, block.float(), own, 1, metric=metric, device=block.device.index or 0
        )[1]
        labels.copy_(found[:, 0])

    return assign
