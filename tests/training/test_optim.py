"""Schedules against torch's own, parameter groups, and the sum of gradients over ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepclust.config.settings import OptimSettings
from deepclust.errors import UserError
from deepclust.heads import Head
from deepclust.runtime.distributed import sum_gradients
from deepclust.training.optim import (
    LARS,
    build_optimizer,
    forget,
    learning_rate_factor,
    set_learning_rate,
)
from tests.ranks import run_ranks
from tests.toys import Plain, toy_backbone


def test_warm_up_and_cosine_are_torchs():
    settings = OptimSettings(final_lr_fraction=0.1)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 5, 1.0, total_iters=4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 45, eta_min=0.1)
    torchs = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[5])
    for step in range(50):
        assert learning_rate_factor(step, 50, 5, settings) == pytest.approx(
            optimizer.param_groups[0]["lr"], abs=1e-9
        )
        optimizer.step()
        torchs.step()
    assert learning_rate_factor(30, 50, 5, OptimSettings(schedule="constant")) == 1.0


def test_warm_up_from_a_start_and_cosine_to_an_end_are_the_published_swav_schedule():
    """Linear from 0.3 to 4.8 over 10 epochs, then half a cosine to 0.0048 (SwAV, batch 4096),
    written out in NumPy.
    """
    settings = OptimSettings(warmup_start_fraction=0.3 / 4.8, final_lr_fraction=0.0048 / 4.8)
    per_epoch, epochs = 7, 40
    later = np.arange(30 * per_epoch)
    cosine = 0.0048 + 0.5 * (4.8 - 0.0048) * (1 + np.cos(np.pi * later / len(later)))
    wanted = np.concatenate([np.linspace(0.3, 4.8, 10 * per_epoch), cosine])
    steps = range(epochs * per_epoch)
    found = [
        4.8 * learning_rate_factor(step, len(steps), 10 * per_epoch, settings, per_epoch)
        for step in steps
    ]
    assert found == pytest.approx(wanted.tolist(), abs=1e-12)


@pytest.mark.parametrize("milestones", [[4.0, 7.0, 7.5], [0.4, 0.7, 0.75]])
def test_step_schedule_is_torchs_with_milestones_in_epochs_or_shares(milestones):
    settings = OptimSettings(schedule="step", milestones=milestones, milestone_factor=0.4)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    torchs = torch.optim.lr_scheduler.MultiStepLR(optimizer, [24, 42, 45], gamma=0.4)
    for step in range(60):
        assert learning_rate_factor(step, 60, 0, settings, 6) == pytest.approx(
            optimizer.param_groups[0]["lr"]
        )
        optimizer.step()
        torchs.step()


def test_a_cosine_by_epoch_is_torchs_at_the_epochs_and_holds_between():
    settings = OptimSettings(schedule_per="epoch", final_lr_fraction=0.001)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=0.001)
    for epoch in range(10):
        for step in range(epoch * 6, epoch * 6 + 6):
            factor = learning_rate_factor(step, 60, 0, settings, 6)
            assert factor == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        torchs.step()


def _lars(parameters, gradients, *, lr, momentum, decay, trust):
    """The formula in float64 NumPy, several steps; `trust` of a parameter may be None."""
    values = [p.astype(np.float64) for p in parameters]
    moving = [None] * len(values)
    for step in gradients:
        for i, (g, t) in enumerate(zip(step, trust)):
            p, g = values[i], g.astype(np.float64)
            norm, slope = np.sqrt((p**2).sum()), np.sqrt((g**2).sum())
            if t is None:
                g = g + decay[i] * p
            elif norm > 0 and slope > 0:
                g = (g + decay[i] * p) * t * norm / (slope + decay[i] * norm + 1e-8)
            moving[i] = g if moving[i] is None else momentum * moving[i] + g
            values[i] = p - lr * moving[i]
    return values


@pytest.mark.parametrize("adapt", [True, False])
def test_lars_is_its_formula(adapt):
    random = np.random.default_rng(0)
    shapes = [(4, 3, 3, 3), (5,), (7, 4), (6, 2)]
    start = [random.normal(size=shape) for shape in shapes]
    start[3] *= 0  # a norm of zero: the plain gradient
    gradients = [[random.normal(size=shape) for shape in shapes] for _ in range(4)]
    gradients[1][2] *= 0
    model = torch.nn.ParameterList(
        [torch.nn.Parameter(torch.from_numpy(value.copy())) for value in start]
    )
    settings = OptimSettings(
        name="lars", lr=0.6, weight_decay=0.02, trust=0.01, adapt_bias_and_norm=adapt
    )
    optimizer = build_optimizer(model, Head(), settings)
    assert isinstance(optimizer, LARS)
    for step in gradients:
        for parameter, gradient in zip(model, step):
            parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    trust, decay = [0.01, 0.01 if adapt else None, 0.01, 0.01], [0.02, 0.0, 0.02, 0.02]
    for found, wanted in zip(
        model, _lars(start, gradients, lr=0.6, momentum=0.9, decay=decay, trust=trust)
    ):
        assert np.abs(found.detach().numpy() - wanted).max() < 1e-12
    assert sorted({group["weight_decay"] for group in optimizer.param_groups}) == [0.0, 0.02]


def test_a_group_of_lars_without_trust_is_torchs_sgd():
    ours, torchs = (torch.nn.Parameter(torch.arange(1.0, 7.0).view(2, 3)) for _ in range(2))
    plain = torch.optim.SGD([torchs], lr=0.1, momentum=0.9, weight_decay=0.1)
    lars = LARS([{"params": [ours], "trust": None}], lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        for parameter, optimizer in ((torchs, plain), (ours, lars)):
            parameter.grad = parameter.detach().cos()
            optimizer.step()
    assert torch.equal(ours, torchs)


def test_adam_has_its_decay_in_the_gradient():
    ours, torchs = Plain(), Plain()
    torchs.load_state_dict(ours.state_dict())
    reference = torch.optim.Adam(torchs.parameters(), lr=1e-2, weight_decay=0.1)
    settings = OptimSettings(name="adam", lr=1e-2, weight_decay=0.1, decay_bias_and_norm=True)
    optimizer = build_optimizer(torch.nn.Module(), ours, settings)
    for _ in range(3):
        for head, one in ((torchs, reference), (ours, optimizer)):
            for parameter in head.parameters():
                parameter.grad = parameter.detach().sin()
            one.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), torchs.parameters()))


def test_groups_have_their_own_rates_and_norms_no_decay():
    backbone, head = toy_backbone(norm=True), Plain()
    optimizer = build_optimizer(
        backbone, head, OptimSettings(lr=0.1, head_lr=1.0, weight_decay=0.01)
    )
    found = {
        id(p): (group["base_lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found[id(backbone.body[0].weight)] == (0.1, 0.01)
    assert found[id(backbone.body[1].weight)] == (0.1, 0.0)
    assert found[id(head.layer.weight)] == (1.0, 0.01)
    assert found[id(head.layer.bias)] == (1.0, 0.0)
    assert len(found) == len(list(backbone.parameters())) + len(list(head.parameters()))
    set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.05, 0.5}


def test_a_heads_own_groups_and_a_frozen_backbone():
    class Own(Plain):
        def param_groups(self):
            yield [self.layer.weight], {"lr_scale": 10.0, "momentum": 0.0, "weight_decay": 0.0}

    backbone, head = toy_backbone(), Own()
    optimizer = build_optimizer(backbone, head, OptimSettings(name="sgd", lr=0.1, backbone_lr=0.0))
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert set(groups) == {id(head.layer.weight), id(head.layer.bias)}
    weight, bias = groups[id(head.layer.weight)], groups[id(head.layer.bias)]
    assert (weight["base_lr"], weight["momentum"], weight["weight_decay"]) == (1.0, 0.0, 0.0)
    assert (bias["base_lr"], bias["momentum"]) == (0.1, 0.9)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    with pytest.raises(UserError, match="nothing to train"):
        build_optimizer(toy_backbone(), Plain(), OptimSettings(backbone_lr=0.0, head_lr=0.0))


def test_forget_drops_the_state_of_one_parameter():
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([first, second])
    (first.sum() + second.sum()).backward()
    optimizer.step()
    forget(optimizer, [first])
    assert first not in optimizer.state and second in optimizer.state


def _sums(rank: int, size: int) -> list[torch.Tensor]:
    import torch.distributed as dist

    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
    parameters[0].grad = torch.full((3,), float(rank + 1))
    if rank == 0:
        parameters[1].grad = torch.eye(2)
    sum_gradients(parameters, dist.group.WORLD)
    return [parameter.grad for parameter in parameters]


def test_gradients_are_summed_also_where_a_rank_has_none():
    for first, second in run_ranks(_sums, 2):
        assert torch.equal(first, torch.full((3,), 3.0)) and torch.equal(second, torch.eye(2))
