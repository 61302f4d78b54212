"""Transport and neighbours on ranks with uneven and empty shards against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepclust.ops import knn, partial_transport, self_label, semantic_partial_transport, sinkhorn
from tests.ranks import run_ranks

CUTS = [0, 37, 37, 90]
"""Rank 0 has 37 rows, rank 1 none, rank 2 has 53."""


def rows(num: int, dim: int, scale: float) -> Tensor:
    return scale * torch.randn(num, dim, generator=torch.Generator().manual_seed(0))


def everything(low: int, high: int, group: Any) -> dict[str, Tensor]:
    """Results whose first axis is this rank's rows."""
    scores, logits, x = (
        rows(90, 7, 0.5)[low:high],
        rows(90, 7, 4.0)[low:high],
        rows(90, 5, 1.0)[low:high],
    )
    log_probs = torch.log_softmax(logits, 1)
    whole = rows(90, 5, 1.0)
    similarity = (whole @ whole.T).exp().tril()[low:high]  # not symmetric
    found = {
        "sinkhorn": sinkhorn(scores, group=group),
        "sinkhorn in the log domain": sinkhorn(scores * 1e3, group=group),
        "self_label": self_label(log_probs, tol=1e-8, group=group).labels,
        "self_label scale": self_label(log_probs, tol=1e-8, group=group).log_sample_scale,
        "self_label chunks": self_label(
            lambda: log_probs.split(20), stop="paper", tol=3.0, group=group
        ).log_sample_scale,
        "partial": partial_transport(logits, mass=0.3, tol=1e-9, group=group).plan,
        "hard": partial_transport(
            logits, mass=1.0, kl_weight=float("inf"), tol=1e-9, group=group
        ).plan,
    }
    options: dict[str, Any] = {
        "mass": 0.4,
        "similarity_weight": 0.1,
        "max_linearisations": 3,
        "group": group,
    }
    found["semantic"] = semantic_partial_transport(logits, similarity, **options).plan
    found["semantic sparse"] = semantic_partial_transport(
        logits, similarity.to_sparse(), **options
    ).plan
    for metric in ("cosine", "dot", "euclidean"):
        values, indices = knn(x + 3, x + 3, k=60, metric=metric, exclude_self=True, group=group)
        found[f"{metric} values"], found[f"{metric} indices"] = values, indices
    found["few queries"] = (
        knn(x[:1], x, k=4, group=group)[1] if low else knn(x, x, k=4, group=group)[1]
    )
    return found


def refusals(rank: int, group: Any) -> list[str]:
    """Every rank raises, though only rank 2 has a bad row."""
    x = rows(5, 4, 1.0)
    if rank == 2:
        x[3, 1] = float("nan")
    calls = (
        lambda: sinkhorn(x, group=group),
        lambda: self_label(x, group=group),
        lambda: partial_transport(x, mass=0.5, group=group),
        lambda: knn(x, x, k=1, group=group),
        lambda: knn(x, x, k=15, exclude_self=True, group=group),
    )
    told = []
    for call in calls:
        with pytest.raises(ValueError, match=r"bad rows|neighbours") as caught:
            call()
        told.append(str(caught.value))
    return told


def work(rank: int, size: int) -> tuple[dict[str, Tensor], list[str]]:
    group = dist.group.WORLD
    return everything(CUTS[rank], CUTS[rank + 1], group), refusals(rank, group)


def test_three_ranks_equal_one() -> None:
    results = run_ranks(work, 3)
    alone = everything(0, 90, None)
    alone["few queries"] = torch.cat([alone["few queries"][:37], alone["few queries"][37:38]])
    for name, expected in alone.items():
        together = torch.cat([found[name] for found, _ in results])
        torch.testing.assert_close(
            together, expected, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    for rank, (_, told) in enumerate(results):
        assert ("[3]" in told[0]) == (rank == 2)
