"""Clusters of new images, for `deepclust predict`."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from deepclust.data.images import UnreadableImage
from deepclust.errors import UserError
from deepclust.model import Clusterer, image_paths

BATCH = 256


def predict(run: Path, images: Path, out: Path, trust: Sequence[str] = ()) -> None:
    """Writes `out` (path, cluster, confidence) for an image or a folder of images, with the model of a run folder.

    Unreadable images are named and left out. Raises UserError where nothing is left or `out` cannot be written.
    """
    model = Clusterer.load(run, trust=trust)
    rows: list[tuple[str, int, str]] = []
    paths = image_paths(images)
    for start in range(0, len(paths), BATCH):
        rows += _rows(model, paths[start : start + BATCH])
    if not rows:
        raise UserError(f"{images}: no image in it can be read")
    try:
        with open(out, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "cluster", "confidence"))
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); choose another file with -o") from None
    print(f"{len(rows)} of {len(paths)} images: {out}")


def _rows(model: Clusterer, paths: Sequence[Path]) -> list[tuple[str, int, str]]:
    pixels, read = [], []
    for path in paths:
        try:
            pixels.append(model.read(path))
            read.append(path)
        except UnreadableImage as error:
            print(f"left out: {error}", file=sys.stderr)
    if not read:
        return []
    confidence, cluster = torch.from_numpy(model.predict_proba(torch.stack(pixels), BATCH)).max(1)
    return [(str(path), int(k), f"{float(p):.6f}") for path, k, p in zip(read, cluster, confidence)]
