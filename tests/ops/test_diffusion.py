"""Diffusion clusters: the embedding against the Laplacian's pseudo-inverse, islands, votes, any
number of clusters.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs, make_moons
from sklearn.metrics import adjusted_rand_score

from deepclust.ops import diffusion
from deepclust.ops.diffusion import Diffusion, agreed, diffusion_clusters
from deepclust.ops.spectral import neighbor_graph


def _near(x: torch.Tensor, k: int) -> np.ndarray:
    return torch.cdist(x, x).topk(k + 1, largest=False).indices[:, 1:].numpy()


def test_with_power_one_half_products_are_the_laplacians_pseudo_inverse(monkeypatch):
    monkeypatch.setattr(diffusion, "POWERS", (0.5,))
    monkeypatch.setattr(diffusion, "CLOSE", 1e-12)
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    graph = neighbor_graph(_near(x, 8), shared=True)
    found = diffusion._weighted(graph, 38)[0].numpy()
    dense, scale = graph.toarray(), graph.toarray().sum(1) ** -0.5
    inverse = np.linalg.pinv(np.eye(40) - scale[:, None] * dense * scale)
    _, vectors = np.linalg.eigh(inverse)
    kept = (
        vectors[:, 3:] @ vectors[:, 3:].T
    )  # less the constant and the two that a sparse solver leaves out
    np.testing.assert_allclose(found @ found.T, kept @ inverse @ kept, atol=1e-8)


def test_moons_and_islands_are_found():
    points, truth = make_moons(300, noise=0.05, random_state=0)
    lifted = torch.tensor(np.c_[points, 3 * np.ones(len(points))], dtype=torch.float32)
    assert adjusted_rand_score(truth, diffusion_clusters(lifted, 2)) > 0.95
    blobs, truth = make_blobs([90, 60, 40, 35], 8, cluster_std=0.2, random_state=0)
    assert adjusted_rand_score(truth, diffusion_clusters(torch.from_numpy(blobs), 4)) == 1


def test_one_decomposition_serves_all_numbers_and_every_cluster_is_used():
    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
    every = Diffusion(x, 30)
    for num_clusters in (1, 2, 7, 30):
        votes = every.votes(num_clusters, seed=1)
        assert votes.shape == (80, num_clusters)
        torch.testing.assert_close(votes.sum(1), torch.ones(80, dtype=torch.float64))
        assert len(votes.argmax(1).unique()) == num_clusters
    own = Diffusion(x, 7).votes(7, seed=1).argmax(1)
    assert adjusted_rand_score(own, every.votes(7, seed=1).argmax(1)) > 0.95
    with pytest.raises(ValueError, match="from 1 to 30"):
        every.votes(31)
    with pytest.raises(ValueError, match="from 1 to 79"):
        Diffusion(x, 80)


@pytest.mark.parametrize("num", [2, 3, 5])
def test_a_handful_of_rows(num):
    x = torch.randn(num, 4, generator=torch.Generator().manual_seed(3))
    assert len(diffusion_clusters(x, num - 1).unique()) == num - 1


def test_clusterings_vote_whatever_their_numbers_are():
    truth = np.arange(60) % 3
    renamed, off = (truth + 1) % 3, truth.copy()
    off[:6] = (truth[:6] + 1) % 3
    votes = agreed([truth, renamed, off], 3)
    assert adjusted_rand_score(truth, votes.argmax(1)) == 1
    np.testing.assert_allclose(np.sort(votes[:6], 1), [[0, 1 / 3, 2 / 3]] * 6)
    assert (votes[6:].max(1) == 1).all()


def test_a_cluster_without_rows_gets_one_that_can_be_spared():
    votes = np.array([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.2, 0.8, 0.0]])
    assert diffusion._all_used(votes.copy()).argmax(1).tolist() == [0, 2, 1]
