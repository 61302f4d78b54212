"""Compiling changes no name and no figure; where it cannot be done, training goes on."""

from __future__ import annotations

import copy

import pytest
import torch

from deepclust.config.settings import OptimSettings, TrainerSettings
from deepclust.runtime import compilation
from deepclust.training.trainer import Hooks, Trainer
from tests.toys import Plain, toy_backbone, toy_images, toy_transforms

IMAGES = toy_images()


def make(warnings: list[str] | None = None, **settings) -> Trainer:
    torch.manual_seed(0)
    values = TrainerSettings(
        **{"epochs": 1, "batch_size": 16, "precision": "float32", "ema": 0.9, **settings}
    )
    hooks = Hooks(warn=(warnings if warnings is not None else []).append)
    head, views = Plain(), toy_transforms(IMAGES)
    return Trainer(
        toy_backbone(norm=True),
        head,
        IMAGES,
        views,
        settings=values,
        optim=OptimSettings(),
        hooks=hooks,
    )


@pytest.fixture
def eager(monkeypatch) -> None:
    """Dynamo without a compiler behind it: quick, and there everywhere."""
    torch.compiler.reset()
    monkeypatch.setattr(compilation, "BACKEND", "eager")


def test_a_compiled_backbone_trains_alike_and_its_checkpoints_fit_both_ways(eager):
    warnings: list[str] = []
    plain, compiled = make(), make(warnings, compile=True)
    for trainer in (plain, compiled):
        trainer.fit()
    assert not warnings
    assert (
        compiled.network.backbone._compiled_call_impl is not None
        and plain.network.backbone._compiled_call_impl is None
    )
    states = [dict(trainer.network.state_dict()) for trainer in (plain, compiled)]
    assert list(states[0]) == list(states[1])
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value)
    saved = copy.deepcopy(compiled.state_dict())
    for other in (make(), make(compile=True)):
        other.load_state_dict(saved)
        assert other.step == compiled.step
        torch.testing.assert_close(other.features()[0], compiled.features()[0])


def test_without_a_compiler_there_is_a_warning_and_training_goes_on(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler was found\nlong story")

    torch.compiler.reset()
    monkeypatch.setattr(compilation, "BACKEND", broken)
    warnings: list[str] = []
    trainer = make(warnings, compile=True)
    trainer.fit()
    assert trainer.step == trainer.num_steps
    assert (
        len(warnings) == 1
        and "no C++ compiler was found" in warnings[0]
        and "goes on without it" in warnings[0]
    )
