"""Partial transport: against POT where it solves the same problem, a float64 log-domain loop, and
its properties.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepclust.ops import mass_schedule, partial_transport
from tests.ops.test_transport import KINDS, rows


def virtual_cluster_loop(
    logits: torch.Tensor, mass: float, kl_weight: float, epsilon: float
) -> torch.Tensor:
    """P2OT's algorithm 1 on logarithms in float64, to a standstill: the virtual cluster's scale is
    iterated.
    """
    num, clusters = logits.shape
    kernel = torch.log_softmax(logits.double(), 1) / epsilon
    kernel = torch.cat([kernel, torch.zeros(num, 1, dtype=torch.float64)], 1)
    log_target = torch.full((clusters + 1,), math.log(mass / clusters), dtype=torch.float64)
    log_target[-1] = math.log1p(-mass)
    exponent = torch.full_like(
        log_target, 1.0 if kl_weight == math.inf else kl_weight / (kl_weight + epsilon)
    )
    exponent[-1] = 1.0
    log_b, change = torch.zeros_like(log_target), math.inf
    while change > 1e-13:
        log_a = -math.log(num) - torch.logsumexp(kernel + log_b, 1)
        update = exponent * (log_target - torch.logsumexp(kernel + log_a[:, None], 0))
        log_b, change = update, float((update - log_b).abs().max())
    return num * (kernel + log_a[:, None] + log_b).exp()[:, :-1]


@pytest.mark.parametrize("mass", [0.3, 0.9])
@pytest.mark.parametrize("kl_weight", [0.3, 1.0, math.inf])
def test_plan_is_the_papers_fixed_point(mass: float, kl_weight: float) -> None:
    logits = rows(80, 6, 3.0).double()
    found = partial_transport(logits, mass=mass, kl_weight=kl_weight, tol=1e-12)
    torch.testing.assert_close(
        found.plan, virtual_cluster_loop(logits, mass, kl_weight, 0.1), atol=1e-9, rtol=0
    )


def test_full_mass_with_kl_columns_is_pots_unbalanced() -> None:
    logits = rows(100, 8, 3.0).double()
    cost = -torch.log_softmax(logits, 1).numpy()
    for epsilon in (0.1, 0.05):
        expected: Any = ot.unbalanced.sinkhorn_unbalanced(
            np.full(100, 0.01),
            np.full(8, 1 / 8),
            cost,
            epsilon,
            (math.inf, 1.0),
            reg_type="entropy",
            numItermax=100_000,
            stopThr=1e-14,
        )
        found = partial_transport(logits, mass=1.0, epsilon=epsilon, tol=1e-12)
        np.testing.assert_allclose(found.plan, 100 * expected, atol=1e-8)


def test_hard_columns_are_pots_balanced_transport_with_a_free_column() -> None:
    logits = rows(60, 5, 2.0).double()
    cost = np.concatenate([-torch.log_softmax(logits, 1).numpy(), np.zeros((60, 1))], 1)
    target = np.array([0.4 / 5] * 5 + [0.6])
    plan: Any = ot.sinkhorn(
        np.full(60, 1 / 60), target, cost, 0.1, numItermax=100_000, stopThr=1e-14
    )
    found = partial_transport(logits, mass=0.4, kl_weight=math.inf, tol=1e-12)
    np.testing.assert_allclose(found.plan, 60 * plan[:, :-1], atol=1e-9)
    np.testing.assert_allclose(found.plan.sum(0), 0.4 * 60 / 5, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [0.1, 0.01])
@pytest.mark.parametrize("kl_weight", [1.0, math.inf])
@pytest.mark.parametrize("mass", [0.1, 1.0])
def test_unused_clusters_break_nothing(
    dtype: torch.dtype, epsilon: float, kl_weight: float, mass: float
) -> None:
    logits = rows(160, 10, 2.0).to(dtype)
    logits[:, 3:5] = -200.0
    found = partial_transport(logits, mass=mass, kl_weight=kl_weight, epsilon=epsilon)
    assert found.plan.isfinite().all() and found.log_cluster_scale.isfinite().all()
    assert found.violation <= 1e-6
    assert abs(float(found.plan.double().sum()) / 160 - mass) < 1e-5
    if kl_weight == math.inf:
        np.testing.assert_allclose(found.plan.sum(0), 160 * mass / 10, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.floats(-4, 4),
    st.sampled_from(KINDS),
    st.floats(0.01, 1.0),
    st.sampled_from([0.1, 1.0, 10.0, math.inf]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_rows_and_mass_are_exact_on_any_input(
    num: int,
    clusters: int,
    log_scale: float,
    kind: str,
    mass: float,
    kl_weight: float,
    dtype: torch.dtype,
) -> None:
    logits = rows(num, clusters, 10**log_scale, kind).to(dtype)
    found = partial_transport(logits, mass=mass, kl_weight=kl_weight, max_iters=100)
    assert (
        found.plan.isfinite().all()
        and (found.plan >= 0).all()
        and found.log_cluster_scale.isfinite().all()
    )
    assert float(found.plan.sum(1).max()) <= 1 + 1e-5
    assert (
        abs(float(found.plan.double().mean(0).sum()) - mass) < 1e-5
        and abs(found.mass - mass) < 1e-9
    )


def test_warm_start_saves_rounds_and_changes_nothing() -> None:
    logits = rows(300, 10, 3.0).double()
    cold = partial_transport(logits, mass=0.3, tol=1e-10)
    warm = partial_transport(logits, mass=0.3, tol=1e-10, warm_start=cold.log_cluster_scale)
    assert warm.num_iters <= 2 < cold.num_iters
    torch.testing.assert_close(warm.plan, cold.plan, atol=1e-9, rtol=0)
    full = partial_transport(
        logits, mass=1.0, tol=1e-10
    )  # its virtual cluster is empty: that must not poison
    after = partial_transport(logits, mass=0.3, tol=1e-10, warm_start=full.log_cluster_scale)
    torch.testing.assert_close(after.plan, cold.plan, atol=1e-9, rtol=0)
    wild = torch.linspace(-1e4, 1e4, 11).double()
    from_wild = partial_transport(logits, mass=1.0, tol=1e-10, warm_start=wild, max_iters=200)
    assert from_wild.num_iters == 200 and from_wild.plan.isfinite().all()


def test_permuted_rows_and_columns_give_the_permuted_plan() -> None:
    logits = rows(70, 6, 2.0).double()
    p, q = torch.randperm(70), torch.randperm(6)
    permuted = partial_transport(logits[p][:, q], mass=0.5, tol=1e-11).plan
    torch.testing.assert_close(
        permuted, partial_transport(logits, mass=0.5, tol=1e-11).plan[p][:, q]
    )


def test_only_confident_samples_are_used() -> None:
    logits = torch.cat([8 * torch.eye(4).repeat(10, 1), torch.zeros(40, 4)])
    used = partial_transport(logits, mass=0.4).plan.sum(1)
    assert used[:40].min() > 0.7 and used[40:].max() < 0.1


@pytest.mark.parametrize(
    "settings_",
    [{"mass": 0.0}, {"mass": 1.5}, {"mass": float("nan")}, {"mass": 0.5, "kl_weight": 0.0}],
)
def test_settings_out_of_range_are_named(settings_: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        partial_transport(rows(5, 3, 1.0), **settings_)


def test_not_finite_logits_are_refused_with_the_rows() -> None:
    logits = rows(5, 3, 1.0)
    logits[2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"logits.*\[2\]"):
        partial_transport(logits, mass=0.5)


@pytest.mark.parametrize(
    ("t", "expected"), [(0, 0.1 + 0.9 * math.exp(-5)), (0.5, 0.357854), (0.75, 0.758454), (1, 1.0)]
)
def test_mass_schedule(t: float, expected: float) -> None:
    assert mass_schedule(int(400 * t), 400) == pytest.approx(expected, abs=1e-6)
    assert mass_schedule(int(400 * t), 400, shape="linear") == pytest.approx(0.1 + 0.9 * t)
    assert mass_schedule(500, 400) == 1.0


@pytest.mark.parametrize(("mass", "kl_weight"), [(1.0, 1.0), (1.0, math.inf), (0.4, math.inf)])
@pytest.mark.filterwarnings("ignore:If reg_type = entropy")
def test_pot_as_a_backend_gives_the_same(mass: float, kl_weight: float) -> None:
    logits = rows(80, 6, 2.0).double()
    options: dict[str, Any] = {
        "mass": mass,
        "kl_weight": kl_weight,
        "tol": 1e-10,
        "max_iters": 20_000,
    }
    own, by_pot = (
        partial_transport(logits, **options),
        partial_transport(logits, **options, backend="pot"),
    )
    torch.testing.assert_close(by_pot.plan, own.plan, atol=1e-7, rtol=0)
    assert by_pot.violation < 1e-7 and by_pot.mass == pytest.approx(mass, abs=1e-8)
    again = partial_transport(logits, **options, warm_start=by_pot.log_cluster_scale)
    assert again.num_iters < own.num_iters


def test_what_pot_cannot_do_is_said() -> None:
    logits = rows(8, 3, 1.0)
    with pytest.raises(ValueError, match=r"cannot solve mass=0.5 with kl_weight=1.0"):
        partial_transport(logits, mass=0.5, backend="pot")
    with pytest.raises(ValueError, match="no warm_start"):
        partial_transport(logits, mass=1.0, backend="pot", warm_start=torch.zeros(4))
    with pytest.raises(ValueError, match="one process"):
        partial_transport(logits, mass=1.0, backend="pot", group=object())
    with pytest.raises(ValueError, match="'own' and 'pot'"):
        partial_transport(logits, mass=1.0, backend="cvx")  # pyright: ignore[reportArgumentType]
