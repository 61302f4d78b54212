"""Whole numbers and float64 far from zero: times, ids and counts keep their differences in every
operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as Theirs
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestNeighbors

from deepclust.clustering.methods import METHODS, cluster
from deepclust.data.features import from_features
from deepclust.errors import UserError
from deepclust.eval import knn_probe, linear_probe
from deepclust.ops import KMeans, kmeans, knn, partial_transport, pca_whiten, self_label, sinkhorn
from deepclust.ops.diffusion import diffusion_clusters
from deepclust.ops.precision import as_rows, computed_in, lost_by_float32
from deepclust.ops.spectral import spectral_clusters
from tests.ranks import run_ranks

NOW = 1_700_000_000
TRUTH = np.repeat([0, 1], 50)
RANDOM = np.random.default_rng(0)
TIMES = NOW + np.stack(
    [np.r_[RANDOM.integers(0, 10, 50), RANDOM.integers(60, 70, 50)] for _ in range(3)], axis=1
)
SPREAD = (
    NOW
    + np.where(TRUTH[:, None] == 0, [1, 0, 0], [0, 1, 0]) * 1000
    + RANDOM.integers(0, 30, (100, 3))
)
"""Directions that differ by a millionth."""

KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "int64": lambda x: x.astype(np.int64),
    "int32": lambda x: x.astype(np.int32),
    "uint32": lambda x: x.astype(np.uint32),
    "uint64": lambda x: x.astype(np.uint64),
    "float64": lambda x: x.astype(np.float64),
    "big endian": lambda x: x.astype(">f8"),
    "tensor of int64": lambda x: torch.tensor(x),
    "tensor of int32": lambda x: torch.tensor(x, dtype=torch.int32),
    "tensor of uint32": lambda x: torch.from_numpy(x.astype(np.uint32)),
    "tensor of float64": lambda x: torch.tensor(x, dtype=torch.float64),
}
TENSORS = [name for name in KINDS if name.startswith("tensor")]


@pytest.mark.parametrize("kind", list(KINDS))
def test_kmeans_tells_times_apart(kind: str) -> None:
    x = KINDS[kind](TIMES)
    found = kmeans(x, 2, num_restarts=3)
    assert adjusted_rand_score(TRUTH, found.labels) == 1
    theirs = Theirs(2, n_init=3, random_state=0).fit((TIMES - NOW).astype(float))
    expected = theirs.cluster_centers_[np.argsort(theirs.cluster_centers_[:, 0])]
    centers = found.centroids.numpy()
    np.testing.assert_allclose(np.sort(centers, axis=0) - NOW, expected, atol=1e-5)
    assert (
        found.inertia == pytest.approx(theirs.inertia_, rel=1e-6)
        and found.centroids.dtype == torch.float64
    )
    again = kmeans(x, 2, init=found.centroids, num_iters=0)
    assert torch.equal(again.labels, found.labels)


def test_kmeans_of_chunks_of_batches_and_of_small_numbers() -> None:
    chunks = [TIMES[:30] - NOW, TIMES[30:]]  # the first of small numbers alone
    assert kmeans(chunks, 3).centroids.dtype == torch.float64
    assert adjusted_rand_score(TRUTH, kmeans([TIMES[:30], torch.tensor(TIMES[30:])], 2).labels) == 1
    batch = np.stack([TIMES - NOW, TIMES])
    for labels in kmeans(batch, 2, num_restarts=3).labels:
        assert adjusted_rand_score(TRUTH, labels) == 1
    for small in (np.arange(40).reshape(20, 2), np.arange(40, dtype=np.uint8).reshape(20, 2)):
        found, floats = kmeans(small, 3), kmeans(small.astype(np.float32), 3)
        assert found.centroids.dtype == torch.float32 and torch.equal(
            found.centroids, floats.centroids
        )


@pytest.mark.parametrize("kind", [name for name in KINDS if "tensor" not in name])
def test_the_estimator_predicts_times(kind: str) -> None:
    x = KINDS[kind](TIMES)
    model = KMeans(2).fit(x)
    assert adjusted_rand_score(TRUTH, model.labels_) == 1 and np.array_equal(
        model.predict(x), model.labels_
    )


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("kind", TENSORS)
def test_neighbours_of_times(kind: str, metric: str) -> None:
    x = KINDS[kind](TIMES)
    values, found = knn(x, x, k=4, metric=metric, exclude_self=True)
    exact = TIMES.astype(object)  # Python's whole numbers
    squares = [[int(((a - b) ** 2).sum()) for b in exact] for a in exact]
    if metric == "euclidean":
        expected = np.sort(np.array(squares, dtype=float) + np.diag(np.full(100, np.inf)), axis=1)[
            :, :4
        ]
        np.testing.assert_allclose(values.numpy() ** 2, expected, atol=1e-6)
        assert (TRUTH[found.numpy()] == TRUTH[:, None]).all()
    if metric == "dot":
        products = np.array([[float((a * b).sum()) for b in exact] for a in exact])
        np.fill_diagonal(products, -np.inf)
        np.testing.assert_allclose(values, -np.sort(-products, axis=1)[:, :4], rtol=1e-15)
    if metric == "cosine":
        unit = TIMES / np.linalg.norm(TIMES, axis=1, keepdims=True)
        theirs = NearestNeighbors(n_neighbors=5).fit(unit).kneighbors(unit)[0][:, 1:]
        np.testing.assert_allclose(values, 1 - theirs**2 / 2, atol=1e-15)


def test_neighbours_among_rows_of_another_dtype() -> None:
    small, large = torch.tensor([[0, 3, 5]]), torch.tensor(TIMES)
    assert knn(small, large, k=1, metric="euclidean")[0].dtype == torch.float64
    assert knn(large, small, k=1, metric="euclidean")[1].unique().tolist() == [0]
    assert knn(small.float(), large, k=2)[0].dtype == torch.float64
    assert knn(small, small, k=1)[0].dtype == torch.float32


AROUND = 2**24 + np.stack([RANDOM.integers(-3000, 0, 50), RANDOM.integers(0, 3000, 50)]).reshape(
    100, 1
)


def _on_ranks(rank: int, size: int) -> torch.Tensor:
    """Numbers that float32 holds on one rank, and others on the other."""
    import torch.distributed as dist

    part = torch.tensor(AROUND[:50] if rank == 0 else AROUND[50:])
    labels = kmeans(part, 3, group=dist.group.WORLD).labels
    assert len(labels) == 50
    return knn(part, part, k=3, metric="euclidean", exclude_self=True, group=dist.group.WORLD)[0]


def test_ranks_agree_on_the_dtype() -> None:
    found = torch.cat(run_ranks(_on_ranks, 2))
    assert found.dtype == torch.float64
    expected = NearestNeighbors(n_neighbors=4).fit(AROUND).kneighbors(AROUND)[0][:, 1:]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["int64", "uint32", "float64", "tensor of int64"])
def test_whitening_is_that_of_the_differences(kind: str) -> None:
    white = pca_whiten(KINDS[kind](TIMES), 2).numpy()
    theirs = PCA(2, whiten=True, svd_solver="full").fit_transform((TIMES - NOW).astype(float))
    np.testing.assert_allclose(np.abs(white), np.abs(theirs), atol=1e-6)


def test_transport_of_whole_numbers_is_that_of_their_differences() -> None:
    scores = RANDOM.integers(0, 5, (12, 3))
    far = torch.tensor(NOW + scores)
    plan = sinkhorn(torch.tensor(scores, dtype=torch.float64), epsilon=0.5, num_iters=30)
    torch.testing.assert_close(sinkhorn(far, epsilon=0.5, num_iters=30), plan, atol=1e-6, rtol=1e-6)
    labels = self_label(torch.tensor(scores, dtype=torch.float64)).labels
    assert torch.equal(self_label(torch.tensor(scores - NOW)).labels, labels)
    near = partial_transport(torch.tensor(scores, dtype=torch.float64), mass=0.5)
    torch.testing.assert_close(
        partial_transport(far, mass=0.5).plan, near.plan, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["tensor of int64", "tensor of float64"])
def test_graphs_of_directions_that_differ_little(kind: str) -> None:
    x = KINDS[kind](SPREAD)
    assert adjusted_rand_score(TRUTH, spectral_clusters(x, 2, num_neighbors=10)) == 1
    assert adjusted_rand_score(TRUTH, diffusion_clusters(x, 2)) == 1


@pytest.mark.parametrize(
    "method", [name for name in METHODS if name not in ("umap_hdbscan", "prototypes", "tsne_gmm")]
)
def test_clusterers_take_whole_numbers(method: str) -> None:
    assert adjusted_rand_score(TRUTH, cluster(method, SPREAD, 2).labels) == 1


def test_probes_of_times() -> None:
    assert (
        linear_probe(TIMES, TRUTH) == 1
        and linear_probe(TIMES[::2], TRUTH[::2], test=(TIMES, TRUTH)) == 1
    )
    assert knn_probe(SPREAD, TRUTH, k=3) == 1


def test_features_that_float32_cannot_tell_apart_are_refused_for_training() -> None:
    for values in (TIMES, TIMES.astype(float), torch.tensor(TIMES)):
        with pytest.raises(
            UserError,
            match=r"column \d holds values around 1.7e\+09 that differ by .* Subtract each",
        ):
            from_features(values)
    assert len(from_features(TIMES - TIMES.mean(0)).train) == 100
    assert len(from_features(TIMES * 1000 % 10**6).train) == 100
    constant = np.concatenate([np.full((100, 1), NOW), RANDOM.normal(size=(100, 4)) * 10], axis=1)
    assert len(from_features(constant).train) == 100, (
        "a column that is the same everywhere tells nothing anyway"
    )


def test_what_rounding_loses() -> None:
    assert lost_by_float32(TIMES) > 1 and lost_by_float32(TIMES - NOW) == 0
    assert (
        lost_by_float32(TIMES.astype(np.float32)) == 0
        and lost_by_float32(np.full((5, 2), 0.1)) == 0
    )
    plain = RANDOM.normal(size=(100, 4))
    assert 0 < lost_by_float32(plain) < 1e-7 and as_rows(plain).dtype == np.float32
    assert (
        as_rows(TIMES).dtype == np.float64
        and as_rows(np.array([[1e300, 0], [0, 1]])).dtype == np.float64
    )


@pytest.mark.parametrize(
    ("values", "double"),
    [
        (np.array([2**24]), False),
        (np.array([2**24 + 1]), True),
        (np.array([-(2**24) - 1], dtype=np.int32), True),
        (np.array([2**63], dtype=np.uint64), True),
        (np.array([2**15], dtype=np.uint16), False),
        (np.array([], dtype=np.int64), False),
        (np.array([True]), False),
        (np.array([1.0], dtype=np.float16), False),
        (np.array([1.0]), True),
    ],
)
def test_the_dtype_of_the_computation(values: np.ndarray, double: bool) -> None:
    assert (computed_in(values) == torch.float64) is double
    assert (computed_in(torch.from_numpy(values)) == torch.float64) is double
