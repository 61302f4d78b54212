"""A small folder of images with its store and a run over it, made within a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deepclust.collection.derived import Derived
from deepclust.collection.history import State
from deepclust.collection.landmarks import FILE, Landmarks
from deepclust.collection.run import FolderRun
from deepclust.data.store import FeatureStore
from deepclust.features.extract import Asked, extract

COLOURS = {"blue": 2, "green": 1, "red": 0}
NETS = """
import torch
from deepclust.backbones import Preprocess

class Colours(torch.nn.Module):
    preprocess, trained_with_labels = Preprocess(8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)), {labels}

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)

def colours():
    return Colours()
"""


def toy_photos(root: Path, num_images: int = 14, copies: int = 2, broken: bool = True) -> Path:
    """A folder of `num_images` blue, green and red images of 14 x 10 px, a sub-folder each.

    The last `copies` red ones are byte for byte the first red one. broken: one more file that is no
    image.
    """
    random = np.random.default_rng(0)
    names = list(COLOURS)
    for number in range(num_images):
        name = names[number % 3]
        pixels = random.integers(0, 100, (10, 14, 3), dtype=np.uint8)
        pixels[..., COLOURS[name]] += 150
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
    for number in range(copies):
        (root / "red" / f"copy{number}.png").write_bytes((root / "red/002.png").read_bytes())
    if broken:
        (root / "red/broken.png").write_bytes(b"no image")
    return root


def toy_store(folder: Path, photos: Path, labels: bool | None = False) -> FeatureStore:
    """Features (N, 12) of these photos in `folder`/store. labels: what the backbone says of its own
    training.
    """
    (folder / "nets.py").write_text(NETS.format(labels=labels))
    extract(Asked(photos, folder / "store", [f"{folder / 'nets.py'}:colours"]))
    return FeatureStore.open(folder / "store")


def toy_state(store: FeatureStore) -> State:
    """Clusters 0, 1, 2 for blue, green, red; the first image of all is noise; copies point to what
    they copy.
    """
    rows = store.rows()
    random = np.random.default_rng(1)
    colour = np.array([list(COLOURS).index(store.paths[row].split("/")[0]) for row in rows])
    copy_of = np.full(len(rows), -1)
    originals = {store.hashes[row]: row for row in rows[::-1]}
    for place, row in enumerate(rows):
        first = originals[store.hashes[row]]
        copy_of[place] = first if first != row else -1
    cluster = colour.copy()
    cluster[0] = -1
    position = (
        np.stack([colour * 3.0, colour % 2 * 4.0], 1) + random.normal(0, 0.3, (len(rows), 2))
    ).astype(np.float32)
    confidence = random.uniform(0.4, 1, len(rows)).astype(np.float32)
    return State(
        rows,
        cluster,
        confidence,
        position.astype(np.float32),
        copy_of,
        np.zeros(len(rows), dtype=bool),
        {},
        3,
    )


def toy_run(folder: Path, labels: bool | None = False, **facts: Any) -> FolderRun:
    """A run in `folder`/run over photos in `folder`/photos and features in `folder`/store; facts:
    further ones.
    """
    photos = toy_photos(folder / "photos")
    store = toy_store(folder, photos, labels)
    (folder / "run").mkdir()
    known = {
        "root": str(photos.resolve()),
        "store": str(store.path.resolve()),
        "backbone": store.backbone().name,
        "asked": {"num_clusters": 3, "noise": True, "sort": None, "seed": 0},
        "clusterer": "kmeans",
        "choice": {
            "kmeans": {"seconds": 0.1, "agreement": 0.9},
            "ward": {"seconds": 0.2, "agreement": 0.8},
        },
        "criterion": "agreement",
        "number": None,
        "seconds": {"features": 1.0, "cluster": 0.5},
    }
    run = FolderRun(folder / "run", {**known, **facts})
    run.save()
    run.history.push("cluster", toy_state(store))
    return run


def toy_landmarks(run: FolderRun) -> None:
    """Every image that is no copy becomes a landmark of the run."""
    derived = Derived(run.store, run.facts["backbone"])
    places = derived.landmarks
    trust = np.full(len(places), 0.9, dtype=np.float32)
    Landmarks(
        derived.rows[places],
        derived.x[places].numpy().astype(np.float16),
        trust,
        derived.basis.numpy(),
    ).save(run.path / FILE)
