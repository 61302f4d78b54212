"""Optimisers with the parameter groups of a stage, and the learning-rate schedule as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from deepclust.errors import UserError
from deepclust.heads.base import Head
from deepclust.settings import OptimSettings


def build_optimizer(backbone: nn.Module, head: Head, settings: OptimSettings) -> torch.optim.Optimizer:
    """AdamW or SGD over a backbone and a head; biases and one-dimensional parameters (norms) get no weight decay.

    Every group carries `base_lr`; `set_learning_rate` scales it. A head's own groups may scale the learning rate
    (`lr_scale`) and set `momentum` and `weight_decay`.
    """
    groups = _split(backbone.parameters(), settings, settings.backbone_lr, {})
    named: set[int] = set()
    for parameters, own in head.param_groups():
        named.update(map(id, parameters))
        groups += _split(parameters, settings, settings.head_lr, own)
    rest = [parameter for parameter in head.parameters() if id(parameter) not in named]
    groups += _split(rest, settings, settings.head_lr, {})
    if not groups:
        raise UserError("nothing to train: the backbone is frozen and the head has no parameters")
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas)


def _split(
    parameters: Iterable[nn.Parameter], settings: OptimSettings, lr: float | None, own: dict[str, float]
) -> list[dict[str, object]]:
    """Groups with and without weight decay. A learning rate of 0 freezes."""
    base_lr = (settings.lr if lr is None else lr) * own.get("lr_scale", 1.0)
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if base_lr == 0:
        for parameter in trainable:
            parameter.requires_grad_(False)
        return []
    decay = own.get("weight_decay", settings.weight_decay)
    common: dict[str, object] = {"base_lr": base_lr, "lr": base_lr}
    if "momentum" in own and settings.name == "sgd":
        common["momentum"] = own["momentum"]
    decayed = [p for p in trainable if p.ndim > 1 or settings.decay_bias_and_norm]
    plain = [p for p in trainable if not (p.ndim > 1 or settings.decay_bias_and_norm)]
    both = ((decayed, decay), (plain, 0.0))
    return [{"params": chosen, "weight_decay": wd, **common} for chosen, wd in both if chosen]


def learning_rate_factor(step: int, num_steps: int, warmup_steps: int, settings: OptimSettings) -> float:
    """Factor of the base learning rate at optimiser step `step` (0-based): linear warm-up, then cosine or constant."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if settings.schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    floor = settings.final_lr_fraction
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scales every group's base learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def forget(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Drops the optimiser's state of re-drawn parameters."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
