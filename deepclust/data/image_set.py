"""What every data set becomes: images by row, each with a stable id and a path; classes, if known, for evaluation."""

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

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_GREY_MEAN, IMAGENET_GREY_STD = (0.449,), (0.226,)
PICTURE_SIZE = 96
STATISTICS_IMAGES = 4096
"""At most so many images, evenly spaced, give the mean and standard deviation of a set in memory."""


@dataclass(frozen=True)
class Skipped:
    """An image file that cannot be read: its id in the full listing, its path and the reason in words."""

    id: int
    path: str
    reason: str


@dataclass(eq=False)
class ImageSet:
    """N readable images of one size. Rows run 0..N-1; `ids` are positions in the full listing, unreadable included.

    name: what tables and plots call it.
    ids (N,) int64; paths: N strings, relative to `root` for files; splits (N,) str.
    channels, size (H, W): of every image. mean, std: per channel, for pixels scaled to [0, 1].
    images: (N, C, H, W) uint8; None where the files are decoded on demand; or, of a set of features, (N, D, 1, 1)
    float32, which views leave as they are.
    classes: (N,) int64 indices into `class_names`, or None; only evaluation may read them.
    skipped: unreadable files. num_ignored: files in the folder that are no images.
    root, file_bytes (N,) int64: folder and file sizes of a set that comes from files. Of features, root alone: the
    folder of the images that they came from.
    """

    name: str
    ids: np.ndarray
    paths: list[str]
    splits: np.ndarray
    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: Tensor | None = None
    classes: np.ndarray | None = None
    class_names: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    num_ignored: int = 0
    root: str | None = None
    file_bytes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_features(self) -> bool:
        """Whether the rows are feature vectors and no images."""
        return self.images is not None and self.images.is_floating_point()

    def read(self, row: int) -> Tensor:
        """(C, H, W) uint8 image of a row, or its (D, 1, 1) float32 features.

        Raises `UnreadableImage` if its file has gone bad since the start-up scan.
        """
        if self.images is not None:
            return self.images[row]
        return torch.from_numpy(decode(os.path.join(self.root or "", self.paths[row]), self.size[0], self.channels))

    def picture(self, row: int) -> np.ndarray:
        """uint8 (C, H, W) to show for a row: its image; of features that came from images, a small one of its file.

        Grey where that file cannot be read any more.
        """
        if not self.is_features:
            return self.read(row).numpy()
        try:
            return decode(os.path.join(self.root or "", self.paths[row]), PICTURE_SIZE, 3)
        except UnreadableImage:
            return np.full((3, PICTURE_SIZE, PICTURE_SIZE), 200, dtype=np.uint8)

    def select(self, rows: np.ndarray | Sequence[int] | Tensor) -> ImageSet:
        """The set of these rows (indices, or a mask of N booleans), in this order; ids, mean and std stay."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        return replace(
            self,
            ids=self.ids[rows],
            paths=[self.paths[row] for row in rows],
            splits=self.splits[rows],
            images=None if self.images is None else self.images[torch.from_numpy(rows)],
            classes=None if self.classes is None else self.classes[rows],
            file_bytes=None if self.file_bytes is None else self.file_bytes[rows],
        )

    def fingerprint(self) -> str:
        """SHA-256 over paths and file sizes of a set that comes from files, else over the pixels; never over labels."""
        digest = hashlib.sha256()
        if self.file_bytes is not None:
            for path, num_bytes in zip(self.paths, self.file_bytes.tolist(), strict=True):
                digest.update(f"{path}\0{num_bytes}\n".encode())
        elif self.images is not None:
            digest.update(repr(tuple(self.images.shape)).encode())
            digest.update(self.images.contiguous().numpy().data)
        return digest.hexdigest()


@dataclass(eq=False)
class ImageData:
    """What a run is given. train: is trained on and clustered. test: held out, with `inductive` and `longtail`.

    extra: images that are only trained on, by stages with `trainer.extra_images`.
    """

    train: ImageSet
    test: ImageSet | None = None
    protocol: Literal["transductive", "inductive", "longtail"] = "transductive"
    name: str = ""
    extra: ImageSet | None = None

    @property
    def num_classes(self) -> int | None:
        """Number of classes among the training images, None where they have no labels."""
        return None if self.train.classes is None else len(np.unique(self.train.classes))

    def fingerprint(self) -> str:
        """SHA-256 of the images that are trained on."""
        own = self.train.fingerprint()
        return own if self.extra is None else hashlib.sha256((own + self.extra.fingerprint()).encode()).hexdigest()

    def training_images(self, extra: bool) -> ImageSet:
        """The train images, as rows 0..N-1, and the extra ones behind them if asked for; without classes then."""
        if self.extra is None or not extra:
            return self.train
        first, more = self.train, self.extra
        if first.images is None or more.images is None:
            raise ValueError("both parts must be in memory")
        return replace(
            first,
            ids=np.arange(len(first) + len(more)),
            paths=first.paths + more.paths,
            splits=np.concatenate([first.splits, more.splits]),
            images=torch.cat([first.images, more.images]),
            classes=None,
            class_names=[],
        )


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation in [0, 1] units of (N, C, H, W) uint8, from a fixed sub-sample of images.

    The deviation is at least 1/255, so that constant images can be normalised. Features stay as they are: (0,), (1,).
    """
    if images.is_floating_point():
        return (0.0,), (1.0,)
    rows = torch.linspace(0, len(images) - 1, min(len(images), STATISTICS_IMAGES), dtype=torch.float64).long()
    std, mean = torch.std_mean(images[rows].double() / 255, dim=(0, 2, 3), correction=0)
    return tuple(mean.tolist()), tuple(std.clamp(min=1 / 255).tolist())


def set_of_arrays(
    name: str, images: Tensor, splits: Sequence[str], classes: np.ndarray | None, class_names: Sequence[str]
) -> ImageSet:
    """A set held in memory: images (N, C, H, W) uint8 or features (N, D, 1, 1) float32, one split for each.

    classes: (N,) int64 or None. An image's path is its split and its number within the split.
    """
    mean, std = channel_statistics(images)
    number: defaultdict[str, Iterator[int]] = defaultdict(count)
    return ImageSet(
        name=name,
        ids=np.arange(len(images)),
        paths=[f"{split}/{next(number[split])}" for split in splits],
        splits=np.asarray(splits, dtype=str),
        channels=images.shape[1],
        size=(images.shape[2], images.shape[3]),
        mean=mean,
        std=std,
        images=images,
        classes=classes,
        class_names=list(class_names),
    )


def as_classes(labels: Sequence[Any] | None, order: Any = None) -> tuple[np.ndarray | None, list[str]]:
    """Labels of any kind to (N,) int64 indices into sorted class names; None becomes -1.

    order: sort key of the names. Fewer than two classes are no labelling: (None, []).
    """
    values = sorted({label for label in labels or [] if label is not None}, key=order)
    if len(values) < 2 or labels is None:
        return None, []
    index = {value: position for position, value in enumerate(values)}
    return np.array([-1 if label is None else index[label] for label in labels]), [str(value) for value in values]
