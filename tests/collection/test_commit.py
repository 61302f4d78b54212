"""A kill between any two writes of a command leaves the run as it was before or as it is after,
never a mix.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deepclust.cli import main
from deepclust.collection.history import State
from deepclust.collection.run import FolderRun
from deepclust.runtime.files import write_atomic
from tests.collection.toys import NETS, toy_photos

FILES = ("clusters.csv", "clusters.parquet", "left_out.csv", "model.safetensors", "landmarks.npz")


class Killed(BaseException):
    """What no handler of the program stops."""


def command(k: int, *more: str) -> list[str]:
    words = ["cluster", "photos", "-k", str(k), "-o", "run", "--store", "store"]
    return [*words, "--backbone", "nets.py:colours", "--clusterers", "ward", *more]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """20 images with 3 clusters in `run`; a copy of all is beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "deepclust.collection.report.write_page",
        lambda run, state: write_atomic(run.path / "report.html", ""),
    )
    toy_photos(tmp_path / "photos", 20)
    (tmp_path / "nets.py").write_text(NETS.format(labels=False))
    assert main(command(3)) == 0
    return tmp_path


def keep() -> None:
    """Remembers the run and the store as they are."""
    shutil.rmtree("kept", ignore_errors=True)
    for name in ("run", "store"):
        shutil.copytree(name, f"kept/{name}")


def restore() -> None:
    for name in ("run", "store"):
        shutil.rmtree(name)
        shutil.copytree(f"kept/{name}", name)


def outcome() -> dict[str, Any]:
    """Everything of a run but the time it took."""
    run = FolderRun.open("run")
    written = json.loads(Path("run/run.json").read_text())
    assert written["step"] == written["shown"] == run.history.digest()
    facts = {
        key: value for key, value in written.items() if key not in ("seconds", "step", "shown")
    }
    for figures in facts["choice"].values():
        figures.pop("seconds", None)
    state = run.state()
    columns = {
        name: getattr(state, name).tolist()
        for name in ("rows", "cluster", "confidence", "position", "copy_of")
    }
    files = {name: Path("run", name).read_bytes() for name in FILES}
    names = sorted(path.name for path in Path("run").iterdir() if not path.name.startswith("."))
    verbs = sorted(path.stem[5:] for path in Path("run/history").glob("0*"))
    return {
        "files": files,
        "facts": facts,
        "names": state.names,
        **columns,
        "folder": names,
        "verbs": verbs,
    }


def killed_at(place: int, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Runs until just before the place-th change of a file of the run; whether it came so far."""
    count = 0

    def counted(function: Callable[..., Any], path: int) -> Callable[..., Any]:
        def change(*args: Any, **options: Any) -> Any:
            nonlocal count
            if "run" in Path(os.path.abspath(args[path])).parts[-3:-1]:
                count += 1
                if count == place:
                    raise Killed
            return function(*args, **options)

        return change

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace, 1))
        patch.setattr(Path, "unlink", counted(Path.unlink, 0))
        try:
            call()
        except Killed:
            return True
    return False


def at_every_place(
    call: Callable[[], object], check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> int:
    """Kills the call at every change in turn and checks what it leaves. How many there were."""
    keep()
    for place in range(1, 100):
        restore()
        if not killed_at(place, call, monkeypatch):
            return place - 1
        check()
    raise AssertionError("it never ended")


def test_another_request_killed_between_any_two_writes(folder, monkeypatch, capsys):
    first = outcome()
    keep()
    assert main(command(4)) == 0
    second = outcome()
    assert main(command(3)) == 0
    back = outcome()
    assert second["facts"]["asked"]["num_clusters"] == 4 and second["cluster"] != first["cluster"]
    restore()

    def check() -> None:
        shutil.rmtree("left", ignore_errors=True)
        shutil.copytree("run", "left")
        assert main(command(3)) == 0 and outcome() in (first, back)
        shutil.rmtree("run")
        shutil.copytree("left", "run")
        assert main(["edit", "run"]) == 0
        assert main(command(4)) == 0 and outcome() == second

    assert at_every_place(lambda: main(command(4)), check, monkeypatch) >= 10


def test_an_append_and_its_undo_killed_between_any_two_writes(folder, monkeypatch):
    first = outcome()
    keep()
    Image.new("RGB", (14, 10), "blue").save("photos/blue/new.png")
    assert main(command(3, "--append")) == 0
    second = outcome()
    assert len(second["cluster"]) == len(first["cluster"]) + 1
    restore()

    def check() -> None:
        assert main(command(3, "--append")) == 0
        found = outcome()
        assert FolderRun.open("run").history.verbs == ["cluster", "append"] and found == second
        assert main(["edit", "run", "undo"]) == 0
        found = outcome()
        assert (
            found["cluster"] == first["cluster"]
            and found["facts"]["digest"] == first["facts"]["digest"]
        )

    assert at_every_place(lambda: main(command(3, "--append")), check, monkeypatch) >= 8
    restore()
    assert main(command(3, "--append")) == 0

    def undone() -> None:
        run = FolderRun.open("run")
        if run.history.verbs == ["cluster", "append"]:
            assert main(["edit", "run", "undo"]) == 0
        assert FolderRun.open("run").facts["digest"] == first["facts"]["digest"]
        assert main(command(3, "--append")) == 0 and outcome()["cluster"] == second["cluster"]

    assert at_every_place(lambda: main(["edit", "run", "undo"]), undone, monkeypatch) >= 8


def test_an_edit_killed_between_any_two_writes(folder, monkeypatch):
    first = outcome()

    def check() -> None:
        assert main(["edit", "run"]) == 0
        verbs = FolderRun.open("run").history.verbs
        assert verbs in (["cluster"], ["cluster", "merge"])
        if verbs == ["cluster"]:
            assert outcome() == first
        else:
            assert set(outcome()["cluster"]) == {0, 2}
            assert main(["edit", "run", "undo"]) == 0 and outcome()["cluster"] == first["cluster"]

    assert at_every_place(lambda: main(["edit", "run", "merge", "0", "1"]), check, monkeypatch) >= 7


def test_a_run_of_before_steps_had_facts_goes_on(folder):
    """As an earlier version left it: facts in run.json alone, an append among them."""
    Image.new("RGB", (14, 10), "blue").save("photos/blue/new.png")
    assert main(command(3, "--append")) == 0
    run = FolderRun.open("run")
    before, scan = run.state(), run.facts["appended"][0][0]
    for file in run.history.files():
        State.load(file).save(file)
    facts = {
        key: value
        for key, value in run.facts.items()
        if key not in ("step", "landmarks", "missing", "shown")
    }
    Path("run/run.json").write_text(json.dumps({"format": 1, **facts}))
    assert main(["edit", "run"]) == 0 and main(["edit", "run", "rename", "0", "first"]) == 0
    assert main(["edit", "run", "undo"]) == 0
    assert FolderRun.open("run").state().cluster.tolist() == before.cluster.tolist()
    assert main(["edit", "run", "undo"]) == 0
    run = FolderRun.open("run")
    assert run.facts["scan"] == scan and len(run.state().rows) == len(before.rows) - 1
    assert main(command(3, "--append")) == 0
    assert FolderRun.open("run").state().cluster.tolist() == before.cluster.tolist()


def test_a_run_of_a_later_version_is_left_alone(folder, capsys):
    facts = json.loads(Path("run/run.json").read_text())
    Path("run/run.json").write_text(json.dumps({**facts, "format": 99}))
    before = Path("run/clusters.csv").read_bytes()
    assert main(command(4)) == 2 and "update deepclust" in capsys.readouterr().err
    assert Path("run/clusters.csv").read_bytes() == before
