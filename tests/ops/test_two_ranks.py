"""Two ranks with uneven and empty shards give what one gives: k-means with all its helpers,
transport, neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from deepclust.ops import kmeans, knn, partial_transport, self_label, sinkhorn
from deepclust.ops.kmeans import bounds, sums
from deepclust.ops.kmeans import filter as filtering
from deepclust.ops.kmeans.assign import by_numpy
from deepclust.ops.kmeans.bounds import GroupBounds
from deepclust.ops.kmeans.filter import Filter
from deepclust.ops.kmeans.init import parallel_candidates
from deepclust.ops.kmeans.ranks import Ranks
from deepclust.ops.kmeans.rows import Rows
from deepclust.ops.kmeans.sums import RunningSums
from deepclust.ops.precision import has_onednn
from tests.ops.test_kmeans import mixture
from tests.ranks import run_ranks

NUM = 2400
CUTS = {"uneven": 1900, "first empty": 0, "second empty": NUM}
"""Rows of rank 0; rank 1 has the others."""
METHODS = {
    "filter": (Filter, "_assign_chunk"),
    "bounds": (GroupBounds, "_search_group"),
    "sums": (RunningSums, "_move"),
}


@contextmanager
def helpers_on(*names: str) -> Iterator[dict[str, int]]:
    """Filter or bounds from two clusters on; how often each helper was at work, by name."""
    calls = dict.fromkeys(METHODS, 0)

    def counted(name: str) -> Any:
        method = getattr(*METHODS[name])

        def run(*arguments: Any) -> Any:
            calls[name] += 1
            return method(*arguments)

        return run

    limits = {"filter": (filtering, "MIN_CLUSTERS"), "bounds": (bounds, "MIN_CLUSTERS")}
    patches = [mock.patch.object(*METHODS[name], counted(name)) for name in METHODS]
    patches += [mock.patch.object(*limits[name], 2 if name in names else 10**9) for name in limits]
    patches += [mock.patch.object(filtering, "cpu_has_fast_bfloat16", lambda: True)]
    patches += [
        mock.patch.object(bounds, "START_BELOW", 0.5),
        mock.patch.object(sums, "MOVE_BELOW", 0.5),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield calls


def everything(
    low: int, high: int, group: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, int]]:
    """(results by row of this rank, results equal on all ranks, how often each helper was at work)."""
    x = mixture(NUM, 24, 70, spread=2.0)
    mine, log_probs = x[low:high], torch.log_softmax(x[low:high, :9], 1)
    by_row: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    work = dict.fromkeys(METHODS, 0)
    for names in ((), ("filter",), ("bounds",), ("filter", "bounds")):
        with helpers_on(*names) as calls:
            found = kmeans(mine, 90, init=x[:90], num_iters=12, group=group)
        title = " and ".join(("k-means", *names))
        by_row[title], shared[f"{title}: centroids"] = found.labels, found.centroids
        shared[f"{title}: inertia"] = torch.tensor(found.inertia / NUM)
        shared[f"{title}: counts"] = found.counts
        work = {name: work[name] + calls[name] for name in work}
    ranks = Ranks(group)
    candidates, weights = parallel_candidates(Rows(mine, ranks), 20, 3, by_numpy)
    shared["k-means||: candidates"], shared["k-means||: weights"] = candidates, weights
    found = kmeans(mine, 20, init="k-means||", num_iters=8, group=group)
    by_row["k-means||"], shared["k-means||: centroids"] = found.labels, found.centroids
    by_row["sinkhorn"] = NUM * sinkhorn(mine[:, :9] / 10, group=group)
    solved = self_label(log_probs, tol=1e-8, group=group)
    by_row["self_label"], by_row["self_label: scale"] = solved.labels, solved.log_sample_scale
    by_row["partial_transport"] = (
        NUM * partial_transport(mine[:, :9], mass=0.3, tol=1e-9, group=group).plan
    )
    for metric in ("cosine", "dot", "euclidean"):
        values, indices = knn(mine, mine, k=7, metric=metric, exclude_self=True, group=group)
        by_row[f"knn, {metric}"], by_row[f"knn, {metric}: indices"] = values, indices
    return by_row, shared, work


def work(rank: int, size: int) -> dict[str, Any]:
    found = {}
    for name, cut in CUTS.items():
        low, high = ((0, cut), (cut, NUM))[rank]
        found[name] = everything(low, high, dist.group.WORLD)
    return found


def test_two_ranks_equal_one() -> None:
    by_row, shared, calls = everything(0, NUM, None)
    assert calls["bounds"]
    assert calls["sums"]
    assert calls["filter"] or not has_onednn()
    first, second = run_ranks(work, 2)
    for cut in CUTS:
        for name, expected in by_row.items():
            together = torch.cat([first[cut][0][name], second[cut][0][name]])
            if name.endswith("indices"):
                # Values are compared above; two of float32's equals may change places.
                assert float((together != expected).double().mean()) < 1e-3
                continue
            torch.testing.assert_close(
                together,
                expected,
                rtol=1e-5,
                atol=1e-5,
                msg=lambda m, name=name, cut=cut: f"{cut}, {name}: {m}",
            )
        for name, expected in shared.items():
            for found in (first, second):
                torch.testing.assert_close(
                    found[cut][1][name],
                    expected,
                    rtol=1e-5,
                    atol=1e-5,
                    msg=lambda m, name=name: f"{name}: {m}",
                )
            assert torch.equal(first[cut][1][name], second[cut][1][name])
    assert first["uneven"][2]["sums"]
    assert second["uneven"][2]["sums"]
