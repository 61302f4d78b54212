"""Eigenvectors against SciPy's dense solver: where graphs are in pieces or full of copies, and
where solvers fail.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse
import torch
from scipy.sparse.linalg import ArpackNoConvergence, aslinearoperator
from sklearn.decomposition import PCA

from deepclust.collection.derived import leading_directions
from deepclust.ops import eigen, knn, pca_whiten
from deepclust.ops.spectral import (
    graph_components,
    neighbor_graph,
    spectral_components,
    spectral_embedding,
)


def _graph(x: np.ndarray, k: int, shared: bool = False) -> scipy.sparse.csr_matrix:
    rows = torch.nn.functional.normalize(torch.tensor(x, dtype=torch.float32), dim=1)
    return neighbor_graph(
        knn(rows, rows, k=min(k, len(x) - 1), exclude_self=True)[1].numpy(), shared=shared
    )


def _normalised(graph: scipy.sparse.csr_matrix) -> np.ndarray:
    scale = np.asarray(graph.sum(1)).ravel() ** -0.5
    return graph.toarray() * scale[:, None] * scale


def _groups(num: int, groups: int, noise: float, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    centers = random.normal(size=(groups, 128))
    return centers[np.arange(num) % groups] + noise * random.normal(size=(num, 128))


def _check(matrix: np.ndarray, values: np.ndarray, vectors: np.ndarray) -> None:
    """The largest eigenvalues, eigenvectors of them, at right angles."""
    expected = scipy.linalg.eigvalsh(matrix)[::-1][: len(values)]
    np.testing.assert_allclose(values, expected, atol=1e-8)
    np.testing.assert_allclose(matrix @ vectors, vectors * values, atol=1e-8)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(values)), atol=1e-8)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_tight_groups_and_more_vectors_than_groups(groups, noise, shared):
    for num in (40, 60, 150):
        for seed in range(2):
            graph = _graph(_groups(num, groups, noise, seed), 20, shared)
            for size in (groups, 8, 10, 20, num // 2):
                values, vectors = graph_components(graph, size)
                assert len(values) == size
                _check(_normalised(graph), values.numpy(), vectors.numpy())


@pytest.mark.parametrize("seed", range(4))
def test_copies_of_an_eigenvalue_are_all_found(seed):
    random = np.random.default_rng(seed)
    x = np.repeat(random.normal(size=(20, 8)), np.arange(1, 21), axis=0)
    graph = _graph(x, 10)
    values, vectors = graph_components(graph, 60)
    _check(_normalised(graph), values.numpy(), vectors.numpy())


@pytest.mark.parametrize("num", [1, 2, 3, 12])
def test_one_row_few_rows_and_rows_that_are_all_alike(num):
    everyone = np.array(
        [[other for other in range(num) if other != row] for row in range(num)]
    ).reshape(num, num - 1)
    graph = neighbor_graph(everyone)
    values, vectors = graph_components(graph, 5)
    assert len(values) == max(1, min(5, num - 2))
    _check(_normalised(graph), values.numpy(), vectors.numpy())


def test_blocks_with_more_asked_than_blocks_and_a_matrix_of_low_rank():
    random = np.random.default_rng(0)
    blocks = [np.ones((size, size)) / size for size in (3, 5, 5, 9)]
    dense = scipy.linalg.block_diag(*blocks)
    parts = random.normal(size=(40, 3))
    for matrix in (dense, parts @ parts.T, np.zeros((6, 6)), np.eye(5), -dense):
        for num in {1, 3, 5, len(matrix) - 1, len(matrix)}:
            for given in (scipy.sparse.csr_matrix(matrix), aslinearoperator(matrix)):
                _check(matrix, *eigen.leading(given, num))


def test_a_start_that_is_an_eigenvector_gives_the_same_every_time():
    ring = np.stack([(np.arange(60) + step) % 60 for step in (-2, -1, 1, 2)], axis=1)
    graph = neighbor_graph(ring)
    found = [graph_components(graph, 6)[1] for _ in range(3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    tight = _graph(_groups(40, 2, 0.0, 1), 20)
    found = [graph_components(tight, 15)[1] for _ in range(3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_arpack_solves_stays_bit_for_bit():
    from scipy.sparse.linalg import eigsh

    x = np.random.default_rng(0).normal(size=(200, 8))
    graph = _graph(x, 10)
    scale = scipy.sparse.diags(np.asarray(graph.sum(axis=1)).ravel() ** -0.5)
    values, vectors = eigsh(scale @ graph @ scale, k=7, which="LA", v0=np.ones(200))
    order = np.argsort(-values)
    found = graph_components(graph, 7)
    assert np.array_equal(found[0].numpy(), values[order]) and np.array_equal(
        found[1].numpy(), vectors[:, order]
    )


def _fail(*args, **options):
    raise ArpackNoConvergence("no convergence", np.zeros(0), np.zeros((0, 0)))


@pytest.mark.parametrize("most", [0, 6000])
def test_without_arpack_others_find_the_same(monkeypatch, most):
    graph = _graph(np.random.default_rng(0).normal(size=(300, 16)), 10)
    monkeypatch.setattr(eigen, "MAX_DENSE", most)
    monkeypatch.setattr(eigen, "_arpack", _fail)
    values, vectors = graph_components(graph, 8)
    matrix = _normalised(graph)
    tolerance = 1e-4 if most == 0 else 1e-8
    np.testing.assert_allclose(values, scipy.linalg.eigvalsh(matrix)[::-1][:8], atol=tolerance)
    np.testing.assert_allclose(matrix @ vectors.numpy(), vectors * values, atol=tolerance)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(8), atol=tolerance)


def test_solvers_that_all_fail_are_an_error_and_none_is_believed_unseen(monkeypatch):
    graph = _graph(np.random.default_rng(0).normal(size=(60, 8)), 6)
    monkeypatch.setattr(
        eigen, "_arpack", lambda matrix, num, *rest: (np.ones(num), np.eye(60)[:, :num])
    )
    _check(_normalised(graph), *(part.numpy() for part in graph_components(graph, 4)))
    monkeypatch.setattr(eigen, "_as_dense", _fail)
    with pytest.raises(np.linalg.LinAlgError, match="4 leading eigenvectors of this 60 x 60"):
        graph_components(graph, 4)


def test_what_is_not_finite_or_not_there_is_refused():
    matrix = scipy.sparse.csr_matrix(np.diag([1.0, np.nan, 2.0]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        eigen.leading(matrix, 1)
    for wrong in (0, 4):
        with pytest.raises(ValueError, match="choose from 1 to 3"):
            eigen.leading(scipy.sparse.identity(3, format="csr"), wrong)
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            eigen.eigh(torch.full((2, 2), value))
        with pytest.raises(ValueError, match="NaN or infinite"):
            eigen.dense(np.full((2, 2), value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_matrices_with_dead_rows_with_and_without_torchs_solver(monkeypatch, dtype):
    random = np.random.default_rng(0)
    parts = np.zeros((12, 60))
    parts[:, random.choice(60, 20, replace=False)] = random.normal(size=(12, 20))
    matrix = torch.tensor(parts.T @ parts, dtype=dtype)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    usual = torch.linalg.eigh(matrix)
    found = eigen.eigh(matrix)
    assert torch.equal(found[0], usual[0]) and torch.equal(found[1], usual[1])

    def fails(*args, **options):
        raise torch.linalg.LinAlgError("failed to converge")

    def fails_too(*args, **options):
        raise np.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    for solver in (np.linalg.eigh, fails_too):
        monkeypatch.setattr(np.linalg, "eigh", solver)
        values, vectors = eigen.eigh(matrix)
        assert values.dtype == vectors.dtype == dtype
        torch.testing.assert_close(values, usual[0], atol=tolerance, rtol=0)
        torch.testing.assert_close(matrix @ vectors, vectors * values, atol=tolerance, rtol=0)
        torch.testing.assert_close(
            vectors.T @ vectors, torch.eye(60, dtype=dtype), atol=tolerance, rtol=0
        )


def test_leading_directions_of_features_that_are_mostly_zero():
    for dim, live in ((384, 20), (1280, 116)):
        for seed, num in ((2, 12), (0, 45)):
            random = np.random.default_rng(seed)
            features = np.zeros((num, dim))
            columns = random.choice(dim, live, replace=False)
            base = np.abs(random.normal(size=live))
            features[:, columns] = np.maximum(
                0, base * (1 + 0.01 * random.normal(size=(num, live)))
            )
            basis = leading_directions(features.astype(np.float16), np.arange(num), 128)
            torch.testing.assert_close(basis.T @ basis, torch.eye(128), atol=1e-5, rtol=0)
            unit = torch.nn.functional.normalize(torch.from_numpy(features).float(), dim=1)
            torch.testing.assert_close(
                (unit @ basis).norm(dim=1), torch.ones(num), atol=1e-5, rtol=0
            )
            white = pca_whiten(features.astype(np.float32), live // 2)
            assert bool(white.isfinite().all())


@pytest.mark.parametrize("shape", [(30, 8), (8, 30)])
def test_principal_scores_are_those_of_scikit_learn_also_without_its_decomposition(
    monkeypatch, shape
):
    x = np.random.default_rng(0).normal(size=shape) + 3
    expected = PCA(5, svd_solver="full").fit_transform(x)
    np.testing.assert_array_equal(eigen.principal_scores(x, 5), expected)

    def fails(*args, **options):
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(PCA, "fit_transform", fails)
    np.testing.assert_allclose(np.abs(eigen.principal_scores(x, 5)), np.abs(expected), atol=1e-9)


def test_embeddings_of_few_tight_groups_have_as_many_columns_as_asked():
    for num, size in ((40, 10), (60, 22)):
        x = torch.nn.functional.normalize(torch.tensor(_groups(num, 2, 0.2, 1)).float(), dim=1)
        assert spectral_embedding(x, size).shape == (num, size)
        assert spectral_components(x, size)[1].shape == (num, size)
