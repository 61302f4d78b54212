"""Sharded k-means and whitening against one process, with uneven and empty shards."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from deepclust.ops import kmeans, pca_whiten
from tests.ops.test_kmeans import mixture
from tests.ranks import run_ranks

CUTS = [0, 900, 900, 1000]
"""Rank 0 has 900 rows, rank 1 none, rank 2 has 100."""
KINDS = {
    "plain": {},
    "random": {"init": "random", "empty": "random"},
    "parallel": {"init": "k-means||"},
    "spherical": {"spherical": True, "num_restarts": 2},
    "weighted": {"weighted": True},
    "empties": {"init": torch.cat([mixture(3, 8, 3), torch.full((17, 8), 1e3)])},
}


def run_kinds(x: torch.Tensor, low: int, high: int, group: dist.ProcessGroup | None) -> dict:
    found = {}
    weights = torch.rand(len(x), generator=torch.Generator().manual_seed(5))
    for name, kind in KINDS.items():
        arguments = {key: value for key, value in kind.items() if key != "weighted"}
        if "weighted" in kind:
            arguments["sample_weights"] = weights[low:high]
        found[name] = kmeans(x[low:high], 20, num_iters=10, group=group, **arguments)
    chunks = [part for part in x[low:high].split(70) if len(part)]
    found["chunks"] = kmeans(chunks, 20, num_iters=10, group=group)
    found["white"] = pca_whiten(x[low:high], 3, group=group)
    return found


def work(rank: int, size: int) -> dict:
    x = mixture(1000, 8, 12, spread=2.0)
    found = run_kinds(x, CUTS[rank], CUTS[rank + 1], dist.group.WORLD)
    bad = x.clone()
    bad[950] = float("nan")
    try:
        kmeans(bad[CUTS[rank] : CUTS[rank + 1]], 5, group=dist.group.WORLD)
    except ValueError as error:
        found["message"] = str(error)
    return found


def test_three_ranks_equal_one() -> None:
    x = mixture(1000, 8, 12, spread=2.0)
    alone = run_kinds(x, 0, 1000, None)
    together = run_ranks(work, 3)
    for name in [*KINDS, "chunks"]:
        for part in together:
            torch.testing.assert_close(
                part[name].centroids, alone[name].centroids, rtol=1e-5, atol=1e-5
            )
            assert torch.equal(part[name].centroids, together[0][name].centroids)
            assert part[name].inertia == pytest.approx(alone[name].inertia, rel=1e-6)
            assert torch.equal(part[name].counts, alone[name].counts)
            assert part[name].num_empty == alone[name].num_empty
        labels = torch.cat([part[name].labels for part in together])
        assert torch.equal(labels, alone[name].labels)
    white = torch.cat([part["white"] for part in together])
    torch.testing.assert_close(white, alone["white"], rtol=1e-4, atol=1e-4)
    assert all("rows 950 hold NaN" in part["message"] for part in together)
    assert alone["empties"].num_empty > 0
