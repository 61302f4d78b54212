"""What the mini-clusters of the calibration head cost: their k-means' share of a training step (goal: at most 10 %).

    python -m benchmarks.speed.calibration [--steps 3]

Each line trains one net on random images with the calibration head around self-labelling, as it comes (one restart,
warm start) and as the paper's reference has it (ten restarts from nothing in every batch): CPU seconds of a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch

from deepclust.config import build, load
from deepclust.data.datasets import from_arrays
from deepclust.data.views import build_views
from deepclust.heads.calibration import Calibration
from deepclust.heads.selflabel import SelfLabel
from deepclust.settings import OptimSettings, TrainerSettings
from deepclust.trainer import Trainer

CASES: dict[str, tuple[list[str], int, int, int, int]] = {
    "small_convnet, 28 px, 1,000 rows, 20 mini-clusters": (["backbone=small_convnet"], 28, 1, 1000, 20),
    "small_convnet, 28 px, 1,000 rows, 100 mini-clusters": (["backbone=small_convnet"], 28, 1, 1000, 100),
    "small_convnet, 28 px, 1,000 rows, 500 mini-clusters": (["backbone=small_convnet"], 28, 1, 1000, 500),
    "cifar_resnet18, 32 px, 200 rows, 40 mini-clusters": (["backbone=cifar_resnet18"], 32, 3, 200, 40),
}
WAYS: dict[str, dict[str, Any]] = {
    "ours": {},
    "reference": {"restarts": 10, "iterations": 300, "warm_start": False},
}


class Timed(Calibration):
    """Counts the CPU seconds of its k-means."""

    spent = 0.0

    def _mini_clusters(self, x: torch.Tensor, group: Any) -> tuple[torch.Tensor, int]:
        began = time.process_time()
        found = super()._mini_clusters(x, group)
        self.spent += time.process_time() - began
        return found


def step_times(case: tuple[list[str], int, int, int, int], way: dict[str, Any], steps: int) -> tuple[float, float]:
    """CPU seconds of a step and of the k-means in it: medians after a first step that does not count."""
    words, side, channels, rows, mini_clusters = case
    config = load(words)
    pixels = np.random.default_rng(0).integers(0, 256, (rows, channels, side, side), dtype=np.uint8)
    images = from_arrays(pixels, None).train
    backbone = build(config.backbone, in_channels=channels, image_size=side)
    inner = SelfLabel(backbone.num_features, 10, kind="mlp", hidden_dim=128)
    head = Timed(backbone.num_features, 10, inner, hidden_dim=128, mini_clusters=mini_clusters, **way)
    views = build_views(config.stages["scan"].augment, images, ["clean", "weak", "strong"])
    settings = TrainerSettings(epochs=100, batch_size=rows, micro_batches=2)
    trainer = Trainer(backbone, head, images, views, settings=settings, optim=OptimSettings(step_per="micro"))
    whole, part = [], []
    for _ in range(steps + 1):
        head.spent, began = 0.0, time.process_time()
        batch = next(trainer._open_pass())
        trainer.train_step(batch, trainer.progress())
        trainer.step += 1
        whole.append(time.process_time() - began)
        part.append(head.spent)
    return statistics.median(whole[1:]), statistics.median(part[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for title, case in CASES.items():
        print(title)
        for name, way in WAYS.items():
            step, kmeans = step_times(case, way, asked.steps)
            print(f"  {name:10s} step {step:7.3f} s   k-means {kmeans:7.3f} s   {kmeans / step:6.1%}", flush=True)


if __name__ == "__main__":
    main()
