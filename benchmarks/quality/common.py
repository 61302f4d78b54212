"""What several quality benchmarks share: features of a data set, cells on disk, options, tables.

A cell is one clustering. It is computed once, kept as a file of OUT/cells and read the next time,
so that a stopped comparison goes on and several processes may share one OUT.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepclust import DeepClusterer
from deepclust.config.build import build
from deepclust.config.load import load
from deepclust.data.features import features as read_features
from deepclust.data.image_set import ImageData
from deepclust.runtime.files import write_atomic

PRETEXT_IMAGES = {"digits": 40_000, "fashion_mnist": 50_000}
"""Images seen by the short SimCLR stage: a minute or two on one core."""


@dataclass(frozen=True)
class Cell:
    """One clustering."""

    data: str
    """Name of the data set."""
    seed: int
    method: str
    factor: float | None = None
    """Clusters over classes; None where a comparison does not vary it."""

    def file(self, out: Path, suffix: str) -> Path:
        """Where the cell is kept below `out`."""
        factor = [] if self.factor is None else [f"{self.factor:g}"]
        name = "_".join([self.data, *factor, str(self.seed), self.method])
        return out / "cells" / f"{name}{suffix}"


# --- features ---------------------------------------------------------------------------------


@cache
def features_of(name: str, seed: int, out: Path, file: str | None) -> tuple[Tensor, np.ndarray]:
    """Features (N, D) float32 and classes (N,) int64 of a data set.

    name: BASE-IMBALANCE (1: none), for which a SimCLR stage is trained once and kept in `out`.
    seed: of that stage.
    out: of the comparison.
    file: features and labels instead, as `benchmarks.quality.features` writes them.

    Ends the program where the file has no labels.
    """
    if file is None:
        path = out / "features" / f"{name}-{seed}.npz"
        if not path.exists():
            save_arrays(path, **pretext(name, seed))
        file = str(path)
    images = read_features(file).train
    if images.images is None or images.classes is None:
        raise SystemExit(f"{file}: has no labels to compare with")
    return images.images.flatten(1), images.classes


def pretext(name: str, seed: int) -> dict[str, np.ndarray]:
    """Trains SimCLR on a data set, thinned to its imbalance: `features` (N, D) and `labels` (N,).

    name: BASE-IMBALANCE, the base one of `PRETEXT_IMAGES`.
    seed: of the training.
    """
    base, imbalance = name.rsplit("-", 1)
    data: ImageData = build(load([f"data={base}", f"data.imbalance={imbalance}"]).data)
    settings = {
        # As the pretext of the recipe `scan`, but for its length.
        "head": "simclr",
        "head.temperature": 0.5,
        "head.neighbors_from": 0.5,
        "optim.lr": 2e-3,
        "optim.warmup_steps": 20,
        "trainer.num_images": PRETEXT_IMAGES[base],
        "trainer.num_threads": torch.get_num_threads(),
        "eval.probes": False,
    }
    # Ten clusters for the evaluation at the end; SimCLR itself has none.
    model = DeepClusterer(10, recipe="single", random_state=seed, overrides=settings).fit(data)
    assert data.train.classes is not None
    return {"features": model.transform(data.train), "labels": data.train.classes}


# --- files ------------------------------------------------------------------------------------


def save_arrays(path: Path, **arrays: Any) -> None:
    """Writes arrays to a .npz file, which is there whole or not at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process's number in the name: another process may be writing the same cell.
    part = path.with_name(f"{path.stem}.{os.getpid()}.part.npz")
    np.savez_compressed(part, **arrays)
    part.replace(path)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a header and a line per row; None becomes an empty field."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def publish(path: Path, text: str) -> None:
    """Writes a comparison's tables to a file, at once, and prints them."""
    write_atomic(path, text)
    print(text)


# --- options ----------------------------------------------------------------------------------


def comparison_parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """A parser with the options of every comparison on features, `--out` and `--features`.

    description: the module's docstring, shown as it stands.
    out: default of `--out`.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument(
        "--features", action="append", default=[], help="NAME=FILE.npz, with labels"
    )
    return parser


def named_files(words: Sequence[str]) -> dict[str, str]:
    """Path of each named file, from the NAME=FILE words of `--features`."""
    return dict(word.split("=", 1) for word in words)


# --- tables -----------------------------------------------------------------------------------


def table_row(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def table_rule(left: int, right: int = 0) -> str:
    """The line below a Markdown table's header.

    left: number of columns whose text begins at the left.
    right: number of columns behind them whose text ends at the right.
    """
    return "|" + " --- |" * left + " ---: |" * right


def figure(values: Sequence[float]) -> str:
    """Mean in per cent and, of several values, their sample standard deviation."""
    mean = f"{100 * statistics.mean(values):.1f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {100 * statistics.stdev(values):.1f}"
