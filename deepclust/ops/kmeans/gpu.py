"""Backends for CUDA devices, and the guard that makes a kernel prove itself before it is trusted.

| name | nearest centroids | float32 products |
| --- | --- | --- |
| triton | own kernel, N × K never stored | exact float32, whatever torch's switches say |
| triton-tf32x3 | the same | three TF32 products for one: as good as float32 but for the last bits |
| triton-tf32 | the same | TF32, 10 bits of every factor: the fastest, labels within that rounding |
| flash-kmeans | flash_kmeans or flashlib, where installed | theirs: TF32 |
| faiss | faiss-gpu, where installed | faiss's own |
| torch | chunked `addmm` and `argmax` | as `torch.backends.cuda.matmul` says; exact by default |

Nothing here changes a global switch. "auto" is `triton` where it is installed and the guard has
found no fault, else `torch`.
"""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec

import torch
from torch import Tensor

from deepclust.ops.kmeans.step import Assign, Backend, Sums, segment_sums

PRECISIONS = {"triton": "ieee", "triton-tf32x3": "tf32x3", "triton-tf32": "tf32"}
"""Backend → `input_precision` of its products."""
GPU_BACKENDS = (*PRECISIONS, "flash-kmeans")
"""Backends that exist on CUDA devices only; faiss is on processors too."""
GUARDED_ROWS = 4096
"""Rows on which a kernel is compared with torch before it answers alone."""
INPUT_ROUNDING = {"ieee": 0.0, "tf32x3": 2.0**-18, "tf32": 2.0**-9}
"""Relative error of a product of two float32 numbers by what is dropped of each.

TF32 keeps 10 bits and may cut off the rest, 2^-10 of each factor; split in two such parts, 2^-20 of
each and the product of the two remainders."""
FLOAT32_ROUNDING = 2.0**-24
"""Unit roundoff: relative error of one rounding to float32."""


def chunk_for(num_clusters: int, device: torch.device) -> int:
    """Rows whose scores fill at most half of the device's second-level cache (at least 64 rows)."""
    # Old versions of torch do not tell: then 4 MiB, the cache of a small server GPU (T4).
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 4 << 20
    return max(64, cache // 2 // (4 * num_clusters))


def has_triton(device: torch.device) -> bool:
    """Whether triton is installed and runs on this device: CUDA, or any in its interpreter."""
    runs = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return find_spec("triton") is not None and runs


def gpu_backend(name: str, device: torch.device, plain: Backend) -> Backend:
    """The GPU backend of that name.

    Args:
        name: one of `GPU_BACKENDS`, or "faiss".
        device: where the rows are.
        plain: the chunked search that checks a kernel and stands in for it.

    Raises:
        ValueError: the backend does not work here; the message says what would.
    """
    if name in PRECISIONS:
        if find_spec("triton") is None:
            raise ValueError(
                f"backend={name!r}: triton is not installed; `pip install triton`, or take"
                " backend='torch'"
            )
        if not has_triton(device):
            raise _wrong_device(name, device)
        return _guarded(plain, PRECISIONS[name])
    if device.type != "cuda":
        raise _wrong_device(name, device)
    if name == "faiss":
        import faiss

        if not hasattr(faiss, "StandardGpuResources"):
            raise ValueError(
                "backend='faiss': this faiss works on the processor only; install faiss-gpu, or"
                " take 'auto'"
            )
        return by_faiss_gpu
    if not flash_package():
        raise ValueError(
            "backend='flash-kmeans': neither flash_kmeans nor flashlib is installed; "
            "`pip install flash-kmeans`, or take backend='auto'"
        )
    return by_flash


def _wrong_device(name: str, device: torch.device) -> ValueError:
    return ValueError(
        f"backend={name!r}: works on CUDA devices, the rows are on {device}; take backend='auto'"
    )


def sums_for(name: str, device: torch.device) -> Sums:
    """The function that a backend sums the rows of each cluster with."""
    automatic = name == "auto" and device.type == "cuda" and has_triton(device)
    if name in PRECISIONS or automatic:
        return by_cluster
    return segment_sums


# --- the guard --------------------------------------------------------------------------------


class Guard:
    """Remembers which kernels have proved themselves on rows of the actual data, and which failed.

    On each device and for each dtype (and tile) the first `GUARDED_ROWS` rows are compared with
    torch's answer. A single wrong answer, or any exception when the kernel is compiled or launched,
    costs one warning, and from then on torch answers alone. A fault that kills the CUDA context,
    such as an illegal address, cannot be survived.

    A key names what is proved: device, dtype, then precision or purpose, and perhaps a tile.
    """

    def __init__(self) -> None:
        self.left: dict[tuple[object, ...], int] = {}
        self.distrusted: set[tuple[object, ...]] = set()

    def distrusts(self, *key: object) -> bool:
        """Whether the kernel failed with this key before."""
        return key in self.distrusted

    def unproven(self, *key: object) -> int:
        """Rows that are still to be compared."""
        return self.left.get(key, GUARDED_ROWS)

    def proved(self, rows: int, *key: object) -> None:
        """Records that so many rows were right."""
        self.left[key] = max(0, self.unproven(*key) - rows)

    def distrust(self, problem: str, *key: object) -> None:
        """Bars the kernel, and warns the first time."""
        if key in self.distrusted:
            return
        self.distrusted.add(key)
        words = ", ".join(str(part) for part in key)
        warnings.warn(
            f"k-means: the triton kernel is not used here ({words}): {problem}. torch answers "
            "instead, correctly but slower; backend='torch' avoids the attempt",
            RuntimeWarning,
            stacklevel=3,
        )


GUARD = Guard()


def _guarded(plain: Backend, precision: str) -> Backend:
    """Backend of the triton kernel at a precision."""

    def backend(centroids: Tensor, bias: Tensor | None, chunk_size: int) -> Assign:
        return by_triton(centroids, bias, plain(centroids, bias, chunk_size), precision)

    return backend


def by_triton(
    centroids: Tensor,
    bias: Tensor | None,
    plain: Assign,
    precision: str = "ieee",
) -> Assign:
    """Search by the fused kernel, guarded.

    Args:
        centroids: (K, D).
        bias: (K,) or None.
        plain: the search that checks the kernel and stands in for it.
        precision: a value of `PRECISIONS`.
    """

    def assign(block: Tensor, labels: Tensor) -> None:
        key = (str(block.device), block.dtype, precision)
        # The kernels work in float32: float64 goes to torch.
        if centroids.dtype == torch.float32 and not GUARD.distrusts(*key):
            problem = _try_kernel(block, centroids, bias, labels, plain, precision)
            if problem is None:
                return
            GUARD.distrust(problem, *key)
        plain(block.to(centroids.dtype), labels)

    return assign


def _try_kernel(
    block: Tensor,
    centroids: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    plain: Assign,
    precision: str,
) -> str | None:
    """Runs the kernel and compares rows while it is unproven. Returns its fault, or None."""
    try:
        from deepclust.ops.kmeans import kernels

        # Another tile is another compiled kernel, which has to prove itself again.
        tile = kernels.tile_for(len(centroids), block.shape[1], precision)
        key = (str(block.device), block.dtype, precision, tile)
        kernels.assign(block, centroids.contiguous(), bias, labels, precision)
        count = min(GUARD.unproven(*key), len(block))
        if count:
            # Spread over the block, so that its last, partly filled tile is looked at as well.
            chosen = torch.linspace(
                0, len(block) - 1, count, device=block.device, dtype=torch.float64
            ).long()
            rows = block[chosen]
            answer = labels[chosen]
            expected = torch.empty_like(answer)
            plain(rows.to(centroids.dtype), expected)
            wrong = num_wrong(rows, centroids, bias, answer, expected, precision)
            if wrong:
                return f"{wrong} of {count} labels were wrong"
            GUARD.proved(count, *key)
    except Exception as error:
        return _one_line(error)
    return None


def _one_line(error: Exception) -> str:
    # Compilers quote whole programs: 200 characters hold the reason.
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def num_wrong(
    rows: Tensor,
    centroids: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    expected: Tensor,
    precision: str = "ieee",
) -> int:
    """How many labels are not of the nearest centroid, ties within rounding aside.

    A label that differs from `expected` is a proven tie if its score, in float64, falls short by no
    more than rounding explains: an inner product of D terms errs by at most D u |x||c|, u = 2^-24
    (Higham 2002, equation 3.5), plus what the precision drops of the factors; adding the bias errs
    by u of the sum; and both scores may err.

    Args:
        rows: (B, D).
        centroids: (K, D).
        bias: (K,) or None.
        labels: (B,) int64, to be judged.
        expected: (B,) int64, by a search that is trusted.
        precision: of the products that gave `labels`, a key of `INPUT_ROUNDING`.
    """
    outside = (labels < 0) | (labels >= len(centroids))
    # Scores of clusters that do not exist cannot be looked up.
    if bool(outside.any()):
        return int(outside.sum())
    differ = torch.nonzero(labels != expected).flatten()
    if not len(differ):
        return 0
    x = rows[differ].double()
    roundings = FLOAT32_ROUNDING * (rows.shape[1] + 2) + INPUT_ROUNDING[precision]
    scores = []
    errors = []
    for label in (labels[differ], expected[differ]):
        nearest = centroids[label].double()
        if bias is None:
            shift = torch.zeros(len(label), dtype=torch.float64, device=x.device)
        else:
            shift = bias[label].double()
        scores.append((x * nearest).sum(1) + shift)
        length = x.norm(dim=1) * nearest.norm(dim=1)
        errors.append(length * roundings + FLOAT32_ROUNDING * shift.abs())
    gap = scores[1] - scores[0]
    # Written so that a score that is not a number is wrong.
    return int((~(gap <= errors[0] + errors[1])).sum())


def by_cluster(
    block: Tensor,
    labels: Tensor,
    num_clusters: int,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sums (K, D) and total weights (K,) as `segment_sums` gives them, by a guarded kernel."""
    key = (str(block.device), block.dtype, "sums")
    if block.dtype == torch.float64 or GUARD.distrusts(*key):
        return segment_sums(block, labels, num_clusters, weights)
    try:
        from deepclust.ops.kmeans import kernels

        sums = kernels.segment_sums(block, labels, num_clusters, weights)
        if not GUARD.unproven(*key) or _same_sums(sums, block, labels, weights):
            GUARD.proved(len(block), *key)
            return sums
        problem = "sums of clusters were wrong"
    except Exception as error:
        problem = _one_line(error)
    GUARD.distrust(problem, *key)
    return segment_sums(block, labels, num_clusters, weights)


def _same_sums(
    sums: tuple[Tensor, Tensor],
    block: Tensor,
    labels: Tensor,
    weights: Tensor | None,
) -> bool:
    """Whether sums (K, D) and weights (K,) are those of float64, within the rounding of float32."""
    if weights is None:
        factors = torch.ones(len(block), dtype=torch.float64, device=block.device)
    else:
        factors = weights.double()
    rows = block.double() * factors[:, None]
    for result, terms in zip(sums, (rows, factors)):
        exact = torch.zeros_like(result).index_add_(0, labels, terms)
        # Rounding is in proportion to the sum of absolute values, however much of it cancels.
        size = torch.zeros_like(result).index_add_(0, labels, terms.abs())
        # A piece has at most 256 rows, each product rounded once.
        if not bool(((result - exact).abs() <= FLOAT32_ROUNDING * 260 * size).all()):
            return False
    return True


# --- other libraries --------------------------------------------------------------------------


def flash_package() -> str | None:
    """Name of the installed package that has Flash-KMeans' assignment, or None."""
    for name in ("flash_kmeans", "flashlib"):
        if find_spec(name) is not None:
            return name
    return None


def by_flash(centroids: Tensor, bias: Tensor | None, chunk_size: int) -> Assign:
    """Backend of Flash-KMeans' assignment by Euclidean distance.

    It multiplies float32 rows in TF32; labels may differ from ours by that rounding.
    """
    # Distances serve both metrics, so the bias is not needed: for centroids of length one the
    # nearest by distance is the nearest by cosine.
    stacked = centroids[None].contiguous()
    if flash_package() == "flash_kmeans":
        from flash_kmeans.assign_euclid_triton import (  # pyright: ignore[reportMissingImports]
            euclid_assign_triton,
        )

        def find(rows: Tensor) -> Tensor:
            return euclid_assign_triton(rows, stacked, rows.float().square().sum(2))

    else:
        from flashlib.primitives.kmeans.triton.assign import (  # pyright: ignore[reportMissingImports]
            euclid_assign_triton,
        )

        def find(rows: Tensor) -> Tensor:
            return euclid_assign_triton(rows, stacked)

    def assign(block: Tensor, labels: Tensor) -> None:
        # Triton launches on the current device, which need not be the rows'.
        with torch.cuda.device(block.device):
            labels.copy_(find(block[None])[0])

    return assign


def by_faiss_gpu(centroids: Tensor, bias: Tensor | None, chunk_size: int) -> Assign:
    """Backend of faiss's exact search on the device (float32)."""
    import faiss
    import faiss.contrib.torch_utils

    resources = faiss.StandardGpuResources()  # pyright: ignore[reportAttributeAccessIssue]
    metric = faiss.METRIC_INNER_PRODUCT if bias is None else faiss.METRIC_L2
    bank = centroids.float().contiguous()

    def assign(block: Tensor, labels: Tensor) -> None:
        _, nearest = faiss.knn_gpu(  # pyright: ignore[reportAttributeAccessIssue]
            resources,
            block.float(),
            bank,
            1,
            metric=metric,
            device=block.device.index or 0,
        )
        labels.copy_(nearest[:, 0])

    return assign
