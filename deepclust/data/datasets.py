"""The data sets that `data=NAME` can choose. A function's signature is the schema of its part of the configuration.

imbalance, where there are labels: thins what is trained on to a long tail (see `long_tail`), so that its largest class
has that many times the images of its smallest. protocol `longtail`: as inductive; what is held out is not thinned.
Every function returns `ImageData`. Labels, where there are any, go to `classes`, which only evaluation reads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deepclust.data.arrays import as_images, as_labels, load_array
from deepclust.data.benchmarks import (
    CIFAR20_CLASSES,
    FASHION_MNIST_CLASSES,
    fine_to_coarse,
    read_benchmark,
    read_fashion_mnist,
)
from deepclust.data.folders import NO_SPLIT, Listing, by_protocol, list_file, list_folder, load_files, read_structure
from deepclust.data.image_set import ImageData, ImageSet, Skipped, as_classes, set_of_arrays
from deepclust.data.images import decode_picture
from deepclust.errors import UserError
from deepclust.schema import Count, Imbalance, Natural

__all__ = [
    "ImageData",
    "ImageSet",
    "Skipped",
    "arrays",
    "cifar10",
    "cifar20",
    "cifar100",
    "digits",
    "fashion_mnist",
    "from_arrays",
    "from_pictures",
    "image_folder",
    "image_list",
    "stl10",
]


def digits(imbalance: Imbalance | None = None) -> ImageData:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey, 10 classes; values 0..16 scaled to 0..255. No download."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(np.rint(pixels.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8))
    names = [str(digit) for digit in range(10)]
    everything = set_of_arrays("digits", images, ["digits"] * len(images), labels.astype(np.int64), names)
    return by_protocol("digits", everything, "transductive", imbalance)


def fashion_mnist(
    root: str = "data",
    split: Literal["test", "train", "all"] = "test",
    protocol: Literal["transductive", "inductive", "longtail"] = "transductive",
    download: bool = False,
    imbalance: Imbalance | None = None,
) -> ImageData:
    """Fashion-MNIST (Xiao et al. 2017): 28 x 28 grey, 10 classes; 10,000 test (the default) and 60,000 train images.

    Looked for in `root` (torchvision's layout, or the bare IDX files), then where Debian's package
    dataset-fashion-mnist puts it; downloaded to `root` if `download`. protocol `inductive`, with split train: the
    test split is held out.
    """
    images, labels, splits = read_fashion_mnist(root, _splits_for(split, protocol), download)
    everything = set_of_arrays("fashion_mnist", images, splits, labels, FASHION_MNIST_CLASSES)
    return by_protocol("fashion_mnist", everything, protocol, imbalance)


def cifar10(
    root: str = "data",
    split: Literal["train", "test", "all"] = "train",
    protocol: Literal["transductive", "inductive", "longtail"] = "inductive",
    download: bool = False,
    imbalance: Imbalance | None = None,
) -> ImageData:
    """CIFAR-10 (Krizhevsky 2009): 32 x 32 RGB, 10 classes; 50,000 train and 10,000 test images, read by torchvision.

    By default it trains on the train split and holds the test split out, as SCAN does; `split=all
    protocol=transductive` clusters both together, as many other papers do.
    """
    return _torchvision("cifar10", "CIFAR10", root, _splits_for(split, protocol), protocol, download, imbalance)


def cifar100(
    root: str = "data",
    split: Literal["train", "test", "all"] = "train",
    protocol: Literal["transductive", "inductive", "longtail"] = "inductive",
    download: bool = False,
    imbalance: Imbalance | None = None,
) -> ImageData:
    """CIFAR-100 with its 100 classes; otherwise as `cifar10`."""
    return _torchvision("cifar100", "CIFAR100", root, _splits_for(split, protocol), protocol, download, imbalance)


def cifar20(
    root: str = "data",
    split: Literal["train", "test", "all"] = "train",
    protocol: Literal["transductive", "inductive", "longtail"] = "inductive",
    download: bool = False,
    imbalance: Imbalance | None = None,
) -> ImageData:
    """CIFAR-100 with its 20 superclasses ("CIFAR100-20"); otherwise as `cifar10`."""
    (images, labels, names), _ = read_benchmark("CIFAR100", root, _splits_for(split, protocol), download)
    everything = set_of_arrays("cifar20", images, names, fine_to_coarse()[labels], list(CIFAR20_CLASSES))
    return by_protocol("cifar20", everything, protocol, imbalance)


def stl10(
    root: str = "data",
    split: Literal["train", "test", "all", "unlabeled"] = "train",
    protocol: Literal["transductive", "inductive", "longtail"] = "inductive",
    download: bool = False,
    extra: bool = False,
    imbalance: Imbalance | None = None,
) -> ImageData:
    """STL-10 (Coates et al. 2011): 96 x 96 RGB, 10 classes; 5,000 train, 8,000 test and 100,000 unlabelled images.

    `all` is train and test together; `unlabeled` has no classes and needs protocol=transductive. extra: also reads the
    unlabelled images (2.8 GB), for the stages with `trainer.extra_images`, as SCAN's pretext has it.
    """
    data = _torchvision("stl10", "STL10", root, _splits_for(split, protocol), protocol, download, imbalance)
    if extra:
        if split == "unlabeled":
            raise UserError("data.extra=true with data.split=unlabeled: these images are trained on already.")
        data.extra = _torchvision("stl10", "STL10", root, ["unlabeled"], "transductive", False).train
    return data


def _splits_for(split: str, protocol: str) -> list[str]:
    """The splits to read: but for `transductive` both, the test split being held out."""
    if protocol != "transductive":
        if split != "train":
            raise UserError(
                f"data.split={split} with data.protocol={protocol}: what is trained on must be data.split=train, "
                "the test split is held out.\nUse data.protocol=transductive to train on this split and cluster it."
            )
        return ["train", "test"]
    return ["train", "test"] if split == "all" else [split]


def _torchvision(
    name: str,
    kind: str,
    root: str,
    splits: list[str],
    protocol: str,
    download: bool,
    imbalance: float | None = None,
) -> ImageData:
    (images, labels, names), class_names = read_benchmark(kind, root, splits, download)
    return by_protocol(name, set_of_arrays(name, images, names, labels, class_names), protocol, imbalance)


def image_folder(
    root: str,
    size: Count = 64,
    channels: Literal["auto", 1, 3] = "auto",
    labels: Literal["auto", "folders", "none"] = "auto",
    protocol: Literal["transductive", "inductive", "longtail"] = "transductive",
    memory_mb: Natural = 2048,
    imbalance: Imbalance | None = None,
) -> ImageData:
    """Any folder of images, flat or nested, labelled or not.

    size: shorter side in px after resizing; then the centre is cropped. channels `auto`: 1 if a sample of the images is
    grey throughout. labels `auto`: the names of the folders right under `root` if all images lie in two or more of
    them, else none; under train, validation and test folders, the names of the folders in those. protocol `inductive`:
    trains on the train folder alone. memory_mb: images that take no more MiB stay in memory, others are decoded anew
    each time.

    Raises:
        UserError: no such folder, no permission, fewer than two readable images, no such labels or splits.
    """
    listing = list_folder(root)
    read_structure(listing, labels)
    name = os.path.basename(os.path.abspath(listing.root)) or "image_folder"
    return load_files(name, listing, size, channels, memory_mb, protocol, imbalance)


def image_list(
    file: str,
    size: Count = 64,
    channels: Literal["auto", 1, 3] = "auto",
    labels: Literal["auto", "none"] = "auto",
    memory_mb: Natural = 2048,
    test_file: str | None = None,
    protocol: Literal["transductive", "inductive", "longtail"] = "transductive",
    imbalance: Imbalance | None = None,
) -> ImageData:
    """A text file with one image path per line, or a CSV file with a path and, if wanted, a label per line.

    Paths are relative to the file's folder. A first line `path,label` is taken as a header. In a file that is not
    called .csv a tab divides path and label. size, channels, memory_mb: as for `image_folder`. test_file: another such
    file, of images that are held out; it needs protocol `inductive` or `longtail`.

    Raises:
        UserError: no such file, fewer than two readable images, or labels for some images only.
    """
    listing = list_file(file, labels)
    if (test_file is None) != (protocol == "transductive"):
        raise UserError(
            f"data.protocol={protocol} with data.test_file={test_file}: a test_file is what inductive and longtail "
            "hold out, and transductive holds out nothing. Give both or neither."
        )
    if test_file is not None:
        held_out = list_file(test_file, labels)
        listing.splits = ["train"] * len(listing.paths) + ["test"] * len(held_out.paths)
        listing.paths += [os.path.relpath(held_out.root / path, listing.root) for path in held_out.paths]
        listing.labels += held_out.labels
    name = os.path.splitext(os.path.basename(file))[0]
    return load_files(name, listing, size, channels, memory_mb, protocol, imbalance)


def arrays(images: str, labels: str | None = None, imbalance: Imbalance | None = None) -> ImageData:
    """Images of a .npy file, or of the array `images` (or `x`, or the only one) of a .npz file.

    labels: a .npy or .npz file (array `labels` or `y`). Shapes, dtypes and ranges: see `from_arrays`. Files with Python
    objects in them are refused.
    """
    pixels = load_array(images, "data.images", ("images", "x"))
    targets = None if labels is None else load_array(labels, "data.labels", ("labels", "y"))
    return from_arrays(pixels, targets, imbalance=imbalance)


def from_arrays(
    images: np.ndarray | Tensor,
    labels: Sequence[Any] | np.ndarray | Tensor | None = None,
    name: str = "arrays",
    imbalance: float | None = None,
) -> ImageData:
    """Images (N, H, W), (N, H, W, C) or (N, C, H, W), C = 1 or 3: integers in 0..255, or floats in [0, 1].

    labels: N whole numbers or strings, or None; only evaluation reads them.

    Raises:
        UserError: another shape, values out of range (NaN included), or labels of another length.
    """
    pixels = as_images(images)
    classes, class_names = (None, []) if labels is None else as_classes(as_labels(labels, len(pixels)))
    everything = set_of_arrays(name, pixels, [NO_SPLIT] * len(pixels), classes, class_names)
    return by_protocol(name, everything, "transductive", imbalance)


def from_pictures(pictures: Sequence[Image.Image], size: int = 64, name: str = "images") -> ImageData:
    """Pillow images; of different sizes they are resized as files are, shorter side to `size` and centre crop.

    Raises:
        UserError: fewer than two, or one that cannot be decoded.
    """
    upright = [decode_picture(picture, None, 3) for picture in pictures]
    if len({picture.shape for picture in upright}) > 1:
        upright = [decode_picture(picture, size, 3) for picture in pictures]
    pixels = np.stack(upright)
    grey = (pixels[:, :1] == pixels).all()
    return from_arrays(pixels[:, :1] if grey else pixels, name=name)


def from_paths(paths: Sequence[str], size: int = 64, name: str = "images") -> ImageData:
    """Image files by path, resized as for `image_folder`; without labels.

    Raises:
        UserError: fewer than two readable images.
    """
    listing = Listing(Path(), list(paths), [None] * len(paths), [NO_SPLIT] * len(paths))
    return load_files(name, listing, size, "auto", 2048, "transductive")
