"""Weights & Biases and TensorBoard: every step once, and no trouble of theirs hurts a run."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepclust.loggers.base import Loggers
from deepclust.loggers.build import build_loggers
from tests.loggers.test_loggers import lines, metrics


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
    loggers = build_loggers(
        {"console": False, "wandb": mode, "wandb_project": "p"}, folder, resumed_step=resumed
    )
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
    assert fake.rows[:3] == [
        {"step": step, "stage": "pretext", **metrics(step)} for step in (1, 2, 3)
    ]
    assert (
        fake.inits[0]["mode"] == mode
        and fake.inits[0]["project"] == "p"
        and fake.inits[0]["dir"] == str(tmp_path)
    )
    assert (
        fake.inits[0]["resume"] == "allow"
        and fake.inits[0]["config"] == {"seed": 0}
        and fake.done == [0]
    )
    run_with(tmp_path, mode, resumed=3)
    assert (
        fake.inits[0]["id"]
        == fake.inits[1]["id"]
        == (tmp_path / "wandb" / "run_id").read_text().strip()
    )
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
        (
            True,
            ("init-online", "init-offline"),
            "WandbLogger is off from here on: init-offline",
            ["online", "offline"],
        ),
        (
            True,
            ("init-online", "teardown"),
            "WandbLogger is off from here on: teardown",
            ["online"],
        ),
        (True, ("setup",), "WandbLogger is off from here on: setup", []),
        (True, ("define_metric",), "WandbLogger is off from here on: define_metric", ["online"]),
        (True, ("log",), "WandbLogger is off from here on: log", ["online"]),
        (True, ("finish",), "WandbLogger is off from here on: finish", ["online"]),
    ],
)
def test_wandb_in_trouble_is_a_warning(
    tmp_path: Path,
    monkeypatch: Any,
    key: bool,
    trouble: tuple[str, ...],
    words: str,
    modes: list[str],
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
    assert len(runs) == 1 and runs[0].name.endswith(
        (folder / "wandb" / "run_id").read_text().strip()
    )
    assert [row["step"] for row in lines(folder)] == [1, 2, 3]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator: Any = importlib.import_module(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
def test_tensorboard_shows_every_step_once_also_after_a_resume(tmp_path: Path) -> None:
    importlib.import_module("torch.utils.tensorboard")
    before = random_states()
    for resumed, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):
        loggers = build_loggers(
            {"console": False, "tensorboard": True}, tmp_path, resumed_step=resumed
        )
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


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
def test_a_run_is_the_same_with_and_without_tensorboard(tmp_path: Path) -> None:
    from tests.runs import outcome, small_run

    for name, wanted in (("with", "true"), ("without", "false")):
        assert small_run(tmp_path / name, f"logger.tensorboard={wanted}") == 0
    assert outcome(tmp_path / "with") == outcome(tmp_path / "without")
    rows = [json.loads(line) for line in (tmp_path / "with/metrics.jsonl").read_text().splitlines()]
    wanted = [(row["step"], pytest.approx(row["loss"])) for row in rows if row["stage"] == "scan"]
    assert scalars(tmp_path / "with")["scan/loss"] == wanted
