"""Published data sets on disk: Fashion-MNIST's IDX files, and CIFAR and STL-10 through torchvision."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepclust.errors import UserError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the gzipped IDX files."""
FASHION_MNIST_FILES = {"train": "train", "test": "t10k"}
FASHION_MNIST_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
CIFAR20_CLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
"""CIFAR-100's superclasses (Krizhevsky 2009, section 3): superclass -> its five classes."""
Pixels = tuple[Tensor, np.ndarray, list[str]]
"""Images (N, C, H, W) uint8, labels (N,) int64, one split name per image."""


def fine_to_coarse() -> np.ndarray:
    """(100,) int64: CIFAR-100's class index (alphabetical) to its superclass index (alphabetical)."""
    pairs = sorted((fine, coarse) for coarse, names in enumerate(CIFAR20_CLASSES.values()) for fine in names.split())
    return np.array([coarse for _, coarse in pairs])


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes, gzipped or not (LeCun's format: magic 0, 0, 8, dims; big-endian sizes; data).

    Raises:
        UserError: the file cannot be read, is broken or holds something else.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}). Delete it and fetch it again.") from error
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise UserError(f"{path}: is no IDX file of unsigned bytes. Delete it and fetch it again.")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], ">u4").astype(int)
    if len(content) - start != shape.prod():
        found = len(content) - start
        raise UserError(f"{path}: is broken: {found} bytes of data, not {shape.prod()}. Delete it and fetch it again.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def read_fashion_mnist(root: str, splits: Sequence[str], download: bool) -> Pixels:
    """Fashion-MNIST from `root` (torchvision's layout or bare files) or Debian's package, or downloaded to `root`."""
    home = Path(os.path.expanduser(root))
    places = (home / "FashionMNIST" / "raw", home, DEBIAN_FASHION_MNIST)
    stems = [FASHION_MNIST_FILES[split] for split in splits]
    place = next((place for place in places if all(_idx_files(place, stem) for stem in stems)), None)
    if place is None and download:
        from torchvision.datasets import FashionMNIST

        _download("Fashion-MNIST", home, lambda: FashionMNIST(str(home), download=True))
        place = places[0]
    if place is None:
        looked = "".join(f"\n  {place}" for place in places)
        raise UserError(
            f"Fashion-MNIST was not found. Looked in{looked}\n"
            f"Either say data.download=true, which fetches it to {home}, or point data.root to its files,\n"
            "or install Debian's package: apt-get install dataset-fashion-mnist"
        )
    images, labels, names = [], [], []
    for split, stem in zip(splits, stems):
        files = _idx_files(place, stem) or [place / stem, place / stem]
        pixels, targets = read_idx(files[0]), read_idx(files[1])
        if pixels.shape != (len(targets), 28, 28) or targets.ndim != 1:
            raise UserError(
                f"{files[0]}: shape {pixels.shape} does not go with {targets.shape} labels; fetch both again."
            )
        images.append(torch.from_numpy(pixels)[:, None])
        labels.append(targets.astype(np.int64))
        names += [split] * len(targets)
    return torch.cat(images), np.concatenate(labels), names


def _idx_files(place: Path, stem: str) -> list[Path] | None:
    """Paths of the image and the label file, or None unless both are there."""
    names = (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte")
    found = [next((path for path in (place / name, place / f"{name}.gz") if path.is_file()), None) for name in names]
    return [path for path in found if path is not None] if None not in found else None


def read_benchmark(name: str, root: str, splits: Sequence[str], download: bool) -> tuple[Pixels, list[str]]:
    """CIFAR10, CIFAR100 or STL10 by torchvision's class name; gives pixels, labels, splits, and the class names.

    torchvision checks the MD5 sums of the files before it reads them.
    """
    from torchvision import datasets

    home = Path(os.path.expanduser(root))
    kind = getattr(datasets, name)

    def load(split: str, fetch: bool) -> Any:
        which = {"split": split} if name == "STL10" else {"train": split == "train"}
        return kind(str(home), download=fetch, **which)

    if download:
        _download(name, home, lambda: load(splits[0], True))
    try:
        parts = [load(split, False) for split in splits]
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{name} was not found in {home}, or its files are broken.\n"
            "Either say data.download=true, or point data.root to the folder that holds torchvision's files."
        ) from error
    images = np.concatenate([_channels_first(part.data) for part in parts])
    labels = np.concatenate([np.asarray(part.labels if name == "STL10" else part.targets, np.int64) for part in parts])
    names = [split for split, part in zip(splits, parts) for _ in range(len(part))]
    return (torch.from_numpy(images), labels, names), list(parts[0].classes)


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.shape[1] == 3 else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _download(name: str, home: Path, fetch: Callable[[], Any]) -> None:
    try:
        fetch()
    except (RuntimeError, OSError) as error:
        raise UserError(f"{name} could not be downloaded to {home}: {error}") from error
