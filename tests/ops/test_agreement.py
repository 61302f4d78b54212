"""Agreement of clusterings and of neighbours against scikit-learn and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from sklearn.metrics import cohen_kappa_score
from sklearn.neighbors import NearestNeighbors

from deepclust.ops.agreement import neighbor_agreement, normalized_mutual_information


@pytest.mark.parametrize(
    ("num_first", "num_second", "noise"), [(4, 4, 0.3), (7, 3, 0.0), (50, 90, 0.9), (1, 5, 0.5)]
)
def test_equals_scikit_learn(num_first: int, num_second: int, noise: float) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(num_first, (400,), generator=generator)
    drawn = torch.randint(num_second, (400,), generator=generator)
    second = torch.where(torch.rand(400, generator=generator) < noise, drawn, first % num_second)
    ours = float(normalized_mutual_information(first, second))
    assert ours == pytest.approx(metrics.normalized_mutual_info_score(first, second), abs=1e-9)


def test_other_names_change_nothing_and_one_cluster_agrees_with_itself() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    assert float(normalized_mutual_information(labels, 7 - labels)) == pytest.approx(1)
    assert float(normalized_mutual_information(labels * 0, labels * 0)) == 1
    assert float(normalized_mutual_information(labels * 0, labels)) == 0


def test_agreement_of_neighbours_is_corrected_for_chance():
    """Cohen's kappa of the two ends of an edge, where both have the cluster sizes' shares."""
    labels = torch.tensor([0, 0, 1, 1])
    ring = torch.tensor([[1, 3], [2, 0], [3, 1], [0, 2]])
    assert float(neighbor_agreement(labels, ring)) == 0
    assert float(neighbor_agreement(labels, torch.tensor([[1], [0], [3], [2]]))) == 1
    assert float(neighbor_agreement(labels, ring, torch.tensor([0, 1]))) == 0, (
        "one cluster among those that count"
    )
    labels, graph = torch.randint(0, 3, (50,)), torch.randint(0, 50, (50, 4))
    edges = (labels[graph] == labels[:, None]).double().mean()
    chance = sum(float((labels == k).double().mean()) ** 2 for k in range(3))
    torch.testing.assert_close(neighbor_agreement(labels, graph), (edges - chance) / (1 - chance))


def test_agreement_is_one_within_islands_and_zero_for_one_cluster() -> None:
    numbers = torch.arange(12)
    ring = (numbers // 3 * 3)[:, None] + (numbers[:, None] + torch.tensor([1, 2])) % 3
    assert float(neighbor_agreement(numbers // 3, ring)) == pytest.approx(1)
    assert float(neighbor_agreement(numbers * 0, ring)) == 0
    assert float(neighbor_agreement(numbers % 3, ring)) < 0


def test_agreement_is_cohens_kappa_where_every_sample_is_as_often_a_neighbour() -> None:
    labels = np.random.default_rng(0).integers(0, 3, 40)
    graph = (np.arange(40)[:, None] + [1, 5, 39]) % 40  # every sample three times a neighbour
    kappa = cohen_kappa_score(np.repeat(labels, 3), labels[graph].ravel())
    ours = neighbor_agreement(torch.from_numpy(labels), torch.from_numpy(graph))
    assert float(ours) == pytest.approx(kappa)


def test_agreement_of_random_labels_is_about_zero_and_of_classes_high() -> None:
    x, y = make_blobs(300, 8, centers=4, cluster_std=1.5, random_state=0)
    near = NearestNeighbors(n_neighbors=6).fit(x).kneighbors(x)[1][:, 1:]
    classes, graph = torch.from_numpy(y), torch.from_numpy(near)
    random = classes[torch.randperm(300, generator=torch.Generator().manual_seed(1))]
    assert abs(float(neighbor_agreement(random, graph))) < 0.1
    assert float(neighbor_agreement(classes, graph)) > 0.9
    renamed = neighbor_agreement((classes + 2) % 4, graph)
    assert float(renamed) == float(neighbor_agreement(classes, graph))


def test_agreement_refuses_a_graph_of_other_rows() -> None:
    labels = torch.arange(30)
    for graph in (torch.zeros(10, 2), torch.zeros(30), torch.zeros(30, 0)):
        with pytest.raises(ValueError, match="30 labels"):
            neighbor_agreement(labels, graph.long())
