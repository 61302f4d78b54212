"""Loggers: every step once and in full precision, whatever dies; and none of them can hurt a run."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from deepclust.loggers import Logger, Loggers, build_loggers
from deepclust.loggers.console import ConsoleLogger
from deepclust.loggers.files import FileLogger, read_metrics
from deepclust.run_folder import FolderError

LOCAL = {"console": False}


def metrics(step: int) -> dict[str, float]:
    return {"loss": math.exp(-step / 7) / 3, "epoch": step // 4, "stage_step": step, "stage_steps": 100}


def train(folder: Path, first: int, last: int, resumed: int = 0, stage: str = "pretext") -> None:
    loggers = build_loggers(LOCAL, folder, resumed_step=resumed)
    loggers.start({"name": "run"})
    for step in range(first, last + 1):
        loggers.log(metrics(step), step, stage)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_object_a_step_in_full_precision(tmp_path: Path) -> None:
    train(tmp_path, 1, 30)
    assert lines(tmp_path) == [{"step": step, "stage": "pretext", **metrics(step)} for step in range(1, 31)]


def test_resume_loses_no_step_and_repeats_none(tmp_path: Path) -> None:
    train(tmp_path, 1, 30)
    reference = (tmp_path / "metrics.jsonl").read_bytes()
    train(tmp_path, 21, 30, resumed=20)
    assert (tmp_path / "metrics.jsonl").read_bytes() == reference
    train(tmp_path, 1, 30, resumed=0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == reference


@pytest.mark.parametrize("torn", ['{"step": 21, "lo', '{"step": 20}\n\n', "\x00\x00\x00", '"step"\n', '{"loss": 1}\n'])
def test_a_line_torn_by_a_kill_is_cut(tmp_path: Path, torn: str) -> None:
    train(tmp_path, 1, 19)
    reference = (tmp_path / "metrics.jsonl").read_bytes()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(torn)
    train(tmp_path, 20, 19, resumed=19)
    assert (tmp_path / "metrics.jsonl").read_bytes() == reference


def test_killed_at_any_moment_and_resumed(tmp_path: Path) -> None:
    """A child logs, and notes its step as a checkpoint would every 5, until it is killed; then another goes on."""
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
    assert [row["loss"] for row in lines(tmp_path)] == [metrics(step)["loss"] for step in range(1, 41)]


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
        with pytest.raises(FolderError, match=r"metrics\.jsonl cannot be written: the disk is full"):
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
    assert loggers.active == [] and capfd.readouterr() == ("", "") and list(tmp_path.iterdir()) == []


def test_importing_leaves_torch_and_wandb_alone(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from deepclust.loggers import build_loggers\n"
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
    assert [line.split()[1] for line in shown] == [f"{step}/100" for step in (1, *range(11, 100, 10), 100)] + ["1/10"]
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
        ConsoleLogger(Console(file=text, force_terminal=is_terminal, width=30)).message(f"some words before it {path}")
        shown = text.getvalue().splitlines()
        assert len(shown) == (2 if is_terminal else 1) and shown[-1].rstrip().endswith(path)


class FakeWandb(types.ModuleType):
    """W&B as far as it is used here; `trouble` names the calls that raise."""

    def __init__(self, key: bool = True, trouble: tuple[str, ...] = ()) -> None:
        super().__init__("wandb")
        self.key, self.trouble = key, trouble
        self.inits: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.done: list[Any] = []
        self.Settings = types.SimpleNamespace
        self.Table = lambda columns, data: (columns, data)

    def _call(self, name: str) -> None:
        random.random()  # as wandb's retries do
        if name in self.trouble:
            raise ConnectionError(f"{name}: no route to host")

    def setup(self, settings: Any) -> None:
        self._call("setup")

    def login(self, prompt: bool, verify: bool) -> bool:
        assert not prompt and not verify
        return self.key

    def teardown(self) -> None:
        self._call("teardown")

    def init(self, **kwargs: Any) -> FakeWandb:
        self.inits.append(kwargs)
        self._call(f"init-{kwargs['mode']}")
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self._call("define_metric")

    def log(self, row: dict[str, Any]) -> None:
        self._call("log")
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self._call("finish")
        self.done.append(exit_code)


def run_with(folder: Path, mode: str, resumed: int = 0) -> tuple[Loggers, str]:
    loggers = build_loggers({"console": False, "wandb": mode, "wandb_project": "p"}, folder, resumed_step=resumed)
    loggers.start({"name": "run", "config": {"seed": 0}})
    for step in range(resumed + 1, resumed + 4):
        loggers.log(metrics(step), step, "pretext")
    loggers.table("Results", ["stage", "acc"], [["pretext", 0.5], ["scan", None]])
    loggers.finish("finished")
    return loggers, (folder / "log.txt").read_text() if (folder / "log.txt").exists() else ""


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_gets_every_step_on_its_own_axis(tmp_path: Path, monkeypatch: Any, mode: str) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    _, log = run_with(tmp_path, mode)
    assert "warning" not in log
    assert fake.rows[:3] == [{"step": step, "stage": "pretext", **metrics(step)} for step in (1, 2, 3)]
    assert fake.inits[0]["mode"] == mode and fake.inits[0]["project"] == "p" and fake.inits[0]["dir"] == str(tmp_path)
    assert fake.inits[0]["resume"] == "allow" and fake.inits[0]["config"] == {"seed": 0} and fake.done == [0]
    run_with(tmp_path, mode, resumed=3)
    assert fake.inits[0]["id"] == fake.inits[1]["id"] == (tmp_path / "wandb" / "run_id").read_text().strip()
    run_with(tmp_path_of(tmp_path, "other"), mode)
    assert fake.inits[2]["id"] != fake.inits[0]["id"]


def tmp_path_of(path: Path, name: str) -> Path:
    (path / name).mkdir()
    return path / name


@pytest.mark.parametrize(
    "key, trouble, words, modes",
    [
        (False, (), "W&B has no key", ["offline"]),
        (
            True,
            ("init-online",),
            "W&B cannot be reached (init-online: no route to host); logging offline",
            ["online", "offline"],
        ),
        (True, ("init-online", "init-offline"), "WandbLogger is off from here on: init-offline", ["online", "offline"]),
        (True, ("init-online", "teardown"), "WandbLogger is off from here on: teardown", ["online"]),
        (True, ("setup",), "WandbLogger is off from here on: setup", []),
        (True, ("define_metric",), "WandbLogger is off from here on: define_metric", ["online"]),
        (True, ("log",), "WandbLogger is off from here on: log", ["online"]),
        (True, ("finish",), "WandbLogger is off from here on: finish", ["online"]),
    ],
)
def test_wandb_in_trouble_is_a_warning(
    tmp_path: Path, monkeypatch: Any, key: bool, trouble: tuple[str, ...], words: str, modes: list[str]
) -> None:
    fake = FakeWandb(key, trouble)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    _, log = run_with(tmp_path, "online")
    assert words in log and [init["mode"] for init in fake.inits] == modes
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3]


def test_wandb_absent_is_a_warning(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    _, log = run_with(tmp_path, "online")
    assert log.count("W&B is not installed") == 1 and log.count("warning") == 1
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3]


def test_wandb_is_not_started_where_it_could_not_write(tmp_path: Path, monkeypatch: Any) -> None:
    """It would go to the system's temporary folder."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "wandb").write_text("in the way")
    _, log = run_with(tmp_path, "offline")
    assert "WandbLogger is off" in log and fake.inits == []


def random_states() -> list[Any]:
    return [random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()]  # noqa: NPY002


def test_loggers_draw_no_random_numbers(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(trouble=("init-online",)))
    before = random_states()
    loggers = build_loggers({"wandb": "online"}, tmp_path)
    loggers.start({"name": "run"})
    loggers.finish("finished")
    assert random_states() == before


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_the_real_wandb_offline(tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")  # what the run asks for wins
    importlib.import_module("wandb")
    before = random_states()
    folder = tmp_path_of(tmp_path, "run")
    loggers, log = run_with(folder, "offline")
    assert random_states() == before
    assert "warning" not in log and len(loggers.active) == 2
    runs = list((folder / "wandb").glob("offline-run-*"))
    assert len(runs) == 1 and runs[0].name.endswith((folder / "wandb" / "run_id").read_text().strip())
    assert [row["step"] for row in lines(folder)] == [1, 2, 3]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_shows_every_step_once_also_after_a_resume(tmp_path: Path) -> None:
    importlib.import_module("torch.utils.tensorboard")
    before = random_states()
    for resumed, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):
        loggers = build_loggers({"console": False, "tensorboard": True}, tmp_path, resumed_step=resumed)
        loggers.start({"name": "run"})
        for step in steps:
            loggers.log({"loss": 10.0 * resumed + step}, step, "scan")
        loggers.table("results", ["", "ACC"], [["scan", None]])
        loggers.finish("preempted")
    assert random_states() == before
    assert scalars(tmp_path) == {"scan/loss": [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0), (5, 25.0)]}
    assert (tmp_path / "log.txt").read_text().count("warning") == 0


def test_tensorboard_absent_is_a_warning(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    loggers = build_loggers({"console": False, "tensorboard": True}, tmp_path)
    loggers.start({})
    loggers.log({"loss": 1.0}, 1, "scan")
    loggers.finish("finished")
    assert (tmp_path / "log.txt").read_text().count("TensorBoard is not installed") == 1
    assert [row["step"] for row in lines(tmp_path)] == [1]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_a_run_is_the_same_with_and_without_tensorboard(tmp_path: Path) -> None:
    from tests.runs import outcome, small_run

    for name, wanted in (("with", "true"), ("without", "false")):
        assert small_run(tmp_path / name, f"logger.tensorboard={wanted}") == 0
    assert outcome(tmp_path / "with") == outcome(tmp_path / "without")
    rows = [json.loads(line) for line in (tmp_path / "with/metrics.jsonl").read_text().splitlines()]
    wanted = [(row["step"], pytest.approx(row["loss"])) for row in rows if row["stage"] == "scan"]
    assert scalars(tmp_path / "with")["scan/loss"] == wanted


def test_the_protocol_is_what_the_loggers_are(tmp_path: Path) -> None:
    verbs = [name for name in vars(Logger) if not name.startswith("_")]
    assert verbs == ["start", "log", "table", "message", "finish"]
    for logger in build_loggers({"wandb": "offline", "tensorboard": True}, tmp_path).active:
        assert all(callable(getattr(logger, verb)) for verb in verbs)
