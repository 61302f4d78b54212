"""The one process that writes a feature store: what changed in the folder, and features as they are
made.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from deepclust.data.folders import Listing
from deepclust.data.images import in_threads, readable_now
from deepclust.data.store import (
    BLOCK,
    FORMAT,
    HEADER,
    MANIFEST,
    PERCEPTUAL,
    FeatureStore,
    StoredBackbone,
    connect,
    hash_rows,
    image_columns,
)
from deepclust.errors import UserError
from deepclust.runtime.files import explain, inside, release_lock, take_lock

SCHEMA = (
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value)",
    (
        "CREATE TABLE images (row INTEGER PRIMARY KEY, path BLOB UNIQUE NOT NULL, bytes INTEGER,"
        " mtime_ns INTEGER, ctime_ns INTEGER, width INTEGER, height INTEGER, sha256 BLOB, status"
        f" TEXT, reason TEXT, changed_at INTEGER, {PERCEPTUAL} BLOB)"
    ),
    (
        "CREATE TABLE backbones (place INTEGER PRIMARY KEY, name TEXT UNIQUE, dim INTEGER, dtype"
        " TEXT, identity TEXT)"
    ),
    (
        "CREATE TABLE blocks (backbone TEXT, block INTEGER, rows INTEGER, sha256 TEXT, computed_at"
        " INTEGER, PRIMARY KEY (backbone, block))"
    ),
)
OPTION = "--store DIR"
AT_ONCE = 500


class FileState(NamedTuple):
    """What the file system tells of a file without reading it; -1 where it cannot."""

    bytes: int
    mtime_ns: int
    ctime_ns: int


class Fact(NamedTuple):
    """What reading an image told. status: `ok` or `unreadable`. size: (width, height). sha256: None
    if not wanted.

    perceptual: hash of the pixels that a backbone is fed, None for an unreadable image.
    """

    row: int
    state: FileState
    size: tuple[int, int]
    sha256: bytes | None
    status: str
    reason: str | None
    perceptual: int | None = None


@dataclass
class Changes:
    """How many images of the folder are new, changed, deleted or deleted ones that came back."""

    new: int = 0
    changed: int = 0
    deleted: int = 0
    returned: int = 0


class StoreWriter(FeatureStore):
    """A store that this process alone may write, until `close`."""

    def __init__(self, path: Path, db: sqlite3.Connection, lock: IO[str] | None = None) -> None:
        super().__init__(path, db)
        self._lock = lock
        self._files: dict[str, int] = {}

    @classmethod
    def create(cls, path: str | Path, root: Path) -> StoreWriter:
        """Takes over the store at `path`, or makes an empty one, for the images of the folder
        `root`.

        Raises UserError: a folder of something else, a store of another folder, one in use, or no
        way to write there.
        """
        folder, root = Path(os.path.abspath(os.path.expanduser(path))), root.resolve()
        with in_words(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / MANIFEST).exists() and any(
                not name.startswith(".") for name in os.listdir(folder)
            ):
                raise UserError(
                    f"--store {folder} holds other files and is no feature store; choose another"
                    f" {OPTION}"
                )
            lock = take_lock(folder, "--store ")
        try:
            with in_words(folder):
                db = connect(inside(folder, MANIFEST), "rwc")
                if not db.execute("SELECT 1 FROM sqlite_master").fetchone():
                    _fill(db, root)
                elif PERCEPTUAL not in image_columns(db):  # a store from before it kept such hashes
                    db.execute(f"ALTER TABLE images ADD COLUMN {PERCEPTUAL} BLOB")
                store = cls(folder, db, lock)
                store._same_folder(root)
                return store
        except (KeyError, ValueError, TypeError) as error:
            release_lock(folder, lock)
            raise UserError(
                f"{folder / MANIFEST} is damaged ({error}). Remove the store and make it anew"
            ) from error
        except BaseException:
            release_lock(folder, lock)
            raise

    def close(self) -> None:
        """Lets another process have the store."""
        for handle in self._files.values():
            os.close(handle)
        self._files = {}
        self._db.close()
        release_lock(self.path, self._lock)
        self._lock = None

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, listing: Listing, hashing: bool) -> Changes:
        """Brings the table of images up to what the folder holds now, in one transaction.

        A file whose size and times are as before is taken as unchanged. Else, with `hashing`, its
        SHA-256 decides; and without, or where none was kept, size and time of modification.
        Unreadable ones are tried again when touched, or when what they lacked was installed.
        """
        states = _states(listing)
        known = {path: row for row, path in enumerate(self.paths)}
        found = {known[path]: state for path, state in zip(listing.paths, states) if path in known}
        fresh = [(path, state) for path, state in zip(listing.paths, states) if path not in known]
        touched = [row for row, state in found.items() if self._touched(row, state, hashing)]
        digests = (
            in_threads(lambda at: _digest(self.root / self.paths[touched[at]]), len(touched))
            if hashing
            else []
        )
        changed = [
            (row, digest)
            for row, digest in zip(touched, digests or [None] * len(touched))
            if self._differs(row, found[row], digest)
        ]
        returned = [row for row in found if self.status[row] == "deleted"]
        deleted = [
            row for row in range(len(self)) if row not in found and self.status[row] != "deleted"
        ]
        anew = {row for row, _ in changed} | set(returned)
        anew |= {
            row
            for row in found
            if self.status[row] == "unreadable" and readable_now(self.reasons[row])
        }
        with in_words(self.path), self._db as db:
            db.executemany(
                "UPDATE images SET status = 'deleted', reason = NULL WHERE row = ?",
                [(r,) for r in deleted],
            )
            db.executemany(
                "UPDATE images SET bytes = ?, mtime_ns = ?, ctime_ns = ? WHERE row = ?",
                [(*found[row], row) for row in touched],
            )
            hashed = [(digest, row) for row, digest in zip(touched, digests) if digest is not None]
            db.executemany("UPDATE images SET sha256 = ? WHERE row = ?", hashed)
            self._add(db, fresh, anew)
        if fresh or anew or touched or deleted:
            self.refresh()
        return Changes(len(fresh), len(changed), len(deleted), len(returned))

    def refresh(self) -> None:
        """Reads the manifest again: what was written of sizes and hashes since."""
        self._read_images()

    def _touched(self, row: int, state: FileState, hashing: bool) -> bool:
        if hashing and self.hashes[row] is None and self.status[row] == "ok":
            return True
        return (self.file_bytes[row], self.mtime_ns[row], self.ctime_ns[row]) != state

    def _differs(self, row: int, state: FileState, digest: bytes | None) -> bool:
        """Whether the image of a touched file has to be looked at anew."""
        if self.status[row] == "deleted":
            return False  # it is anyway
        if self.status[row] != "ok":
            return True
        if digest is not None and self.hashes[row] is not None:
            return digest != self.hashes[row]
        return (self.file_bytes[row], self.mtime_ns[row]) != state[:2]

    def _add(
        self, db: sqlite3.Connection, fresh: Sequence[tuple[str, FileState]], anew: set[int]
    ) -> None:
        """Rows for new images, and a new scan for all that has to be computed."""
        if not fresh and not anew:
            return
        self.scan += 1
        db.execute("UPDATE facts SET value = ? WHERE name = 'scan'", (self.scan,))
        statement = (
            f"UPDATE images SET status = 'new', reason = NULL, changed_at = ?, {PERCEPTUAL} = NULL"
            " WHERE row = ?"
        )
        db.executemany(statement, [(self.scan, row) for row in sorted(anew)])
        rows = [
            (len(self) + place, os.fsencode(path), *state, self.scan)
            for place, (path, state) in enumerate(fresh)
        ]
        columns = "row, path, bytes, mtime_ns, ctime_ns, width, height, status, changed_at"
        db.executemany(
            f"INSERT INTO images ({columns}) VALUES (?, ?, ?, ?, ?, 0, 0, 'new', ?)", rows
        )

    def add_backbone(self, backbone: StoredBackbone) -> list[int]:
        """Takes a backbone in, beside the others, or finds it again. Gives blocks that were
        damaged: no longer sealed.

        Raises UserError where the disk has no room for its features.
        """
        with in_words(self.path):
            if backbone.name not in self.backbones:
                with self._db as db:
                    values = (
                        backbone.name,
                        backbone.dim,
                        backbone.dtype,
                        json.dumps(backbone.identity),
                    )
                    db.execute(
                        "INSERT INTO backbones (name, dim, dtype, identity) VALUES (?, ?, ?, ?)",
                        values,
                    )
                self.backbones[backbone.name] = backbone
            elif (
                self.backbones[backbone.name].identity != backbone.identity
            ):  # its file may have been moved
                with self._db as db:
                    values = (json.dumps(backbone.identity), backbone.name)
                    db.execute("UPDATE backbones SET identity = ? WHERE name = ?", values)
                self.backbones[backbone.name] = backbone
            damaged = self.damaged(backbone.name)
            for block in damaged:
                self._unseal(backbone.name, block)
            self._open(self.backbones[backbone.name])
        return damaged

    def _open(self, backbone: StoredBackbone) -> None:
        """The features file, as long as there are images."""
        path = inside(self.path, f"{backbone.name}.npy")
        size = HEADER + len(self) * backbone.dim * np.dtype(backbone.dtype).itemsize
        needed = size - (_allocated(path) if path.exists() else 0)
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise UserError(
                f"{path} needs {needed / 1e6:,.0f} MB more and the disk has {free / 1e6:,.0f} MB"
                f" free. Free some space, choose another {OPTION}, or --dtype float16"
            )
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        self._files[backbone.name] = handle
        os.ftruncate(handle, size)
        _write(handle, 0, _header(backbone, len(self)))

    def seal(
        self, block: int, found: Mapping[str, tuple[np.ndarray, np.ndarray]], facts: Sequence[Fact]
    ) -> None:
        """Writes features of one block and what reading its images told.

        found: by backbone, the rows (n,) int64 and their features (n, D). Raises UserError where
        writing fails; what was sealed before stays.
        """
        start = block * BLOCK
        stop = min(start + BLOCK, len(self))
        with in_words(self.path):
            seals = {}
            for name, (rows, values) in found.items():
                backbone, handle = self.backbones[name], self._files[name]
                sealed = self._blocks.get(name, {}).get(block)
                if sealed and rows.min() < start + sealed[0]:
                    self._unseal(name, block)
                data = np.ascontiguousarray(values, np.dtype(backbone.dtype).newbyteorder("<"))
                for run in _runs(rows):
                    _write(
                        handle, HEADER + int(rows[run.start]) * data.strides[0], data[run].tobytes()
                    )
                os.fsync(handle)
                seals[name] = (
                    stop - start,
                    hash_rows(handle, start, stop - start, data.strides[0]),
                    self.scan,
                )
            with self._db as db:
                _keep_facts(db, [self._as_scanned(fact) for fact in facts])
                rows_of_table = [(name, block, *seal) for name, seal in seals.items()]
                db.executemany(
                    "INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?, ?)", rows_of_table
                )
        for name, seal in seals.items():
            self._blocks.setdefault(name, {})[block] = seal
        for fact in facts:
            self.status[fact.row] = fact.status
            if fact.reason is not None:
                self.reasons[fact.row] = fact.reason

    def _as_scanned(self, fact: Fact) -> Fact:
        """A file that changed between the scan and its reading keeps what the scan saw: the next
        one finds it out.
        """
        row = fact.row
        scanned = FileState(
            int(self.file_bytes[row]), int(self.mtime_ns[row]), int(self.ctime_ns[row])
        )
        return (
            fact if fact.state == scanned else fact._replace(state=scanned, sha256=self.hashes[row])
        )

    def _unseal(self, name: str, block: int) -> None:
        with self._db as db:
            db.execute("DELETE FROM blocks WHERE backbone = ? AND block = ?", (name, block))
        self._blocks.get(name, {}).pop(block, None)

    def _same_folder(self, root: Path) -> None:
        """Refuses images of another folder; one that was moved as a whole is followed."""
        if self.root == root:
            return
        moved = not self.root.exists() and any((root / path).exists() for path in self.paths)
        if not moved:
            raise UserError(
                f"--store {self.path} holds the features of {self.root}, not of {root}; choose"
                f" another {OPTION}"
            )
        with self._db as db:
            db.execute("UPDATE facts SET value = ? WHERE name = 'root'", (os.fsencode(root),))
        self.root = root


def _states(listing: Listing) -> list[FileState]:
    """Of all files; some hundred at a time in threads, for file systems that are slow to answer."""
    root, paths = str(listing.root), listing.paths

    def part(number: int) -> list[FileState]:
        return [
            file_state(f"{root}/{path}")
            for path in paths[number * AT_ONCE : (number + 1) * AT_ONCE]
        ]

    return [state for states in in_threads(part, -(-len(paths) // AT_ONCE)) for state in states]


def file_state(path: str | Path) -> FileState:
    """Size and times of a file."""
    try:
        status = os.stat(path)
    except OSError:
        return FileState(-1, -1, -1)
    return FileState(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@contextmanager
def in_words(folder: Path) -> Iterator[None]:
    """A failed write as a UserError that says why and what to do."""
    try:
        yield
    except sqlite3.Error as error:
        text = str(error)
        if "full" in text:
            text = explain(OSError(errno.ENOSPC, text), OPTION)
        elif "readonly" in text or "unable to open" in text:
            text = explain(OSError(errno.EACCES, text), OPTION)
        elif "malformed" in text or "not a database" in text or "no such table" in text:
            text = f"{MANIFEST} is damaged ({text}). Remove the store and make it anew"
        raise UserError(f"the store {folder} cannot be written: {text}") from error
    except OSError as error:
        raise UserError(
            f"the store {folder} cannot be written: {explain(error, OPTION)}"
        ) from error


def _fill(db: sqlite3.Connection, root: Path) -> None:
    """An empty store's tables."""
    with db:
        db.execute("BEGIN")
        for statement in SCHEMA:
            db.execute(statement)
        facts = {"format": FORMAT, "root": os.fsencode(root), "scan": 0}
        db.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())


def _keep_facts(db: sqlite3.Connection, facts: Sequence[Fact]) -> None:
    """The perceptual hash stays that of the backbone that came first."""
    seen = [
        None if fact.perceptual is None else fact.perceptual.to_bytes(8, "big") for fact in facts
    ]
    db.executemany(
        "UPDATE images SET bytes = ?, mtime_ns = ?, ctime_ns = ?, width = ?, height = ?, sha256 ="
        f" ?, status = ?, reason = ?, {PERCEPTUAL} = CASE WHEN ? IS NULL THEN NULL ELSE"
        f" coalesce({PERCEPTUAL}, ?) END WHERE row = ?",
        [
            (*fact.state, *fact.size, fact.sha256, fact.status, fact.reason, hash_, hash_, fact.row)
            for fact, hash_ in zip(facts, seen)
        ],
    )


def _header(backbone: StoredBackbone, rows: int) -> bytes:
    """Version 1.0 of the .npy format, padded to a fixed length."""
    descr = np.dtype(backbone.dtype).newbyteorder("<").str
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': ({rows}, {backbone.dim}), }}"
    return (
        b"\x93NUMPY\x01\x00"
        + (HEADER - 10).to_bytes(2, "little")
        + text.ljust(HEADER - 11).encode()
        + b"\n"
    )


def _runs(rows: np.ndarray) -> list[slice]:
    """Slices of positions over which ascending rows follow one another without a gap."""
    cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return [slice(first, last) for first, last in pairwise(cuts)]


def _write(handle: int, offset: int, data: bytes) -> None:
    """All of it; a mapped file would end the process with SIGBUS where the disk is full."""
    os.lseek(handle, offset, os.SEEK_SET)
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _allocated(path: Path) -> int:
    status = path.stat()
    return getattr(status, "st_blocks", status.st_size // 512) * 512


def _digest(path: Path) -> bytes | None:
    """SHA-256 of a file, None where it cannot be read (decoding will say why)."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while part := file.read(2**20):
                digest.update(part)
        return digest.digest()
    except OSError:
        return None
