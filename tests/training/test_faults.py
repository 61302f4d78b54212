"""Kill it anywhere: the same command goes on as if nothing had happened, or says why it cannot."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deepclust.config.load import load
from deepclust.errors import UserError
from deepclust.runtime import checkpoint
from deepclust.runtime.signals import StopRequested
from deepclust.training.recipe import train
from deepclust.training.run_folder import RunFolder
from tests.runs import SMALL, outcome, pixels, small_data, small_run, status, stop_at, words

FORK = multiprocessing.get_context("fork")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run comes to that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert small_run(folder) == 0
    return outcome(folder)


def in_child(work):
    """Runs `work()` in a forked process; its exit code, negative for a signal."""

    def body():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            code = work()
        except UserError as error:
            print(error)
            code = 2
        os._exit(code)

    child = FORK.Process(target=body)
    child.start()
    child.join(120)
    assert not child.is_alive()
    return child.exitcode


def on_call(number, action, original):
    """`original`, but the call of that number (from 1) first does `action()`."""
    calls = []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            action()
        return original(*args, **kwargs)

    return call


# ------------------------------------------------------------------------------------------- as


def some(chosen, everything):
    """Parameters of a test: the chosen ones always, the others under the marker `slow`."""
    return [
        each if each in chosen else pytest.param(*_tuple(each), marks=pytest.mark.slow)
        for each in everything
    ]


def _tuple(each):
    return each if isinstance(each, tuple) else (each,)


@pytest.mark.parametrize("poll", some((2, 8, 17), range(1, 40)))
def test_a_stop_at_any_look_is_made_good(whole, tmp_path, monkeypatch, poll):
    """Looks come after each step and before each k-means, mining and evaluation: 1 to about 30
    cover a whole run.
    """
    with monkeypatch.context() as patch:
        stop_at(patch, poll)
        code = small_run(tmp_path / "run")
    assert code == (143 if status(tmp_path / "run")["state"] == "preempted" else 0)
    assert small_run(tmp_path / "run") == 0
    assert status(tmp_path / "run")["state"] == "finished"
    assert outcome(tmp_path / "run") == whole


def test_many_stops_in_one_run_are_made_good(whole, tmp_path, monkeypatch):
    codes = []
    for _ in range(40):
        with monkeypatch.context() as patch:
            stop_at(patch, 9)
            codes.append(small_run(tmp_path / "run"))
        if codes[-1] == 0:
            break
    assert codes.count(143) >= 2
    if codes[-1] != 0:  # what is left is longer than nine looks
        assert small_run(tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == whole


LONG = {
    "k-means": "deepclust.heads.common.layers.kmeans",
    "mining": "deepclust.heads.scan.neighbor_table",
    "features": "deepclust.training.trainer.collect",
    "evaluation": "deepclust.training.results.label_free_scores",
    "baselines": "deepclust.training.results.run_baselines",
    "report": "deepclust.training.results.write_report",
}


@pytest.mark.parametrize(
    ("place", "number"),
    some([("mining", 1), ("baselines", 1)], list(zip(LONG, (2, 1, 3, 2, 1, 1)))),
)
def test_a_signal_inside_a_long_section_ends_it_at_once(
    whole, tmp_path, monkeypatch, place, number
):
    import importlib

    module, _, name = LONG[place].rpartition(".")
    original = getattr(importlib.import_module(module), name)

    def interrupted(*args, **kwargs):
        if next(calls) == number:
            with pytest.raises(StopRequested):
                signal.raise_signal(signal.SIGTERM)
            raise StopRequested
        return original(*args, **kwargs)

    calls = iter(range(1, 10**6))
    with monkeypatch.context() as patch:
        patch.setattr(LONG[place], interrupted)
        assert small_run(tmp_path / "run") == 143
    assert (
        status(tmp_path / "run")["state"] == "preempted"
        and status(tmp_path / "run")["reason"] == "SIGTERM"
    )
    assert small_run(tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == whole


@pytest.mark.parametrize(
    ("head", "workers"),
    some(
        [("simclr", 0), ("scan", 2), ("selflabel", 0), ("calibration", 0)],
        [
            (head, workers)
            for head in ("simclr", "scan", "selflabel", "calibration")
            for workers in (0, 2)
        ],
    ),
)
def test_every_head_goes_on_bit_for_bit_with_and_without_workers(
    tmp_path, monkeypatch, head, workers
):
    words_ = [
        f"head={head}",
        "trainer.num_images=120",
        "trainer.views=workers",
        "trainer.ema=0.9",
        f"trainer.num_workers={workers}",
    ]
    words_ += [word for word in SMALL if not word.startswith(("stages.", "trainer.num_workers"))]
    config = load(
        [
            *words_,
            "num_clusters=4",
            "trainer.log_every_steps=2",
            *(["head.num_neighbors=5"] if head == "scan" else []),
        ]
    )

    def run(name):
        return train(
            replace(config, run=replace(config.run, dir=str(tmp_path / name))), small_data()
        )

    assert run("whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        assert run("run") == 143
    assert run("run") == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


# ------------------------------------------------------------------------------------------- ki

KILLS = [
    (call, number)
    for call, last in (("fsync", 90), ("rename", 14), ("replace", 36))
    for number in range(1, last)
]


@pytest.mark.parametrize(
    ("call", "number"), some([("fsync", 23), ("rename", 4), ("replace", 8)], KILLS)
)
def test_a_kill_inside_a_save_loses_nothing(whole, tmp_path, monkeypatch, call, number):
    """SIGKILL at a write that was to become durable: a checkpoint's part, its rename, status.json,
    the results.
    """
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(os, call, on_call(number, kill, getattr(os, call)))
        code = in_child(lambda: small_run(tmp_path / "run"))
    assert code == -signal.SIGKILL or number > 10
    assert small_run(tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == whole
    assert not list((tmp_path / "run").rglob(".tmp-*"))


@pytest.mark.parametrize("name", some(["SIGINT"], ["SIGINT", "SIGUSR1", "SIGTERM"]))
def test_a_real_signal_between_steps_saves(whole, tmp_path, monkeypatch, name):
    send = lambda: os.kill(os.getpid(), getattr(signal, name))  # noqa: E731
    from deepclust.training.trainer import Trainer

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", on_call(9, send, Trainer.train_step))
        assert in_child(lambda: small_run(tmp_path / "run")) == 143
    said = status(tmp_path / "run")
    assert said == {
        "state": "preempted",
        "stage": "scan",
        "epoch": said["epoch"],
        "step": 3,
        "reason": name,
    }
    assert checkpoint.listing(tmp_path / "run" / "checkpoints")[-1].name == "step-00000003"
    assert small_run(tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == whole


def start(folder, data, *more):
    """The command line in a process of its own, slow enough to be caught; returns once a few steps
    are logged.
    """
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *words(folder, *more),
        "data=arrays",
        f"data.images={data}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=folder.parent, env=environment, stderr=subprocess.PIPE, text=True
    )
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (
        metrics.exists() and metrics.read_text().count("\n") >= 3
    ):
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_the_command_line_is_stopped_and_goes_on(tmp_path, number):
    np.save(tmp_path / "images.npy", pixels())
    longer = ("stages.pretext.trainer.epochs=40", "checkpoint.every_steps=20")
    process = start(
        tmp_path / "run", tmp_path / "images.npy", *longer, "stages.pretext.trainer.num_workers=2"
    )
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert process.returncode == 143, said
        assert status(tmp_path / "run")["state"] == "preempted"
    assert "Traceback" not in said
    assert small_run(tmp_path / "whole", *longer) == 0
    assert (
        small_run(tmp_path / "run", *longer, "data=arrays", f"data.images={tmp_path}/images.npy")
        == 0
    )
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


# ------------------------------------------------------------------------------------------- br


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def cut(file):
    file.write_bytes(file.read_bytes()[:-7])


BREAKS = {
    "bit flipped": flip,
    "truncated": cut,
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
}


@pytest.mark.parametrize(
    ("kind", "part"),
    some(
        [("bit flipped", "backbone.pt"), ("truncated", "manifest.json")],
        [
            (kind, part)
            for kind in BREAKS
            for part in ("backbone.pt", "manifest.json", "rank0.pt", "optimizer.pt")
        ],
    ),
)
def test_a_broken_newest_checkpoint_is_named_and_the_one_before_is_used(
    whole, tmp_path, monkeypatch, kind, part
):
    with monkeypatch.context() as patch:
        stop_at(patch, 14)
        assert small_run(tmp_path / "run") == 143
    *_, before, newest = checkpoint.listing(tmp_path / "run" / "checkpoints")
    BREAKS[kind](newest / part)
    assert small_run(tmp_path / "run") == 0
    said = (tmp_path / "run" / "log.txt").read_text()
    assert str(newest) in said and part in said and "The one before it is used." in said
    assert f"Going on from step {int(before.name[5:])}" in said
    assert outcome(tmp_path / "run") == whole


@pytest.mark.parametrize("number", some([40], [*range(1, 80, 6), 40]))
def test_a_full_disk_is_said_in_a_line_and_the_run_goes_on_later(
    whole, tmp_path, monkeypatch, number
):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", on_call(number, full, os.fsync))
        with pytest.raises(UserError, match=r"the disk is full\. Free some space") as told:
            small_run(tmp_path / "run")
    assert "\n" not in str(told.value)
    for path in checkpoint.listing(tmp_path / "run" / "checkpoints"):
        assert checkpoint.verify(path) == []
    assert small_run(tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == whole


@pytest.mark.parametrize("limit", some([30_000], [2_000, 10_000, 30_000]))
def test_a_file_that_may_not_grow_is_like_a_full_disk(whole, tmp_path, capfd, limit):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return small_run(tmp_path / "run")

    assert in_child(limited) == 2
    assert "the disk is full" in capfd.readouterr().out
    assert small_run(tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == whole


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [64, 256, 512, 1024])
def test_a_disk_that_is_really_full(whole, tmp_path, capfd, kilobytes):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", disk], capture_output=True
    ).returncode:
        pytest.skip("no permission to mount a small disk")
    try:
        code = in_child(lambda: small_run(disk / "run"))
        assert code == 2 and "the disk is full" in capfd.readouterr().out
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        assert small_run(disk / "run") == 0
        assert outcome(disk / "run") == whole
    finally:
        subprocess.run(["umount", disk], check=True)


# ------------------------------------------------------------------------------------------- ot


def test_two_runs_do_not_share_a_folder(tmp_path):
    ready, done = FORK.Event(), FORK.Event()

    def hold():
        with RunFolder.open(tmp_path / "run"):
            ready.set()
            done.wait(60)

    other = FORK.Process(target=hold)
    other.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match=f"in use by process {other.pid} on "):
        small_run(tmp_path / "run")
    done.set()
    other.join()
    assert small_run(tmp_path / "run") == 0


def test_a_killed_data_worker_ends_the_run_in_words(tmp_path, monkeypatch):
    from deepclust.cli import main
    from deepclust.data.image_set import ImageSet

    np.save(tmp_path / "images.npy", pixels())
    parent, original = os.getpid(), ImageSet.read

    def read(self, row):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, row)

    monkeypatch.setattr(ImageSet, "read", read)
    more = [
        "trainer.views=workers",
        "stages.pretext.trainer.num_workers=1",
        f"data.images={tmp_path}/images.npy",
    ]
    assert main(["train", *words(tmp_path / "run", *more), "data=arrays"]) == 1
    assert (
        "DataLoader worker" in json.loads((tmp_path / "run" / "status.json").read_text())["reason"]
    )
