"""Agreement of clusterings against scikit-learn."""

from __future__ import annotations

import pytest
import torch

from deepclust.ops.agreement import neighbor_agreement, normalized_mutual_information


@pytest.mark.parametrize(("num_first", "num_second", "noise"), [(4, 4, 0.3), (7, 3, 0.0), (50, 90, 0.9), (1, 5, 0.5)])
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
    assert float(neighbor_agreement(labels, ring, torch.tensor([0, 1]))) == 0, "one cluster among those that count"
    labels, graph = torch.randint(0, 3, (50,)), torch.randint(0, 50, (50, 4))
    edges = (labels[graph] == labels[:, None]).double().mean()
    chance = sum(float((labels == k).double().mean()) ** 2 for k in range(3))
    torch.testing.assert_close(neighbor_agreement(labels, graph), (edges - chance) / (1 - chance))
