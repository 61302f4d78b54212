"""The data sets that `data=NAME` can choose.

The signature of each function is the schema of its part of the configuration. Every function
returns `ImageData`; labels, where there are any, go to `classes`, which only evaluation reads.

Parameters that several of them have:

root: folder of the files.
split: the split to train on and cluster; `all` is train and test together.
protocol: `transductive` trains on the split and clusters it; `inductive` trains on the train split
    and holds the others out; `longtail` is as inductive, where the train split has a long tail.
download: whether files that are missing are downloaded to `root`.
imbalance: makes what is trained on a long tail, whose largest class has that many times the images
    of its smallest (see `long_tail`). What is held out is never thinned. Needs labels.
size: shorter side in pixels after resizing; then the centre is cropped to a square.
memory_mb: images that take at most so many MiB stay in memory; others are decoded anew each time.
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
    splits_to_read,
)
from deepclust.data.folders import (
    NO_SPLIT,
    Listing,
    by_protocol,
    list_file,
    list_folder,
    load_files,
    read_structure,
)
from deepclust.data.image_set import ImageData, ImageSet, Skipped, as_classes, set_of_arrays
from deepclust.data.images import decode_picture
from deepclust.errors import UserError
from deepclust.types import Count, Imbalance, Natural

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
    """scikit-learn's 1,797 handwritten digits: 8 x 8 grey, 10 classes. Needs no download."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    # the values are counts of set pixels in 4 x 4 blocks, 0 to 16; images are bytes, 0 to 255
    images = torch.from_numpy(np.rint(pixels.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8))
    splits = ["digits"] * len(images)
    names = [str(digit) for digit in range(10)]
    everything = set_of_arrays("digits", images, splits, labels.astype(np.int64), names)
    return by_protocol("digits", everything, "transductive", imbalance)


def fashion_mnist(
    root: str = "data",
    split: Literal["test", "train", "all"] = "test",
    protocol: Literal["transductive", "inductive", "longtail"] = "transductive",
    download: bool = False,
    imbalance: Imbalance | None = None,
) -> ImageData:
    """Fashion-MNIST (Xiao et al. 2017): 28 x 28 grey, 10 classes; 60,000 train, 10,000 test images.

    root: folder with torchvision's layout or the bare IDX files. If they are not there, the files
        of Debian's package dataset-fashion-mnist are taken, if it is installed.
    split: the smaller test split by default, for quick runs.
    protocol, download, imbalance: see the top of this file.
    """
    images, labels, splits = read_fashion_mnist(root, splits_to_read(split, protocol), download)
    everything = set_of_arrays("fashion_mnist", images, splits, labels, FASHION_MNIST_CLASSES)
    return by_protocol("fashion_mnist", everything, protocol, imbalance)


def cifar10(
    root: str = "data",
    split: Literal["train", "test", "all"] = "train",
    protocol: Literal["transductive", "inductive", "longtail"] = "inductive",
    download: bool = False,
    imbalance: Imbalance | None = None,
) -> ImageData:
    """CIFAR-10 (Krizhevsky 2009): 32 x 32 RGB, 10 classes; 50,000 train, 10,000 test images.

    By default the train split is trained on and the test split held out, as SCAN does;
    `split=all protocol=transductive` clusters both together, as many other papers do.

    root: folder of torchvision's files.
    split, protocol, download, imbalance: see the top of this file.
    """
    splits = splits_to_read(split, protocol)
    return _torchvision("cifar10", "CIFAR10", root, splits, protocol, download, imbalance)


def cifar100(
    root: str = "data",
    split: Literal["train", "test", "all"] = "train",
    protocol: Literal["transductive", "inductive", "longtail"] = "inductive",
    download: bool = False,
    imbalance: Imbalance | None = None,
) -> ImageData:
    """CIFAR-100 with its 100 classes; otherwise as `cifar10`."""
    splits = splits_to_read(split, protocol)
    return _torchvision("cifar100", "CIFAR100", root, splits, protocol, download, imbalance)


def cifar20(
    root: str = "data",
    split: Literal["train", "test", "all"] = "train",
    protocol: Literal["transductive", "inductive", "longtail"] = "inductive",
    download: bool = False,
    imbalance: Imbalance | None = None,
) -> ImageData:
    """CIFAR-100 with its 20 superclasses ("CIFAR100-20"); otherwise as `cifar10`."""
    wanted = splits_to_read(split, protocol)
    # torchvision reads the 100 fine classes alone, so the superclasses are looked up in a table
    (images, fine, splits), _ = read_benchmark("CIFAR100", root, wanted, download)
    coarse = fine_to_coarse()[fine]
    everything = set_of_arrays("cifar20", images, splits, coarse, list(CIFAR20_CLASSES))
    return by_protocol("cifar20", everything, protocol, imbalance)


def stl10(
    root: str = "data",
    split: Literal["train", "test", "all", "unlabeled"] = "train",
    protocol: Literal["transductive", "inductive", "longtail"] = "inductive",
    download: bool = False,
    extra: bool = False,
    imbalance: Imbalance | None = None,
) -> ImageData:
    """STL-10 (Coates et al. 2011): 96 x 96 RGB, 10 classes; 5,000 train, 8,000 test images.

    Besides these it has 100,000 unlabelled images, some of them of other classes.

    root: folder of torchvision's files.
    split: `all` is train and test together; `unlabeled` has no classes and needs
        protocol=transductive.
    extra: also reads the unlabelled images (2.8 GB), for the stages with `trainer.extra_images`, as
        SCAN's pretext stage has them.
    protocol, download, imbalance: see the top of this file.

    Raises:
        UserError: `extra` with split=unlabeled.
    """
    splits = splits_to_read(split, protocol)
    data = _torchvision("stl10", "STL10", root, splits, protocol, download, imbalance)
    if extra:
        if split == "unlabeled":
            raise UserError(
                "data.extra=true with data.split=unlabeled: these images are trained on already."
            )
        unlabelled = _torchvision("stl10", "STL10", root, ["unlabeled"], "transductive", False)
        data.extra = unlabelled.train
    return data


def _torchvision(
    name: str,
    kind: str,
    root: str,
    splits: list[str],
    protocol: str,
    download: bool,
    imbalance: float | None = None,
) -> ImageData:
    """A data set that torchvision reads with its class `kind`."""
    (images, labels, split_names), class_names = read_benchmark(kind, root, splits, download)
    everything = set_of_arrays(name, images, split_names, labels, class_names)
    return by_protocol(name, everything, protocol, imbalance)


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

    root: the folder.
    channels: `auto` is 1 if a sample of the images is grey throughout, else 3.
    labels: `auto` takes the names of the folders right under `root` as labels if all images lie in
        two or more of them, else there are no labels. If these folders are called train, validation
        and test, they are splits, and the folders in them are the labels.
    protocol: `inductive` trains on the train folder alone.
    size, memory_mb, imbalance: see the top of this file.

    Raises:
        UserError: no such folder, no permission, fewer than two readable images, no such labels or
            splits.
    """
    listing = list_folder(root)
    read_structure(listing, labels)
    # the folder's name, also of "." and of a path that ends in a slash; the root of a disk has none
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
    """The images that a file lists: one path per line, with a label after it where there is one.

    file: paths are relative to its folder. In a .csv file a comma divides path and label, in other
        files a tab does. A first line `path,label` is taken as a header.
    channels: `auto` is 1 if a sample of the images is grey throughout, else 3.
    labels: `none` leaves the labels of the file unread.
    test_file: another such file, of images that are held out; needs protocol `inductive` or
        `longtail`, which in turn need it.
    size, memory_mb, protocol, imbalance: see the top of this file.

    Raises:
        UserError: no such file, fewer than two readable images, labels for some images only, or a
            protocol that does not go with `test_file`.
    """
    listing = list_file(file, labels)
    if (test_file is None) != (protocol == "transductive"):
        raise UserError(
            f"data.protocol={protocol} with data.test_file={test_file}: a test_file is what "
            "inductive and longtail hold out, and transductive holds out nothing. "
            "Give both or neither."
        )
    if test_file is not None:
        held_out = list_file(test_file, labels)
        listing.splits = ["train"] * len(listing.paths) + ["test"] * len(held_out.paths)
        # a set has one root: the second file's paths become relative to the first file's folder
        listing.paths += [
            os.path.relpath(held_out.root / path, listing.root) for path in held_out.paths
        ]
        listing.labels += held_out.labels
    name = os.path.splitext(os.path.basename(file))[0]
    return load_files(name, listing, size, channels, memory_mb, protocol, imbalance)


def arrays(images: str, labels: str | None = None, imbalance: Imbalance | None = None) -> ImageData:
    """Images, and labels if there are any, from NumPy files. Files with Python objects are refused.

    images: a .npy file, or a .npz file with the array `images` (or `x`, or only one array). Shapes,
        dtypes and ranges: see `from_arrays`.
    labels: a .npy file, or a .npz file with the array `labels` (or `y`, or only one array).
    imbalance: see the top of this file.
    """
    pixels = load_array(images, "data.images", ("images", "x"))
    targets = None
    if labels is not None:
        targets = load_array(labels, "data.labels", ("labels", "y"))
    return from_arrays(pixels, targets, imbalance=imbalance)


def from_arrays(
    images: np.ndarray | Tensor,
    labels: Sequence[Any] | np.ndarray | Tensor | None = None,
    name: str = "arrays",
    imbalance: float | None = None,
) -> ImageData:
    """Images in memory as a data set that is trained on and clustered as a whole.

    images: (N, H, W), (N, H, W, C) or (N, C, H, W), C = 1 or 3: integers in 0..255, or floats in
        [0, 1].
    labels: N whole numbers or strings, or None; only evaluation reads them.
    name: what tables and plots call the set.
    imbalance: see the top of this file.

    Raises:
        UserError: another shape, values out of range (NaN included), or labels of another length.
    """
    pixels = as_images(images)
    classes: np.ndarray | None = None
    class_names: list[str] = []
    if labels is not None:
        classes, class_names = as_classes(as_labels(labels, len(pixels)))
    splits = [NO_SPLIT] * len(pixels)
    everything = set_of_arrays(name, pixels, splits, classes, class_names)
    return by_protocol(name, everything, "transductive", imbalance)


def from_pictures(
    pictures: Sequence[Image.Image], size: int = 64, name: str = "images"
) -> ImageData:
    """Pillow images; of different sizes they are resized as files are, shorter side to `size` and
    centre crop.

    Raises:
        UserError: fewer than two, or one that cannot be decoded.
    """
    upright = [decode_picture(picture, None, 3) for picture in pictures]
    if len({picture.shape for picture in upright}) > 1:
        upright = [decode_picture(picture, size, 3) for picture in pictures]
    pixels = np.stack(upright)
    grey = (pixels[:, :1] == pixels).all()
    return from_arrays(pixels[:, :1] if grey else pixels, name=name)


def from_paths(paths: Sequence[str]) -> ImageData:
    """Image files by path, without labels; size, channels and memory as `image_folder` defaults.

    Raises:
        UserError: fewer than two readable images.
    """
    no_labels: list[str | None] = [None] * len(paths)
    listing = Listing(Path(), list(paths), no_labels, [NO_SPLIT] * len(paths))
    return load_files("images", listing, 64, "auto", 2048, "transductive")
