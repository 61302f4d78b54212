"""The CUDA side of k-means: kernels in triton's interpreter, the guard around them, backends by
name.

triton decides when it is imported whether it interprets, so the tests marked `interpreted` run in a
process of their own, which `test_everything_interpreted` starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import types
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from deepclust.ops import kmeans
from deepclust.ops.kmeans import gpu
from deepclust.ops.kmeans.assign import backend_for, bias_of, by_torch, rows_at_a_time
from deepclust.ops.kmeans.step import segment_sums

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_everything_interpreted")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_guard(monkeypatch):
    monkeypatch.setattr(gpu, "GUARD", gpu.Guard())


def mixture(num: int, dim: int, modes: int = 10, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(modes, dim, generator=generator)
    return centres[torch.randint(modes, (num,), generator=generator)] + torch.randn(
        num, dim, generator=generator
    )


@pytest.mark.skipif(
    INTERPRETED or find_spec("triton") is None, reason="needs triton; starts the process with it"
)
def test_everything_interpreted():
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout


# --- kernels against float64 ------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("num", "dim", "num_clusters"),
    [(300, 48, 37), (65, 3, 1), (64, 130, 129), (1, 1, 2), (100, 257, 16), (129, 16, 64)],
)
def test_labels_against_float64(num, dim, num_clusters, biased, dtype):
    from deepclust.ops.kmeans import kernels

    x = mixture(num, dim).to(dtype)
    centroids = torch.cat(
        [x[:num_clusters].float(), mixture(max(num_clusters - num, 0), dim, seed=1)]
    )
    bias = bias_of(centroids, False) if biased else None
    labels = torch.full((num,), -7)
    kernels.assign(x, centroids, bias, labels)
    scores = x.double() @ centroids.double().T + (0 if bias is None else bias.double())
    assert gpu.num_wrong(x, centroids, bias, labels, scores.argmax(1)) == 0
    assert float((labels != scores.argmax(1)).double().mean()) < 0.02


@interpreted
@pytest.mark.parametrize("precision", list(gpu.INPUT_ROUNDING))
def test_the_lowest_index_among_equals_wins(precision):
    from deepclust.ops.kmeans import kernels

    # Small whole numbers: every product and sum is exact, so twins score alike in whatever order a
    # processor adds.
    x = mixture(80, 20).round()
    twins = x[:30].repeat(5, 1)
    labels = torch.empty(80, dtype=torch.int64)
    kernels.assign(x, twins, bias_of(twins, False), labels, precision)
    assert int(labels.max()) < 30
    kernels.assign(torch.zeros(80, 20), torch.zeros(200, 20), None, labels, precision)
    assert not labels.any()


@interpreted
def test_strided_rows_and_scores_that_overflow():
    from deepclust.ops.kmeans import kernels

    wide = mixture(100, 40)
    labels = torch.full((100,), -1)
    kernels.assign(wide[:, 7:29], wide[:9, 7:29], bias_of(wide[:9, 7:29], False), labels)
    assert torch.equal(
        labels, (wide[:, 7:29] @ wide[:9, 7:29].T + bias_of(wide[:9, 7:29], False)).argmax(1)
    )
    kernels.assign(wide, wide[:9], torch.full((9,), float("-inf")), labels)
    assert not labels.any()
    kernels.assign(wide[:0], wide[:9], None, labels[:0])


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("num", "dim", "num_clusters"), [(700, 5, 3), (20, 70, 5), (1, 1, 4), (513, 3, 1)]
)
def test_sums_against_float64_and_twice_the_same(num, dim, num_clusters, weighted, dtype):
    from deepclust.ops.kmeans import kernels

    generator = torch.Generator().manual_seed(3)
    x = mixture(num, dim).to(dtype)
    labels = torch.randint(num_clusters, (num,), generator=generator)
    labels[labels == 1] = 0
    weights = torch.rand(num, generator=generator) if weighted else None
    sums, totals = kernels.segment_sums(x, labels, num_clusters, weights)
    factors = torch.ones(num, dtype=torch.float64) if weights is None else weights.double()
    exact = torch.zeros(num_clusters, dim, dtype=torch.float64).index_add_(
        0, labels, x.double() * factors[:, None]
    )
    torch.testing.assert_close(sums, exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        totals, torch.zeros(num_clusters, dtype=torch.float64).index_add_(0, labels, factors)
    )
    again = kernels.segment_sums(x, labels, num_clusters, weights)
    assert torch.equal(sums, again[0]) and torch.equal(totals, again[1])


@interpreted
@pytest.mark.parametrize(
    ("backend", "weighted", "spherical"),
    [
        ("triton", False, False),
        ("triton", True, True),
        ("triton-tf32x3", False, True),
        ("triton-tf32", True, False),
    ],
)
def test_the_whole_run_equals_torch(backend, weighted, spherical):
    x = mixture(300, 12)
    weights = torch.rand(300, generator=torch.Generator().manual_seed(1)) if weighted else None
    options = {"init": x[:8], "num_iters": 2, "sample_weights": weights, "spherical": spherical}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = kmeans(x, 8, backend=backend, **options)
    plain = kmeans(x, 8, backend="torch", **options)
    assert torch.equal(ours.labels, plain.labels)
    torch.testing.assert_close(ours.centroids, plain.centroids)
    assert ours.inertia == pytest.approx(plain.inertia, rel=1e-5)


@interpreted
def test_float64_rows_go_to_torch():
    x = mixture(200, 6).double()
    ours, plain = (kmeans(x, 5, init=x[:5], backend=name) for name in ("triton", "torch"))
    assert torch.equal(ours.labels, plain.labels) and ours.centroids.dtype == torch.float64


# --- the guard --------------------------------------------------------------------------------


def wrong_kernel(x, centroids, bias, labels, precision):
    """Right but for its last row, as a kernel with a bad mask would be."""
    labels.copy_((x @ centroids.T + (0 if bias is None else bias)).argmax(1))
    labels[-1] = (labels[-1] + 1) % len(centroids)


def raising_kernel(*_):
    raise RuntimeError("out of resource: shared memory")


def out_of_range_kernel(x, centroids, bias, labels, precision):
    labels.fill_(len(centroids))


@interpreted
@pytest.mark.parametrize(
    ("kernel", "problem"),
    [
        (wrong_kernel, "1 of 300 labels were wrong"),
        (raising_kernel, "out of resource"),
        (out_of_range_kernel, "300 of 300"),
    ],
)
def test_a_bad_kernel_costs_one_warning_and_no_label(kernel, problem, monkeypatch):
    from deepclust.ops.kmeans import kernels

    monkeypatch.setattr(kernels, "assign", kernel)
    monkeypatch.setattr(
        kernels, "segment_sums", lambda *about: [part.double() for part in segment_sums(*about)]
    )
    x = mixture(300, 8)
    plain = kmeans(x, 6, init=x[:6], num_iters=2, backend="torch")
    with pytest.warns(RuntimeWarning) as caught:
        ours = kmeans(x, 6, init=x[:6], num_iters=2, backend="triton")
        again = kmeans(x, 6, init=x[:6], num_iters=2, backend="triton")
    assert [problem in str(one.message) for one in caught] == [True]
    assert "backend='torch'" in str(caught[0].message)
    assert torch.equal(ours.labels, plain.labels) and torch.equal(again.centroids, ours.centroids)


@interpreted
@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_bad_sum_costs_one_warning(fault, monkeypatch):
    from deepclust.ops.kmeans import kernels

    own = kernels.segment_sums

    def bad(x, labels, num_clusters, weights):
        if fault == "raises":
            raise RuntimeError("no such instruction")
        sums, totals = own(x, labels, num_clusters, weights)
        sums[0, 0] += 0.1
        return sums, totals

    monkeypatch.setattr(kernels, "segment_sums", bad)
    x = mixture(300, 8)
    plain = kmeans(x, 6, init=x[:6], num_iters=2, backend="torch")
    with pytest.warns(
        RuntimeWarning, match="sums of clusters were wrong|no such instruction"
    ) as caught:
        ours = kmeans(x, 6, init=x[:6], num_iters=2, backend="triton")
    assert len(caught) == 1
    assert torch.equal(ours.labels, plain.labels)


@interpreted
def test_the_guard_looks_at_4096_rows_and_no_more(monkeypatch):
    from deepclust.ops.kmeans import kernels

    looked = []
    monkeypatch.setattr(
        kernels, "assign", lambda x, c, bias, labels, _: labels.copy_((x @ c.T + bias).argmax(1))
    )
    monkeypatch.setattr(gpu, "num_wrong", lambda rows, *_: looked.append(len(rows)) or 0)
    x = mixture(3000, 4)
    find = backend_for("triton", CPU)(x[:5], bias_of(x[:5], False), 256)
    for _ in range(3):
        find(x, torch.empty(3000, dtype=torch.int64))
    assert looked == [3000, 1096]


@interpreted
def test_half_precision_rows_are_guarded_too():
    x = mixture(100, 9)
    find = backend_for("triton", CPU)(x[:5], bias_of(x[:5], False), 256)
    labels = torch.empty(100, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find(x.half(), labels)
    assert gpu.GUARD.left and torch.equal(
        labels, (x.half().float() @ x[:5].T + bias_of(x[:5], False)).argmax(1)
    )


def test_only_proven_ties_are_forgiven():
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    centroids = torch.stack([x.mean(0), x.mean(0), x.mean(0) + 1])
    bias = bias_of(centroids, False)
    best = (x @ centroids.T + bias).argmax(1)
    twins = torch.where(best == 0, 1, best)
    assert gpu.num_wrong(x, centroids, bias, twins, best) == 0
    swapped = torch.where(best == 2, 0, 2)
    assert gpu.num_wrong(x, centroids, bias, swapped, best) == 50
    # A label better than the expected one is not wrong, one that is not a number is.
    assert gpu.num_wrong(x, centroids, bias, best, swapped) == 0
    centroids[2] = float("nan")
    assert (
        gpu.num_wrong(x, centroids, bias, torch.full((50,), 2), torch.zeros(50, dtype=torch.int64))
        == 50
    )


def test_the_bound_widens_with_what_a_precision_drops():
    x, centroids = torch.ones(1, 4), torch.ones(2, 4)
    centroids[1] -= 2.0**-12
    found, expected = torch.tensor([1]), torch.tensor([0])
    assert gpu.num_wrong(x, centroids, None, found, expected, "ieee") == 1
    assert gpu.num_wrong(x, centroids, None, found, expected, "tf32x3") == 1
    assert gpu.num_wrong(x, centroids, None, found, expected, "tf32") == 0


# --- backends by name -------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="the interpreter makes the processor a device of triton's")
@pytest.mark.parametrize("name", list(gpu.GPU_BACKENDS))
def test_gpu_backends_name_the_device_they_need(name):
    with pytest.raises(
        ValueError, match=rf"backend='{name}': works on CUDA devices, the rows are on cpu"
    ):
        kmeans(mixture(50, 3), 4, backend=name)


@pytest.mark.parametrize(
    ("name", "missing", "fix"),
    [
        ("triton", "triton", "pip install triton"),
        ("triton-tf32", "triton", "pip install triton"),
        ("flash-kmeans", "flash_kmeans", "pip install flash-kmeans"),
    ],
)
def test_a_missing_package_is_named(name, missing, fix, monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=missing) as raised:
        backend_for(name, torch.device("cuda"))
    assert fix in str(raised.value)


def test_faiss_for_the_processor_is_refused_on_cuda():
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="install faiss-gpu"):
        backend_for("faiss", torch.device("cuda"))


def test_auto_takes_triton_only_where_it_is(monkeypatch):
    cuda = torch.device("cuda")
    assert gpu.sums_for("auto", CPU) is segment_sums
    monkeypatch.setattr(gpu, "find_spec", lambda _: None)
    assert gpu.sums_for("auto", cuda) is segment_sums
    assert backend_for("auto", cuda) is by_torch
    monkeypatch.setattr(gpu, "find_spec", lambda _: object())
    assert backend_for("auto", cuda) is not by_torch
    assert (
        gpu.sums_for("auto", cuda) is gpu.by_cluster and gpu.sums_for("torch", cuda) is segment_sums
    )


def test_scores_fill_half_of_the_second_level_cache(monkeypatch):
    properties = types.SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    rows = rows_at_a_time(3000, 128, torch.device("cuda"))
    assert rows * 3000 * 4 <= 25 << 20 < (rows + 1) * 3000 * 4


@pytest.mark.parametrize("package", ["flash_kmeans", "flashlib"])
def test_flash_kmeans_is_asked_for_the_nearest(package, monkeypatch):
    """Their packages assert CUDA; here stand-ins with their signatures."""

    def with_squares(x, centroids, x_sq):
        return (
            ((x_sq[:, :, None] - 2 * x @ centroids.mT) + centroids.square().sum(2)[:, None])
            .argmin(2)
            .int()
        )

    def without(x, centroids):
        return with_squares(x, centroids, x.square().sum(2))

    where = {"flash_kmeans": "assign_euclid_triton", "flashlib": "primitives.kmeans.triton.assign"}[
        package
    ]
    parts = [package, *where.split(".")]
    for depth in range(1, len(parts) + 1):
        monkeypatch.setitem(
            sys.modules, ".".join(parts[:depth]), types.ModuleType(parts[depth - 1])
        )
    module = sys.modules[f"{package}.{where}"]
    monkeypatch.setattr(
        module,
        "euclid_assign_triton",
        with_squares if package == "flash_kmeans" else without,
        raising=False,
    )
    monkeypatch.setattr(gpu, "flash_package", lambda: package)
    monkeypatch.setattr(torch.cuda, "device", lambda _: warnings.catch_warnings())
    x = mixture(200, 6)
    labels = torch.empty(200, dtype=torch.int64)
    gpu.by_flash(x[:9], bias_of(x[:9], False), 64)(x, labels)
    assert torch.equal(labels, (x @ x[:9].T + bias_of(x[:9], False)).argmax(1))
