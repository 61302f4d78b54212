"""Balanced assignment and self-labelling: against POT, the papers' loops, and the properties that
define them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepclust.ops import self_label, sinkhorn

KINDS = ("normal", "one-hot", "equal rows", "equal")


def rows(
    num: int, clusters: int, scale: float, kind: str = "normal", seed: int = 0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, clusters, generator=generator)
    if kind == "one-hot":
        x = torch.eye(clusters)[torch.randint(0, clusters, (num,), generator=generator)]
    elif kind == "equal rows":
        x = x[:1].expand(num, -1).contiguous()
    elif kind == "equal":
        x = torch.ones(num, clusters)
    return scale * x


def log_domain(
    scores: torch.Tensor, epsilon: float, num_iters: int, marginal: torch.Tensor
) -> torch.Tensor:
    """Equation 5 of SwAV on logarithms in float64: columns, then rows."""
    log_plan = scores.double() / epsilon
    for _ in range(num_iters):
        log_plan = log_plan - torch.logsumexp(log_plan, 0) + marginal.double().log()
        log_plan = log_plan - torch.logsumexp(log_plan, 1, keepdim=True)
    return log_plan.exp()


def uniform(clusters: int) -> torch.Tensor:
    return torch.full((clusters,), 1.0 / clusters)


@pytest.mark.parametrize("scale", [1e-4, 0.3, 3.0, 30.0, 1e4])
@pytest.mark.parametrize("shape", [(64, 30), (1, 5), (5, 1), (4, 9)])
def test_sinkhorn_is_the_log_domain_loop(scale: float, shape: tuple[int, int]) -> None:
    scores = rows(*shape, scale)
    for epsilon in (0.05, 0.01):
        expected = log_domain(scores, epsilon, 3, uniform(shape[1]))
        torch.testing.assert_close(
            sinkhorn(scores, epsilon=epsilon).double(), expected, atol=2e-6, rtol=0
        )


def test_sinkhorn_is_pot() -> None:
    scores = rows(40, 12, 0.3).double()
    expected: Any = ot.sinkhorn(
        np.full(40, 1 / 40),
        np.full(12, 1 / 12),
        -scores.numpy(),
        0.05,
        numItermax=7,
        stopThr=0,
        warn=False,
    )
    np.testing.assert_allclose(sinkhorn(scores, num_iters=7), 40 * expected, atol=1e-12)
    np.testing.assert_allclose(
        sinkhorn(scores, num_iters=7, backend="pot"), 40 * expected, atol=1e-12
    )


def test_sinkhorn_takes_any_column_marginal() -> None:
    marginal = torch.tensor([0.0, 1.0, 2.0, 3.0, 1e-4])  # is normalised
    codes = sinkhorn(rows(200, 5, 0.2).double(), num_iters=500, column_marginal=marginal)
    torch.testing.assert_close(
        codes.mean(0), marginal.double() / marginal.double().sum(), atol=1e-9, rtol=1e-6
    )
    torch.testing.assert_close(codes.sum(1), torch.ones(200, dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.floats(-4, 4),
    st.sampled_from(KINDS),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from([0.005, 0.05, 1.0]),
)
def test_sinkhorn_is_finite_with_unit_rows(
    num: int, clusters: int, log_scale: float, kind: str, dtype: torch.dtype, epsilon: float
) -> None:
    codes = sinkhorn(rows(num, clusters, 10**log_scale, kind).to(dtype), epsilon=epsilon)
    assert codes.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert codes.isfinite().all() and (codes >= 0).all()
    torch.testing.assert_close(codes.sum(1).double(), torch.ones(num).double(), atol=1e-4, rtol=0)


def test_sinkhorn_survives_the_largest_numbers() -> None:
    scores = torch.tensor([[3e38, -3e38, 0.0], [-3e38, 3e38, 1.0], [0.0, 0.0, -3e38]])
    codes = sinkhorn(scores)
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.sum(1), torch.ones(3))


def test_sinkhorn_has_full_precision_inside_autocast() -> None:
    scores = rows(50, 9, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sinkhorn(scores)
    assert torch.equal(inside, sinkhorn(scores))


def test_sinkhorn_of_permuted_rows_and_columns_is_permuted() -> None:
    scores = rows(30, 8, 0.5)
    p, q = torch.randperm(30), torch.randperm(8)
    torch.testing.assert_close(sinkhorn(scores[p][:, q]), sinkhorn(scores)[p][:, q])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_refused_with_the_rows(bad: float) -> None:
    scores = rows(6, 4, 1.0)
    scores[3, 2] = bad
    with pytest.raises(ValueError, match=r"\[3\]"):
        sinkhorn(scores)
    with pytest.raises(ValueError, match=r"\[3\]"):
        self_label(scores)


def test_sinkhorn_refuses_a_marginal_that_is_none() -> None:
    for marginal in (torch.ones(3), torch.tensor([1.0, -1.0, 1.0, 1.0]), torch.zeros(4)):
        with pytest.raises(ValueError, match="column_marginal"):
            sinkhorn(rows(5, 4, 1.0), column_marginal=marginal)


def paper_loop(
    log_probs: torch.Tensor, power: float, tol: float
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """The published NumPy loop of SeLa, in float64."""
    powers = np.exp(log_probs.double().numpy()).T ** power
    clusters, num = powers.shape
    c, error, iteration = np.ones((num, 1)) / num, np.inf, 0
    while error > tol:
        r = (1 / clusters) / (powers @ c)
        c_new = (1 / num) / (r.T @ powers).T
        if iteration % 10 == 0:
            error = np.nansum(np.abs(c / c_new - 1))
        c, iteration = c_new, iteration + 1
    return iteration, (powers * c.T * r).argmax(0), np.log(r[:, 0]), np.log(c[:, 0])


@pytest.mark.parametrize(("power", "tol"), [(1.0, 0.1), (10.0, 0.1), (25.0, 0.1), (25.0, 0.01)])
def test_paper_rule_is_the_papers_loop(power: float, tol: float) -> None:
    log_probs = torch.log_softmax(rows(500, 10, 1.0), 1)
    iterations, labels, log_r, log_c = paper_loop(log_probs, power, tol)
    found = self_label(log_probs, power=power, tol=tol, stop="paper")
    assert found.num_iters == iterations
    assert np.array_equal(found.labels, labels)
    np.testing.assert_allclose(found.log_cluster_scale, log_r, atol=1e-10)
    np.testing.assert_allclose(found.log_sample_scale, log_c, atol=1e-10)
    np.testing.assert_allclose(
        found.cost, -log_probs.double().numpy()[np.arange(500), labels].mean(), rtol=1e-12
    )


def test_self_label_is_pots_plan() -> None:
    log_probs = torch.log_softmax(rows(120, 6, 2.0), 1).double()
    found = self_label(log_probs, power=10.0, tol=1e-11)
    plan = (10.0 * log_probs + found.log_cluster_scale + found.log_sample_scale[:, None]).exp()
    expected: Any = ot.sinkhorn(
        np.full(120, 1 / 120),
        np.full(6, 1 / 6),
        -log_probs.numpy(),
        0.1,
        numItermax=100_000,
        stopThr=1e-12,
    )
    np.testing.assert_allclose(plan, expected, atol=1e-9)
    assert np.array_equal(found.labels, expected.argmax(1))


def test_chunks_give_what_the_tensor_gives() -> None:
    log_probs = torch.log_softmax(rows(333, 7, 3.0), 1)
    whole = self_label(log_probs)
    chunked = self_label(lambda: iter(log_probs.split(50)))
    assert torch.equal(whole.labels, chunked.labels) and len(chunked.log_sample_scale) == 333
    torch.testing.assert_close(
        whole.log_cluster_scale, chunked.log_cluster_scale, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("scale", [1e-4, 1.0, 10.0, 100.0, 1e4])
def test_self_label_meets_both_marginals(scale: float) -> None:
    log_probs = torch.log_softmax(rows(300, 10, scale).double(), 1)
    found = self_label(log_probs)
    plan = (25.0 * log_probs + found.log_cluster_scale + found.log_sample_scale[:, None]).exp()
    np.testing.assert_allclose(plan.sum(1), 1 / 300, rtol=1e-9)
    assert (plan.sum(0) - 0.1).abs().sum() <= 1.01e-4
    assert found.violation <= 1e-4


def test_self_label_gives_an_unused_cluster_its_share() -> None:
    logits = rows(400, 8, 2.0)
    logits[:, 3] = -200.0
    found = self_label(torch.log_softmax(logits, 1))
    assert found.violation <= 1e-4
    assert abs(int((found.labels == 3).sum()) - 50) <= 5


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 8), st.floats(-4, 4), st.sampled_from(KINDS))
def test_self_label_is_always_finite(num: int, clusters: int, log_scale: float, kind: str) -> None:
    found = self_label(
        torch.log_softmax(rows(num, clusters, 10**log_scale, kind), 1), max_iters=200
    )
    assert (
        found.labels.shape == (num,)
        and int(found.labels.min()) >= 0
        and int(found.labels.max()) < clusters
    )
    assert found.log_cluster_scale.isfinite().all() and found.log_sample_scale.isfinite().all()


def test_pot_as_a_backend_gives_the_same_labels() -> None:
    log_probs = torch.log_softmax(rows(120, 6, 2.0), 1)
    own = self_label(log_probs, power=10.0, tol=1e-9)
    by_pot = self_label(log_probs, power=10.0, tol=1e-9, backend="pot", max_iters=10_000)
    assert torch.equal(own.labels, by_pot.labels) and by_pot.violation <= 1e-8
    assert own.cost == pytest.approx(by_pot.cost, rel=1e-12)
    with pytest.raises(ValueError, match="takes a tensor"):
        self_label(lambda: iter([log_probs]), backend="pot")
    with pytest.raises(ValueError, match="takes a tensor"):
        self_label(log_probs, backend="pot", stop="paper")
    with pytest.raises(ValueError, match="'own' and 'pot'"):
        sinkhorn(log_probs, backend="cvx")  # pyright: ignore[reportArgumentType]


def test_streamed_labels_never_hold_all_log_probabilities() -> None:
    """3,000 clusters: chunks are made when asked for, and each is gone when the next one comes."""
    alive: list[weakref.ref[torch.Tensor]] = []
    passes = 0

    def chunks() -> Iterator[torch.Tensor]:
        nonlocal passes
        passes += 1
        for start in range(10):
            logits = rows(20, 3000, 2.0, seed=start)
            alive[:] = [made for made in alive if made() is not None]
            assert len(alive) <= 2
            chunk = torch.log_softmax(logits, 1)
            alive.append(weakref.ref(chunk))
            yield chunk

    found = self_label(chunks, power=2.0, max_iters=5)
    assert passes >= 5 and found.labels.shape == (200,) and found.log_cluster_scale.shape == (3000,)
