"""`sorted/`: what is placed follows the clusters, and nothing else is ever touched."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from deepclust.collection import sorted as sort
from deepclust.collection.history import State
from deepclust.collection.run import FolderRun
from deepclust.collection.sorted import folder_name, sort_images
from deepclust.errors import UserError

PATHS = ["a/1.png", "b/1.png", "b/1.PNG", "a/2.png", "c/3.png", "c/4.png"]


@pytest.fixture
def run(tmp_path: Path) -> FolderRun:
    """Six files, which need not be images here."""
    for path in PATHS:
        (tmp_path / "photos" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / path).write_text(path)
    (tmp_path / "run").mkdir()
    found = FolderRun(
        tmp_path / "run", {"root": str(tmp_path / "photos"), "asked": {"sort": "copy"}}
    )
    found.__dict__["store"] = SimpleNamespace(paths=PATHS)
    return found


def state(
    cluster: list[int], names: dict[int, str] | None = None, excluded: tuple[int, ...] = ()
) -> State:
    num = len(cluster)
    out = np.isin(np.arange(num), excluded)
    zeros = np.zeros(num, dtype=np.float32)
    where = np.zeros((num, 2), dtype=np.float32)
    return State(
        np.arange(num),
        np.array(cluster),
        zeros,
        where,
        np.full(num, -1),
        out,
        names or {},
        max(cluster) + 1,
    )


def tree(folder: Path) -> dict[str, str]:
    """Contents of all files that are not hidden, by path."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if not path.is_dir() and not path.name.startswith(".")
    ]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def asked(run: FolderRun, how: str | None) -> FolderRun:
    run.facts["asked"]["sort"] = how
    return run


@pytest.mark.parametrize("how", ["copy", "symlink"])
def test_every_image_is_in_its_cluster_whatever_its_name(run: FolderRun, how: str):
    found = sort_images(
        asked(run, how), state([0, 0, 0, -1, 12, 12], {12: "red/blue: ?"}, excluded=(5,))
    )
    assert found == (5, [])
    assert tree(run.path / "sorted") == {
        "000/1.png": "a/1.png",
        "000/1-1.png": "b/1.png",
        "000/1-2.PNG": "b/1.PNG",
        "noise/2.png": "a/2.png",
        "012-red_blue_ _/3.png": "c/3.png",
    }
    assert (run.path / "sorted/noise/2.png").is_symlink() == (how == "symlink")
    if how == "copy":
        source = run.root / "a/2.png"
        assert (run.path / "sorted/noise/2.png").stat().st_mtime_ns == source.stat().st_mtime_ns


@pytest.mark.parametrize("after", ["copy", "symlink", None])
@pytest.mark.parametrize("before", ["copy", "symlink"])
def test_asking_again_moves_what_was_placed_and_nothing_else(
    run: FolderRun, before: str, after: str | None
):
    originals = tree(run.root)
    sort_images(asked(run, before), state([0, 0, 1, 1, 2, 2]))
    folder = run.path / "sorted"
    (folder / "001/mine.txt").write_text("mine")
    (folder / "002/notes").mkdir()
    (folder / "own").mkdir()
    sort_images(asked(run, after), state([1, 1, 1, 3, 2, 2], {2: "x"}))
    expected = {"001/mine.txt": "mine"}
    if after:
        expected |= {"001/1.png": "a/1.png", "001/1-1.png": "b/1.png", "001/1-2.PNG": "b/1.PNG"}
        expected |= {"003/2.png": "a/2.png", "002-x/3.png": "c/3.png", "002-x/4.png": "c/4.png"}
    assert tree(folder) == expected and tree(run.root) == originals
    assert (
        (folder / "002/notes").is_dir()
        and (folder / "own").is_dir()
        and not (folder / "000").exists()
    )
    assert sum(path.is_symlink() for path in folder.rglob("*")) == (6 if after == "symlink" else 0)
    assert (folder / ".placed.json").exists() == bool(after) and not (folder / ".moving").exists()


def test_nothing_remains_of_a_folder_that_is_no_longer_asked_for(run: FolderRun):
    sort_images(run, state([0, 0, 1, 1, 2, 2]))
    sort_images(asked(run, None), state([0, 0, 1, 1, 2, 2]))
    assert os.listdir(run.path) == []


def test_copies_that_change_place_are_moved_and_those_that_stay_are_left(run: FolderRun):
    sort_images(run, state([0, 0, 1, 1, 2, 2]))
    known = {path.read_text(): path.stat().st_ino for path in (run.path / "sorted").glob("0*/*")}
    sort_images(run, state([1, 0, 0, 1, 2, 2], {0: "a"}))
    assert {
        path.read_text(): path.stat().st_ino for path in (run.path / "sorted").glob("0*/*")
    } == known


def test_a_changed_copy_and_a_file_in_the_way_stay_and_a_changed_original_is_copied_again(
    run: FolderRun,
):
    sort_images(run, state([0, 0, 0, 1, 2, 2]))
    folder = run.path / "sorted"
    (folder / "002/3.png").write_text("edited by hand")
    (folder / "000/2.png").write_text("somebody's")
    (run.root / "c/4.png").write_text("another image")
    sort_images(run, state([0, 0, 0, 0, 2, 2]))
    found = tree(folder)
    assert found["000/2.png"] == "somebody's" and found["000/2-3.png"] == "a/2.png"
    assert found["002/3.png"] == "edited by hand" and found["002/3-4.png"] == "c/3.png"
    assert found["002/4.png"] == "another image"


@pytest.mark.parametrize("after", ["copy", "symlink", None])
def test_the_last_copy_of_an_image_is_never_removed(run: FolderRun, after: str | None):
    sort_images(run, state([0, 0, 1, 1, 2, 2]))
    shutil.rmtree(run.root / "c")
    found = sort_images(asked(run, after), state([0, 0, 1, 1, 1, 1], excluded=(5,)))
    left = tree(run.path / "sorted")
    assert sorted(text for text in left.values() if text[0] == "c") == ["c/3.png", "c/4.png"]
    if after:
        assert left["001/3.png"] == "c/3.png" and len(found.missing) == 1 and found.placed == 5


def test_a_stop_at_any_point_is_made_good_by_the_next_time(
    run: FolderRun, monkeypatch: pytest.MonkeyPatch
):
    first, second = state([0, 0, 1, 1, 2, 2]), state([1, 1, 0, 0, 2, 3], {2: "x"})
    for stop in range(1, 30):
        sort_images(run, first)
        calls = [0]

        def fail(function, calls=calls, stop=stop):
            def called(*args, **keys):
                calls[0] += 1
                if calls[0] == stop:
                    raise KeyboardInterrupt
                return function(*args, **keys)

            return called

        with monkeypatch.context() as patch:
            for name in ("rename", "unlink", "symlink", "mkdir", "rmdir", "replace"):
                patch.setattr(os, name, fail(getattr(os, name)))
            try:
                sort_images(run, second)
            except KeyboardInterrupt:
                pass
            else:
                break
        sort_images(run, second)
        assert sorted(tree(run.path / "sorted").values()) == sorted(PATHS)
        assert {path.name for path in (run.path / "sorted").iterdir()} == {
            ".placed.json",
            "000",
            "001",
            "002-x",
            "003",
        }
    assert stop > 8


def test_links_in_the_way_and_wrong_manifests_lead_nowhere(run: FolderRun, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "1.png").write_text("a/1.png")
    (run.path / "sorted").symlink_to(outside)
    with pytest.raises(UserError, match="sorted is a link"):
        sort_images(run, state([0, 0, 1, 1, 2, 2]))
    (run.path / "sorted").unlink()
    sort_images(run, state([0, 0, 1, 1, 2, 2]))
    shutil.rmtree(run.path / "sorted/000")
    (run.path / "sorted/000").symlink_to(outside)
    with pytest.raises(UserError, match="000 is a link"):
        sort_images(run, state([0, 0, 1, 1, 2, 2]))
    status = (run.root / "a/1.png").stat()
    line = f'"{run.root}/a/1.png", {status.st_size}, {status.st_mtime_ns}'
    shutil.rmtree(run.path / "sorted/001")
    bad = [
        f'["../../photos/a/1.png", {line}]',
        f'["x/../1.png", {line}]',
        f'["../1.png", {line}]',
        '["a"]',
        "3",
    ]
    for text in (*(f"[{each}]" for each in bad), "{", "null", f"[{bad[2]}]"):
        (run.path / "sorted/.placed.json").write_text(text)
        sort_images(run, state([1, 1, 1, 1, 2, 2], excluded=(0,)))
    assert (run.root / "a/1.png").exists() and (outside / "1.png").exists()


def test_faults_of_the_file_system_come_in_words(run: FolderRun, monkeypatch: pytest.MonkeyPatch):
    def refuse(number: int):
        def called(*_args: object, **_keys: object) -> None:
            raise OSError(number, os.strerror(number), "a", None, "b")

        return called

    clusters = state([0, 0, 1, 1, 2, 2])
    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", refuse(errno.EPERM))
        with pytest.raises(
            UserError, match=r"links cannot be made on this file system. --sort copy"
        ):
            sort_images(asked(run, "symlink"), clusters)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy2", refuse(errno.ENOSPC))
        with pytest.raises(UserError, match=r"Free some space, or --sort symlink"):
            sort_images(asked(run, "copy"), clusters)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3))
        with pytest.raises(UserError, match=r"copies need .* MB, .* are free"):
            sort_images(run, clusters)
        assert not list((run.path / "sorted").glob("0*/*"))
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
        patch.setattr(shutil, "copy2", refuse(errno.EIO))
        with pytest.raises(UserError, match="other files all the same"):
            sort_images(run, clusters)
    assert sort_images(run, clusters).placed == 6


def test_names_of_folders():
    names = {0: "  summer dresses. ", 1: "../..", 2: "x" * 300, 3: "日本" * 60, 1234: "con"}
    found = {cluster: folder_name(state([0, 1234], names), cluster) for cluster in (*names, 5, -1)}
    assert (
        found[0] == "000-summer dresses"
        and found[1] == "001-_"
        and found[5] == "005"
        and found[-1] == "noise"
    )
    assert len(found[2]) == 104 and len(found[3].encode()) <= 104 and found[1234] == "1234-con"
    taken: set[str] = set()
    long = [sort._free("é" * 120 + ".jpeg", row, taken) for row in (3, 40000, 40000)]
    assert len(set(long)) == 3 and all(
        len(name.encode()) <= 245 and name.endswith(".jpeg") for name in long
    )
