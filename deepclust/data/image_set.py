"""What every data set becomes: images by row, each with a stable id and a path.

Classes, where they are known, are for evaluation alone.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from deepclust.data.images import UnreadableImage, decode

# Per-channel statistics of ImageNet's training images as torchvision's networks use them; the grey
# ones are the means of the three.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET_GREY_MEAN = (0.449,)
IMAGENET_GREY_STD = (0.226,)
PICTURE_SIZE = 96
"""Side in pixels of the picture that stands for a feature vector in a report."""
PICTURE_GREY = 200
"""Grey value of the picture of an image that cannot be read any more."""
# The pixels of so many images give a mean far more precise than normalisation needs.
STATISTICS_IMAGES = 4096
"""Most images that give the mean and standard deviation of a set in memory."""


@dataclass(frozen=True)
class Skipped:
    """An image file that cannot be read."""

    id: int
    """Position in the full listing."""
    path: str
    reason: str
    """Why, in words."""


@dataclass(eq=False)
class ImageSet:
    """N readable images of one size, or N feature vectors; rows run from 0 to N - 1."""

    name: str
    """What tables and plots call the set."""
    ids: np.ndarray
    """(N,) int64 positions in the full listing, in which unreadable files count as well."""
    paths: list[str]
    """N paths, relative to `root` for files."""
    splits: np.ndarray
    """(N,) str: the split that each image is of."""
    channels: int
    size: tuple[int, int]
    """(H, W) of every image, in pixels."""
    mean: tuple[float, ...]
    """Per channel, for pixels scaled to [0, 1]."""
    std: tuple[float, ...]
    """Per channel, for pixels scaled to [0, 1]."""
    images: Tensor | None = None
    """(N, C, H, W) uint8, or of features (N, D, 1, 1) float32, which views leave unscaled.

    None where files are decoded on demand.
    """
    classes: np.ndarray | None = None
    """(N,) int64 indices into `class_names`, or None. Only evaluation may read them."""
    class_names: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    """The files that cannot be read."""
    num_ignored: int = 0
    """Number of files in the folder that are no images."""
    root: str | None = None
    """Folder of the files; of features, the folder of the images they were computed from."""
    file_bytes: np.ndarray | None = None
    """(N,) int64 file sizes of a set that is read from files; None for features."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_features(self) -> bool:
        """Whether the rows are feature vectors instead of images."""
        return self.images is not None and self.images.is_floating_point()

    def read(self, row: int) -> Tensor:
        """(C, H, W) uint8 image of a row, or its (D, 1, 1) float32 features.

        Raises:
            UnreadableImage: its file has become unreadable since it was listed.
        """
        if self.images is not None:
            return self.images[row]
        return torch.from_numpy(decode(self._file(row), self.size[0], self.channels))

    def picture(self, row: int) -> np.ndarray:
        """(C, H, W) uint8 picture of a row for a report.

        For images it is the image itself. For features it is a small RGB picture of the image they
        were computed from, or plain grey where that file cannot be read any more.
        """
        if not self.is_features:
            return self.read(row).numpy()
        try:
            return decode(self._file(row), PICTURE_SIZE, 3)
        except UnreadableImage:
            return np.full((3, PICTURE_SIZE, PICTURE_SIZE), PICTURE_GREY, dtype=np.uint8)

    def _file(self, row: int) -> str:
        """Path of a row's file."""
        return os.path.join(self.root or "", self.paths[row])

    def select(self, rows: np.ndarray | Sequence[int] | Tensor) -> ImageSet:
        """The set of these rows in this order.

        ids, mean and std stay: a part is normalised like the whole.

        rows: row indices, or a mask of N booleans.
        """
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        return replace(
            self,
            ids=self.ids[rows],
            paths=[self.paths[row] for row in rows],
            splits=self.splits[rows],
            images=_take(self.images, torch.from_numpy(rows)),
            classes=_take(self.classes, rows),
            file_bytes=_take(self.file_bytes, rows),
        )

    def fingerprint(self) -> str:
        """SHA-256 that tells whether two sets have the same images in the same order.

        Over paths and file sizes of a set that is read from files, else over the pixels. Labels are
        never part of it, so that a set without labels counts as the same.
        """
        digest = hashlib.sha256()
        if self.file_bytes is not None:
            # sizes instead of contents: a run would have to read every file before it starts
            for path, num_bytes in zip(self.paths, self.file_bytes.tolist(), strict=True):
                # NUL cannot be part of a path, so no two listings give the same bytes
                digest.update(f"{path}\0{num_bytes}\n".encode())
        elif self.images is not None:
            digest.update(repr(tuple(self.images.shape)).encode())
            digest.update(self.images.contiguous().numpy().data)
        return digest.hexdigest()


def _take(values: Any, rows: Any) -> Any:
    """The values of some rows; None where the set has none."""
    if values is None:
        return None
    return values[rows]


@dataclass(eq=False)
class ImageData:
    """The images that a run is given."""

    train: ImageSet
    """Trained on and clustered."""
    test: ImageSet | None = None
    """Held out, with the protocols `inductive` and `longtail`."""
    protocol: Literal["transductive", "inductive", "longtail"] = "transductive"
    name: str = ""
    extra: ImageSet | None = None
    """Images that are only trained on, by stages with `trainer.extra_images`."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes among the training images, None where they have no labels."""
        if self.train.classes is None:
            return None
        return len(np.unique(self.train.classes))

    def fingerprint(self) -> str:
        """SHA-256 of the images that are trained on, the extra ones included."""
        digest = self.train.fingerprint()
        if self.extra is None:
            return digest
        return hashlib.sha256((digest + self.extra.fingerprint()).encode()).hexdigest()

    def training_images(self, extra: bool) -> ImageSet:
        """The train images, or with `extra` and where there are any, those and the extra images.

        The train images are rows 0 to N - 1, the extra ones follow. Their union has no classes.
        """
        if self.extra is None or not extra:
            return self.train
        # Both are read as one array by row; a set of files has none.
        first = self.train
        second = self.extra
        if first.images is None or second.images is None:
            raise ValueError("both parts must be in memory")
        return replace(
            first,
            ids=np.arange(len(first) + len(second)),
            paths=first.paths + second.paths,
            splits=np.concatenate([first.splits, second.splits]),
            images=torch.cat([first.images, second.images]),
            classes=None,
            class_names=[],
        )


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation of images, for pixels scaled to [0, 1].

    They are taken of at most `STATISTICS_IMAGES` images. The deviation is at least 1/255, so that
    constant images can be normalised. Features give (0,), (1,) and so stay as they are.

    images: (N, C, H, W) uint8, or (N, D, 1, 1) float32 features.
    """
    if images.is_floating_point():
        return (0.0,), (1.0,)
    # evenly spaced instead of random, so that the same images always give the same statistics;
    # float64, as sums of millions of pixels lose digits in float32
    num_rows = min(len(images), STATISTICS_IMAGES)
    rows = torch.linspace(0, len(images) - 1, num_rows, dtype=torch.float64).long()
    std, mean = torch.std_mean(images[rows].double() / 255, dim=(0, 2, 3), correction=0)
    return tuple(mean.tolist()), tuple(std.clamp(min=1 / 255).tolist())


def set_of_arrays(
    name: str,
    images: Tensor,
    splits: Sequence[str],
    classes: np.ndarray | None,
    class_names: Sequence[str],
) -> ImageSet:
    """A set held in memory. The path of an image is its split and its number within the split.

    name: what tables and plots call the set.
    images: (N, C, H, W) uint8, or (N, D, 1, 1) float32 features.
    splits: N names of splits.
    classes: (N,) int64 indices into `class_names`, or None.
    class_names: names of the classes; empty without classes.
    """
    mean, std = channel_statistics(images)
    numbers: defaultdict[str, Iterator[int]] = defaultdict(count)
    return ImageSet(
        name=name,
        ids=np.arange(len(images)),
        paths=[f"{split}/{next(numbers[split])}" for split in splits],
        splits=np.asarray(splits, dtype=str),
        channels=images.shape[1],
        size=(images.shape[2], images.shape[3]),
        mean=mean,
        std=std,
        images=images,
        classes=classes,
        class_names=list(class_names),
    )


def as_classes(
    labels: Sequence[Any] | None,
    order: Any = None,
) -> tuple[np.ndarray | None, list[str]]:
    """(N,) int64 indices of labels into their sorted names, and the names.

    (None, []) for fewer than two different labels: there is nothing to tell apart.

    labels: N labels of any kind that can be sorted; None, for an unlabelled image, becomes -1.
    order: sort key of the labels.
    """
    values = sorted({label for label in labels or [] if label is not None}, key=order)
    if len(values) < 2 or labels is None:
        return None, []
    index_of = {value: index for index, value in enumerate(values)}
    indices = np.array([-1 if label is None else index_of[label] for label in labels])
    return indices, [str(value) for value in values]
