"""Spectral clusters against scikit-learn and where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import SpectralClustering
from sklearn.datasets import load_digits, make_moons
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestNeighbors, kneighbors_graph

from deepclust.ops.spectral import (
    neighbor_graph,
    spectral_clusters,
    spectral_components,
    spectral_embedding,
)
from tests.ranks import run_ranks


def test_two_moons_which_kmeans_cannot_part():
    points, truth = make_moons(300, noise=0.05, random_state=0)
    lifted = torch.tensor(np.c_[points, 3 * np.ones(len(points))], dtype=torch.float32)
    found = spectral_clusters(lifted, 2, num_neighbors=8, extra_components=0)
    assert adjusted_rand_score(truth, found) > 0.99


def test_agrees_with_scikit_learn_on_digits():
    pixels, truth = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32)
    x = x / x.norm(dim=1, keepdim=True)
    ours = spectral_clusters(x, 10, num_neighbors=10, extra_components=0)
    theirs = SpectralClustering(
        10, affinity="nearest_neighbors", n_neighbors=10, random_state=0
    ).fit_predict(x.numpy())
    assert adjusted_rand_score(truth, ours) > adjusted_rand_score(truth, theirs) - 0.05


def test_the_embedding_is_made_of_eigenvectors():
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(60, 5), dim=1)
    found = spectral_embedding(x, 4, num_neighbors=6)
    assert found.shape == (60, 4)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(60))
    again = spectral_embedding(x, 4, num_neighbors=6)
    assert torch.equal(found, again)


def test_fewer_components_are_the_first_of_more():
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(60, 5), dim=1)
    values, vectors = spectral_components(x, 8, num_neighbors=6)
    fewer, first = spectral_components(x, 4, num_neighbors=6)
    assert values[0] == pytest.approx(1) and (values.diff() <= 0).all()
    torch.testing.assert_close(values[:4], fewer)
    torch.testing.assert_close(
        (vectors[:, :4] * first).sum(0).abs(), torch.ones(4, dtype=torch.float64)
    )


@pytest.mark.parametrize("num_components", [3, 6, 11])
def test_a_graph_in_pieces_has_one_component_for_each(num_components):
    pieces = torch.arange(120) % 6
    random = torch.Generator().manual_seed(0)
    x = torch.eye(12)[pieces] + 0.1 * torch.randn(120, 12, generator=random)
    x = torch.nn.functional.normalize(x, dim=1)
    values, vectors = spectral_components(x, num_components, num_neighbors=8)
    near = torch.from_numpy(NearestNeighbors(n_neighbors=9).fit(x.numpy()).kneighbors(x.numpy())[1])
    graph = torch.zeros(120, 120, dtype=torch.float64).scatter_(1, near, 1.0)
    graph = (graph + graph.T) / 2
    scale = graph.sum(1).rsqrt()
    matrix = scale[:, None] * graph * scale
    expected = torch.linalg.eigvalsh(matrix).flip(0)[:num_components]
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(matrix @ vectors, vectors * values)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(num_components, dtype=torch.float64))
    assert adjusted_rand_score(pieces, spectral_clusters(x, 6, num_neighbors=8)) == 1


def _part(rank: int, size: int, x: torch.Tensor) -> torch.Tensor:
    import torch.distributed as dist

    rows = slice(0, 25) if rank == 0 else slice(25, 60)
    return spectral_clusters(x[rows], 3, num_neighbors=6, group=dist.group.WORLD)


def test_two_ranks_find_what_one_finds():
    torch.manual_seed(0)
    x = torch.randn(60, 5)
    together = torch.cat(run_ranks(_part, 2, x))
    assert torch.equal(together, spectral_clusters(x, 3, num_neighbors=6))


def test_edges_weigh_what_their_ends_share():
    x = torch.nn.functional.normalize(
        torch.randn(50, 4, generator=torch.Generator().manual_seed(2)), dim=1
    )
    near = NearestNeighbors(n_neighbors=7).fit(x).kneighbors(x, return_distance=False)
    sets = [set(row) for row in near]
    expected = np.zeros((50, 50))
    for row, column in np.ndindex(50, 50):
        if column in sets[row] or row in sets[column]:
            expected[row, column] = len(sets[row] & sets[column]) / len(sets[row] | sets[column])
    found = neighbor_graph(near[:, 1:], shared=True).toarray()
    np.testing.assert_allclose(found, expected, atol=1e-12)
    theirs = kneighbors_graph(x, 7, include_self=True)
    np.testing.assert_allclose(
        neighbor_graph(near[:, 1:]).toarray(), 0.5 * (theirs + theirs.T).toarray()
    )


@pytest.mark.parametrize("shared", [False, True])
def test_components_are_those_of_the_laplacian(shared):
    x = torch.nn.functional.normalize(
        torch.randn(60, 5, generator=torch.Generator().manual_seed(1)), dim=1
    )
    near = NearestNeighbors(n_neighbors=9).fit(x).kneighbors(x, return_distance=False)[:, 1:]
    values, vectors = spectral_components(x, 5, num_neighbors=8, shared=shared)
    graph = neighbor_graph(near, shared=shared).toarray()
    scale = graph.sum(1) ** -0.5
    weights, theirs = np.linalg.eigh(np.eye(60) - scale[:, None] * graph * scale)
    np.testing.assert_allclose(1 - values.numpy(), weights[:5], atol=1e-8)
    np.testing.assert_allclose(np.abs(theirs[:, :5].T @ vectors.numpy()), np.eye(5), atol=1e-5)
