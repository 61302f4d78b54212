"""The run folder: one run at a time, nothing written outside, nothing of somebody else's removed."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deepclust.runtime.files import FolderError, choose_path, inside, write_atomic
from deepclust.training import run_folder
from deepclust.training.run_folder import FILES, RunFolder


def tree(path: Path) -> dict[str, bytes | None]:
    return {
        p.relative_to(path).as_posix(): p.read_bytes() if p.is_file() else None
        for p in sorted(path.rglob("*"))
    }


def test_a_new_folder_and_what_it_says(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "a" / "run") as run:
        assert run.previous_config is None and run.previous_status is None and not run.finished
        run.describe("seed: 0\n", device="cpu", threads=2)
        run.status("running", stage="scan", epoch=3, step=41)
        status = json.loads((run.path / "status.json").read_text())
        assert status == {
            "state": "running",
            "stage": "scan",
            "epoch": 3,
            "step": 41,
            "reason": None,
        }
        run.status("finished")
    with RunFolder.open(tmp_path / "a" / "run") as run:
        assert run.previous_config == "seed: 0\n" and run.finished
        assert run.checkpoints == run.path / "checkpoints"


def test_the_environment_holds_no_secrets(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-in-the-environment")
    monkeypatch.setattr(sys, "argv", ["train.py", "canary-on-the-command-line"])
    with RunFolder.open(tmp_path) as run:
        run.describe("", device="cpu")
        text = (run.path / "env.json").read_text()
    env = json.loads(text)
    assert "canary" not in text
    assert (
        env["device"] == "cpu" and env["host"] == socket.gethostname() and env["versions"]["torch"]
    )
    assert env["python"] == ".".join(map(str, sys.version_info[:3]))


def test_importing_and_opening_leaves_torch_alone(tmp_path: Path) -> None:
    code = f"import sys; from deepclust.training.run_folder import RunFolder; RunFolder.open({str(tmp_path)!r}).describe('')"
    subprocess.run([sys.executable, "-c", code + "; sys.exit('torch' in sys.modules)"], check=True)


def test_a_second_run_in_this_process_is_refused(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path):
        with pytest.raises(FolderError, match="in use by another run of this process"):
            RunFolder.open(tmp_path)
        (tmp_path.parent / "link").symlink_to(tmp_path)
        with pytest.raises(FolderError, match="in use"):
            RunFolder.open(tmp_path.parent / "link")
        assert RunFolder.open(tmp_path, rank=1).rank == 1
    RunFolder.open(tmp_path).close()


HOLD = """
import os, sys, time
from deepclust.training.run_folder import RunFolder
run = RunFolder.open(sys.argv[1])
worker = os.fork()
if worker:
    print(worker, flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    """A data worker that outlives the killed run for a while does not keep the folder locked."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    worker = int(holder.stdout.readline())
    try:
        with pytest.raises(
            FolderError, match=f"in use by process {holder.pid} on {socket.gethostname()}"
        ):
            RunFolder.open(tmp_path)
        holder.kill()
        holder.wait()
        os.kill(worker, 0)
        RunFolder.open(tmp_path).close()
    finally:
        holder.kill()
        os.kill(worker, signal.SIGKILL)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "run", rank=1)
    run.describe("x")
    run.status("running")
    run.write("summary.json", "{}")
    run.close()
    assert list(tmp_path.iterdir()) == []


def test_starting_over_removes_what_runs_write_and_nothing_else(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path) as run:
        for name in FILES:
            run.write(name, "x")
        ours = [
            "checkpoints/00-a/step-00000001/model.pt",
            "checkpoints/.tmp-x/model.pt",
            "wandb/run_id",
            "wandb/run-1/x",
            ".tmp-x",
        ]
        theirs = [
            "notes.txt",
            "checkpoints/mine.txt",
            "checkpoints/00-a/best/model.pt",
            "wandb/mine.txt",
            "clusters.csv.bak",
        ]
        for name in ours + theirs:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("x")
    with RunFolder.open(tmp_path, new=True) as run:
        assert run.previous_config is None and run.previous_status is None
    assert sorted(name for name, data in tree(tmp_path).items() if data is not None) == sorted(
        [*theirs, run_folder.LOCK]
    )


@pytest.mark.parametrize("new", [False, True])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, new: bool) -> None:
    (tmp_path / "config.yaml").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(FolderError, match=r"holds config\.yaml, which no run wrote"):
        RunFolder.open(tmp_path, new=new)
    assert tree(tmp_path) == before


def test_a_run_folder_copied_without_hidden_files_is_still_one(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path) as run:
        run.describe("seed: 0")
        run.status("preempted")
    (tmp_path / run_folder.LOCK).unlink()
    RunFolder.open(tmp_path).close()


@pytest.mark.parametrize("name", ["checkpoints", "wandb", "config.yaml", run_folder.LOCK])
@pytest.mark.parametrize("new", [False, True])
def test_links_do_not_lead_out(tmp_path: Path, name: str, new: bool) -> None:
    outside = tmp_path / "outside"
    (outside / "00-a" / "step-00000001").mkdir(parents=True)
    (outside / "run_id").write_text("x")
    RunFolder.open(tmp_path / "run").close()
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).symlink_to(outside if "." not in name else outside / "run_id")
    before = tree(outside)
    with pytest.raises(FolderError, match="leads outside of the run folder"):
        RunFolder.open(tmp_path / "run", new=new)
    assert tree(outside) == before


def test_a_linked_stage_folder_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "outside" / "step-00000001").mkdir(parents=True)
    RunFolder.open(tmp_path / "run").close()
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "00-a").symlink_to(tmp_path / "outside")
    with pytest.raises(FolderError, match="leads outside"):
        RunFolder.open(tmp_path / "run", new=True)
    assert (tmp_path / "outside" / "step-00000001").exists()


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "", "..", "deep/../../x"])
def test_names_do_not_lead_out(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(FolderError):
        inside(tmp_path / "run", name)
    assert inside(tmp_path / "run", "x") == tmp_path / "run" / "x"


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/b", "a\0b", "", ".", "..", " x", "x" * 300, "é" * 150, "a\\b"]
)
def test_a_run_name_is_one_plain_component(name: str) -> None:
    with pytest.raises(FolderError, match=r"run\.name"):
        choose_path("outputs", name)


def test_a_run_folder_is_where_it_is_asked_for() -> None:
    assert choose_path("outputs", "scan-scan-digits-0") == Path("outputs/scan-scan-digits-0")
    assert choose_path("outputs", "../ignored", "/data/mine") == Path("/data/mine")
    for bad in ("", "  ", "a\0b"):
        with pytest.raises(FolderError, match=r"run\.dir"):
            choose_path("outputs", "x", bad)


def test_places_that_cannot_be_used_are_told_in_words(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("x")
    for path, words in [
        ("file", "in the way"),
        ("file/run", "in the way"),
        ("x" * 300, "too long"),
    ]:
        with pytest.raises(FolderError, match=f"run.dir=.* cannot be used: .*{words}"):
            RunFolder.open(tmp_path / path)

    def denied(*_: Any, **__: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(FolderError, match="no permission"):
        RunFolder.open(tmp_path / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(FolderError, match="no permission"):
        RunFolder.open(tmp_path / "run")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_content(
    tmp_path: Path, monkeypatch: Any, function: str
) -> None:
    path = tmp_path / "status.json"
    write_atomic(path, "old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(FolderError, match=r"status\.json cannot be written: the disk is full"):
            write_atomic(path, "new")
    assert tree(tmp_path) == {"status.json": b"old"}


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    """A child rewrites the file as fast as it can until it is killed; whatever is read is one of
    the two contents.
    """
    path, contents = tmp_path / "status.json", (b"a" * 10_000, b"b" * 20_000)
    write_atomic(path, contents[0])
    child = os.fork()
    if child == 0:
        try:
            while True:
                for content in contents:
                    write_atomic(path, content)
        finally:
            os._exit(1)
    try:
        seen = set()
        end = time.monotonic() + 5
        while len(seen) < 2 and time.monotonic() < end:
            seen.add(path.read_bytes())
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert seen == set(contents) and path.read_bytes() in contents


def test_a_failure_is_told_even_where_the_disk_is_full(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunFolder.open(tmp_path) as run:
        run.status("running")
        monkeypatch.setattr(os, "fsync", full)
        run.status("failed", reason="the disk is full")
        with pytest.raises(FolderError, match="disk is full"):
            run.status("saving")
        assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"
