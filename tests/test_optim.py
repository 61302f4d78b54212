"""Schedules against torch's own, parameter groups, and the sum of gradients over ranks."""

from __future__ import annotations

import pytest
import torch

from deepclust.distributed import sum_gradients
from deepclust.errors import UserError
from deepclust.optim import build_optimizer, forget, learning_rate_factor, set_learning_rate
from deepclust.settings import OptimSettings
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
        assert learning_rate_factor(step, 50, 5, settings) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        torchs.step()
    assert learning_rate_factor(30, 50, 5, OptimSettings(schedule="constant")) == 1.0


def test_groups_have_their_own_rates_and_norms_no_decay():
    backbone, head = toy_backbone(norm=True), Plain()
    optimizer = build_optimizer(backbone, head, OptimSettings(lr=0.1, head_lr=1.0, weight_decay=0.01))
    found = {
        id(p): (group["base_lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
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
