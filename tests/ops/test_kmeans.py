"""k-means against a float64 oracle, scikit-learn, faiss and its own properties."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepclust.ops import kmeans
from deepclust.ops.kmeans import assign
from deepclust.ops.kmeans.assign import BACKENDS, backend_for, bias_of


def mixture(num: int, dim: int, modes: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(modes, dim, generator=generator)
    rows = torch.randint(modes, (num,), generator=generator)
    return centres[rows] + spread * torch.randn(num, dim, generator=generator)


def oracle(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """(N, K) squared distances in float64, from the differences."""
    return torch.cdist(
        x.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).square()


def assert_nearest(
    x: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor, tol: float = 2e-6
) -> None:
    """Every label is a nearest centroid; only ties of float32's own size may fall either way."""
    distances = oracle(x, centroids)
    gap = distances.gather(1, labels[:, None])[:, 0] - distances.amin(1)
    scale = (x.double().norm(dim=1) + centroids.double().norm(dim=1).max()).square()
    assert bool((gap <= tol * scale).all())
    assert float((distances.argmin(1) != labels).double().mean()) < 0.002


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize(
    ("num", "dim", "num_clusters"), [(5000, 32, 50), (700, 3, 1), (1000, 130, 257), (300, 1, 7)]
)
def test_one_step_against_a_float64_oracle(
    backend: str, num: int, dim: int, num_clusters: int
) -> None:
    if backend == "faiss":
        pytest.importorskip("faiss")
    x = mixture(num, dim, 20)
    start = x[:num_clusters].clone()
    labels = torch.empty(num, dtype=torch.int64)
    backend_for(backend, x.device)(start, bias_of(start, False), 256)(x, labels)
    assert_nearest(x, start, labels)
    found = kmeans(x, num_clusters, init=start, num_iters=1, empty="keep", backend=backend)
    nearest = oracle(x, start).argmin(1)
    means = torch.stack([x[nearest == k].double().mean(0) for k in range(num_clusters)])
    torch.testing.assert_close(found.centroids.double(), means, rtol=1e-4, atol=1e-4)
    assert_nearest(x, found.centroids, found.labels)
    exact = oracle(x, found.centroids).gather(1, found.labels[:, None]).sum()
    assert found.inertia == pytest.approx(float(exact), rel=1e-5)
    assert torch.equal(found.counts, torch.bincount(found.labels, minlength=num_clusters))


@pytest.mark.parametrize("weighted", [False, True])
def test_equals_scikit_learn_from_the_same_start(weighted: bool) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    x = mixture(3000, 16, 30, spread=2.0)
    weights = torch.rand(3000, generator=torch.Generator().manual_seed(1)) if weighted else None
    start = x[:30].clone()
    ours = kmeans(x, 30, init=start, num_iters=12, sample_weights=weights)
    theirs = cluster.KMeans(30, init=start.numpy(), n_init=1, max_iter=12, tol=0).fit(
        x.numpy(), sample_weight=None if weights is None else weights.numpy()
    )
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-5)
    np.testing.assert_allclose(ours.centroids.numpy(), theirs.cluster_centers_, atol=2e-3)
    assert np.mean(ours.labels.numpy() != theirs.labels_) < 1e-3


def test_spherical_equals_faiss() -> None:
    faiss = pytest.importorskip("faiss")
    x = torch.nn.functional.normalize(mixture(2000, 24, 15, spread=2.0), dim=1)
    start = x[:15].clone()
    peer = faiss.Kmeans(24, 15, niter=8, spherical=True, max_points_per_centroid=10**9)
    peer.train(x.numpy(), init_centroids=start.numpy())
    ours = kmeans(x, 15, init=start, num_iters=8, spherical=True)
    np.testing.assert_allclose(ours.centroids.numpy(), peer.centroids, atol=1e-4)


def test_spherical_ignores_lengths() -> None:
    x = mixture(1500, 8, 10, spread=2.0)
    lengths = 0.1 + torch.rand(1500, 1, generator=torch.Generator().manual_seed(3))
    start = x[:10].clone()
    plain = kmeans(torch.nn.functional.normalize(x, dim=1), 10, init=start, spherical=True)
    scaled = kmeans(x * lengths, 10, init=start, spherical=True)
    assert torch.equal(plain.labels, scaled.labels)
    assert scaled.inertia == pytest.approx(plain.inertia, rel=1e-5)
    torch.testing.assert_close(scaled.centroids.norm(dim=1), torch.ones(10))


@pytest.mark.parametrize("init", ["k-means++", "random", "k-means||"])
@pytest.mark.parametrize("spherical", [False, True])
def test_objective_never_rises(init: str, spherical: bool) -> None:
    x = mixture(800, 6, 12, spread=2.0)
    values = [kmeans(x, 25, init=init, num_iters=t, spherical=spherical).inertia for t in range(12)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(values))
    assert values[-1] < values[0]


def test_a_start_found_carefully_is_better_than_random_rows() -> None:
    x = mixture(4000, 16, 100)
    careful = [kmeans(x, 100, seed=seed, num_iters=20).inertia for seed in range(3)]
    parallel = [
        kmeans(x, 100, init="k-means||", seed=seed, num_iters=20).inertia for seed in range(3)
    ]
    random = [kmeans(x, 100, init="random", seed=seed, num_iters=20).inertia for seed in range(3)]
    assert max(careful) < 0.9 * min(random)
    assert max(parallel) < 0.9 * min(random)


def test_repeats_by_seed_and_leaves_the_global_generators_alone() -> None:
    x = mixture(600, 5, 8, spread=3.0)
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (kmeans(x, 20, seed=3, num_restarts=2, num_iters=4) for _ in range(2))
    assert torch.equal(first.centroids, second.centroids)
    assert torch.equal(first.labels, second.labels)
    assert not torch.equal(first.centroids, kmeans(x, 20, seed=4, num_iters=4).centroids)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("amd", [False, True])
def test_nothing_is_timed_unless_asked_for(amd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = mixture(900, 20, 40)
    asked = []
    monkeypatch.setattr(assign, "_trial", lambda *shape: asked.append(shape) or "numpy")
    monkeypatch.setattr(
        assign.Path, "read_text", lambda path: "vendor_id : AuthenticAMD" if amd else ""
    )
    assign._steady.cache_clear()
    first, second = (kmeans(x, 40, num_iters=3) for _ in range(2))
    assert torch.equal(first.centroids, second.centroids)
    assert not asked
    timed = kmeans(x, 40, num_iters=3, backend="fastest")
    assert asked
    assert timed.inertia == pytest.approx(first.inertia, rel=1e-5)
    assign._steady.cache_clear()


def test_restarts_keep_the_best() -> None:
    x = mixture(500, 4, 30)
    single = [kmeans(x, 30, init="random", seed=seed).inertia for seed in range(4)]
    many = [kmeans(x, 30, init="random", num_restarts=4, seed=seed).inertia for seed in range(4)]
    assert all(best <= first for best, first in zip(many, single))
    assert sum(many) < sum(single)


def test_tolerance_stops_early_and_zero_runs_to_the_fixed_point() -> None:
    x = mixture(2000, 8, 20, spread=3.0)
    full = kmeans(x, 20, num_iters=500)
    assert full.num_iters < 500
    assert kmeans(x, 20, init=full.centroids, num_iters=1).inertia == pytest.approx(
        full.inertia, rel=1e-7
    )
    assert kmeans(x, 20, num_iters=500, tol=1e-1).num_iters < full.num_iters


@pytest.mark.parametrize("empty", ["split", "keep", "random"])
@pytest.mark.parametrize("spherical", [False, True])
def test_empty_clusters_are_counted_and_mended(empty: str, spherical: bool) -> None:
    x = mixture(400, 4, 5)
    start = torch.cat([x[:2], torch.full((6, 4), -50.0) if spherical else torch.full((6, 4), 1e4)])
    found = kmeans(x, 8, init=start, num_iters=30, empty=empty, spherical=spherical)
    assert found.num_empty > 0
    assert bool(torch.isfinite(found.centroids).all())
    if empty != "keep":
        assert int(found.counts.min()) > 0
    elif not spherical:
        assert torch.equal(found.centroids[2:], start[2:])


@pytest.mark.parametrize("empty", ["split", "keep", "random"])
def test_fewer_distinct_rows_than_clusters(empty: str) -> None:
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0], [5.0, 5.0]]).repeat(20, 1)
    found = kmeans(x, 10, empty=empty, num_iters=20)
    assert found.inertia == pytest.approx(0, abs=1e-6)
    assert bool(torch.isfinite(found.centroids).all())
    assert int(found.counts.sum()) == 60


def test_extremes() -> None:
    x = mixture(60, 5, 4)
    one = kmeans(x, 1)
    torch.testing.assert_close(one.centroids[0], x.mean(0))
    assert one.inertia == pytest.approx(float((x - x.mean(0)).square().sum()), rel=1e-5)
    each = kmeans(x, 60)
    assert each.inertia == pytest.approx(0, abs=1e-6)
    assert sorted(each.labels.tolist()) == list(range(60))
    constant = kmeans(torch.full((30, 4), 7.0), 5)
    torch.testing.assert_close(constant.centroids, torch.full((5, 4), 7.0))
    assert constant.inertia == pytest.approx(0, abs=1e-6)
    assert kmeans(torch.zeros(9, 3), 4, spherical=True).counts.sum() == 9


def test_far_from_the_origin() -> None:
    x = mixture(1000, 6, 10)
    near = kmeans(x, 10, init=x[:10])
    far = kmeans((x.double() + 1e4).float(), 10, init=(x[:10].double() + 1e4).float())
    assert far.inertia == pytest.approx(near.inertia, rel=1e-3)
    torch.testing.assert_close(
        kmeans(x.double() + 1e5, 10).centroids - 1e5, kmeans(x.double(), 10).centroids
    )


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64]
)
def test_dtypes(dtype: torch.dtype) -> None:
    x = (mixture(500, 6, 5) * 4 + 100).to(dtype)
    found = kmeans(x, 5)
    assert found.centroids.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_nearest(x.double(), found.centroids, found.labels)
    assert found.inertia == pytest.approx(kmeans(x.double(), 5).inertia, rel=1e-4)


def test_layouts_and_containers_agree(tmp_path) -> None:
    x = mixture(1000, 12, 10, spread=2.0)
    want = kmeans(x, 10, num_iters=6)
    wide = torch.zeros(1000, 24)
    wide[:, ::2] = x
    np.save(tmp_path / "x.npy", x.numpy())
    chunks = [x[:1], x[1:400].numpy(), x[400:]]
    others = [
        x.T.contiguous().T,
        wide[:, ::2],
        x.numpy(),
        np.load(tmp_path / "x.npy", mmap_mode="r"),
    ]
    others += [x.numpy().astype(">f4"), x.clone().requires_grad_(), chunks, tuple(chunks)]
    for other in others:
        got = kmeans(other, 10, num_iters=6)
        torch.testing.assert_close(got.centroids, want.centroids, rtol=1e-5, atol=1e-5)
        assert not got.centroids.requires_grad


def test_chunk_size_changes_nothing() -> None:
    x = mixture(1000, 12, 10, spread=2.0)
    want = kmeans(x, 10, num_iters=6)
    for chunk_size in (1, 7, 5000):
        torch.testing.assert_close(
            kmeans(x, 10, num_iters=6, chunk_size=chunk_size).centroids, want.centroids
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_bad_rows_are_named(bad: float) -> None:
    x = mixture(3000, 4, 4)
    x[[17, 2500], [0, 3]] = bad
    with pytest.raises(ValueError, match=r"rows 17, 2500 hold NaN, infinity"):
        kmeans(x, 4)


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (torch.zeros(3), {}, r"expected shape \(N, D\)"),
        (torch.zeros(3, 2, dtype=torch.complex64), {}, "real numbers"),
        ((torch.zeros(2, 2) for _ in range(2)), {}, "read only once"),
        (torch.zeros(1, 2), {}, "num_clusters=2"),
        (torch.zeros(0, 2), {}, "num_clusters=2"),
        (torch.zeros(9, 2), {"init": "best"}, "init='best'"),
        (torch.zeros(9, 2), {"init": torch.zeros(3, 2)}, r"expected shape \(2, 2\)"),
        (torch.zeros(9, 2), {"init": torch.full((2, 2), float("nan"))}, "NaN"),
        (torch.zeros(9, 2), {"empty": "drop"}, "empty='drop'"),
        (torch.zeros(9, 2), {"backend": "magic"}, "backend='magic'"),
        (torch.zeros(9, 2), {"tol": float("nan")}, "tol=nan"),
        (torch.zeros(9, 2), {"sample_weights": torch.zeros(9)}, "all are zero"),
        (torch.zeros(9, 2), {"sample_weights": torch.full((9,), -1.0)}, "at least 0"),
        (torch.zeros(9, 2), {"sample_weights": torch.ones(8)}, r"expected shape \(9,\)"),
        ([torch.zeros(3, 2), torch.zeros(3, 4)], {}, "expected chunks"),
    ],
)
def test_nonsense_is_refused(x, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kmeans(x, 2, **arguments)


def test_an_exception_from_the_callback_ends_the_run() -> None:
    seen = []

    def stop(iteration: int) -> None:
        seen.append(iteration)
        if iteration == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kmeans(mixture(500, 4, 9, spread=3.0), 9, on_iteration=stop)
    assert seen == [1, 2]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_small_problem(data: st.DataObject) -> None:
    num, dim = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5))
    values = data.draw(st.lists(st.integers(-3, 3), min_size=num * dim, max_size=num * dim))
    x = torch.tensor(values, dtype=torch.float32).reshape(num, dim)
    num_clusters = data.draw(st.integers(1, num))
    empty = data.draw(st.sampled_from(["split", "keep", "random"]))
    found = kmeans(x, num_clusters, empty=empty, num_iters=data.draw(st.integers(0, 8)))
    distances = oracle(x, found.centroids)
    torch.testing.assert_close(
        distances.gather(1, found.labels[:, None])[:, 0], distances.amin(1), rtol=1e-4, atol=1e-4
    )
    assert int(found.counts.sum()) == num
    start = x[:num_clusters]
    values = [
        kmeans(x, num_clusters, init=start, num_iters=t, empty=empty).inertia for t in range(5)
    ]
    if empty != "random":
        assert all(after <= before + 1e-4 * (1 + before) for before, after in pairwise(values))
    shuffled = torch.randperm(num, generator=torch.Generator().manual_seed(0))
    one, other = (
        kmeans(rows, num_clusters, init=start, num_iters=1, empty="keep")
        for rows in (x, x[shuffled])
    )
    torch.testing.assert_close(one.centroids, other.centroids, rtol=1e-4, atol=1e-4)
