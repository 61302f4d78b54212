"""Array files that are damaged in every way: one kind of error, ours made again, a user's named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from deepclust.cli import main
from deepclust.collection.run import FolderRun
from deepclust.data.features import load_columns
from deepclust.errors import UserError
from deepclust.runtime.npz import Column, Unreadable, read_arrays, read_columns
from tests.collection.toys import NETS, toy_photos

FLIPS = 20


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("not an array file\n" * 20)


def flipped(place: int) -> Callable[[Path], None]:
    """One bit, at one of 20 places spread over the file."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) * place // FLIPS + 7] ^= 1 << place % 8
        path.write_bytes(bytes(content))

    return damage


def rewritten(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    """A whole file, with other arrays in it."""

    def damage(path: Path) -> None:
        with np.load(path) as content:
            arrays = {name: content[name] for name in content.files}
        change(arrays)
        np.savez(path, **arrays)

    return damage


def _largest(arrays: dict[str, np.ndarray]) -> str:
    return max(arrays, key=lambda name: (arrays[name].ndim, arrays[name].size))


def _lose(arrays: dict[str, np.ndarray]) -> None:
    del arrays[_largest(arrays)]


def _reshape(arrays: dict[str, np.ndarray]) -> None:
    name = _largest(arrays)
    arrays[name] = arrays[name][..., :-1]


def _cut(arrays: dict[str, np.ndarray]) -> None:
    for name, values in arrays.items():
        arrays[name] = values[:-1] if values.ndim else values


def _pickle(arrays: dict[str, np.ndarray]) -> None:
    arrays[_largest(arrays)] = np.array([{"a": 1}, None], dtype=object)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncated,
    "shortened": shortened,
    "empty": empty,
    "text": text,
    "missing key": rewritten(_lose),
    "wrong shape": rewritten(_reshape),
    "fewer rows": rewritten(_cut),
    "pickled": rewritten(_pickle),
    **{f"flip {place}": flipped(place) for place in range(FLIPS)},
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_whatever_is_wrong_is_one_kind_of_error(tmp_path, save):
    path = tmp_path / "a.npz"
    wanted = {"x": Column("f", ("n", 4)), "rows": Column("i", ("n",))}
    arrays = {"x": np.random.default_rng(0).normal(size=(50, 4)), "rows": np.arange(50)}
    for name, damage in DAMAGES.items():
        save(path, **arrays)
        assert set(read_columns(path, wanted)) == {"x", "rows"}
        damage(path)
        if name == "fewer rows":
            assert len(read_columns(path, wanted)["x"]) == 49
            continue
        try:
            found = read_columns(path, wanted)
        except Unreadable as error:
            assert str(error)
        else:  # a bit that says nothing, such as one of a time
            assert name.startswith("flip") and all(
                np.array_equal(found[key], arrays[key]) for key in arrays
            )
    with pytest.raises(Unreadable, match="is not there"):
        read_columns(tmp_path / "gone.npz", wanted)
    with pytest.raises(Unreadable):
        read_columns(tmp_path, wanted)


def test_columns_must_be_what_they_are_said_to_be(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros((3, 2)), rows=np.arange(4))
    assert len(read_columns(path, {"x": Column("f", ("n", 2))})) == 1
    for wanted, words in (
        ({"y": Column("f", ())}, "lacks y"),
        ({"x": Column("i", ("n", 2))}, r"holds x of shape \(3, 2\) and type float64"),
        ({"x": Column("f", ("n", 3))}, "does not fit"),
        ({"x": Column("f", ("n",))}, "does not fit"),
        ({"x": Column("f", ("n", 2)), "rows": Column("i", ("n",))}, r"holds rows of shape \(4,\)"),
    ):
        with pytest.raises(Unreadable, match=words):
            read_columns(path, wanted)
    np.save(tmp_path / "a.npy", np.arange(3))
    assert read_arrays(tmp_path / "a.npy", lambda names: names)[""].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["npz", "npy", "safetensors"])
def test_a_users_file_of_features_is_refused_in_words(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    rows = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    for name, damage in DAMAGES.items():
        if kind == "npz":
            np.savez_compressed(
                path, features=rows, labels=np.arange(30), paths=[f"{row}.jpg" for row in range(30)]
            )
        elif kind == "npy":
            np.save(path, rows)
        else:
            save_file({"features": rows, "labels": np.arange(30)}, path)
        if kind != "npz" and name in ("missing key", "wrong shape", "fewer rows", "pickled"):
            if name != "pickled" or kind != "npy":
                continue
            np.save(path, np.array([None, 1], dtype=object), allow_pickle=True)
        else:
            damage(path)
        try:
            load_columns(str(path), "data.file")
            assert name.startswith(("flip", "wrong", "fewer")) or (
                name == "missing key" and kind == "npz"
            )
        except UserError as error:
            assert f"data.file={path}: " in str(error)


# --- files of a run of `deepclust cluster` ----------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of 3 clusters, of which two were merged."""
    folder = tmp_path_factory.mktemp("npz")
    toy_photos(folder / "photos", 30)
    (folder / "nets.py").write_text(NETS.format(labels=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(command("--noise")) == 0
        assert main(["edit", "run", "merge", "0", "1"]) == 0
    for name in ("run", "store"):
        shutil.copytree(folder / name, folder / "whole" / name)
    return folder


def command(*more: str) -> list[str]:
    words = ["cluster", "photos", "-k", "3", "-o", "run", "--store", "store"]
    return [*words, "--backbone", "nets.py:colours", "--clusterers", "ward", *more]


@pytest.fixture
def folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, whole again."""
    for name in ("run", "store"):
        shutil.rmtree(made / name)
        shutil.copytree(made / "whole" / name, made / name)
    monkeypatch.chdir(made)
    return made


def outcome() -> list[bytes]:
    return [(Path("run") / name).read_bytes() for name in ("clusters.csv", "model.safetensors")]


@pytest.mark.parametrize(
    "part", ["projected", "neighbors", "duplicates", "nearest", "map", "outliers"]
)
def test_damaged_parts_beside_the_store_are_made_again(folder, part):
    from deepclust.collection.derived import Derived
    from deepclust.data.store import FeatureStore

    store = FeatureStore.open("store")
    (path,) = Path("store/derived").glob(f"{part}-*.npz")
    whole = path.read_bytes()
    names = {"projected": "_projected", "duplicates": "copy_of", "outliers": "outlying"}
    get = {
        "projected": lambda found: found.x.numpy(),
        "neighbors": lambda found: found.neighbors[1],
    }
    get["nearest"] = lambda found: found.nearest[1].numpy()
    first = get.get(part, lambda found: getattr(found, names.get(part, part)))
    expected = first(Derived(store, store.backbone().name))
    for damage in DAMAGES.values():
        path.write_bytes(whole)
        damage(path)
        assert np.array_equal(first(Derived(store, store.backbone().name)), expected)
        assert np.array_equal(first(Derived(store, store.backbone().name)), expected)
    truncated(path)
    assert (
        main(command("--noise", "--append")) == 0
        and main(["edit", "run", "rename", "2", "third"]) == 0
    )


@pytest.mark.parametrize("damage", ["truncated", "wrong shape", "flip 3"])
def test_damaged_landmarks_are_named_and_made_again_by_the_command_that_is_named(
    folder, capsys, damage
):
    path = Path("run/landmarks.npz")
    before = Path("run/clusters.csv").read_bytes()
    DAMAGES[damage](path)
    assert main(["edit", "run", "rename", "2", "third"]) == 2
    error = capsys.readouterr().err
    assert "landmarks.npz" in error and "makes it anew" in error
    assert FolderRun.open("run").history.verbs == ["cluster", "merge"], (
        "nothing is begun that cannot be finished"
    )
    words = error.split("; deepclust ")[1].split(" makes it anew")[0].split()
    assert main(words) == 0
    assert "That is done now" in capsys.readouterr().out
    assert Path("run/clusters.csv").read_bytes() == before
    assert main(["edit", "run", "rename", "2", "third"]) == 0
    assert main(["edit", "run", "undo"]) == 0 and main(["edit", "run", "undo"]) == 0
    assert main(["predict", "run", "photos", "-o", "again.csv"]) == 0


def test_landmarks_and_steps_that_are_damaged_in_any_way_are_named_with_the_way_out(folder):
    from deepclust.collection.landmarks import Landmarks

    run = FolderRun.open("run")
    path, step = Path("run/landmarks.npz"), Path("run/history/0001-merge.npz")
    whole, state = path.read_bytes(), step.read_bytes()
    for name, damage in DAMAGES.items():
        path.write_bytes(whole)
        damage(path)
        with pytest.raises(
            UserError, match=r"landmarks.npz .*; deepclust cluster .* makes it anew"
        ):
            Landmarks.load(run)
        step.write_bytes(state)
        damage(step)
        try:
            run.state()
            assert name.startswith("flip") or name == "fewer rows"
        except UserError as error:
            assert "0001-merge.npz" in str(error) and "deepclust edit run undo goes back" in str(
                error
            )


@pytest.mark.parametrize("more", [[], ["--append"], ["--new"]])
def test_damaged_landmarks_stop_no_cluster_command(folder, more):
    before = outcome()
    for damage in ("flip 5", "pickled"):
        DAMAGES[damage](Path("run/landmarks.npz"))
        assert main(command("--noise", *more)) == 0
        if not more:
            assert outcome()[0] == before[0]


@pytest.mark.parametrize("damage", ["empty", "missing key", "flip 3"])
def test_a_damaged_last_step_is_named_and_undo_goes_back(folder, capsys, damage):
    path = Path("run/history/0001-merge.npz")
    DAMAGES[damage](path)
    assert main(["edit", "run"]) == 2
    error = capsys.readouterr().err
    assert "0001-merge.npz" in error and "deepclust edit run undo" in error and "--new" in error
    assert (
        main(["edit", "run", "merge", "0", "2"]) == 2
        and "0001-merge.npz" in capsys.readouterr().err
    )
    for more in ([], ["--append"]):
        assert main(command("--noise", *more)) == 2 and "0001-merge.npz" in capsys.readouterr().err
    assert main(["edit", "run", "undo"]) == 0
    assert main(["edit", "run"]) == 0 and "history: cluster\n" in capsys.readouterr().out
    assert main(command("--noise")) == 0 and main(["edit", "run", "merge", "0", "2"]) == 0


@pytest.mark.parametrize("damage", ["truncated", "pickled"])
def test_damaged_steps_before_the_last_and_starting_over(folder, capsys, damage):
    DAMAGES[damage](Path("run/history/0000-cluster.npz"))
    assert main(["edit", "run"]) == 0 and main(command("--noise")) == 0
    capsys.readouterr()
    assert main(["edit", "run", "undo"]) == 2
    error = capsys.readouterr().err
    assert "0000-cluster.npz" in error and "cannot be gone back to" in error and "--new" in error
    DAMAGES[damage](Path("run/history/0001-merge.npz"))
    assert main(command("--noise", "--new")) == 0
    assert (
        FolderRun.open("run").history.verbs == ["cluster"]
        and main(["edit", "run", "merge", "0", "1"]) == 0
    )


@pytest.mark.parametrize("file", ["history/0000-cluster.npz", "run.json"])
def test_a_run_without_edits_is_made_anew_where_it_is_damaged(folder, capsys, file):
    assert main(["edit", "run", "undo"]) == 0
    before = outcome()
    truncated(Path("run") / file)
    if file == "run.json":
        assert main(["edit", "run"]) == 0, "the step of the history has the facts too"
    else:
        capsys.readouterr()
        assert main(["edit", "run"]) == 2
        error = capsys.readouterr().err
        assert "0000-cluster.npz" in error and "undo" not in error and "--new" in error
    assert main(command("--noise")) == 0
    assert outcome() == before
