"""Features of a folder of images on disk: made once, grown with the folder, read as memory maps.

```
<store>/
  .deepclust.lock   held by the process that writes
  store.sqlite      the manifest: images, backbones, sealed blocks with their SHA-256, format
  <backbone>.npy    features (N, D), float16 or float32, a row for each image,
                     the same for every backbone; not standardised
  simclr/           the run that trained a backbone on these very images, where one was asked for
```
A row belongs to one path for ever: new images come behind, deleted ones are marked. What changes in
the folder has a number, its scan; a block of `BLOCK` rows is sealed with the scan it was computed
in, so a row is out of date where its image changed in a later one. A transaction that seals a block
is written after the block's features, so that a kill at any moment leaves rows to compute again and
never wrong ones. Importing this file imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepclust.errors import UserError

FORMAT = 1
MANIFEST = "store.sqlite"
PERCEPTUAL = "phash"
DTYPES = ("float16", "float32")
BLOCK = 256
"""Rows that are hashed and sealed together."""
HEADER = 128
"""Bytes of a features file before its first row: a .npy header of fixed length, so that files grow
in place.
"""


@dataclass(frozen=True)
class StoredBackbone:
    """What a store knows of a backbone: its name there, D, dtype (float16, float32) and identity
    (plain JSON).

    identity: `model`, `weights` (SHA-256), `preprocess`, `trained_with_labels` (None: not known),
    `precision`, `batch_size`, `made_by` (what rebuilds it) and what else was known.
    """

    name: str
    dim: int
    dtype: str
    identity: dict[str, Any]


class FeatureStore:
    """A store that is read. Rows run 0..N-1 and belong to one path each, whatever happens to the
    folder.

    path: the store's folder. root: the folder of images. paths: N, relative to `root`. status: N of
    `ok`, `new` (not looked at yet), `unreadable`, `deleted`. reasons: why, by row, for the
    unreadable ones. sizes: (N, 2) int64, width and height in pixels, 0 where they are not known.
    hashes: N times SHA-256 of the file, or None. file_bytes,
    mtime_ns: (N,) int64. perceptual: (N,) uint64, `perceptual_hash` of the pixels that the first
    backbone was fed (the centred square), 0 where it is not known; has_perceptual: (N,) bool, where
    it is. Not known: unreadable images, and those whose features were made before stores kept it.
    backbones: by name.
    """

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self.path = path
        self._db = db
        facts = dict(db.execute("SELECT name, value FROM facts"))
        if not str(facts.get("format", "")).isdecimal() or int(facts["format"]) > FORMAT:
            raise UserError(
                f"{path} was written by a newer deepclust (format {facts.get('format')}); update"
                " deepclust"
            )
        self.root = Path(os.fsdecode(facts["root"]))
        self.scan = int(facts["scan"])
        self._read_images()
        self.backbones: dict[str, StoredBackbone] = {}
        for name, dim, dtype, identity in db.execute(
            "SELECT name, dim, dtype, identity FROM backbones ORDER BY place"
        ):
            self.backbones[name] = _checked(StoredBackbone(name, dim, dtype, json.loads(identity)))

    @classmethod
    def open(cls, path: str | Path) -> FeatureStore:
        """Reads a store's manifest; features stay on disk. Raises UserError where there is none, or
        a broken one.
        """
        folder = Path(path).expanduser()
        file = folder / MANIFEST
        if not file.is_file():
            raise UserError(
                f"{path} is no feature store; deepclust features IMAGES --store {path} makes one"
            )
        for mode in (
            "ro",
            "rw",
        ):  # a kill inside a transaction leaves a journal that only a writer may roll back
            try:
                db = connect(file, mode)
                try:
                    return cls(folder, db)
                finally:
                    db.close()
            except (sqlite3.Error, KeyError, ValueError, TypeError) as error:
                fault = error
        raise UserError(
            f"{file} cannot be read ({fault}). Remove it and make it anew: deepclust features"
            f" IMAGES --store {folder}"
        ) from fault

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def valid(self) -> np.ndarray:
        """(N,) bool: images that were there and readable when last looked at."""
        return self.status == "ok"

    def backbone(self, name: str | None = None) -> StoredBackbone:
        """The backbone of this name in the store, or of this model if only one is; None: the only
        one there is.

        Raises UserError, naming those there are, where it is none or several.
        """
        if name in self.backbones:
            return self.backbones[name]
        found = [
            each
            for each in self.backbones.values()
            if name is None or each.identity.get("model") == name
        ]
        if len(found) == 1:
            return found[0]
        names = ", ".join(each.name for each in found) or ", ".join(self.backbones) or "none yet"
        what = (
            f"{'has no' if name and not found else 'has several'}"
            f" backbones{f' {name}' if name else ''}"
        )
        if not self.backbones:
            what = "has no features yet"
        raise UserError(f"{self.path} {what}; there are: {names}")

    def known_as(self, name: str, size: int | None, dtype: str) -> str | None:
        """What the store calls the backbone that was asked for as `name`, if that cannot be another
        one by now.

        So it is with a timm model and its own weights, and with FILE.py:FUNCTION where the file is
        unchanged.
        """
        place, colon, function = name.rpartition(":")
        wanted: dict[str, Any] = {"name": name, "weights": None, "size": size}
        if place.endswith(".py") and Path(place).is_file():
            wanted["name"] = f"{os.path.abspath(place)}{colon}{function}"
            wanted["code"] = hashlib.sha256(Path(place).read_bytes()).hexdigest()
        elif colon or "/" in name:
            return None
        return self._made_by(wanted, dtype)

    def trained_here(self, dtype: str) -> str | None:
        """What the store calls the backbone that was trained on its own images, for want of
        weights.
        """
        return self._made_by(
            {"name": os.path.abspath(self.path / "simclr"), "weights": None, "size": None}, dtype
        )

    def _made_by(self, wanted: dict[str, Any], dtype: str) -> str | None:
        made = (
            (each, each.identity.get("made_by"))
            for each in self.backbones.values()
            if each.dtype == dtype
        )
        return next((each.name for each, known in made if known == wanted), None)

    def features(self, name: str | None = None) -> np.ndarray:
        """(N, D) memory map, read-only, float16 or float32. Rows that `computed` leaves out hold 0
        or old values.
        """
        found = self.backbone(name)
        file, dtype = self.file(found.name), np.dtype(found.dtype)
        if (
            not file.is_file()
            or file.stat().st_size < HEADER + len(self) * found.dim * dtype.itemsize
        ):
            raise UserError(f"{file} is not complete; {self.command} goes on where it stopped")
        return np.memmap(file, dtype.newbyteorder("<"), "r", HEADER, (len(self), found.dim))

    def computed(self, name: str | None = None) -> np.ndarray:
        """(N,) bool: rows whose features are sealed and of the image as it was last seen,
        unreadable ones included.
        """
        computed_at = np.zeros(len(self), dtype=np.int64)
        for block, (rows, _, scan) in self._blocks.get(self.backbone(name).name, {}).items():
            computed_at[block * BLOCK : block * BLOCK + rows] = scan
        return computed_at >= self.changed_at

    def rows(self, name: str | None = None) -> np.ndarray:
        """(n,) int64: the rows to work with, valid and computed."""
        return np.flatnonzero(self.valid & self.computed(name))

    def damaged(self, name: str | None = None) -> list[int]:
        """Sealed blocks whose features are not what was written (SHA-256); block b holds rows from
        b * 256 on.
        """
        found = self.backbone(name)
        blocks = self._blocks.get(found.name, {})
        row_bytes = found.dim * np.dtype(found.dtype).itemsize
        try:
            with open(self.file(found.name), "rb") as file:
                return [
                    block
                    for block, (rows, digest, _) in sorted(blocks.items())
                    if hash_rows(file.fileno(), block * BLOCK, rows, row_bytes) != digest
                ]
        except OSError:
            return sorted(blocks)

    def digest(self, name: str | None = None) -> str:
        """SHA-256 of a backbone's seals: another one where a feature is."""
        seals = sorted(self._blocks.get(self.backbone(name).name, {}).items())
        return hashlib.sha256(json.dumps(seals).encode()).hexdigest()

    def file(self, name: str) -> Path:
        """Where the features of a backbone are, by its name in the store."""
        return self.path / f"{name}.npy"

    @property
    def command(self) -> str:
        """What completes this store, in words."""
        root, path = shlex.quote(str(self.root)), shlex.quote(str(self.path))
        return f"deepclust features {root} --store {path} with the same --backbone"

    def _read_images(self) -> None:
        """Columns of the table of images, and the seals."""
        columns = (
            "path, bytes, mtime_ns, ctime_ns, width, height, sha256, status, reason, changed_at, "
        )
        columns += PERCEPTUAL if PERCEPTUAL in image_columns(self._db) else "NULL"
        rows = self._db.execute(f"SELECT {columns} FROM images ORDER BY row").fetchall()
        found: Sequence[Sequence[Any]] = list(zip(*rows)) or [()] * 11
        self.paths = [os.fsdecode(path) for path in found[0]]
        numbers = np.array(found[1:6], dtype=np.int64).reshape(5, len(rows))
        self.file_bytes, self.mtime_ns, self.ctime_ns = numbers[:3]
        self.sizes = numbers[3:].T
        self.hashes: list[bytes | None] = list(found[6])
        self.status = np.array(found[7], dtype="<U10")
        self.reasons = {row: reason for row, reason in enumerate(found[8]) if reason is not None}
        self.changed_at = np.array(found[9], dtype=np.int64)
        self.has_perceptual = np.array([each is not None for each in found[10]], dtype=bool)
        self.perceptual = np.array(
            [int.from_bytes(each or b"", "big") for each in found[10]], dtype=np.uint64
        )
        self._blocks: dict[str, dict[int, tuple[int, str, int]]] = {}
        for name, *seal in self._db.execute(
            "SELECT backbone, block, rows, sha256, computed_at FROM blocks"
        ):
            self._blocks.setdefault(name, {})[seal[0]] = (seal[1], seal[2], seal[3])


def _checked(backbone: StoredBackbone) -> StoredBackbone:
    """The same. ValueError unless its file is in the store and holds numbers: objects are
    unsafe."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", backbone.name):
        raise ValueError(f"{backbone.name!r} is no name of a backbone")
    if backbone.dtype not in DTYPES or type(backbone.dim) is not int or backbone.dim < 1:
        raise ValueError(f"{backbone.name} has {backbone.dim!r} features of {backbone.dtype!r}")
    if not isinstance(backbone.identity, dict):
        raise ValueError(f"{backbone.name} does not say what it is")
    return backbone


def connect(file: Path, mode: str) -> sqlite3.Connection:
    """The manifest; mode: `ro`, `rw`, `rwc` (made if it is not there)."""
    return sqlite3.connect(f"{file.resolve().as_uri()}?mode={mode}", uri=True, timeout=30)


def image_columns(db: sqlite3.Connection) -> list[str]:
    """Columns that the table of images has; the perceptual hash came later than the others."""
    return [name for _, name, *_ in db.execute("PRAGMA table_info(images)")]


def hash_rows(handle: int, start: int, rows: int, row_bytes: int) -> str:
    """SHA-256 of rows start..start+rows of an open features file (of what is there of them)."""
    return hashlib.sha256(read_rows(handle, start, rows, row_bytes)).hexdigest()


def read_rows(handle: int, start: int, rows: int, row_bytes: int) -> bytes:
    """Bytes of some rows of an open features file."""
    os.lseek(handle, HEADER + start * row_bytes, os.SEEK_SET)
    wanted, parts = rows * row_bytes, []
    while wanted > 0 and (part := os.read(handle, wanted)):
        parts.append(part)
        wanted -= len(part)
    return b"".join(parts)
