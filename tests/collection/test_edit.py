"""`deepclust edit`: what each verb does, that ids keep their meaning, and that all of it can be
taken back.
"""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from deepclust.cli import main
from deepclust.collection import edit as edits
from deepclust.collection import outputs
from deepclust.collection.history import State
from deepclust.collection.outputs import up_to_date, write_all, write_tables
from deepclust.collection.run import FolderRun
from deepclust.model import Clusterer
from deepclust.runtime.files import release_lock, take_lock
from tests.collection.toys import toy_landmarks, toy_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> FolderRun:
    found = toy_run(
        tmp_path_factory.mktemp("edit"), asked={"num_clusters": 3, "noise": True, "sort": "symlink"}
    )
    toy_landmarks(found)
    write_all(found, found.state())
    return found


@pytest.fixture
def run(made: FolderRun, tmp_path: Path) -> FolderRun:
    return FolderRun.open(shutil.copytree(made.path, tmp_path / "run", symlinks=True))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables alone are written."""

    def write(run: FolderRun, state: State) -> None:
        write_tables(run, state)
        run.facts[outputs.SHOWN] = run.history.digest()
        run.save()

    monkeypatch.setattr(edits, "write_all", write)


def edit(run: FolderRun, *words: object) -> int:
    return main(["edit", str(run.path), *map(str, words)])


def clusters(run: FolderRun) -> dict[str, int]:
    """Cluster of each image that is in the table, by its path."""
    with open(run.path / "clusters.csv", newline="") as file:
        return {line["path"]: int(line["cluster"]) for line in csv.DictReader(file)}


def test_every_file_follows_and_undo_restores_them(
    run: FolderRun, capsys: pytest.CaptureFixture[str]
):
    before, model = (
        (run.path / "clusters.csv").read_bytes(),
        (run.path / "model.safetensors").read_bytes(),
    )
    assert edit(run, "rename", 1, "  grass  green ") == 0
    assert edit(run, "merge", 0, "Grass Green") == 0
    said = capsys.readouterr().out
    assert "cluster 1 is called 'grass green'; now 3 clusters" in said
    assert "merged 1 (grass green) into 0; now 2 clusters" in said
    assert set(clusters(run).values()) == {-1, 0, 2} and run.state().names == {0: "grass green"}
    assert len(os.listdir(run.path / "sorted/000-grass green")) == 9
    assert (
        not (run.path / "sorted/001").exists()
        and "grass green" in (run.path / "report.html").read_text()
    )
    state = run.state()
    found = Clusterer.load(run.path).predict(run.features(state.rows))
    assert (np.asarray(found)[state.cluster >= 0] == state.cluster[state.cluster >= 0]).all()
    assert (state.confidence[state.cluster == 0] > 0.5).all()
    assert edit(run, "undo") == 0 and edit(run, "undo") == 0
    assert (run.path / "clusters.csv").read_bytes() == before
    assert (run.path / "model.safetensors").read_bytes() == model
    assert edit(run, "undo") == 2 and "there is nothing to take back" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_split_keeps_duplicates_together_and_the_id_with_the_largest_part(
    run: FolderRun, capsys: pytest.CaptureFixture[str]
):
    before = clusters(run)
    assert edit(run, "merge", 0, 1, 2) == 0
    assert edit(run, "rename", 0, "all") == 0
    assert edit(run, "split", "all", "-n", 3) == 0
    assert "split 0 (all) into 0 of " in capsys.readouterr().out
    state, after = run.state(), clusters(run)
    sizes = {each: sum(label == each for label in after.values()) for each in state.ids}
    assert (
        list(sizes) == [0, 3, 4] and sizes[0] >= sizes[3] >= sizes[4] and state.names == {0: "all"}
    )
    assert (
        len({after[path] for path in after if "copy" in path or path.endswith("red/002.png")}) == 1
    )
    pairs = {(before[path], after[path]) for path in after if before[path] >= 0}
    assert len(pairs) == 3  # the colours again


@pytest.mark.usefixtures("quick")
def test_exclude_takes_clusters_and_images_out(run: FolderRun, capsys: pytest.CaptureFixture[str]):
    state = run.state()
    path = run.store.paths[state.rows[-1]]
    assert edit(run, "exclude", 0, path, "noise") == 0
    with open(run.path / "left_out.csv", newline="") as file:
        out = {line["path"] for line in csv.DictReader(file)}
    inside = clusters(run)
    assert str(run.root / path) in out and not out & set(inside) and set(inside.values()) == {1, 2}
    assert len(out) + len(inside) == len(run.store)
    assert (
        edit(run, "exclude", run.root / path) == 2
        and "is taken out already" in capsys.readouterr().err
    )
    assert (
        edit(run, "exclude", 0) == 2
        and "0: there is no such cluster; clusters are 1, 2" in capsys.readouterr().err
    )
    assert edit(run, "exclude", 1, 2) == 2 and "no cluster would be left" in capsys.readouterr().err
    assert edit(run) == 0
    said = capsys.readouterr().out
    assert "image(s) taken out" in said and "history: cluster, exclude" in said
    assert [line.split()[:2] for line in said.splitlines()[1:3]] == [["1", "5"], ["2", "5"]]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("seed", range(4))
def test_an_id_never_means_something_else_and_all_can_be_taken_back(run: FolderRun, seed: int):
    """A cluster's images after any edits: of an id that is new, no earlier one; undone, the same
    bytes.
    """
    random = np.random.default_rng(seed)
    given = set(run.state().ids)  # ids that were ever seen
    tables = [(run.path / "clusters.csv").read_bytes()]
    for _ in range(14):
        before = run.state()
        ids = before.ids
        verb = random.choice(["merge", "split", "rename", "exclude", "undo", "split"])
        chosen = random.choice(ids, min(len(ids), 2), replace=False).tolist()
        words = {
            "merge": chosen,
            "rename": [chosen[0], f"name {random.integers(3)}"],
            "undo": [],
        }.get(verb, chosen[:1])
        code = edit(run, verb, *words)
        if code:
            assert (run.path / "clusters.csv").read_bytes() == tables[-1]
            continue
        after = run.state()
        if verb == "undo":
            tables.pop()
        else:
            tables.append((run.path / "clusters.csv").read_bytes())
            fresh = set(after.ids) - set(before.ids)
            assert not fresh & given and (verb == "split" or not fresh)
            given |= fresh
            for each in set(after.ids) & set(before.ids):
                was, now = before.cluster == each, after.cluster == each
                assert (now & ~was).sum() == 0 or (verb == "merge" and each == chosen[0])
        assert (run.path / "clusters.csv").read_bytes() == tables[-1] and up_to_date(
            FolderRun.open(run.path)
        )
    while len(tables) > 1:
        tables.pop()
        assert edit(run, "undo") == 0 and (run.path / "clusters.csv").read_bytes() == tables[-1]
    assert edit(run, "undo") == 2


@pytest.mark.usefixtures("quick")
def test_a_stop_before_the_files_are_written_is_seen(
    run: FolderRun, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(
            edits, "write_all", lambda run, state: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert edit(run, "merge", 0, 1) == 130
    assert set(clusters(run).values()) == {-1, 0, 1, 2}
    assert edit(run) == 0
    assert set(clusters(run).values()) == {-1, 0, 2}
    with monkeypatch.context() as patch:
        patch.setattr(
            edits, "write_all", lambda run, state: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert edit(run, "undo") == 130
    assert edit(run, "rename", 17, "x") == 2
    assert set(clusters(run).values()) == {-1, 0, 1, 2}


def test_words_that_do_not_fit_are_refused_with_what_would(
    run: FolderRun, capsys: pytest.CaptureFixture[str]
):
    state = run.state()
    run.history.push("rename", State(**{**state.__dict__, "names": {1: "grass"}}))
    run.facts[outputs.SHOWN] = run.history.digest()
    run.save()
    wrong = {
        ("merge", "0", "7"): "7: there is no such cluster; clusters are 0, 1 (grass), 2",
        ("merge", "0", "gras"): "gras: there is no such cluster; did you mean grass?",
        ("merge", "0"): "merge takes two clusters or more",
        ("merge", "0", "0"): "merge takes two clusters or more",
        ("merge", "noise", "0"): "noise is none: merge 0 noise",
        ("split", "0", "1"): "split takes one cluster",
        ("split", "noise"): "noise is no cluster, and cannot be split",
        (
            "split",
            "0",
            "-n",
            "50",
        ): "-n 50: cluster 0 has 4 images that are no near-duplicates; -n may be from 2 to 3",
        ("split", "0", "-n", "1"): "-n may be from 2 to 3",
        ("split", "0", "-n", "x"): "invalid int value: 'x'",
        ("rename", "0", "12"): "a name must be no number",
        ("rename", "0", "Noise"): "and not noise",
        ("rename", "0", "GRASS"): "cluster 1 has it. Choose another name, or merge 1 0",
        ("rename", "0"): "rename takes a cluster and its name",
        ("rename", "-1", "x"): "noise is no cluster",
        ("exclude",): "exclude takes clusters or paths",
        ("exclude", "blue/00.png"): "there is no such image in the clusters; did you mean blue/0",
        ("exclude", "no such"): "no such: there is no such cluster",
        ("undo", "3"): "undo takes nothing with it",
        ("merg", "0", "1"): "merg",
        ("rename", "0", "x", "-n", "3"): "only split has it",
    }
    for words, message in wrong.items():
        assert edit(run, *words) == 2, words
        assert message in capsys.readouterr().err, words
    assert run.history.verbs == ["cluster", "rename"]
    assert (
        main(["edit", str(run.root)]) == 2
        and "deepclust cluster IMAGES makes one" in capsys.readouterr().err
    )
    lock = take_lock(run.path, "")
    try:
        assert edit(run, "merge", 0, 1) == 2 and "in use by another run" in capsys.readouterr().err
    finally:
        release_lock(run.path, lock)
