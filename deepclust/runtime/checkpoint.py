"""Checkpoints that are whole or not there.

```
<run folder>/checkpoints/
  00-pretext/step-00000200/     number of the stage, its name; step = macro batches done
    model.pt optimizer.pt …     one file a part of the state, written by torch.save
    manifest.json               written last: version, meta, SHA-256 and size of every part,
                                  SHA-256 of itself
  01-scan/step-00000100-2/      the second one saved at the same step
  .tmp-…/                       unfinished; removed at the next start
```
A save writes into a temporary folder, makes every file durable and renames the folder; a removal
first renames it away. So a kill at any moment leaves each checkpoint as it was or gone. A flipped
bit loads silently with `torch.load`: hashes are checked before anything is read, and reading is
`weights_only=True`: tensors and plain data, never code. Which one is newest is read from the name,
never from a clock.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from deepclust.errors import UserError
from deepclust.runtime.files import explain, fsync_folder

VERSION = 1
MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
NAME = re.compile(r"(\d{2,})-([A-Za-z0-9_.-]+)/step-(\d{8,})(?:-(\d+))?")
PART = re.compile(r"[A-Za-z0-9_-]+")


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or not be read as what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """state: part name → nested plain data and CPU tensors. meta: what was given to `save`. path:
    its folder.
    """

    state: dict[str, Any]
    meta: dict[str, Any]
    path: Path


def save(root: Path, name: str, state: Mapping[str, Any], meta: Mapping[str, Any]) -> Path:
    """Writes one checkpoint and gives its folder, `root/name` or, where that is taken,
    `root/name-2`, `-3`, …

    name: `<stage number>-<stage>/step-<8 digits>`. state: part name (letters, digits, `_`, `-`) →
    nested dict, list and tuple of tensors, str, int, float, bool and None. meta: JSON; `permanent:
    true` keeps it from rotation. Raises CheckpointError, with older checkpoints untouched, if the
    disk is full or the folder cannot be written.
    """
    if not NAME.fullmatch(name) or not all(PART.fullmatch(part) for part in state):
        raise ValueError(f"bad checkpoint name or part name: {name}, {list(state)}")
    plain = {part: _plain(value, part) for part, value in state.items()}
    temporary = None
    try:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(root, name)
        parts = {
            part: _write_part(temporary / f"{part}.pt", value) for part, value in plain.items()
        }
        with _Hashed(temporary / MANIFEST) as file:
            file.write(_render({"version": VERSION, "meta": dict(meta), "parts": parts}))
        fsync_folder(temporary)
        final = _free_name(root / name)
        os.rename(temporary, final)
        fsync_folder(final.parent)
        fsync_folder(root)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise CheckpointError(
            f"The checkpoint {root / name} could not be saved: {explain(cause)}"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def load(path: Path | str) -> Checkpoint:
    """Reads a checkpoint onto the CPU after checking its hashes. Raises CheckpointError naming what
    is broken.
    """
    path = Path(path)
    problems = verify(path)
    if problems:
        raise CheckpointError(f"The checkpoint {path} cannot be used: {'; '.join(problems)}.")
    content = manifest(path)
    state = {}
    for part in content["parts"]:
        try:
            state[part] = torch.load(path / f"{part}.pt", map_location="cpu", weights_only=True)
        except (
            pickle.UnpicklingError,
            RuntimeError,
            EOFError,
            OSError,
            ValueError,
            KeyError,
        ) as error:
            message = (
                f"{part}.pt holds something other than tensors and plain data, and is not read"
            )
            raise CheckpointError(f"The checkpoint {path} cannot be used: {message}.") from error
    return Checkpoint(state, content["meta"], path)


def verify(path: Path | str) -> list[str]:
    """What is wrong with a checkpoint, in words; empty if every part is as it was written."""
    path = Path(path)
    try:
        content = manifest(path)
    except CheckpointError as error:
        return [str(error)]
    return [
        problem
        for part, written in content["parts"].items()
        if (problem := _part_problem(path, part, written))
    ]


def manifest(path: Path | str) -> dict[str, Any]:
    """`{"version", "meta", "parts": {name: {"sha256", "size"}}}` of a checkpoint. Raises
    CheckpointError.
    """
    file = Path(path) / MANIFEST
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{MANIFEST} is missing" if Path(path).is_dir() else "there is no such folder"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{MANIFEST} cannot be read: {explain(error)}") from error
    try:
        content = json.loads(raw)
        content.pop("sha256")
        version, parts = content["version"], content["parts"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{MANIFEST} is damaged" if raw else f"{MANIFEST} is empty") from None
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(
            f"it has format version {version}, this program reads up to {VERSION}; update deepclust"
        )
    if _render(content) != raw or not all(PART.fullmatch(part) for part in parts):
        raise CheckpointError(f"{MANIFEST} is damaged")
    return content


def listing(root: Path) -> list[Path]:
    """Every checkpoint folder under `root`, broken ones included, oldest first by stage, step and
    count.
    """
    found = {}
    for path in root.glob("*/*"):
        match = NAME.fullmatch(path.relative_to(root).as_posix())
        if match and path.is_dir():
            stage, _, step, count = match.groups()
            found[path] = (int(stage), int(step), int(count or 1))
    return sorted(found, key=lambda path: (found[path], path.as_posix()))


def newest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a line on each broken one passed over. Removes
    unfinished saves.
    """
    for leftover in root.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    notes = []
    for path in reversed(listing(root)):
        try:
            return load(path), notes
        except CheckpointError as error:
            notes.append(f"{error} The one before it is used.")
    if notes:
        notes[-1] = notes[-1].replace(
            "The one before it is used.", "No checkpoint before it is left."
        )
    return None, notes


def rotate(root: Path, keep: int) -> list[Path]:
    """Removes all but the `keep` newest whole checkpoints and the permanent ones; gives what it
    removed.

    Each one that stays is verified before an older one goes: with no whole one, nothing is removed.
    """
    whole, removed = 0, []
    for path in reversed(listing(root)):
        if whole < keep:
            whole += not verify(path)
        elif not _permanent(path):
            _remove(root, path)
            removed.append(path)
    return removed


def digest(path: Path | str) -> dict[str, str]:
    """Part → SHA-256 of its content (see `digest_state`); independent of file details. Raises
    CheckpointError.
    """
    return digest_state(load(path).state)


def digest_state(state: Mapping[str, Any]) -> dict[str, str]:
    """Part → SHA-256 over types, keys, shapes, dtypes and bytes of its nested content, dict keys in
    sorted order.
    """
    digests = {}
    for part in sorted(state):
        hasher = hashlib.sha256()
        _feed(hasher, state[part])
        digests[part] = hasher.hexdigest()
    return digests


class _Hashed:
    """A file for writing that hashes what should reach the disk, and makes it durable on
    closing."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "xb")  # noqa: SIM115 - closed in __exit__
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self._size += len(data)
        self._file.write(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def result(self) -> dict[str, Any]:
        return {"sha256": self._hash.hexdigest(), "size": self._size}

    def __enter__(self) -> _Hashed:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if error[0] is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def _write_part(path: Path, value: Any) -> dict[str, Any]:
    with _Hashed(path) as file:
        torch.save(value, file)  # pyright: ignore[reportArgumentType] - it needs write and flush only
    return file.result()


def _part_problem(path: Path, part: str, written: Mapping[str, Any]) -> str | None:
    file = path / f"{part}.pt"
    try:
        size = file.stat().st_size
        if size != written["size"]:
            return f"{file.name} has {size} bytes instead of {written['size']}"
        hasher = hashlib.sha256()
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                hasher.update(block)
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read: {explain(error)}"
    return (
        None
        if hasher.hexdigest() == written["sha256"]
        else f"{file.name} was changed after it was written (SHA-256)"
    )


def _render(content: Mapping[str, Any]) -> bytes:
    """The manifest's exact bytes: JSON with the SHA-256 of itself without that entry."""
    body = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return json.dumps(
        {**content, "sha256": hashlib.sha256(body.encode()).hexdigest()}, sort_keys=True, indent=1
    ).encode()


def _temporary(root: Path, name: str) -> Path:
    path = root / f"{TEMPORARY}{name.replace('/', '-')}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


def _free_name(path: Path) -> Path:
    count, free = 1, path
    while os.path.lexists(free):
        count += 1
        free = path.with_name(f"{path.name}-{count}")
    return free


def _permanent(path: Path) -> bool:
    try:
        return bool(manifest(path)["meta"].get("permanent"))
    except CheckpointError:
        return False


def _remove(root: Path, path: Path) -> None:
    """Renames first: a kill in the middle leaves a leftover that the next start removes, not half a
    checkpoint.
    """
    doomed = _temporary(root, path.name)
    os.rename(path, doomed / path.name)
    shutil.rmtree(doomed, ignore_errors=True)


def _plain(value: Any, where: str) -> Any:
    """A copy of nested state that `torch.load(weights_only=True)` will read: plain containers,
    tensors on the CPU.

    Raises TypeError naming the place of anything else (a NumPy number, a config object).
    """
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        # A slice would drag the whole storage that it looks into onto the disk.
        return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
    if isinstance(value, Mapping):
        if not all(type(key) in (str, int) for key in value):
            raise TypeError(f"checkpoint state at {where} has keys other than str and int")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise TypeError(
        f"checkpoint state at {where} is a {type(value).__name__}; keep tensors and plain data"
        " there"
    )


def _feed(hasher: Any, value: Any) -> None:
    """Hashes one node of a state: a tag and a length before every piece, so that no two states read
    alike.
    """
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        _feed_bytes(hasher, b"t", f"{value.dtype}{tuple(value.shape)}".encode() + b":" + data)
    elif isinstance(value, Mapping):
        _feed_bytes(hasher, b"d", str(len(value)).encode())
        for key in sorted(value, key=lambda key: (type(key).__name__, key)):
            _feed(hasher, key)
            _feed(hasher, value[key])
    elif isinstance(value, list | tuple):
        _feed_bytes(hasher, type(value).__name__[:1].encode() + b"[", str(len(value)).encode())
        for item in value:
            _feed(hasher, item)
    elif isinstance(value, float):
        _feed_bytes(hasher, b"f", struct.pack("<d", value))
    else:
        _feed_bytes(hasher, type(value).__name__.encode(), repr(value).encode())


def _feed_bytes(hasher: Any, tag: bytes, data: bytes) -> None:
    hasher.update(tag + struct.pack("<q", len(data)))
    hasher.update(data)
