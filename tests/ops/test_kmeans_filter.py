"""The bfloat16 filter is never wrong about a row that it calls sure, and the sums it feeds stay
those of all rows.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepclust.ops import kmeans
from deepclust.ops.kmeans import filter as filtering
from deepclust.ops.kmeans import sums
from deepclust.ops.kmeans.assign import bias_of, by_torch
from deepclust.ops.kmeans.filter import Filter
from deepclust.ops.kmeans.ranks import Ranks
from deepclust.ops.kmeans.rows import Rows
from deepclust.ops.kmeans.step import lloyd_step
from deepclust.ops.kmeans.sums import RunningSums
from tests.ops.test_kmeans import assert_nearest, mixture, oracle

bfloat16 = pytest.mark.skipif(
    not (
        hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ),
    reason="torch has no bfloat16 product for this processor",
)


def sure(x: torch.Tensor, centroids: torch.Tensor, spherical: bool = False) -> torch.Tensor:
    """Labels that the filter gives without another look; -1 where it is in doubt."""
    rows = Rows(x, Ranks(), spherical=spherical)
    rows.shift = None
    quick, labels = Filter(rows), torch.empty(len(x), dtype=torch.int64)
    quick.begin(centroids, lambda block, part: part.fill_(-1))
    for low in range(0, len(x), quick.chunk_size):
        here = slice(low, low + quick.chunk_size)
        quick._assign_chunk(low, x[here], labels[here])
    return labels


def near_ties(num: int, dim: int, gap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that lie, but for `gap` of the distance, halfway between two of the centroids."""
    generator = torch.Generator().manual_seed(dim)
    centroids = torch.randn(40, dim, generator=generator) + 2
    pairs = torch.randint(40, (2, num), generator=generator)
    one, other = centroids[pairs[0]], centroids[pairs[1]]
    part = 0.5 + gap * torch.randn(num, 1, generator=generator)
    return part * one + (1 - part) * other, centroids


@bfloat16
@pytest.mark.parametrize("gap", [1e-7, 1e-4, 1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("dim", [1, 3, 64, 500])
def test_what_is_sure_is_right_without_tolerance(dim: int, gap: float) -> None:
    x, centroids = near_ties(2000, dim, gap)
    labels = sure(x, centroids)
    known = labels >= 0
    assert torch.equal(labels[known], oracle(x, centroids).argmin(1)[known])
    if gap == 0.1 and dim > 1:
        assert float(known.double().mean()) > 0.2


@bfloat16
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_sure_of_any_data(data: st.DataObject) -> None:
    dim, number = data.draw(st.integers(1, 40)), data.draw(st.integers(2, 60))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    scale = 10.0 ** data.draw(st.integers(-25, 15))
    steps = data.draw(st.sampled_from([1, 4, 1000]))
    spherical = data.draw(st.booleans())
    x, centroids = (torch.randn(n, dim, generator=generator) * steps for n in (300, number))
    x, centroids = (part.round() / steps * scale for part in (x, centroids))
    centroids = centroids + data.draw(st.sampled_from([0.0, 1.0, 30.0])) * scale
    if spherical:
        centroids = torch.nn.functional.normalize(centroids, dim=1)
    labels = sure(x, centroids, spherical)
    scores = x.double() @ centroids.double().T
    if not spherical:
        scores = -oracle(x, centroids)
    known = labels >= 0
    assert torch.equal(labels[known], scores.argmax(1)[known])


@bfloat16
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("num_clusters", [10, 100])
def test_every_pass_against_the_oracle(spherical: bool, num_clusters: int) -> None:
    x = mixture(3000, 48, 60, spread=2.0)
    x = torch.nn.functional.normalize(x, dim=1) if spherical else x
    rows = Rows(x, Ranks(), block_size=1700, spherical=spherical)
    rows.shift = None
    quick, labels, centroids = (
        Filter(rows),
        torch.zeros(3000, dtype=torch.int64),
        x[:num_clusters].clone(),
    )
    for _ in range(6):
        quick.begin(centroids, by_torch(centroids, bias_of(centroids, spherical), 256))
        packed = lloyd_step(rows, quick.assign, num_clusters, labels)
        assert_nearest(x, centroids, labels)
        centroids = (packed[:, :-1] / packed[:, -1:].clamp_min(1)).float()
        if spherical:
            centroids = torch.nn.functional.normalize(centroids, dim=1)
    assert quick.wait < 0


@bfloat16
def test_equal_centroids_go_to_the_first() -> None:
    x = mixture(3000, 32, 40)
    centroids = torch.cat([x[:70], x[:70]])
    rows = Rows(x, Ranks())
    quick, labels = Filter(rows), torch.empty(3000, dtype=torch.int64)
    quick.begin(centroids, by_torch(centroids, bias_of(centroids, False), 256))
    quick.assign(0, x, labels)
    assert int(labels.max()) < 70
    assert_nearest(x, centroids, labels)


@bfloat16
def test_too_much_doubt_ends_it() -> None:
    x = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0)) + 50
    rows = Rows(x, Ranks())
    rows.shift = None
    quick, labels, centroids = Filter(rows), torch.empty(20_000, dtype=torch.int64), x[:300].clone()
    calls = []

    def find(block: torch.Tensor, part: torch.Tensor) -> None:
        calls.append(len(block))
        by_torch(centroids, bias_of(centroids, False), 256)(block, part)

    quick.begin(centroids, find)
    quick.assign(0, x, labels)
    assert quick.lost
    assert max(calls) > 10_000
    for _ in range(2):
        quick.begin(centroids, find)
        quick.assign(0, x, labels)
    assert calls[-1] == 20_000
    assert_nearest(x - 50, centroids - 50, labels, tol=1e-3)


@bfloat16
@pytest.mark.parametrize("spherical", [False, True])
def test_the_loop_with_and_without_the_filter(
    spherical: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filtering, "cpu_has_fast_bfloat16", lambda: True)
    x = mixture(4000, 64, 300)
    plain = kmeans(x, 300, init=x[:300], num_iters=6, backend="numpy", spherical=spherical)
    asked = []
    begin = Filter.begin
    monkeypatch.setattr(Filter, "begin", lambda *arguments: asked.append(1) or begin(*arguments))
    quick, again = (
        kmeans(x, 300, init=x[:300], num_iters=6, spherical=spherical) for _ in range(2)
    )
    assert asked
    assert quick.inertia == pytest.approx(plain.inertia, rel=1e-6)
    assert float((quick.labels != plain.labels).double().mean()) < 1e-3
    assert torch.equal(quick.centroids, again.centroids)
    monkeypatch.setattr(filtering, "cpu_has_fast_bfloat16", lambda: False)
    asked.clear()
    assert torch.equal(
        kmeans(x, 300, init=x[:300], num_iters=6, spherical=spherical).labels, plain.labels
    )
    assert not asked


@pytest.mark.parametrize("move_below", [0.15, 1.0])
def test_running_sums_are_the_sums_of_all_rows(
    move_below: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "MOVE_BELOW", move_below)
    x = mixture(3000, 6, 20, spread=2.0)
    rows = Rows(x, Ranks(), block_size=700)
    running, labels, centroids = (
        RunningSums(rows, 30),
        torch.zeros(3000, dtype=torch.int64),
        x[:30].clone(),
    )
    for _ in range(12):
        find = by_torch(centroids, bias_of(centroids, False), 256)
        packed = running(lambda start, block, part, find=find: find(block, part), labels)
        want = torch.zeros(30, 7, dtype=torch.float64)
        want.index_add_(0, labels, torch.cat([x, torch.ones(3000, 1)], 1).double())
        torch.testing.assert_close(packed, want, rtol=1e-6, atol=1e-4)
        assert torch.equal(packed[:, -1], want[:, -1])
        centroids = (packed[:, :-1] / packed[:, -1:].clamp_min(1)).float()
    inertia, counts = running.finish(None, centroids, labels)
    exact = (x.double() - centroids.double()[labels]).square().sum()
    assert inertia == pytest.approx(float(exact), rel=1e-6)
    assert torch.equal(counts, torch.bincount(labels, minlength=30))


def test_a_cluster_that_shrinks_is_added_up_anew() -> None:
    x = torch.cat([1000 + torch.rand(40_000, 3), -torch.rand(5, 3)])
    rows = Rows(x, Ranks())
    rows.shift = None
    running, labels = RunningSums(rows, 2), torch.zeros(40_005, dtype=torch.int64)
    running(lambda start, block, part: part.fill_(0), labels)
    running.changed = 0
    packed = running(lambda start, block, part: part.copy_((block[:, 0] > 0).long()), labels)
    torch.testing.assert_close(packed[0, :-1], x[40_000:].double().sum(0), rtol=1e-6, atol=1e-6)
