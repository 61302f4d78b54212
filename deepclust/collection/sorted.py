"""`sorted/`: one folder per cluster with its images, as copies or as links, kept as the clusters
are.

```
<run>/sorted/
  .placed.json          what was placed here: only that is ever moved or removed
  003/  004-shoes/      a cluster, with its name if it has one
  noise/
```
Originals are only read, and nothing is written outside of the run's folder. A file that somebody
added, or a copy that somebody changed, stays where it is, and a copy whose original is gone is
never removed.

Links are absolute, as the paths of clusters.csv: they hold when `sorted/` is moved and break when
the images are. Two
images of one file name in one cluster: the second has its `index` in its name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from deepclust.collection.history import NOISE, State
from deepclust.collection.run import FolderRun
from deepclust.data.folders import printable
from deepclust.errors import UserError
from deepclust.runtime.files import explain, inside, write_atomic

FOLDER, MANIFEST, MOVING = "sorted", ".placed.json", ".moving"
LONGEST = 200
"""Bytes of a file name that we make; most systems take 255."""
CLOCK = 2 * 10**9
"""Nanoseconds by which some file systems round the time of a copy."""


class Placed(NamedTuple):
    """What lies at a place: a link to `source`, or a copy of it when it had this size and time.
    size: -1 for a link.
    """

    source: str
    size: int
    mtime_ns: int


class Sorted(NamedTuple):
    """What was done: images that lie in `sorted/` now, and originals that are not there any
    more."""

    placed: int
    missing: list[str]


Places = dict[str, Placed]
"""By place: folder and file name, divided by a slash."""


def sort_images(run: FolderRun, state: State) -> Sorted:
    """Makes `sorted/` what the state says, or clears it of what was placed where sorting was not
    asked for.

    Raises UserError: no room, no permission, no links on this file system, or a link in the way.
    """
    how = run.facts["asked"].get("sort")
    folder = run.path / FOLDER
    with _in_words(folder, how):
        before = _read(folder)
        if not how and not before:
            return Sorted(0, [])
        _refuse_links([folder])
        folder.mkdir(exist_ok=True)
        sources = _sources(run, state) if how else {}
        ours = _lying(folder, before)
        ours = {
            place: what for place, what in ours.items() if what.source in sources or _may_go(what)
        }
        wanted, missing = _plan(state, how, sources, ours, _taken(folder, ours))
        _refuse_links(folder / name for name in {place.partition("/")[0] for place in wanted})
        _write(
            folder, {*before, *wanted.items()}
        )  # so that a stop leaves nothing that is not known as ours
        _check_room(folder, ours, wanted)
        _arrange(folder, ours, wanted)
        for name in {place.partition("/")[0] for place, _ in before} - {
            place.partition("/")[0] for place in wanted
        }:
            with contextlib.suppress(OSError):  # somebody's file is in it
                (folder / name).rmdir()
        _write(folder, set(wanted.items()))
        if not wanted:
            (folder / MANIFEST).unlink()
            with contextlib.suppress(OSError):
                folder.rmdir()
    return Sorted(len(wanted), missing)


def folder_name(state: State, cluster: int) -> str:
    """`noise`, `003` or `003-name` with what no file system takes replaced by `_`."""
    if cluster == NOISE:
        return "noise"
    name = re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*]', "_", state.names.get(cluster, ""))
    name = name.encode("utf-8", "replace")[:100].decode("utf-8", "ignore").strip(" .")
    return f"{cluster:03d}-{name}" if name else f"{cluster:03d}"


def _sources(run: FolderRun, state: State) -> dict[str, int]:
    """The state's place of each original that is wanted, by its path."""
    root, paths, kept = str(run.root), run.store.paths, state.kept.tolist()
    return {
        os.path.join(root, paths[row]): place
        for row, place in zip(state.rows[state.kept].tolist(), kept)
    }


def _may_go(what: Placed) -> bool:
    """Whether nothing is lost with it: a link, or a copy of what is still there."""
    return what.size < 0 or os.path.exists(what.source)


def _plan(
    state: State, how: str | None, sources: dict[str, int], ours: Places, taken: dict[str, set[str]]
) -> tuple[Places, list[str]]:
    """Where each image goes, and paths of originals that are gone; a copy of such a one goes along.

    taken: names of files that are not ours, by folder, in lower case.
    """
    wanted: Places = {}
    missing: list[str] = []
    copies = {what.source: what for what in ours.values() if what.size >= 0}
    folders = {cluster: folder_name(state, cluster) for cluster in (NOISE, *state.ids)}
    for source, place in sources.items():
        try:
            status = os.stat(source)
            what = (
                Placed(source, status.st_size, status.st_mtime_ns)
                if how == "copy"
                else Placed(source, -1, -1)
            )
        except OSError:
            missing.append(source)
            if source not in copies:
                continue
            what = copies[source]
        name = folders[int(state.cluster[place])]
        file = _free(
            os.path.basename(source), int(state.rows[place]), taken.setdefault(name, set())
        )
        wanted[f"{name}/{file}"] = what
    return wanted, missing


def _free(name: str, row: int, taken: set[str]) -> str:
    """The name, or one with the row in it where the name is taken; systems that ignore case are
    thought of.
    """
    stem, end = os.path.splitext(name)
    while name.casefold() in taken:
        short = os.fsencode(stem)[: LONGEST - len(os.fsencode(end))]
        stem = f"{short.decode('utf-8', 'ignore')}-{row}"
        name = f"{stem}{end}"
    taken.add(name.casefold())
    return name


def _taken(folder: Path, ours: Places) -> dict[str, set[str]]:
    """Names of files, by folder, that we did not place."""
    known: dict[str, set[str]] = {}
    for place in ours:
        name, _, file = place.partition("/")
        known.setdefault(name, set()).add(file)
    found: dict[str, set[str]] = {}
    for entry in os.scandir(folder):
        if entry.is_dir() and not entry.name.startswith("."):
            others = set(os.listdir(entry.path)) - known.get(entry.name, set())
            found[entry.name] = {name.casefold() for name in others}
    return found


def _arrange(folder: Path, ours: Places, wanted: Places) -> None:
    """Removes what is ours and not wanted, and places what is wanted; copies that only change place
    are moved.
    """
    moving = folder / MOVING
    shutil.rmtree(moving, ignore_errors=True)
    moving.mkdir()
    needed = {what for place, what in wanted.items() if ours.get(place) != what}
    spare: dict[Placed, str] = {}
    for number, (place, what) in enumerate(ours.items()):
        if wanted.get(place) == what:
            continue
        if what.size >= 0 and what in needed and what not in spare:
            spare[what] = f"{moving}/{number}"
            os.rename(f"{folder}/{place}", spare[what])
        else:
            os.unlink(f"{folder}/{place}")
    for name in {place.partition("/")[0] for place in wanted}:
        (folder / name).mkdir(exist_ok=True)
    for place, what in wanted.items():
        if ours.get(place) == what:
            continue
        if what.size < 0:
            os.symlink(what.source, f"{folder}/{place}")
        else:
            made = spare.pop(what, None) or shutil.copy2(what.source, f"{moving}/new")
            os.rename(made, f"{folder}/{place}")
    shutil.rmtree(moving)


def _lying(folder: Path, lines: Sequence[tuple[str, Placed]]) -> Places:
    """What is still there as we placed it, in folders that are no links."""
    real = {
        name
        for name in {place.partition("/")[0] for place, _ in lines}
        if not (folder / name).is_symlink()
    }
    return {
        place: what
        for place, what in lines
        if place.partition("/")[0] in real and _lies(f"{folder}/{place}", what)
    }


def _lies(path: str, what: Placed) -> bool:
    try:
        if what.size < 0:
            return os.readlink(path) == what.source
        status = os.lstat(path)
    except OSError:
        return False
    same = status.st_size == what.size and abs(status.st_mtime_ns - what.mtime_ns) <= CLOCK
    return same and stat.S_ISREG(status.st_mode)


def _refuse_links(folders: Iterable[Path]) -> None:
    for folder in folders:
        if folder.is_symlink():
            raise UserError(f"{folder} is a link, and may lead out of the run's folder. Remove it")


def _check_room(folder: Path, ours: Places, wanted: Places) -> None:
    """Raises the error of a full disk before anything is copied rather than in the middle."""
    there = set(ours.values())
    needed = sum(max(0, what.size) for what in wanted.values() if what not in there)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC, f"copies need {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"
        )


def _read(folder: Path) -> list[tuple[str, Placed]]:
    """What was placed; a place may be there twice after a stop. Nothing that would lead out of the
    folder is taken.
    """
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        lines = [
            (str(place), Placed(str(source), int(size), int(time)))
            for place, source, size, time in found
        ]
    except (OSError, ValueError, TypeError):
        return []
    return [
        line
        for line in lines
        if re.fullmatch(r"(?!\.)[^/\0]+/[^/\0]+", line[0]) and not line[0].endswith("/..")
    ]


def _write(folder: Path, lines: Iterable[tuple[str, Placed]]) -> None:
    write_atomic(
        inside(folder, MANIFEST), json.dumps(sorted((place, *what) for place, what in lines))
    )


@contextmanager
def _in_words(folder: Path, how: str | None) -> Iterator[None]:
    """Turns a fault of the file system into words and a way out."""
    try:
        yield
    except OSError as error:
        if (
            error.filename
            and error.filename2 is None
            and not str(error.filename).startswith(str(folder))
        ):
            text = (
                f"{printable(str(error.filename))} cannot be read ({error.strerror}). Mend or"
                " remove it"
            )
        elif how == "symlink" and error.errno in (
            errno.EPERM,
            errno.EOPNOTSUPP,
            errno.ENOSYS,
            errno.EINVAL,
        ):
            text = "links cannot be made on this file system. --sort copy makes copies"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = (
                f"{error.strerror or 'the disk is full'}. Free some space, or --sort symlink makes"
                " links"
            )
        else:
            text = explain(
                error,
                (
                    "--sort symlink or another folder for the run"
                    if how == "copy"
                    else "another folder"
                ),
            )
        raise UserError(
            f"{folder}: {text}. The clusters are in the run's other files all the same"
        ) from error
