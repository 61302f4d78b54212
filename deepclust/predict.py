"""Clusters of new images with the model of a run."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from deepclust.data.images import UnreadableImage
from deepclust.errors import UserError
from deepclust.model import Clusterer, image_paths
from deepclust.run_folder import explain

BATCH = 256


def predict(run: Path, images: Path, out: Path, trust: Sequence[str] = ()) -> tuple[int, int]:
    """Writes path, cluster, confidence of every image below `images` (a folder or a file) to the CSV file `out`.

    run: a run folder or a model file. An image that cannot be read gets an empty cluster and the reason in `error`.
    Returns how many were clustered and how many could not be read. Raises UserError where nothing is to be done.
    """
    clusterer = Clusterer.load(run, trust=trust)
    paths = image_paths(images)
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise UserError(f"--out {out}: must be a file in a folder that exists")
    temporary = out.with_name(f".tmp-{out.name}")
    try:
        with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            done, failed = _write(file, clusterer, paths)
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {explain(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    print(f"{done} images clustered{f', {failed} could not be read' if failed else ''}: {out}")
    return done, failed


def _write(file: TextIO, clusterer: Clusterer, paths: Sequence[Path]) -> tuple[int, int]:
    """A line for each path; gives how many images were clustered and how many could not be read."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["path", "cluster", "confidence", "error"])
    done = 0
    for start in range(0, len(paths), BATCH):
        part = paths[start : start + BATCH]
        pixels, reasons = _read(clusterer, part)
        found = iter(clusterer.predict_proba(torch.stack(pixels).numpy()) if pixels else [])
        for path, reason in zip(part, reasons):
            if reason is None:
                row = next(found)
                writer.writerow([path, int(row.argmax()), f"{row.max():.6f}", ""])
            else:
                writer.writerow([path, "", "", reason])
        done += len(pixels)
    return done, len(paths) - done


def _read(clusterer: Clusterer, paths: Sequence[Path]) -> tuple[list[Tensor], list[str | None]]:
    """The readable images, and for each path None or why it could not be read."""
    pixels: list[Tensor] = []
    reasons: list[str | None] = []
    for path in paths:
        try:
            pixels.append(clusterer.read(path))
            reasons.append(None)
        except UnreadableImage as error:
            reasons.append(error.reason)
    return pixels, reasons
