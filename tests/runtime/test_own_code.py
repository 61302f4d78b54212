"""Stores by strangers name a FILE.py: it runs only where this user named it, before or now."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from deepclust.cli import main
from deepclust.collection.edit import edit
from deepclust.collection.landmarks import save_model
from deepclust.collection.run import FolderRun
from deepclust.data.store import MANIFEST, FeatureStore
from deepclust.errors import UserError
from deepclust.features.encoder import find_encoder
from deepclust.runtime import own_code
from deepclust.runtime.own_code import KNOWN, read_code
from tests.collection.toys import NETS, toy_landmarks, toy_run

TRACED = f"""
import pathlib
with open(pathlib.Path(__file__).parent / "canary.txt", "a") as canary:
    canary.write("ran ")
{NETS.format(labels=False)}
other = colours
"""


@dataclass
class Theirs:
    """A run over a store whose features a FILE.py made, as somebody may have sent it."""

    folder: Path
    capsys: Any

    @property
    def file(self) -> Path:
        return self.folder / "nets.py"

    @property
    def name(self) -> str:
        return f"{self.file}:colours"

    def predict(self, *more: str, run: str = "run") -> int:
        """Clusters of an image by the run's model."""
        image = self.folder / "photos/red/002.png"
        words = [
            "predict",
            str(self.folder / run),
            str(image),
            "-o",
            str(self.folder / "c.csv"),
            "--new",
        ]
        return main([*words, *more])

    def ran(self) -> bool:
        """Whether the file was run since this was asked last."""
        canary = self.folder / "canary.txt"
        there = canary.exists()
        canary.unlink(missing_ok=True)
        return there

    def refuses(self, said: str, run: str = "run") -> str:
        """Checks that nothing runs and that one line says why; gives the line."""
        self.capsys.readouterr()
        assert self.predict(run=run) == 2 and not self.ran()
        line = self.capsys.readouterr().err.strip()
        assert said in line, line
        return line

    def forge(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Changes what the store says of its backbone."""
        with sqlite3.connect(self.folder / "store" / MANIFEST) as db:
            identity = json.loads(db.execute("SELECT identity FROM backbones").fetchone()[0])
            change(identity)
            db.execute("UPDATE backbones SET identity = ?", (json.dumps(identity),))
        db.close()


@pytest.fixture
def theirs(
    tmp_path: Path, settings_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Theirs:
    monkeypatch.setattr("tests.collection.toys.NETS", TRACED.replace("{", "{{").replace("}", "}}"))
    run = toy_run(tmp_path)
    toy_landmarks(run)
    save_model(run, run.state())
    shutil.rmtree(settings_folder)  # another user made it
    made = Theirs(tmp_path, capsys)
    assert made.ran()
    return made


def test_a_strangers_run_says_what_would_run_and_how_to_allow_it(theirs: Theirs):
    line = theirs.refuses("That would run the function colours of")
    digest = hashlib.sha256(theirs.file.read_bytes()).hexdigest()
    assert (
        "\n" not in line
        and digest in line
        and f"--trust {theirs.file}" in line
        and f"--backbone {theirs.name}" in line
    )


def test_the_user_may_trust_it_each_time(theirs: Theirs, settings_folder: Path):
    assert theirs.predict("--trust", str(theirs.file)) == 0 and theirs.ran()
    theirs.refuses("That would run")
    assert not settings_folder.exists(), "trust is for this once"
    assert (
        theirs.predict("--trust", "nets") == 2
        and theirs.predict("--trust", str(theirs.folder)) == 2
    )
    assert not theirs.ran()


def test_what_the_user_ran_by_name_runs_again(theirs: Theirs, settings_folder: Path):
    assert theirs.predict("--backbone", theirs.name) == 0 and theirs.ran()
    assert theirs.predict() == 0 and theirs.ran()
    assert theirs.predict("--backbone", theirs.name) == 0
    assert len((settings_folder / KNOWN).read_text().splitlines()) == 1
    (settings_folder / KNOWN).unlink()
    theirs.ran()
    theirs.refuses("That would run")


@pytest.mark.parametrize("command", ["features", "cluster"])
def test_naming_it_for_a_folder_of_ones_own_counts(theirs: Theirs, command: str):
    photos, store = str(theirs.folder / "photos"), str(theirs.folder / "mine")
    more = ["-k", "2", "-o", str(theirs.folder / "clusters")] if command == "cluster" else []
    assert (
        main([command, photos, "--backbone", theirs.name, "--store", store, *more]) == 0
        and theirs.ran()
    )
    assert theirs.predict(run="clusters" if more else "run") == 0 and theirs.ran()


# --- what a stranger may try once the user ran a file of theirs by name -----------------------


@pytest.fixture
def known(theirs: Theirs) -> Theirs:
    find_encoder(theirs.name)
    assert theirs.ran() and theirs.predict() == 0 and theirs.ran()
    return theirs


def rehash(file: Path) -> Callable[[dict[str, Any]], None]:
    """Makes the store's own hash that of a file."""
    return lambda identity: identity["made_by"].update(
        name=f"{file}:colours", code=hashlib.sha256(file.read_bytes()).hexdigest()
    )


def test_a_changed_file_is_another_one_even_if_the_store_knows_its_hash(known: Theirs):
    known.file.write_text(TRACED + "\n# changed\n")
    known.refuses("was changed since")
    known.forge(rehash(known.file))
    known.refuses("That would run")


def test_another_function_of_the_same_file_is_another_one(known: Theirs):
    known.forge(lambda identity: identity["made_by"].update(name=f"{known.file}:other"))
    known.refuses("That would run the function other of")


@pytest.mark.parametrize("how", ["copy", "symlink", "hard link"])
def test_the_same_file_elsewhere_is_another_one(known: Theirs, how: str):
    """What lies beside it there is another's."""
    (known.folder / "there").mkdir()
    place = known.folder / "there/nets.py"
    {"copy": shutil.copy, "symlink": os.symlink, "hard link": os.link}[how](known.file, place)
    known.forge(rehash(place))
    known.refuses("That would run")
    assert not (known.folder / "there/canary.txt").exists()


def test_a_link_that_was_turned_is_another_file(theirs: Theirs):
    link, evil = theirs.folder / "link.py", theirs.folder / "evil.py"
    link.symlink_to(theirs.file)
    theirs.forge(rehash(link))
    find_encoder(f"{link}:colours")
    assert theirs.ran() and theirs.predict() == 0 and theirs.ran()
    evil.write_text(TRACED + "\n# evil\n")
    link.unlink()
    link.symlink_to(evil)
    theirs.forge(rehash(link))
    theirs.refuses("That would run")


def test_a_changed_file_beside_it_counts(known: Theirs):
    (known.folder / "beside.py").write_text("x = 1\n")
    known.refuses("with the .py files beside it")
    (known.folder / "beside.py").unlink()
    assert known.predict() == 0 and known.ran()


def test_what_runs_is_what_was_hashed(known: Theirs, monkeypatch: pytest.MonkeyPatch):
    """The file is exchanged between the look at it and its run."""
    before = own_code.Code.run

    def run(code: own_code.Code) -> Any:
        known.file.write_text("raise SystemExit('this was never looked at')\n")
        return before(code)

    monkeypatch.setattr(own_code.Code, "run", run)
    assert known.predict() == 0 and known.ran()


@pytest.mark.parametrize(
    "identity",
    [
        {"made_by": None, "model": "{file}:colours"},
        {"made_by": [], "model": "{file}:colours"},
        {"made_by": {"name": "{file}:colours"}},
        {"made_by": {"name": "{file}:colours", "code": None}},
        {"made_by": {"name": ["{file}:colours"]}},
        {"made_by": {"name": "nets:colours"}},
        {"made_by": {"name": ":colours"}},
        {"made_by": {"name": "os:getcwd"}},
        {"made_by": {"name": "{file}"}},
        {"made_by": {"name": "hf-hub:somebody/model"}},
        {"made_by": {"name": "test_vit", "weights": "/dev/zero"}},
        {"made_by": {"name": "test_vit", "weights": "{file}", "size": 10**9}},
    ],
)
def test_stores_that_say_strange_things_run_nothing(theirs: Theirs, identity: dict[str, Any]):
    def change(known: dict[str, Any]) -> None:
        known.update(json.loads(json.dumps(identity).replace("{file}", str(theirs.file))))

    theirs.forge(change)
    theirs.refuses("needs the network that made its features")


def test_words_of_a_store_are_quoted_where_they_are_to_be_typed(theirs: Theirs):
    place = theirs.folder / "a; touch canary.txt\n #"
    place.mkdir()
    shutil.copy(theirs.file, place / "nets.py")
    theirs.forge(rehash(place / "nets.py"))
    line = theirs.refuses("That would run")
    assert "\n" not in line and shlex.split(line)[-1] == f"{place}/nets.py:colours".replace(
        "\n", "?"
    )


def test_runs_of_training_and_models_go_by_the_same_rule(theirs: Theirs):
    """Where config.yaml names the store instead of run.json."""
    shutil.copytree(theirs.folder / "run", theirs.folder / "trained")
    (theirs.folder / "trained/run.json").unlink()
    (theirs.folder / "trained/config.yaml").write_text(
        f"data: {{file: {theirs.folder / 'store'}}}\n"
    )
    theirs.refuses("That would run", run="trained")
    theirs.refuses("That would run", run="trained/model.safetensors")
    theirs.refuses("That would run", run="run/model.safetensors")


def test_what_needs_no_network_runs_no_code(theirs: Theirs):
    run, store = theirs.folder / "run", theirs.folder / "store"
    edit(run, "merge", ["0", "1"])
    edit(run, "split", ["2"])
    FolderRun.open(run).state()
    FeatureStore.open(store).features()
    assert main(["predict", str(run), str(store), "-o", str(theirs.folder / "c.csv")]) == 0
    assert not theirs.ran()


def test_a_store_holds_numbers_in_files_of_its_own(theirs: Theirs):
    """A map of objects would follow any address that the file holds."""
    for column, value in (
        ("dtype", "O"),
        ("dtype", "object"),
        ("name", "../evil"),
        ("dim", -1),
        ("identity", "[]"),
    ):
        with sqlite3.connect(theirs.folder / "store" / MANIFEST) as db:
            before = db.execute(f"SELECT {column} FROM backbones").fetchone()
            db.execute(f"UPDATE backbones SET {column} = ?", (value,))
        db.close()
        with pytest.raises(UserError, match="cannot be read"):
            FeatureStore.open(theirs.folder / "store")
        with sqlite3.connect(theirs.folder / "store" / MANIFEST) as db:
            db.execute(f"UPDATE backbones SET {column} = ?", before)
        db.close()


# --- where it is remembered -------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_no_error(theirs: Theirs, settings_folder: Path):
    settings_folder.parent.mkdir(exist_ok=True)
    settings_folder.write_text("a file is in the way")
    assert isinstance(find_encoder(theirs.name).net, torch.nn.Module) and theirs.ran()
    theirs.refuses("That would run")
    settings_folder.unlink()
    (settings_folder / KNOWN).mkdir(parents=True)
    find_encoder(theirs.name)
    assert theirs.ran() and not read_code(theirs.name).remembered
    theirs.refuses("That would run")


def test_a_relative_folder_of_settings_does_not_count(
    theirs: Theirs, monkeypatch: pytest.MonkeyPatch
):
    """It would be one of the folder that the user happens to be in."""
    (theirs.folder / "deepclust").mkdir()
    (theirs.folder / "deepclust" / KNOWN).write_text(read_code(theirs.name)._line + "\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(theirs.folder))
    assert read_code(theirs.name).remembered
    monkeypatch.chdir(theirs.folder)
    monkeypatch.setenv("HOME", str(theirs.folder / "home"))
    for relative in (".", "", "../" + theirs.folder.name):
        monkeypatch.setenv("XDG_CONFIG_HOME", relative)
        assert not read_code(theirs.name).remembered
    read_code(theirs.name).remember()
    assert (theirs.folder / "home/.config/deepclust" / KNOWN).is_file()


def test_a_name_cannot_forge_another_line(theirs: Theirs):
    good = read_code(theirs.name)
    sly = own_code.Code(f"x\n{good._line}\n", "f", b"", "")
    sly.remember()
    assert sly.remembered and not good.remembered
