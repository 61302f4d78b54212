"""What `deepclust predict` is given: images of a folder or a list, or features of a store or a
file.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deepclust.data.features import load_columns
from deepclust.data.folders import list_file, list_folder, printable
from deepclust.data.store import MANIFEST, FeatureStore
from deepclust.data.store_writer import FileState, file_state
from deepclust.errors import UserError
from deepclust.predict.model import RunModel

ARRAYS = (".npy", ".npz", ".safetensors")


@dataclass
class Source:
    """N images or rows of features, in the order in which they are written.

    names: what `path` says of each. root, paths: of images. read: of features, rows first..last (n,
    D). faults: rows that cannot be clustered, and why. file: the one that holds the features.
    num_ignored: files that are no images.
    """

    names: Sequence[str]
    root: Path | None = None
    paths: Sequence[str] = ()
    read: Callable[[int, int], np.ndarray] | None = None
    faults: dict[int, str] = field(default_factory=dict)
    file: Path | None = None
    num_ignored: int = 0

    def __len__(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        """SHA-256 of what is to be clustered: paths; of features, the state of their file, too."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(os.fsencode(name) + b"\0")
        if self.file is not None:
            digest.update(repr((file_state(self.file), sorted(self.faults.items()))).encode())
        return digest.hexdigest()

    def states(self, first: int, last: int) -> str:
        """What tells whether images first..last changed: a digest of their files' sizes and
        times."""
        if self.root is None:
            return ""
        return states_digest(file_state(self.root / path) for path in self.paths[first:last])


def states_digest(states: Iterable[FileState]) -> str:
    """SHA-256 of states of files."""
    return hashlib.sha256(repr([tuple(state) for state in states]).encode()).hexdigest()


def open_source(path: Path, model: RunModel, backbone: str | None = None) -> Source:
    """A folder of images, an image, a .txt file with a path per line, a feature store, or a file of
    features.

    backbone: which one of a store, where the model does not tell. Raises UserError for what the
    model cannot take.
    """
    is_store = (path / MANIFEST).is_file()
    if is_store or path.suffix.lower() in ARRAYS:
        if not model.of_features:
            raise UserError(
                f"{path} holds features, and {model.run} is a model of images; give images"
            )
        return _of_store(path, model, backbone) if is_store else _of_file(path, model)
    if path.is_dir():
        listing = list_folder(str(path), key="")
    elif path.suffix.lower() == ".txt":
        listing = list_file(str(path), "none", key="")
    else:
        return Source([str(path)], Path(), [str(path)])
    names = [os.path.join(listing.root, name) for name in listing.paths]
    return Source(names, listing.root, listing.paths, num_ignored=listing.num_ignored)


def _of_store(path: Path, model: RunModel, backbone: str | None) -> Source:
    """The images of a store that were not deleted; unreadable ones with the reason."""
    store = FeatureStore.open(path)
    name = _backbone(store, model, backbone)
    if waiting := int((~store.computed(name) & (store.status != "deleted")).sum()):
        raise UserError(f"{path}: {waiting} images have no features yet; {store.command} goes on.")
    if damaged := store.damaged(name):
        raise UserError(
            f"{store.file(name)} was changed on disk (SHA-256, {len(damaged)} blocks of rows);"
            f" {store.command} computes them again."
        )
    rows = np.flatnonzero(store.status != "deleted")
    features = store.features(name)
    _check_columns(features, model, path)
    names = [os.path.join(store.root, store.paths[row]) for row in rows.tolist()]
    places = {row: place for place, row in enumerate(rows.tolist())}
    faults = {places[row]: reason for row, reason in store.reasons.items() if row in places}
    read: Callable[[int, int], np.ndarray] = lambda first, last: features[rows[first:last]]  # noqa: E731
    return Source(names, read=read, faults=faults, file=store.file(name))


def _backbone(store: FeatureStore, model: RunModel, asked: str | None) -> str:
    """The name in a store of what made the features that a model wants; UserError where the store
    has none by it.
    """
    wanted = model.stored
    if wanted is None:
        return store.backbone(asked).name
    found = [
        name
        for name, each in store.backbones.items()
        if all(
            each.identity.get(key) == wanted.identity.get(key) for key in ("weights", "preprocess")
        )
    ]
    found.sort(key=lambda name: store.backbones[name].dtype != wanted.dtype)
    if not found:
        made_by = wanted.identity.get("made_by") or {"name": wanted.identity.get("model")}
        words = [
            str(each) for each in (store.root, "--store", store.path, "--backbone", made_by["name"])
        ]
        raise UserError(
            f"{store.path} holds features by {', '.join(store.backbones) or 'nothing yet'};"
            f" {model.run} wants those by {wanted.name}:"
            f" {shlex.join(['deepclust', 'features', *words])}"
        )
    return found[0]


def _of_file(path: Path, model: RunModel) -> Source:
    """Rows of a file; `path` is that of the file's own `paths`, else the row's number."""
    columns = load_columns(str(path), "PATH", mapped=True)
    features = columns["features"]
    _check_columns(features, model, path)
    names = [str(name) for name in np.ravel(columns.get("paths", range(len(features))))]
    if len(names) != len(features):
        raise UserError(f"{path}: {len(names)} paths for {len(features)} rows of features")
    return Source(names, read=lambda first, last: features[first:last], file=path)


def _check_columns(features: np.ndarray, model: RunModel, path: Path) -> None:
    if features.ndim != 2 or not len(features) or features.dtype.kind not in "fiub":
        raise UserError(
            f"{printable(str(path))}: {features.dtype} of shape {features.shape}; expected numbers"
            " (N, D), N >= 1"
        )
    if features.shape[1] != model.num_features:
        raise UserError(
            f"{printable(str(path))}: features have {features.shape[1]} columns; {model.run} was"
            f" trained on {model.num_features}"
        )
