"""Small whole runs, for tests of what a run promises: 60 digits, two epochs a stage, in this
process.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from deepclust.config.load import load
from deepclust.config.run_config import RunConfig
from deepclust.data.datasets import digits, from_arrays
from deepclust.data.image_set import ImageData
from deepclust.runtime import checkpoint
from deepclust.runtime.signals import StopRequest
from deepclust.training.recipe import train

STAGES = ("pretext", "scan", "selflabel")
SMALL = (
    "trainer.batch_size=20",
    "trainer.num_threads=1",
    "trainer.num_workers=0",
    "trainer.log_every_steps=1",
    "backbone.width=8",
    *(
        f"stages.{stage}.trainer.{word}"
        for stage in STAGES
        for word in ("epochs=2", "num_images=null")
    ),
    "stages.pretext.optim.warmup_steps=2",
    "stages.scan.head.num_neighbors=5",
    "stages.scan.head.num_heads=2",
    "stages.scan.head.init=kmeans",
    "checkpoint.every_steps=2",
    "eval.baselines=none",
    "eval.probes=false",
    "eval.gallery_images=2",
    "logger.console=false",
)
RESULTS = ("model.safetensors", "clusters.csv")


def pixels(count: int = 60) -> np.ndarray:
    """(count, 1, 8, 8) uint8: the first digits."""
    return digits().train.images[:count].numpy()  # pyright: ignore[reportOptionalSubscript]


def small_data(count: int = 60, labels: Sequence[int] | None = None) -> ImageData:
    """The first digits, with the given labels or none."""
    return from_arrays(pixels(count), labels)


def words(folder: Path, *more: str) -> list[str]:
    """The configuration of a small run in `folder`."""
    return [*SMALL, "num_clusters=4", f"run.dir={folder}", *more]


def small_run(folder: Path, *more: str, data: ImageData | None = None) -> int:
    """Runs it in this process; the exit code."""
    config = _composed(*words(Path("any"), *more))
    run = {**config.tree["run"], "dir": str(folder)}
    config = replace(
        config, run=replace(config.run, dir=str(folder)), tree={**config.tree, "run": run}
    )
    return train(config, data or small_data())


@cache
def _composed(*overrides: str) -> RunConfig:
    """Composing costs as much as a small run."""
    return load(overrides)


def status(folder: Path) -> dict[str, Any]:
    """status.json."""
    return json.loads((folder / "status.json").read_text())


def outcome(folder: Path) -> dict[str, Any]:
    """Everything of a finished run that must not depend on where it was stopped: bytes, digests and
    figures.
    """
    ends: dict[str, Any] = {}
    for path in checkpoint.listing(folder / "checkpoints"):
        if checkpoint.manifest(path)["meta"]["finished"]:
            ends[path.parent.name] = checkpoint.digest(path)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["images_per_second"]
    return {
        **{name: (folder / name).read_bytes() for name in RESULTS},
        "ends": ends,
        "metrics": rows,
    }


def stop_at(monkeypatch: Any, poll: int) -> None:
    """Asks the next runs to stop at their `poll`-th look: one after each step and one before each
    long section.
    """
    polls = iter(range(1, 10**6))

    class StopAt(StopRequest):
        @property
        def requested(self) -> bool:
            return self._asked or next(polls) >= poll

        @requested.setter
        def requested(self, value: bool) -> None:
            self._asked = value

    monkeypatch.setattr("deepclust.training.recipe.StopRequest", StopAt)
