"""What moves weights: gradients summed over ranks, the optimiser's step, the teacher that
follows."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deepclust.config.settings import OptimSettings, TrainerSettings
from deepclust.errors import UserError
from deepclust.heads.base import Progress
from deepclust.model import Network
from deepclust.ops.precision import autocast_dtype
from deepclust.runtime.distributed import World, sum_gradients
from deepclust.training.optim import (
    build_optimizer,
    forget,
    learning_rate_factor,
    set_learning_rate,
)


class Stepper:
    """Optimiser, loss scaling, schedule and EMA teacher of one stage.

    `network` is the student. The teacher, None where neither `trainer.ema` nor the head wants one,
    begins as its copy. Raises UserError if the head needs a teacher that `trainer.ema_mode` does
    not give.
    """

    def __init__(
        self, network: Network, optim: OptimSettings, settings: TrainerSettings, world: World
    ) -> None:
        self.network, self.optim, self.settings, self.world = network, optim, settings, world
        self.optimizer = build_optimizer(network.backbone, network.head, optim)
        self.dtype = autocast_dtype(settings.precision, world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.dtype is torch.float16)
        self.decay = network.head.teacher_decay if settings.ema is None else settings.ema
        self.teacher: Network | None = None
        if network.head.teacher_decay is not None and settings.ema_mode == "reference":
            name = type(network.head).__name__
            raise UserError(
                f"trainer.ema_mode=reference: {name} needs targets from a teacher; use"
                " ema_mode=teacher"
            )

    def start_teacher(self) -> None:
        """The teacher begins as the student."""
        if self.decay is not None:
            self.teacher = copy.deepcopy(self.network).requires_grad_(False).eval()

    @property
    def target_network(self) -> Network | None:
        """The network that makes targets, None where that is the student itself (as in SCAN's
        code).
        """
        return None if self.settings.ema_mode == "reference" else self.teacher

    def backward(self, loss: Tensor) -> None:
        """Adds a loss's gradients. A loss without gradient (nothing was confident) adds none."""
        scaled = self.scaler.scale(loss)
        if loss.requires_grad:
            scaled.backward()

    def step(self, progress: Progress) -> None:
        """One optimiser step, then the teacher's."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        sum_gradients(parameters, self.world.group)
        # float16's scaler refuses a step without any gradient, where other precisions take none
        any_gradient = any(p.grad is not None for p in parameters)
        if any_gradient:
            self.scaler.unscale_(self.optimizer)
        for name in self.network.head.frozen(progress):
            self.network.head.get_parameter(name).grad = None
        if self.settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm)
        warmup = self.optim.warmup_steps or round(
            self.optim.warmup_epochs * progress.num_steps / progress.num_epochs
        )
        per_epoch = progress.num_steps // progress.num_epochs
        factor = learning_rate_factor(
            progress.step, progress.num_steps, warmup, self.optim, per_epoch
        )
        set_learning_rate(self.optimizer, factor)
        if any_gradient:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.network.average_batch_statistics(self.world.group)
        self._move_teacher(progress)

    def _move_teacher(self, progress: Progress) -> None:
        """`teacher`: the usual mean teacher, following faster in its first steps. `reference`: as
        SCAN's code has it.

        There the averaged parameters are loaded back into the student after each step, and its
        buffers stay what they
        were at the start: in effect a learning rate of (1 - ema) times the nominal one, and frozen
        batch statistics.
        """
        if self.teacher is None or self.decay is None:
            return
        if self.settings.ema_mode == "reference":
            self.teacher.follow(self.network, self.decay, buffers=False)
            self.network.follow(self.teacher, 0.0)
        else:
            self.teacher.follow(
                self.network, min(self.decay, (1 + progress.step) / (10 + progress.step))
            )

    def reset_parameters(self, names: Iterable[str]) -> None:
        """Parameters or buffers of the head drawn anew: their optimiser state goes, the teacher
        takes the values.
        """
        student = self.network.head.state_dict(keep_vars=True)
        for name in names:
            value = student[name]
            if isinstance(value, nn.Parameter):
                forget(self.optimizer, [value])
            if self.teacher is not None:
                self.teacher.head.state_dict(keep_vars=True)[name].data.copy_(value)

    @property
    def learning_rate(self) -> float:
        """Of the first parameter group, as the last step used it."""
        return float(self.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Parts `backbone`, `head`, `optimizer`, `scaler` and, where there is one, `teacher`."""
        state: dict[str, Any] = {
            "backbone": self.network.backbone.state_dict(),
            "head": self.network.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        return state if self.teacher is None else {**state, "teacher": self.teacher.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the parts of `state_dict` back."""
        self.network.backbone.load_state_dict(state["backbone"])
        self.network.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.start_teacher()
        if self.teacher is not None and "teacher" in state:
            self.teacher.load_state_dict(state["teacher"])
