"""Files that are whole or not there, folders that one process at a time writes to, and what goes
wrong with both.

Importing this file imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
from pathlib import Path
from typing import IO

from deepclust.errors import UserError

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no fcntl; runs there are not locked
    fcntl = None


LOCK = ".deepclust.lock"

# POSIX locks do not exclude a second run in the same process, and closing any handle of the file
# would drop them.
_held: set[Path] = set()


class FolderError(UserError):
    """The run folder cannot be used as asked."""


class NotWritten(FolderError):
    """A file that cannot be written, and why. option: what chooses another place."""

    def __init__(self, path: Path, error: OSError, option: str = "run.dir=…") -> None:
        super().__init__(f"{path} cannot be written: {explain(error, option)}")
        self.path, self.error = path, error


def choose_path(root: str | Path, name: str, directory: str | Path | None = None) -> Path:
    """`directory` if it is given, else `root/name`, where the name must be one plain path
    component.

    Raises FolderError for a name that would leave `root` or that no file system takes.
    """
    if directory is not None:
        if "\0" in str(directory) or not str(directory).strip():
            raise FolderError(
                f"run.dir={str(directory)!r} is not a path. Give a folder, e.g."
                " run.dir=outputs/mine."
            )
        return Path(directory).expanduser()
    if not re.fullmatch(r"[^/\\\0]+", name) or name in (".", "..") or name != name.strip():
        raise FolderError(
            f"run.name={name!r} must be a plain name without '/', e.g. run.name=my-run; run.dir"
            " chooses the place."
        )
    if len(name.encode(errors="surrogateescape")) > 200:
        raise FolderError(
            f"run.name is {len(name)} characters long, at most 200 bytes are possible: {name[:40]}…"
        )
    return Path(root).expanduser() / name


def inside(folder: Path, name: str) -> Path:
    """`folder/name`, refused (FolderError) where a '..' or a symbolic link would lead out of the
    folder.
    """
    path = folder / name
    if (
        not path.parent.resolve().is_relative_to(folder.resolve())
        or path.name in ("", "..")
        or path.is_symlink()
    ):
        raise FolderError(
            f"{path} leads outside of the run folder (a link?). Remove it, or choose another"
            " run.dir."
        )
    return path


def fsync_folder(folder: Path) -> None:
    """Makes a rename inside `folder` durable, where the system knows how."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replaces `path` by `data`: a reader, or a kill at any moment, finds the old content or the
    new, never a mix.

    Raises NotWritten where the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise NotWritten(path, error) from error


def explain(error: BaseException, option: str = "run.dir=…") -> str:
    """An operating system's error in a few words, and the fix. option: what chooses another
    place."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"the disk is full. Free some space or choose another place with {option}; the same"
            " command then goes on."
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write there. Choose another place with {option}"
    if number == errno.ENAMETOOLONG:
        return f"the name is too long. Choose a shorter one with {option}"
    if number in (errno.EEXIST, errno.ENOTDIR):
        return f"a file is in the way. Choose another place with {option}"
    return (
        (getattr(error, "strerror", None) or str(error) or type(error).__name__)
        .strip()
        .splitlines()[0]
    )


def take_lock(path: Path, option: str = "run.dir=") -> IO[str] | None:
    """An open file that holds the folder's lock until `release_lock` or until this process ends,
    however it ends.

    A record lock and not `flock`: a data worker that outlives a killed run would still hold the
    latter.
    option: what chooses the folder, in messages. Raises FolderError where another run holds it.
    """
    resolved, choose = path.resolve(), option.strip(" =")
    if resolved in _held:
        raise FolderError(
            f"{option}{path} is in use by another run of this process. Finish that one or choose"
            f" another {choose}."
        )
    file = open(inside(path, LOCK), "a+")  # noqa: SIM115 - stays open as long as the run
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        if not isinstance(error, BlockingIOError | PermissionError):
            raise
        raise FolderError(
            f"{option}{path} is in use by {owner}. Wait for it, stop it, or choose another"
            f" {choose}."
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held.add(resolved)
    return file


def release_lock(path: Path, lock: IO[str] | None) -> None:
    """Lets another run have the folder whose lock this is."""
    if lock is not None:
        lock.close()
        _held.discard(path.resolve())
