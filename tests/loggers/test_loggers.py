"""Loggers: every step once and in full precision, whatever dies; and none of them can hurt a run."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from deepclust.loggers.base import Logger, Loggers
from deepclust.loggers.build import build_loggers
from deepclust.loggers.console import ConsoleLogger
from deepclust.loggers.files import FileLogger, read_metrics
from deepclust.runtime.files import FolderError

LOCAL = {"console": False}


def metrics(step: int) -> dict[str, float]:
    return {
        "loss": math.exp(-step / 7) / 3,
        "epoch": step // 4,
        "stage_step": step,
        "stage_steps": 100,
    }


def train(folder: Path, first: int, last: int, resumed: int = 0, stage: str = "pretext") -> None:
    loggers = build_loggers(LOCAL, folder, resumed_step=resumed)
    loggers.start({"name": "run"})
    for step in range(first, last + 1):
        loggers.log(metrics(step), step, stage)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_object_a_step_in_full_precision(tmp_path: Path) -> None:
    train(tmp_path, 1, 30)
    assert lines(tmp_path) == [
        {"step": step, "stage": "pretext", **metrics(step)} for step in range(1, 31)
    ]


def test_resume_loses_no_step_and_repeats_none(tmp_path: Path) -> None:
    train(tmp_path, 1, 30)
    reference = (tmp_path / "metrics.jsonl").read_bytes()
    train(tmp_path, 21, 30, resumed=20)
    assert (tmp_path / "metrics.jsonl").read_bytes() == reference
    train(tmp_path, 1, 30, resumed=0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == reference


@pytest.mark.parametrize(
    "torn", ['{"step": 21, "lo', '{"step": 20}\n\n', "\x00\x00\x00", '"step"\n', '{"loss": 1}\n']
)
def test_a_line_torn_by_a_kill_is_cut(tmp_path: Path, torn: str) -> None:
    train(tmp_path, 1, 19)
    reference = (tmp_path / "metrics.jsonl").read_bytes()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(torn)
    train(tmp_path, 20, 19, resumed=19)
    assert (tmp_path / "metrics.jsonl").read_bytes() == reference


def test_killed_at_any_moment_and_resumed(tmp_path: Path) -> None:
    """A child logs, and notes its step as a checkpoint would every 5, until it is killed; then
    another goes on.
    """
    saved = tmp_path / "saved"

    def body(die_at: int) -> None:
        resumed = int(saved.read_text()) if saved.exists() else 0
        loggers = build_loggers(LOCAL, tmp_path, resumed_step=resumed)
        loggers.start({})
        for step in range(resumed + 1, 41):
            loggers.log(metrics(step), step, "pretext" if step < 20 else "scan")
            if step == die_at:
                with open(tmp_path / "metrics.jsonl", "a") as file:
                    file.write('{"step": ')
                os._exit(9)
            if step % 5 == 0:
                saved.write_text(str(step))
        loggers.finish("finished")
        os._exit(0)

    for die_at in (1, 4, 5, 6, 13, 20, 21, 39, 0):
        child = os.fork()
        if child == 0:
            try:
                body(die_at)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (9 if die_at else 0)
    assert [row["step"] for row in lines(tmp_path)] == list(range(1, 41))
    assert [row["loss"] for row in lines(tmp_path)] == [
        metrics(step)["loss"] for step in range(1, 41)
    ]


def test_a_second_call_for_a_step_adds_to_its_line(tmp_path: Path) -> None:
    train(tmp_path, 1, 2)
    loggers = build_loggers(LOCAL, tmp_path, resumed_step=2)
    loggers.start({})
    loggers.log({"eval/acc": 0.9}, 2, "pretext")
    loggers.log({"loss": 1.0}, 3, "scan")
    loggers.log({"eval/acc": 0.95}, 3, "scan")
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3]
    assert lines(tmp_path)[1] == {"step": 2, "stage": "pretext", **metrics(2), "eval/acc": 0.9}
    assert lines(tmp_path)[2] == {"step": 3, "stage": "scan", "loss": 1.0, "eval/acc": 0.95}


def test_the_table_is_the_same_numbers_and_its_columns_may_grow(tmp_path: Path) -> None:
    train(tmp_path, 1, 3)
    loggers = build_loggers(LOCAL, tmp_path, resumed_step=3)
    loggers.start({})
    loggers.log({"loss": 0.1, "entropy": 2.0}, 4, "scan")
    with open(tmp_path / "metrics.csv") as file:
        assert len(list(csv.DictReader(file))) == 3, "rewritten when a stage ends"
    loggers.finish("finished")
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in lines(tmp_path)]
    assert [row["entropy"] for row in rows] == ["", "", "", "2.0"]


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    logger = FileLogger(tmp_path)
    logger.start({})
    logger.log({"loss": float("nan"), "scale": float("inf"), "count": 3}, 1, "a")

    def refuse(text: str) -> None:
        raise AssertionError(text)

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"step": 1, "stage": "a", "loss": None, "scale": None, "count": 3}


def test_tensors_and_numpy_numbers_are_taken(tmp_path: Path) -> None:
    loggers = build_loggers(LOCAL, tmp_path)
    loggers.start({})
    numbers: dict[str, Any] = {"loss": torch.tensor(0.5), "rate": np.float32(0.25)}
    loggers.log(numbers, 1, "a")
    assert lines(tmp_path) == [{"step": 1, "stage": "a", "loss": 0.5, "rate": 0.25}]


def test_messages_and_tables_are_in_the_log(tmp_path: Path) -> None:
    logger = FileLogger(tmp_path)
    logger.message("one\ntwo", "warning")
    logger.table("Results", ["stage", "acc"], [["pretext", 0.912345], ["k-means", None]])
    text = (tmp_path / "log.txt").read_text()
    assert "warning one\n    two\n" in text
    assert "Results\n    stage    acc\n    pretext  0.9123\n    k-means  –\n" in text


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.csv", "log.txt"])
def test_a_link_does_not_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "outside")
    with pytest.raises(FolderError, match="leads outside"):
        build_loggers(LOCAL, tmp_path / "run")
    assert not (tmp_path / "outside").exists()


def test_a_disk_too_full_for_the_metrics_stops_the_run_in_words(tmp_path: Path) -> None:
    """The kernel refuses to write beyond 500 bytes of any file. What fits stays readable."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    loggers = build_loggers(LOCAL, tmp_path)
    loggers.start({})
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(
            FolderError, match=r"metrics\.jsonl cannot be written: the disk is full"
        ):
            for step in range(1, 100):
                loggers.log(metrics(step), step, "a")
        loggers.message("x" * 1000)
        loggers.finish("failed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    steps = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 3


class Recorder:
    """A logger that remembers what it was given and fails where it is told to."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*args: Any) -> None:
            self.calls.append((name, args))
            if name == self.fails:
                raise RuntimeError("server says no\nsecond line")

        return call


@pytest.mark.parametrize("fails", ["start", "log", "table", "message", "finish"])
def test_a_failing_logger_is_named_once_and_switched_off(fails: str) -> None:
    bad, good = Recorder(fails), Recorder()
    loggers = Loggers([bad, good])  # type: ignore[list-item]
    for _ in range(2):
        loggers.start({})
        loggers.log({"loss": 1.0}, 1, "a")
        loggers.table("t", ["a"], [[1]])
        loggers.message("hello")
        loggers.finish("finished")
    warnings = [args[0] for name, args in good.calls if name == "message" and args[1] == "warning"]
    assert warnings == ["Recorder is off from here on: server says no"]
    assert [name for name, _ in bad.calls].count(fails) == 1
    assert len(good.calls) == 11


def test_other_ranks_are_quiet(tmp_path: Path, capfd: Any) -> None:
    loggers = build_loggers({"wandb": "offline"}, tmp_path / "absent", rank=1)
    loggers.start({"name": "x"})
    loggers.log({"loss": 1.0}, 1, "a")
    loggers.message("x", "error")
    loggers.finish("finished")
    assert (
        loggers.active == [] and capfd.readouterr() == ("", "") and list(tmp_path.iterdir()) == []
    )


def test_importing_leaves_torch_and_wandb_alone(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from deepclust.loggers.build import build_loggers\n"
        f"build_loggers({{}}, pathlib.Path({str(tmp_path)!r}))\n"
        "sys.exit('torch' in sys.modules or 'wandb' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_a_line_every_ten_seconds() -> None:
    text, clock = io.StringIO(), Clock()
    logger = ConsoleLogger(Console(file=text, width=200), clock)
    for step in range(1, 101):
        clock.now += 1
        logger.log({**metrics(step), "images_per_second": 1234.4}, step, "pretext")
    clock.now += 1
    logger.log({"eval/acc": 0.9}, 100, "pretext")
    logger.log({"loss": 0.5, "stage_step": 1, "stage_steps": 10}, 101, "scan")
    logger.finish("finished")
    shown = text.getvalue().splitlines()
    assert [line.split()[1] for line in shown] == [
        f"{step}/100" for step in (1, *range(11, 100, 10), 100)
    ] + ["1/10"]
    assert shown[0] == f"pretext 1/100  loss {metrics(1)['loss']:.4f}  1234 images/s"
    assert shown[1].endswith("1:29 left")


def test_on_a_terminal_a_bar_that_is_taken_down() -> None:
    text = io.StringIO()
    logger = ConsoleLogger(Console(file=text, force_terminal=True, width=120), Clock())
    logger.start({"name": "scan-digits-0", "folder": "outputs/scan-digits-0"})
    for step in range(1, 101):
        logger.log({**metrics(step), "images_per_second": 1234.4}, step, "pretext")
    logger.message("a [bold] word", "warning")
    logger.table("[Results]", ["stage", "acc"], [["[pretext]", 0.912345], ["k-means", None]])
    logger.finish("finished")
    shown = text.getvalue()
    for part in (
        "scan-digits-0 in outputs/scan-digits-0",
        "pretext",
        "100/100",
        "1234 images/s",
        "a [bold] word",
        "[Results]",
        "[pretext]",
    ):
        assert part in shown
    assert "0.9123" in shown and "–" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1, "the cursor is back"


def test_a_terminal_breaks_messages_between_words_and_never_a_path() -> None:
    path = "/" + "x" * 60
    for is_terminal in (False, True):
        text = io.StringIO()
        ConsoleLogger(Console(file=text, force_terminal=is_terminal, width=30)).message(
            f"some words before it {path}"
        )
        shown = text.getvalue().splitlines()
        assert len(shown) == (2 if is_terminal else 1) and shown[-1].rstrip().endswith(path)


def test_the_protocol_is_what_the_loggers_are(tmp_path: Path) -> None:
    verbs = [name for name in vars(Logger) if not name.startswith("_")]
    assert verbs == ["start", "log", "table", "message", "finish"]
    for logger in build_loggers({"wandb": "offline", "tensorboard": True}, tmp_path).active:
        assert all(callable(getattr(logger, verb)) for verb in verbs)
