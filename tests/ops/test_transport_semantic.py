"""Semantic transport against mirror descent and the paper's own loop: stationary, never rising, whatever the graph."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import expit

from deepclust.ops import partial_transport, semantic_partial_transport
from tests.ops.test_transport import rows

NUM, CLUSTERS, EPSILON = 60, 5, 0.1
MASSES = [0.1, 0.3, 0.8, 1.0]
GRAPHS = ["positive", "indefinite", "asymmetric", "signed"]


def graph(kind: str, num: int = NUM) -> torch.Tensor:
    """A similarity (N, N): a Gaussian kernel, that between nearest neighbours alone, or those one way, or noise."""
    generator = torch.Generator().manual_seed(3)
    if kind == "signed":
        return torch.randn(num, num, generator=generator).double()
    x = torch.randn(num, 5, generator=generator).double()
    kernel = torch.exp(-torch.cdist(x, x).square() / 10)
    if kind == "positive":
        return kernel
    kernel.fill_diagonal_(0)
    values, columns = kernel.topk(4, dim=1)
    nearest = torch.zeros_like(kernel).scatter_(1, columns, values)
    return torch.maximum(nearest, nearest.T) if kind == "indefinite" else nearest


def weight_of(kind: str) -> float:
    """Strong enough to have whole steps go wrong where the graph allows it."""
    return {"positive": 2.0, "signed": 4.0}.get(kind, 40.0)


def objective(
    plan: np.ndarray, logits: np.ndarray, similarity: np.ndarray, weight: float, mass: float
) -> float:
    """What the plan (N, K), N * Q, shall minimise, with kl_weight 1."""
    q = plan / len(plan)
    cost = np.log(np.exp(logits).sum(1, keepdims=True)) - logits
    columns, target = q.sum(0), mass / q.shape[1]
    cells = q if mass == 1 else np.column_stack([q, np.maximum(1 / len(q) - q.sum(1), 0)])
    negative_entropy = np.where(cells > 0, cells * np.log(np.maximum(cells, 1e-300)), 0).sum()
    divergence = (columns * np.log(columns / target) - columns + target).sum()
    return float(
        (q * cost).sum()
        - weight * (q * (similarity @ q)).sum()
        + divergence
        + EPSILON * negative_entropy
    )


def mirror_descent(
    start: np.ndarray,
    logits: np.ndarray,
    similarity: np.ndarray,
    weight: float,
    mass: float,
    steps: int,
) -> np.ndarray:
    """A plan (N, K) from `start`, by multiplicative steps along the gradient, each projected."""
    num, clusters = start.shape
    cost = np.log(np.exp(logits).sum(1, keepdims=True)) - logits
    # one over what bounds the curvature relative to the entropy's: of kl_weight, the entropy and the graph
    rate = 1 / (1 + EPSILON + weight * np.abs(similarity + similarity.T).sum(1).max() / num)
    plan = start
    for _ in range(steps):
        q = plan / num
        gradient = (
            cost - weight * (similarity + similarity.T) @ q + np.log(q.sum(0) / (mass / clusters))
        )
        log_cells = np.log(np.maximum(plan, 1e-300))
        moved = log_cells - rate * (gradient + EPSILON * log_cells)
        free = (1 - rate * EPSILON) * np.log(np.maximum(1 - plan.sum(1), 1e-300))
        plan = project(moved, free, mass)
    return plan


def project(log_cells: np.ndarray, log_free: np.ndarray, mass: float) -> np.ndarray:
    """The nearest plan by Kullback-Leibler, of logarithms of its cells (N, K) and of what its rows leave free (N,)."""
    log_sums = np.logaddexp.reduce(log_cells, axis=1)
    if mass < 1:
        odds = log_free - log_sums
        shift = brentq(
            lambda y: expit(odds + y).mean() - (1 - mass),
            -odds.max() - 40,
            -odds.min() + 40,
            xtol=1e-14,
        )
        log_sums = np.logaddexp(log_sums, log_free + shift)
    return np.exp(log_cells - log_sums[:, None])


def whole_step(
    plan: torch.Tensor, logits: torch.Tensor, similarity: torch.Tensor, weight: float, mass: float
) -> Any:
    """The plan for the tangent's costs at this plan (N, K): the paper's iteration on logarithms, to a standstill."""
    tilted = torch.log_softmax(logits, 1) + weight * (similarity + similarity.T) @ plan / len(plan)
    kernel, target = (
        tilted / EPSILON,
        torch.full((plan.shape[1],), mass / plan.shape[1], dtype=torch.float64),
    )
    exponent = torch.full_like(target, 1 / (1 + EPSILON))
    if mass < 1:
        kernel = torch.cat([kernel, torch.zeros(len(plan), 1, dtype=torch.float64)], 1)
        target, exponent = (
            torch.cat([target, target.new_tensor([1 - mass])]),
            torch.cat([exponent, exponent[:1] ** 0]),
        )
    log_b, change = torch.zeros_like(target), math.inf
    while change > 1e-11:
        log_a = -math.log(len(plan)) - torch.logsumexp(kernel + log_b, 1)
        update = exponent * (target.log() - torch.logsumexp(kernel + log_a[:, None], 0))
        log_b, change = update, float((update - log_b).abs().max())
    return len(plan) * (kernel + log_a[:, None] + log_b).exp()[:, : plan.shape[1]]


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("kind", GRAPHS)
def test_one_more_step_does_not_move_the_plan(kind: str, mass: float) -> None:
    logits, similarity, weight = rows(NUM, CLUSTERS, 2.0).double(), graph(kind), weight_of(kind)
    found = semantic_partial_transport(logits, similarity, mass=mass, similarity_weight=weight)
    moved = (whole_step(found.plan, logits, similarity, weight, mass) - found.plan).abs().max()
    assert found.change <= 1e-4 and moved < 2e-4
    assert found.violation <= 1e-6 and found.mass == pytest.approx(mass, abs=1e-9)
    assert (
        float(found.plan.sum()) == pytest.approx(NUM * mass, abs=1e-9)
        and float(found.plan.sum(1).max()) < 1 + 1e-9
    )
    assert (found.plan - partial_transport(logits, mass=mass).plan).abs().max() > 0.02, (
        "the graph changes something"
    )


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("kind", GRAPHS)
def test_the_objective_never_rises(kind: str, mass: float) -> None:
    logits, similarity, weight = rows(NUM, CLUSTERS, 2.0).double(), graph(kind), weight_of(kind)
    values = []
    for steps in range(1, 25):
        options: dict[str, Any] = {"max_linearisations": steps, "plan_tol": 1e-12, "tol": 1e-11}
        plan = semantic_partial_transport(
            logits, similarity, mass=mass, similarity_weight=weight, **options
        ).plan
        values.append(objective(plan.numpy(), logits.numpy(), similarity.numpy(), weight, mass))
    assert values[0] - values[-1] > 1e-5
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(values))


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("kind", GRAPHS)
def test_mirror_descent_finds_nothing_lower_nearby(kind: str, mass: float) -> None:
    logits, similarity, weight = rows(NUM, CLUSTERS, 2.0).double(), graph(kind), weight_of(kind)
    plan = semantic_partial_transport(
        logits, similarity, mass=mass, similarity_weight=weight
    ).plan.numpy()
    problem = (logits.numpy(), similarity.numpy(), weight, mass)
    further = mirror_descent(plan, *problem, steps=300)
    assert objective(plan, *problem) - objective(further, *problem) < 1e-8
    assert np.abs(further - plan).max() < 2e-3


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("kind", GRAPHS)
def test_mirror_descent_from_anywhere_finds_the_plan_where_there_is_one(
    kind: str, mass: float
) -> None:
    logits, similarity, weight = (
        rows(NUM, CLUSTERS, 2.0).double(),
        graph(kind),
        0.05 * weight_of(kind),
    )
    plan = semantic_partial_transport(
        logits, similarity, mass=mass, similarity_weight=weight, tol=1e-9, plan_tol=1e-7
    ).plan.numpy()
    problem = (logits.numpy(), similarity.numpy(), weight, mass)
    rng = np.random.default_rng(0)
    for _ in range(3):
        begun = np.log(rng.dirichlet(np.ones(CLUSTERS + 1), NUM))
        start = project(begun[:, :-1], begun[:, -1], mass)
        reached = mirror_descent(start, *problem, steps=600)
        np.testing.assert_allclose(reached, plan, atol=1e-4)
        assert objective(plan, *problem) <= objective(reached, *problem) + 1e-12


@pytest.mark.parametrize("kind", GRAPHS)
def test_equal_columns_and_a_sparse_graph(kind: str) -> None:
    logits, similarity, weight = rows(NUM, CLUSTERS, 2.0).double(), graph(kind), weight_of(kind)
    options: dict[str, Any] = {"mass": 0.4, "similarity_weight": weight, "kl_weight": math.inf}
    found = semantic_partial_transport(logits, similarity, **options)
    np.testing.assert_allclose(found.plan.sum(0), NUM * 0.4 / CLUSTERS, rtol=1e-4)
    assert found.change <= 1e-4
    sparse = semantic_partial_transport(logits, similarity.to_sparse(), **options)
    torch.testing.assert_close(sparse.plan, found.plan, atol=1e-6, rtol=0)
    assert sparse.num_iters == found.num_iters


def test_without_weight_it_is_partial_transport() -> None:
    logits = rows(NUM, CLUSTERS, 2.0).double()
    found = semantic_partial_transport(logits, graph("positive"), mass=0.4, similarity_weight=0.0)
    torch.testing.assert_close(
        found.plan, partial_transport(logits, mass=0.4).plan, atol=1e-6, rtol=0
    )


def test_a_warm_start_saves_rounds_and_changes_nothing() -> None:
    logits = rows(NUM, CLUSTERS, 2.0).double()
    problem = (logits, graph("positive"))
    options: dict[str, Any] = {"mass": 0.3, "similarity_weight": 2.0, "tol": 1e-9, "plan_tol": 1e-7}
    cold = semantic_partial_transport(*problem, **options)
    warm = semantic_partial_transport(*problem, **options, warm_start=cold.log_cluster_scale)
    torch.testing.assert_close(warm.plan, cold.plan, atol=1e-5, rtol=0)
    assert warm.num_iters < cold.num_iters


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_rough_solver_gets_finer_as_the_plan_comes_to_rest(kind: str) -> None:
    """What a solver leaves open at 1e-3 would move the plan by more than the 1e-4 at which it counts as at rest."""
    logits, similarity, weight = rows(NUM, CLUSTERS, 2.0), graph(kind), weight_of(kind)
    found = semantic_partial_transport(
        logits, similarity, mass=0.3, similarity_weight=weight, tol=1e-3
    )
    plan = found.plan.double()
    moved = (whole_step(plan, logits.double(), similarity, weight, 0.3) - plan).abs().max()
    assert found.change <= 1e-4 and moved < 2e-4
    assert found.violation <= 1e-5 and found.plan.dtype == torch.float32
    one = semantic_partial_transport(
        logits, similarity, mass=0.3, similarity_weight=weight, max_linearisations=1
    )
    assert one.change > 1e-2, "what was left to do where a limit ended it"
