"""Folders and lists of image files: what is listed, in which order, and which classes and splits
the paths tell.
"""

from __future__ import annotations

import csv
import difflib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deepclust.data.image_set import (
    IMAGENET_GREY_MEAN,
    IMAGENET_GREY_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageData,
    ImageSet,
    Skipped,
    as_classes,
    channel_statistics,
)
from deepclust.data.images import EXTENSIONS, all_grey, decode_all
from deepclust.data.longtail import long_tail
from deepclust.errors import UserError
from deepclust.runtime.files import LOCK

TRAIN_NAMES = {"train", "training"}
SPLIT_NAMES = TRAIN_NAMES | {"val", "valid", "validation", "test", "testing"}
SYSTEM_NAMES = {"__macosx", "thumbs.db", "lost+found", "$recycle.bin", "system volume information"}
PATH_HEADERS = {"path", "file", "filename", "image", "image_path"}
NO_SPLIT = "all"


@dataclass
class Listing:
    """Image files of a folder or list: paths relative to `root`, labels by path or None, and what
    else lay there.
    """

    root: Path
    paths: list[str]
    labels: list[str | None] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    num_ignored: int = 0


DIGITS = re.compile(r"([0-9]+)")


def natural(text: str) -> tuple[Any, ...]:
    """Sort key: `img2` before `img10`, upper and lower case together, the same on every machine and
    in every locale.
    """
    pieces = DIGITS.split(text.casefold())
    return (
        *((0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in pieces if piece),
        (-1, 0, text),
    )


def _order(path: str) -> str:
    """Sorts paths as `natural` sorts the names in them, in a tenth of its memory: listings may hold
    a million.

    Only control characters in names, on which nothing depends, may come in another order.
    """
    below, slash, name = path.rpartition("/")
    return _name_order(name) if not slash else _folder_order(below) + _name_order(name)


@lru_cache(maxsize=4096)
def _folder_order(path: str) -> str:
    return "".join(map(_name_order, path.split("/")))


def _name_order(name: str) -> str:
    parts = []
    for piece in DIGITS.split(name.casefold()):
        if piece.isdecimal():
            number = str(int(piece))
            parts.append(f"\x02{chr(len(number))}{number}")
        elif piece:
            parts.append(f"\x03{piece}")
    return "".join([*parts, f"\x01{name}\x00"])


def check_folder(root: str, key: str = "data.root=") -> Path:
    """The folder at `root` (`~` allowed); a `UserError` says what is wrong with it and what may
    have been meant.

    key: what messages write before the folder.
    """
    path = Path(os.path.expanduser(root))
    if root and os.path.isdir(path):
        return path
    if os.path.isfile(path):
        raise UserError(f"{key}{root}: this is a file; give the folder that holds the images.")
    raise UserError(f"{key}{root}: there is no such folder. {_nearest(path)}")


def _nearest(path: Path) -> str:
    missing = path.absolute()
    while not os.path.isdir(missing.parent):
        missing = missing.parent
    here = missing.parent
    try:
        close = difflib.get_close_matches(missing.name, sorted(os.listdir(here)), n=1)
    except PermissionError:
        return f"There is no permission to look into {here}."
    return (
        f"Did you mean {here / close[0]}?"
        if close
        else f"The nearest folder that exists is {here}."
    )


def list_folder(root: str, key: str = "data.root=") -> Listing:
    """All image files under `root`, at any depth, in natural order of their paths.

    Hidden and system names are left out; links are followed, but never into a folder that contains
    them. Links that lead nowhere count as images, so that they are named later on. key: what
    messages write before the folder.
    """
    path = check_folder(root, key)
    found: list[str] = []
    others: Counter[str] = Counter()
    for name in _walk(path, key):
        extension = os.path.splitext(name)[1].lower()
        if extension in EXTENSIONS:
            found.append(name)
        else:
            others[extension or "no extension"] += 1
    if not found:
        raise UserError(f"{key}{root}: {_nothing_found(others)}")
    found.sort(key=_order)
    return Listing(path, found, num_ignored=others.total())


def _walk(root: Path, key: str) -> Iterator[str]:
    """Relative paths of all files below `root` that are not hidden, without those of runs and
    stores of ours.
    """
    above = tuple((status.st_dev, status.st_ino) for status in map(os.stat, root.resolve().parents))
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", above)]
    while waiting:
        below, ancestors = waiting.pop()
        folder = root / below
        try:
            status, entries = folder.stat(), list(os.scandir(folder))
        except OSError as error:
            raise UserError(
                f"{key}{root}: the folder {folder} cannot be listed ({error.strerror}).\n"
                "Give yourself permission to read it, or move it elsewhere."
            ) from error
        here = (status.st_dev, status.st_ino)
        if here in ancestors:  # a link back to a folder that contains it
            continue
        if below and any(
            entry.name == LOCK for entry in entries
        ):  # ours; a run's sorted/ holds the same images again
            continue
        for entry in entries:
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.name.startswith(".") or entry.name.lower() in SYSTEM_NAMES:
                continue
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                is_folder, is_file = False, True
            if is_folder:
                waiting.append((name, (*ancestors, here)))
            elif is_file or (entry.is_symlink() and not os.path.exists(entry.path)):
                yield name


def _nothing_found(others: Counter[str]) -> str:
    if not others:
        return "the folder is empty (hidden files are not counted)."
    kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
    return (
        f"no image among {others.total()} files ({kinds}).\n"
        f"Files with these extensions are read: {' '.join(EXTENSIONS)}"
    )


def read_structure(listing: Listing, labels: Literal["auto", "folders", "none"]) -> None:
    """Fills in splits and labels from the paths' folders.

    A first level of nothing but train, validation, test (one of them alone only if it holds
    folders) names splits; the next level names classes.
    """
    parts = [path.split("/") for path in listing.paths]
    first = {names[0].lower() for names in parts}
    has_splits = all(len(names) > 1 for names in parts) and first <= SPLIT_NAMES
    has_splits = has_splits and (len(first) > 1 or all(len(names) > 2 for names in parts))
    depth = 1 if has_splits else 0
    listing.splits = [names[0] if has_splits else NO_SPLIT for names in parts]
    found: list[str | None] = [names[depth] if len(names) > depth + 1 else None for names in parts]
    loose = next((path for path, label in zip(listing.paths, found) if label is None), None)
    if labels == "folders" and (loose is not None or len(set(found)) < 2):
        why = (
            f"{loose} lies in no class folder"
            if loose is not None
            else f"there is one class folder only, {found[0]}"
        )
        raise UserError(f"data.labels=folders: {why}. Use data.labels=auto or none.")
    if labels == "none" or (loose is not None and not has_splits):
        found = [None] * len(found)
    listing.labels = found


def list_file(file: str, labels: Literal["auto", "none"], key: str = "data.file=") -> Listing:
    """A text file with one path per line, or CSV/TSV with a path and, if wanted, a label; a header
    line is optional.

    In a .txt file a tab divides path and label, so that paths may hold commas and blanks. Paths are
    relative to the file's folder. key: what messages write before the file.
    """
    path = Path(os.path.expanduser(file))
    if not os.path.isfile(path):
        raise UserError(f"{key}{file}: there is no such file. {_nearest(path)}")
    try:
        rows = _rows(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{key}{file}: cannot be read as UTF-8 text ({error}).") from error
    if rows and rows[0][0].strip().lower() in PATH_HEADERS:
        rows = rows[1:]
    if not rows:
        raise UserError(f"{key}{file}: names no image. Give one path per line.")
    found: list[str | None] = [None for _ in rows]
    if labels == "auto":
        found = [row[1].strip() or None if len(row) > 1 else None for row in rows]
    if None in found and any(found):
        raise UserError(
            f"{key}{file}: entry {found.index(None) + 1} ({rows[found.index(None)][0]}) has no"
            " label, others do.\nGive every image a label, or use data.labels=none."
        )
    return Listing(path.parent, [row[0].strip() for row in rows], found, [NO_SPLIT] * len(rows))


def _rows(path: Path) -> list[list[str]]:
    lines = (line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip())
    if path.suffix.lower() == ".csv":
        return list(csv.reader(lines))
    return list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def load_files(
    name: str,
    listing: Listing,
    size: int,
    channels: Literal["auto", 1, 3],
    memory_mb: int,
    protocol: str,
    imbalance: float | None = None,
) -> ImageData:
    """Decodes every file once: into memory if all fit into `memory_mb` MiB, else only to find the
    unreadable ones.
    """
    files = [os.path.join(listing.root, path) for path in listing.paths]
    num_channels = channels if channels != "auto" else 1 if all_grey(files) else 3
    in_memory = len(files) * num_channels * size * size <= memory_mb * 2**20
    images, reasons = decode_all(files, size, num_channels, in_memory)
    reasons = [name_fault(path) or reason for path, reason in zip(listing.paths, reasons)]
    rows = np.flatnonzero([reason is None for reason in reasons])
    _check_count(listing, reasons, len(rows))
    if images is not None and len(rows) < len(files):
        images = images[rows]
    grey = num_channels == 1
    mean, std = (IMAGENET_GREY_MEAN, IMAGENET_GREY_STD) if grey else (IMAGENET_MEAN, IMAGENET_STD)
    if images is not None:
        mean, std = channel_statistics(images)
    classes, class_names = as_classes([listing.labels[row] for row in rows], natural)
    everything = ImageSet(
        name=name,
        ids=rows,
        paths=[listing.paths[row] for row in rows],
        splits=np.asarray([listing.splits[row] for row in rows], dtype=str),
        channels=num_channels,
        size=(size, size),
        mean=mean,
        std=std,
        images=images,
        classes=classes,
        class_names=class_names,
        skipped=[
            Skipped(row, printable(path), reason)
            for row, (path, reason) in enumerate(zip(listing.paths, reasons))
            if reason is not None
        ],
        num_ignored=listing.num_ignored,
        root=str(listing.root),
        file_bytes=np.array([os.path.getsize(files[row]) for row in rows]),
    )
    return by_protocol(name, everything, protocol, imbalance)


def printable(path: str) -> str:
    """A path that any UTF-8 file can hold."""
    return path.encode("utf-8", "backslashreplace").decode()


def name_fault(path: str) -> str | None:
    """Why a file of this name is left out, None if it is not."""
    return None if printable(path) == path else "its name is not valid UTF-8: rename it"


def _check_count(listing: Listing, reasons: Sequence[str | None], num_readable: int) -> None:
    if num_readable >= 2:
        return
    faults = [
        f"  {printable(path)}: {reason}"
        for path, reason in zip(listing.paths, reasons)
        if reason is not None
    ]
    if num_readable:
        text = f"{listing.root}: clustering needs at least 2 images, and 1 was found"
    else:
        text = f"{listing.root}: none of the {len(listing.paths)} images can be read"
    raise UserError(
        "\n".join(
            [
                f"{text}{':' if faults else '.'}",
                *faults[:5],
                *(["  ..."] if len(faults) > 5 else []),
            ]
        )
    )


def by_protocol(
    name: str, everything: ImageSet, protocol: str, imbalance: float | None = None
) -> ImageData:
    """Transductive: all images are trained on and clustered. Inductive: split train is, the rest is
    held out.

    Longtail: as inductive, where the train split has a long tail and the held-out images need not
    have one. imbalance: thins what is trained on (see `long_tail`), and never what is held out;
    inductive is then called longtail.
    """
    if protocol == "transductive":
        train = without_partial_labels(everything)
        return ImageData(
            train if imbalance is None else long_tail(train, imbalance), None, "transductive", name
        )
    in_train = np.array([split.lower() in TRAIN_NAMES for split in everything.splits])
    if in_train.sum() < 2 or in_train.all():
        found = ", ".join(sorted(set(everything.splits.tolist())))
        raise UserError(
            f"data.protocol={protocol}: needs 2 images or more in split train and some in another"
            f" (splits: {found}).\nUse data.protocol=transductive to cluster all images."
        )
    train, test = (
        without_partial_labels(everything.select(rows)) for rows in (in_train, ~in_train)
    )
    if imbalance is not None:
        train = long_tail(train, imbalance)
    if train.images is not None:
        train.mean, train.std = test.mean, test.std = channel_statistics(train.images)
    tailed = imbalance is not None or protocol == "longtail"
    return ImageData(train, test, "longtail" if tailed else "inductive", name)


def without_partial_labels(images: ImageSet) -> ImageSet:
    """The set itself; without classes if some of its images have none, for scores over a part would
    mislead.
    """
    if images.classes is not None and (images.classes < 0).any():
        images.classes, images.class_names = None, []
    return images
