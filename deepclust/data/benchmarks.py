"""Published data sets on disk: Fashion-MNIST's IDX files; CIFAR and STL-10 through torchvision."""

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
"""Split to the first part of its files' names."""
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
IDX_UNSIGNED_BYTES = b"\0\0\x08"
"""First bytes of an IDX file of unsigned bytes; the number of dimensions follows."""
Pixels = tuple[Tensor, np.ndarray, list[str]]
"""Images (N, C, H, W) uint8, labels (N,) int64, one split name per image."""


def fine_to_coarse() -> np.ndarray:
    """(100,) int64: superclass index of each CIFAR-100 class; both in alphabetical order."""
    # class indices are ranks in alphabetical order; the table above has its superclasses in order
    pairs = sorted(
        (fine, coarse)
        for coarse, names in enumerate(CIFAR20_CLASSES.values())
        for fine in names.split()
    )
    return np.array([coarse for _, coarse in pairs])


def splits_to_read(split: str, protocol: str, held_out: str = "test") -> list[str]:
    """Names of the splits that a protocol needs.

    split: the split that is asked for; `all` is train and the held-out split together.
    protocol: all but `transductive` train on the train split and hold the other out.
    held_out: name of the data set's split besides train.

    Raises:
        UserError: another split than train with a protocol that holds one out.
    """
    if protocol != "transductive" and split != "train":
        raise UserError(
            f"data.split={split} with data.protocol={protocol}: what is trained on must be "
            f"data.split=train, the {held_out} split is held out.\n"
            "Use data.protocol=transductive to train on this split and cluster it."
        )
    if protocol != "transductive" or split == "all":
        return ["train", held_out]
    return [split]


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file of unsigned bytes, gzipped or not.

    LeCun's format: the bytes 0, 0, 8, the number of dimensions as a byte, each size as a big-endian
    32-bit integer, then the data.

    Raises:
        UserError: the file cannot be read, is broken or holds something else.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}: cannot be read ({error}). Delete it and fetch it again."
        ) from error
    if content[:3] != IDX_UNSIGNED_BYTES or len(content) < 4 + 4 * content[3]:
        raise UserError(f"{path}: is no IDX file of unsigned bytes. Delete it and fetch it again.")
    # 4 bytes of magic number and number of dimensions, then 4 bytes for each dimension's size
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], ">u4").astype(int)
    num_bytes = len(content) - start
    if num_bytes != shape.prod():
        raise UserError(
            f"{path}: is broken: {num_bytes} bytes of data, not {shape.prod()}. Delete it and fetch"
            " it again."
        )
    # a copy, because an array over `bytes` is read-only and torch warns of such
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def read_fashion_mnist(root: str, splits: Sequence[str], download: bool) -> Pixels:
    """Fashion-MNIST's images, labels and split names.

    root: folder with torchvision's layout or the bare files; Debian's package is looked at next.
    splits: `train`, `test` or both.
    download: whether to download to `root` if the files are nowhere.

    Raises:
        UserError: the files are not there, are broken, or do not go together.
    """
    home = Path(os.path.expanduser(root))
    folders = (home / "FashionMNIST" / "raw", home, DEBIAN_FASHION_MNIST)
    stems = [FASHION_MNIST_FILES[split] for split in splits]
    # the first folder that has the files of all splits: halves of two copies are never mixed
    folder = next((path for path in folders if all(_idx_files(path, stem) for stem in stems)), None)
    if folder is None and download:
        from torchvision.datasets import FashionMNIST

        _download("Fashion-MNIST", home, lambda: FashionMNIST(str(home), download=True))
        folder = folders[0]
    if folder is None:
        searched = "".join(f"\n  {path}" for path in folders)
        raise UserError(
            f"Fashion-MNIST was not found. Looked in{searched}\n"
            f"Either say data.download=true, which fetches it to {home}, "
            "or point data.root to its files,\n"
            "or install Debian's package: apt-get install dataset-fashion-mnist"
        )
    images: list[Tensor] = []
    labels: list[np.ndarray] = []
    names: list[str] = []
    for split, stem in zip(splits, stems):
        pixels, targets = _read_pair(folder, stem)
        images.append(torch.from_numpy(pixels)[:, None])
        labels.append(targets.astype(np.int64))
        names += [split] * len(targets)
    return torch.cat(images), np.concatenate(labels), names


def _read_pair(folder: Path, stem: str) -> tuple[np.ndarray, np.ndarray]:
    """(n, 28, 28) images and (n,) labels of one split."""
    # a download may have left no files: reading then names the one that is missing
    image_file, label_file = _idx_files(folder, stem) or [folder / stem, folder / stem]
    pixels = read_idx(image_file)
    targets = read_idx(label_file)
    if pixels.shape != (len(targets), 28, 28) or targets.ndim != 1:
        raise UserError(
            f"{image_file}: shape {pixels.shape} does not go with {targets.shape} labels; fetch"
            " both again."
        )
    return pixels, targets


def _idx_files(folder: Path, stem: str) -> list[Path] | None:
    """Paths of the image and the label file, plain or gzipped; None unless both are there."""
    files = []
    for name in (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"):
        candidates = (folder / name, folder / f"{name}.gz")
        file = next((path for path in candidates if path.is_file()), None)
        if file is None:
            return None
        files.append(file)
    return files


def read_benchmark(
    name: str,
    root: str,
    splits: Sequence[str],
    download: bool,
) -> tuple[Pixels, list[str]]:
    """Images, labels and split names of a data set that torchvision reads, and its class names.

    name: torchvision's class: CIFAR10, CIFAR100 or STL10.
    root: folder of its files; torchvision checks their MD5 sums before it reads them.
    splits: names of the splits, in the order in which they are joined.
    download: whether to download what is missing to `root`.

    Raises:
        UserError: the files are not there or broken, or cannot be downloaded.
    """
    from torchvision import datasets

    home = Path(os.path.expanduser(root))
    kind = getattr(datasets, name)
    # STL10 names its splits and its labels; the CIFAR classes have a flag `train` and `targets`
    named_splits = name == "STL10"
    label_attribute = "labels" if named_splits else "targets"

    def load(split: str, fetch: bool) -> Any:
        which = {"split": split} if named_splits else {"train": split == "train"}
        return kind(str(home), download=fetch, **which)

    if download:
        _download(name, home, lambda: load(splits[0], True))
    try:
        parts = [load(split, False) for split in splits]
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{name} was not found in {home}, or its files are broken.\n"
            "Either say data.download=true, "
            "or point data.root to the folder that holds torchvision's files."
        ) from error
    images = np.concatenate([_channels_first(part.data) for part in parts])
    labels = np.concatenate(
        [np.asarray(getattr(part, label_attribute), np.int64) for part in parts]
    )
    split_names = [split for split, part in zip(splits, parts) for _ in range(len(part))]
    return (torch.from_numpy(images), labels, split_names), list(parts[0].classes)


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    """(N, 3, H, W) from either order: STL10 has it already, the CIFAR classes are (N, H, W, 3)."""
    if pixels.shape[1] == 3:
        return pixels
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _download(name: str, home: Path, fetch: Callable[[], Any]) -> None:
    """Calls `fetch`; a failure becomes a UserError."""
    try:
        fetch()
    except (RuntimeError, OSError) as error:
        raise UserError(f"{name} could not be downloaded to {home}: {error}") from error
