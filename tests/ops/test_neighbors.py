"""Exact neighbours against scikit-learn, whatever the chunking."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import pairwise_distances

from deepclust.ops import knn, neighbors, search


def points(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def scores(queries: torch.Tensor, bank: torch.Tensor, metric: str) -> np.ndarray:
    """(Q, N) in float64, larger is nearer."""
    q, b = queries.double().numpy(), bank.double().numpy()
    if metric == "dot":
        return q @ b.T
    distances = pairwise_distances(q, b, metric=metric)
    return 1 - distances if metric == "cosine" else -distances


def check(
    queries: torch.Tensor, bank: torch.Tensor, k: int, metric: Any, exclude_self: bool, tol: float
) -> None:
    """Values are the k best, and every index has the value it is given: right for ties too."""
    values, indices = knn(queries, bank, k=k, metric=metric, exclude_self=exclude_self)
    truth = scores(queries, bank, metric)
    if exclude_self:
        np.fill_diagonal(truth, -np.inf)
    found = -values.double().numpy() if metric == "euclidean" else values.double().numpy()
    np.testing.assert_allclose(found, -np.sort(-truth, 1)[:, :k], atol=tol)
    np.testing.assert_allclose(np.take_along_axis(truth, indices.numpy(), 1), found, atol=tol)
    assert indices.dtype == torch.int64 and all(len(set(row)) == k for row in indices.tolist())


@pytest.fixture(params=["whole", "small chunks"])
def chunking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "small chunks":
        monkeypatch.setattr(neighbors, "PIECE_ROWS", 301)
        monkeypatch.setattr(search, "SCORES_CPU", 20_000)


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_all_pairs_are_scikit_learns(metric: str, exclude_self: bool) -> None:
    x = points(1100, 6) + 2
    check(x, x, 5, metric, exclude_self, 2e-6 if metric != "dot" else 2e-5)
    check(x.double(), x.double(), 5, metric, exclude_self, 1e-9)


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
def test_other_queries(metric: str) -> None:
    check(points(57, 6, 1), points(700, 6), 11, metric, False, 1e-5)
    check(points(3, 6, 1), points(4, 6), 4, metric, False, 1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 60),
    st.integers(1, 6),
    st.integers(1, 5),
    st.sampled_from(["cosine", "dot", "euclidean"]),
)
def test_duplicates_and_ties(num: int, dim: int, values: int, metric: str) -> None:
    x = torch.randint(
        1, values + 1, (num, dim), generator=torch.Generator().manual_seed(num)
    ).float()
    check(x, x, min(4, num - 1), metric, True, 1e-5)


@settings(deadline=None)
@given(
    st.integers(2, 40),
    st.integers(1, 6),
    st.sampled_from(["cosine", "dot", "euclidean"]),
    st.integers(0, 999),
)
def test_order_of_the_bank_and_of_the_queries_changes_nothing(
    num: int, dim: int, metric: Any, seed: int
) -> None:
    queries, bank = points(9, dim, seed), points(num, dim, seed + 1)
    k, order = min(num, 4), torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    values, indices = knn(queries, bank, k=k, metric=metric)
    others, places = knn(queries.flip(0), bank[order], k=k, metric=metric)
    torch.testing.assert_close(
        others.flip(0), values, rtol=1e-5, atol=2e-6 if metric != "euclidean" else 1e-3
    )
    truth = torch.from_numpy(scores(queries, bank, metric))
    np.testing.assert_allclose(
        truth.gather(1, order[places].flip(0)), truth.gather(1, indices), atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = points(80, 9).to(dtype)
    assert knn(x, x, k=3)[0].dtype == torch.float32
    check(x, x, 3, "cosine", True, 1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(points(80, 9), points(80, 9), 3, "cosine", True, 1e-6)


def test_far_from_the_origin_and_at_the_ends_of_float32() -> None:
    check(points(200, 4) + 1000, points(200, 4) + 1000, 5, "euclidean", True, 1e-3)
    x = points(50, 4)
    for scale in (1e-30, 1e30):  # scikit-learn takes the first for zeros
        torch.testing.assert_close(knn(x * scale, x * scale, k=5)[0], knn(x, x, k=5)[0])


def test_rows_need_not_be_contiguous_and_a_zero_row_is_like_nothing() -> None:
    x = points(6, 90).T
    x[7] = 0.0
    values, _ = knn(x, x, k=3)
    assert values.isfinite().all() and (values[7] == 0).all()


def test_what_cannot_be_done_is_said() -> None:
    x = points(10, 3)
    for k in (0, 11):
        with pytest.raises(ValueError, match="neighbours"):
            knn(x, x, k=k)
    with pytest.raises(ValueError, match=r"1 to 9 without self"):
        knn(x, x, k=10, exclude_self=True)
    with pytest.raises(ValueError, match="do not fit"):
        knn(x, points(10, 4), k=1)
    with pytest.raises(ValueError, match="do not fit"):
        knn(x[:5], x, k=1, exclude_self=True)
    with pytest.raises(ValueError, match="metric"):
        knn(x, x, k=1, metric="manhattan")  # pyright: ignore[reportArgumentType]
    bad = x.clone()
    bad[4, 1] = float("inf")
    with pytest.raises(ValueError, match=r"'queries': \[\], 'bank': \[4\]"):
        knn(x, bad, k=1)


def test_no_queries_is_no_error() -> None:
    values, indices = knn(points(0, 3), points(5, 3), k=2)
    assert values.shape == indices.shape == (0, 2)


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_faiss_finds_the_same(metric: Any, exclude_self: bool) -> None:
    pytest.importorskip("faiss")
    x = points(700, 6)
    by_faiss = knn(x, x, k=5, metric=metric, exclude_self=exclude_self, backend="faiss")
    own = knn(x, x, k=5, metric=metric, exclude_self=exclude_self)
    torch.testing.assert_close(
        by_faiss[0], own[0], atol=2e-3 if metric == "euclidean" else 1e-5, rtol=1e-5
    )
    assert (by_faiss[1] == own[1]).double().mean() > 0.99


def test_faiss_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install faiss-cpu"):
        knn(points(5, 3), points(5, 3), k=1, backend="faiss")


@pytest.mark.parametrize(
    "kind", ["spread", "clustered", "one side", "equal", "tiny", "mixed lengths"]
)
@pytest.mark.parametrize("exclude_self", [False, True])
def test_proposals_in_bfloat16_lose_nothing(
    kind: str, exclude_self: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "cpu_has_fast_bfloat16", lambda: True)
    x = points(5000, 64)
    if kind == "clustered":  # many scores within bfloat16's rounding of each other
        x = points(20, 64, 1).repeat(250, 1) + 0.02 * x
    elif kind == "one side":  # dot products of both signs, most of them negative
        x = torch.cat([x[:2500].abs(), -x[:2500].abs()])
    elif kind == "equal":
        x = x[:1].repeat(5000, 1) + 1e-4 * x
    elif kind == "tiny":  # products below the smallest normal number
        x = 1e-20 * x
    elif kind == "mixed lengths":
        x = x * torch.logspace(-3, 3, 5000)[:, None]
    for metric in ("cosine", "dot"):
        unit = float(x.square().sum(1).amax()) if metric == "dot" else 1.0
        bank = (
            x.double()
            if metric == "dot"
            else torch.nn.functional.normalize(x.double(), dim=1, eps=0.0)
        )
        truth = bank[:700] @ bank.T
        if exclude_self:
            values, indices = (
                part[:700] for part in knn(x, x, k=9, metric=metric, exclude_self=True)
            )
            truth.fill_diagonal_(-torch.inf)
        else:
            values, indices = knn(x[:700], x, k=9, metric=metric)
        best = truth.topk(9, dim=1).values
        np.testing.assert_allclose(values.double() / unit, best / unit, atol=2e-6, rtol=0)
        np.testing.assert_allclose(truth.gather(1, indices) / unit, best / unit, atol=2e-6, rtol=0)
        assert all(len(set(row)) == 9 for row in indices.tolist())


def test_queries_that_the_filter_cannot_settle_are_few_on_spread_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(search, "cpu_has_fast_bfloat16", lambda: True)
    again: list[int] = []
    original = search.search_exact
    monkeypatch.setattr(search, "search_exact", lambda *a: again.append(len(a[5])) or original(*a))
    x = points(8000, 128)
    knn(x[:1000], x, k=10)
    assert len(again) == 1 and again[0] < 50


def test_the_same_call_gives_the_same_bits() -> None:
    x = points(4000, 64)
    first, second = knn(x, x, k=7, exclude_self=True), knn(x, x, k=7, exclude_self=True)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_more_copies_of_a_row_than_neighbours_and_self_is_still_left_out() -> None:
    x = points(3, 5).repeat_interleave(40, 0)
    for backend in ("own", "faiss") if neighbors.importlib.util.find_spec("faiss") else ("own",):
        for metric in ("cosine", "dot", "euclidean"):
            indices = knn(x, x, k=10, metric=metric, exclude_self=True, backend=backend)[1]
            assert (indices != torch.arange(120)[:, None]).all()


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
def test_approximate_search_finds_nearly_all(metric: Any) -> None:
    pytest.importorskip("faiss")
    x = points(100, 16, 1).repeat(60, 1) + 0.3 * points(6000, 16)
    values, indices = knn(
        x, x, k=10, metric=metric, exclude_self=True, backend="faiss", approximate=True
    )
    exact_values, exact = knn(x, x, k=10, metric=metric, exclude_self=True)
    assert (indices[:, :, None] == exact[:, None]).any(2).double().mean() > 0.9
    assert (indices != torch.arange(6000)[:, None]).all()
    found = (indices == exact) & (indices >= 0)
    torch.testing.assert_close(values[found], exact_values[found], atol=2e-3, rtol=1e-4)
    with pytest.raises(ValueError, match="approximate=True is for backend 'faiss'"):
        knn(x, x, k=1, approximate=True)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_all_pairs_of_long_rows_are_multiplied_once(monkeypatch, metric, exclude_self) -> None:
    monkeypatch.setattr(search, "TILE", 32)
    rows = points(101, 1024)
    rows[70] = rows[3]  # a copy of a row is its neighbour, the row itself is not
    seen: list[int] = []
    product = search._product

    def counted(
        chunk: torch.Tensor, piece: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        seen.append(len(chunk) * len(piece))
        return product(chunk, piece, bias)

    monkeypatch.setattr(search, "_product", counted)
    check(rows, rows, 7, metric, exclude_self, 1e-3 if metric == "dot" else 1e-5)
    assert 101 * 101 / 2 < sum(seen) < 0.7 * 101 * 101
