"""Optimisers with the parameter groups of a stage, LARS, and the learning rate as a pure function
of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deepclust.config.settings import OptimSettings
from deepclust.errors import UserError
from deepclust.heads.base import Head


def build_optimizer(
    backbone: nn.Module, head: Head, settings: OptimSettings
) -> torch.optim.Optimizer:
    """The optimiser of a backbone and a head; one-dimensional parameters (biases, norms) decay only
    if asked to.

    Every group carries `base_lr`; `set_learning_rate` scales it. A head's own groups may scale the
    learning rate (`lr_scale`) and set `momentum` and `weight_decay`.
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
    if settings.name in ("sgd", "lars"):
        kind = LARS if settings.name == "lars" else torch.optim.SGD
        return kind(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov)
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=settings.lr, betas=settings.betas)


def _split(
    parameters: Iterable[nn.Parameter],
    settings: OptimSettings,
    lr: float | None,
    own: dict[str, float],
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
    if settings.name in ("sgd", "lars") and "momentum" in own:
        common["momentum"] = own["momentum"]
    groups: list[dict[str, object]] = []
    for flat in (False, True):
        chosen = [parameter for parameter in trainable if (parameter.ndim <= 1) == flat]
        group = {
            "params": chosen,
            "weight_decay": 0.0 if flat and not settings.decay_bias_and_norm else decay,
            **common,
        }
        if settings.name == "lars":
            group["trust"] = None if flat and not settings.adapt_bias_and_norm else settings.trust
        groups += [group] if chosen else []
    return groups


class LARS(torch.optim.SGD):
    """SGD with layer-wise adaptive rates (You et al. 2017, section 4), as LARC without clipping and
    SwAV have it.

    With t = `trust`, d = `weight_decay` and norms over a whole tensor p with gradient g:

        g <- (g + d p) t |p| / (|g| + d |p| + 1e-8)    where |p|, |g| > 0, else g, without decay;

    then SGD's momentum, and a step of `lr`. The paper has the rate inside the momentum; here, as in
    SwAV, outside. A group whose `trust` is None is plain SGD with L2 decay.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. Gradients are scaled in place."""
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays):
            if group["trust"] is not None:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        _adapt(parameter, parameter.grad, group["trust"], decay)
                group["weight_decay"] = 0.0
        try:
            return super().step(closure)
        finally:
            for group, decay in zip(self.param_groups, decays):
                group["weight_decay"] = decay


def _adapt(parameter: Tensor, gradient: Tensor, trust: float, decay: float) -> None:
    """Decay and layer-wise scaling of a gradient in place; no value leaves the device."""
    size, slope = parameter.norm(), gradient.norm()
    both = (size > 0) & (slope > 0)
    scale = torch.where(both, trust * size / (slope + decay * size + 1e-8), 1.0)
    gradient.add_(parameter * both.to(gradient) * decay).mul_(scale)


def learning_rate_factor(
    step: int, num_steps: int, warmup_steps: int, settings: OptimSettings, steps_per_epoch: int = 1
) -> float:
    """Factor of the base learning rate at step `step` (0-based): linear warm-up, then the schedule.

    A cosine falls from the warm-up's end to `num_steps`. Milestones count from the stage's
    beginning.
    """
    if step < warmup_steps:
        start = settings.warmup_start_fraction
        if start is None:
            return (step + 1) / warmup_steps
        return start + (1 - start) * step / max(1, warmup_steps - 1)
    if settings.schedule_per == "epoch":
        step -= step % steps_per_epoch
    if settings.schedule == "step":
        marks = [
            mark * (num_steps if mark < 1 else steps_per_epoch) for mark in settings.milestones
        ]
        return settings.milestone_factor ** sum(step >= mark for mark in marks)
    if settings.schedule == "constant":
        return 1.0
    done = max(0, step - warmup_steps) / max(1, num_steps - warmup_steps)
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
