"""What the calibration head's mini-clusters cost: their k-means' share of a training step.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.speed.calibration

No committed figures are of it; the goal is at most 10 %. Each line trains one network on random
images with the calibration head around self-labelling, as it comes (`ours`: one restart, a warm
start) and as the paper's reference has it (`reference`: ten restarts from nothing in every batch).
Figures are CPU seconds of a step, medians of `--steps`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, NamedTuple

import numpy as np
import torch

from deepclust.config.build import build
from deepclust.config.load import load
from deepclust.config.settings import OptimSettings, TrainerSettings
from deepclust.data.datasets import from_arrays
from deepclust.data.views.transform import build_views
from deepclust.heads.calibration import Calibration
from deepclust.heads.selflabel import SelfLabel
from deepclust.training.trainer import Trainer


class Case(NamedTuple):
    """One network and batch."""

    backbone: str
    side: int
    """Of the square images, in pixels."""
    channels: int
    rows: int
    """Of a macro batch."""
    mini_clusters: int

    def __str__(self) -> str:
        batch = f"{self.rows:,} rows, {self.mini_clusters} mini-clusters"
        return f"{self.backbone}, {self.side} px, {batch}"


CASES = (
    Case("small_convnet", 28, 1, 1000, 20),
    Case("small_convnet", 28, 1, 1000, 100),
    Case("small_convnet", 28, 1, 1000, 500),
    Case("cifar_resnet18", 32, 3, 200, 40),
)
WAYS: dict[str, dict[str, Any]] = {
    "ours": {},
    # The paper's settings, as conf/recipe/cdc.yaml has them.
    "reference": {"restarts": 10, "iterations": 300, "warm_start": False},
}
"""Parameters of the head."""


class TimedCalibration(Calibration):
    """The calibration head, which counts the CPU seconds of its k-means in `kmeans_seconds`."""

    kmeans_seconds = 0.0

    def _mini_clusters(self, x: torch.Tensor, group: Any) -> tuple[torch.Tensor, int]:
        start = time.process_time()
        result = super()._mini_clusters(x, group)
        self.kmeans_seconds += time.process_time() - start
        return result


def trainer_for(case: Case, way: dict[str, Any], steps: int) -> Trainer:
    """A trainer that stops after `steps` macro batches, its head a `TimedCalibration`.

    case: network and batch.
    way: further parameters of the head.
    steps: macro batches.
    """
    config = load([f"backbone={case.backbone}"])
    shape = (case.rows, case.channels, case.side, case.side)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images = from_arrays(pixels, None).train
    backbone = build(config.backbone, in_channels=case.channels, image_size=case.side)
    head = TimedCalibration(
        backbone.num_features,
        10,
        SelfLabel(backbone.num_features, 10, kind="mlp", hidden_dim=128),
        hidden_dim=128,
        mini_clusters=case.mini_clusters,
        # Good initial weights take time before the first step, and change no step's.
        orthogonal_steps=1,
        **way,
    )
    augment = config.stages["scan"].augment
    settings = TrainerSettings(
        epochs=100,
        batch_size=case.rows,
        # Two optimiser steps a macro batch, as the recipe of calibrated clustering has it.
        micro_batches=2,
        max_steps=steps,
        log_every_steps=1,
    )
    return Trainer(
        backbone,
        head,
        images,
        build_views(augment, images, ["clean", "weak", "strong"]),
        settings=settings,
        optim=OptimSettings(step_per="micro"),
    )


def step_times(case: Case, way: dict[str, Any], steps: int) -> tuple[float, float]:
    """CPU seconds of a step, and of the k-means in it: medians.

    case: network and batch.
    way: further parameters of the head.
    steps: that count.
    """
    trainer = trainer_for(case, way, steps + 1)
    head = trainer.head
    assert isinstance(head, TimedCalibration)
    step_seconds: list[float] = []
    kmeans_seconds: list[float] = []
    last = time.process_time()

    def after_step(*_: Any) -> None:
        nonlocal last
        now = time.process_time()
        step_seconds.append(now - last)
        kmeans_seconds.append(head.kmeans_seconds)
        last = now
        head.kmeans_seconds = 0.0

    trainer.hooks.log = after_step
    trainer.fit()
    # The first step has no centroids to go on from, and pays for the head's initial clusters.
    return statistics.median(step_seconds[1:]), statistics.median(kmeans_seconds[1:])


def main() -> None:
    """Prints two lines for each of `CASES`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for case in CASES:
        print(case)
        for name, way in WAYS.items():
            step, kmeans = step_times(case, way, options.steps)
            figures = f"step {step:7.3f} s   k-means {kmeans:7.3f} s   {kmeans / step:6.1%}"
            print(f"  {name:10s} {figures}", flush=True)


if __name__ == "__main__":
    main()
