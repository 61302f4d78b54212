"""Group bounds give the labels of a full search, pass by pass."""

from __future__ import annotations

import pytest
import torch

from deepclust.ops.kmeans import bounds, lloyd, step
from deepclust.ops.kmeans.assign import bias_of, by_torch
from deepclust.ops.kmeans.bounds import GroupBounds
from deepclust.ops.kmeans.ranks import Ranks
from deepclust.ops.kmeans.rows import Rows
from tests.ops.test_kmeans import assert_nearest, mixture


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [0.15, 0.9])
def test_every_pass_against_the_oracle(
    dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "STOP_ABOVE", limit)
    monkeypatch.setattr(bounds, "START_BELOW", 0.5)
    monkeypatch.setattr(bounds, "GROUP_SIZE", 7)
    x = mixture(3000, 6, 60, spread=1.5).to(dtype)
    rows = Rows(x, Ranks(), block_size=1000)
    labels = torch.zeros(3000, dtype=torch.int64)
    search, centroids = GroupBounds(rows), x[:80].clone()
    searched = 0
    full = GroupBounds._search_in_full

    def counted(*arguments) -> None:
        nonlocal searched
        searched += 1
        full(*arguments)

    monkeypatch.setattr(GroupBounds, "_search_in_full", counted)
    for _ in range(15):
        find = by_torch(centroids, bias_of(centroids, False), 256)
        search.begin(centroids, lambda start, block, part, find=find: find(block, part))
        packed = step.lloyd_step(rows, search.assign, 80, labels)
        assert_nearest(x, centroids, labels)
        bounded = search.lower is not None
        centroids = (packed[:, :-1] / packed[:, -1:].clamp_min(1)).to(dtype)
    assert bounded
    assert 0 < searched < 30


def test_the_loop_with_and_without_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    x = mixture(2000, 6, 60, spread=1.5)
    rows = Rows(x, Ranks())
    settings = lloyd.Settings(30, 0.0, 1, "split", None, "torch", None)

    def run() -> lloyd.Run:
        return lloyd.lloyd(
            rows, x[:64].clone(), lambda c: by_torch(c, bias_of(c, False), 256), settings, 0
        )

    plain = run()
    monkeypatch.setattr(bounds, "MIN_CLUSTERS", 2)
    bounded = run()
    assert bounded.inertia == pytest.approx(plain.inertia, rel=1e-6)
    assert torch.equal(bounded.labels, plain.labels)
