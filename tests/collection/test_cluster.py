"""`deepclust cluster` from end to end on small folders: what it leaves, asks, refuses, and keeps
stable.
"""

from __future__ import annotations

import csv
import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from deepclust import Clusterer
from deepclust.cli import main
from deepclust.collection.append import inherit
from deepclust.collection.derived import Derived
from deepclust.collection.history import State
from deepclust.collection.run import FolderRun
from deepclust.data.store import FeatureStore
from tests.collection.toys import NETS, toy_photos


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command on 60 blue, green and red images, two copies and a broken one."""
    monkeypatch.chdir(tmp_path)
    toy_photos(tmp_path / "photos", 60)
    (tmp_path / "nets.py").write_text(NETS.format(labels=False))
    return [
        "cluster",
        "photos",
        "--backbone",
        "nets.py:colours",
        "--clusterers",
        "spectral,spherical_kmeans,ward",
    ]


def table(run: str) -> list[dict[str, str]]:
    with open(Path(run) / "clusters.csv", newline="") as file:
        return list(csv.DictReader(file))


def colours(run: str) -> dict[str, set[str]]:
    """Clusters by colour, the name of the sub-folder."""
    found: dict[str, set[str]] = {}
    for line in table(run):
        found.setdefault(Path(line["path"]).parent.name, set()).add(line["cluster"])
    return found


def test_one_command_leaves_everything(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([*words[:-2], "-k", "3", "--sort", "symlink"]) == 0
    said = capsys.readouterr().out
    run = "outputs/clusters-photos-k3"
    assert "3 clusters, by diffusion, spectral, spherical_kmeans" in said
    assert "red/broken.png: not an image" in said
    assert {each: len(clusters) for each, clusters in colours(run).items()} == {
        "blue": 1,
        "green": 1,
        "red": 1,
    }
    assert sum(len(each) for each in colours(run).values()) == len(
        set.union(*colours(run).values())
    )
    lines = table(run)
    assert len(lines) == 62 and all(0 < float(line["confidence"]) <= 1 for line in lines)
    assert [Path(line["path"]).name for line in lines if line["duplicate_of"]] == [
        "copy0.png",
        "copy1.png",
    ]
    assert parquet.read_table(f"{run}/clusters.parquet").column("cluster").to_pylist() == [
        int(line["cluster"]) for line in lines
    ]
    assert (
        "broken.png" in Path(run, "left_out.csv").read_text()
        and "<canvas" in Path(run, "report.html").read_text()
    )
    assert len([path for path in Path(run, "sorted").rglob("*.png") if path.is_symlink()]) == 62
    opened = FolderRun.open(run)
    state = opened.state()
    predicted = Clusterer.load(run).predict(opened.features(state.rows))
    assert np.array_equal(predicted, state.cluster)


def test_the_number_of_clusters_is_found_and_its_curves_are_in_the_report(words: list[str], capsys):
    assert main(words) == 0
    run = FolderRun.open("outputs/clusters-photos-kauto")
    number = run.facts["number"]
    assert (
        number["k"] == 3
        and len(run.state().ids) == 3
        and number["statement"] in capsys.readouterr().out
    )
    page = (run.path / "report.html").read_text()
    assert "Number of clusters" in page and all(
        name in number["curves"] for name in number["votes"]
    )


def test_another_k_reuses_features_and_what_was_made_of_them(
    words: list[str], monkeypatch: pytest.MonkeyPatch
):
    assert main([*words, "-k", "3"]) == 0
    made = {
        path: path.stat().st_mtime_ns for path in Path("outputs/features-photos/derived").iterdir()
    }
    assert main([*words, "-k", "4"]) == 0
    assert {
        path: path.stat().st_mtime_ns for path in Path("outputs/features-photos/derived").iterdir()
    } == made
    assert len({line["cluster"] for line in table("outputs/clusters-photos-k4")}) == 4
    assert len({line["cluster"] for line in table("outputs/clusters-photos-k3")}) == 3


def test_features_that_are_there_need_no_network(words: list[str], monkeypatch: pytest.MonkeyPatch):
    assert main([*words, "-k", "3"]) == 0

    def refuse(*_: object) -> None:
        raise AssertionError("the network was built")

    with monkeypatch.context() as patch:
        patch.setattr("deepclust.features.encoder.find_encoder", refuse)
        assert main([*words, "-k", "4"]) == 0
        Image.new("RGB", (14, 10), "white").save("photos/new.png")
        assert main([*words, "-k", "4"]) == 1
    Path("nets.py").write_text(NETS.format(labels=True))
    with monkeypatch.context() as patch:
        patch.setattr("deepclust.features.encoder.find_encoder", refuse)
        assert main([*words, "-k", "4"]) == 1
    assert main([*words, "-k", "4"]) == 0 and len(table("outputs/clusters-photos-k4")) == 63


def test_the_same_command_gives_the_same_bytes(
    words: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main([*words, "-k", "3"]) == 0
    run = Path("outputs/clusters-photos-k3")
    before = {
        path.name: path.read_bytes()
        for path in run.iterdir()
        if path.suffix in (".csv", ".parquet")
    }
    assert main([*words, "-k", "3"]) == 0 and "nothing changed since" in capsys.readouterr().out
    assert {name: (run / name).read_bytes() for name in before} == before
    shutil.rmtree("outputs")
    assert main([*words, "-k", "3"]) == 0
    assert {name: (run / name).read_bytes() for name in before} == before


def test_new_images_join_the_clusters_that_are_there(words: list[str]):
    assert main([*words, "-k", "3"]) == 0
    run = "outputs/clusters-photos-k3"
    before = {line["path"]: line["cluster"] for line in table(run)}
    random = np.random.default_rng(5)
    for number in range(4):
        pixels = random.integers(0, 100, (10, 14, 3), dtype=np.uint8)
        pixels[..., 2] += 150
        Image.fromarray(pixels).save(f"photos/blue/new{number}.png")
    shutil.copy("photos/red/002.png", "photos/red/another.png")
    Path("photos/green/001.png").unlink()
    assert main([*words, "-k", "3", "--append"]) == 0
    after = {line["path"]: line["cluster"] for line in table(run)}
    gone = set(before) - set(after)
    assert {Path(path).name for path in gone} == {"001.png"} and len(set(after) - set(before)) == 5
    assert all(after[path] == cluster for path, cluster in before.items() if path not in gone)
    assert {each: len(clusters) for each, clusters in colours(run).items()} == {
        "blue": 1,
        "green": 1,
        "red": 1,
    }
    assert FolderRun.open(run).history.verbs == ["cluster", "append"]


def test_clusters_that_are_found_again_keep_their_ids(words: list[str]):
    assert main([*words, "-k", "3"]) == 0
    run = "outputs/clusters-photos-k3"
    before = colours(run)
    for path in sorted(Path("photos/red").glob("0*.png"))[:12]:  # red is no longer the largest
        path.unlink()
    assert main([*words, "-k", "3"]) == 0
    assert colours(run) == before


def test_an_edited_run_is_not_overwritten(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([*words, "-k", "3"]) == 0
    run = FolderRun.open("outputs/clusters-photos-k3")
    run.history.push("rename", run.state())
    Path("photos/blue/000.png").unlink()
    assert main([*words, "-k", "3"]) == 2
    assert "--append keeps" in capsys.readouterr().err
    assert main([*words, "-k", "3", "--append"]) == 0
    assert main([*words, "-k", "3", "--new"]) == 0
    assert FolderRun.open("outputs/clusters-photos-k3").history.verbs == ["cluster"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-k", "1"], "neither auto nor a whole number from 2 on"),
        (["-k", "63"], "holds 63 image(s); choose from 2 to 62"),
        (["-k", "61"], "2 of them near-duplicates of others; choose from 2 to 59"),
        (["--clusterers", "spectrall"], "did you mean spectral?"),
        (["--append"], "there are no clusters in outputs/clusters-photos-kauto yet"),
        (["--append", "--new"], "choose one"),
        (["--backbone", "resnet18"], "--backbone is given 2 times"),
        (["--out", "photos"], "holds other files"),
        (["--sort", "move"], "invalid choice"),
        (["--appendd"], "did you mean --append?"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    words: list[str], more: list[str], message: str, capsys
):
    assert main([*words, *more]) == 2
    assert message in capsys.readouterr().err


def test_an_empty_folder_and_one_without_readable_images(tmp_path: Path, words: list[str], capsys):
    (tmp_path / "empty").mkdir()
    assert main(["cluster", "empty", *words[2:]]) == 2 and "empty" in capsys.readouterr().err
    for number in range(4):
        (tmp_path / "empty" / f"{number}.png").write_bytes(b"no image")
    assert main(["cluster", "empty", *words[2:]]) == 2
    assert "none of the images can be read" in capsys.readouterr().err


def test_noise_is_what_lies_apart(words: list[str]):
    random = np.random.default_rng(3)
    white = np.full((10, 14, 3), 255, dtype=np.uint8)
    white[:5] = random.integers(0, 255, (5, 14, 3), dtype=np.uint8)
    Image.fromarray(white).save("photos/odd.png")
    assert main([*words, "-k", "3", "--noise"]) == 0
    lines = table("outputs/clusters-photos-k3")
    noise = [Path(line["path"]).name for line in lines if line["cluster"] == "-1"]
    assert "odd.png" in noise and len(noise) < 10
    store = FeatureStore.open("outputs/features-photos")
    derived = Derived(store, store.backbone().name)
    assert derived.outlying.sum() <= len(noise)


def test_a_stop_keeps_what_was_made(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("deepclust.collection.cluster.find_clusters", stop)
        assert main([*words, "-k", "3"]) == 143
    assert "the same command goes on from there" in capsys.readouterr().out
    assert main([*words, "-k", "3"]) == 0
    facts = json.loads(Path("outputs/clusters-photos-k3/run.json").read_text())
    assert facts["clusterer"] in facts["choice"] and set(facts["choice"]) == {
        "spectral",
        "spherical_kmeans",
        "ward",
    }


def test_inherited_ids_never_change_their_meaning():
    def state(cluster: list[int], rows: list[int] | None = None, **more: object) -> State:
        n = len(cluster)
        zeros = np.zeros(n)
        return State(
            np.array(rows or list(range(n))),
            np.array(cluster),
            zeros.astype(np.float32),
            np.zeros((n, 2), dtype=np.float32),
            np.full(n, -1),
            zeros.astype(bool),
            **more,  # pyright: ignore[reportArgumentType]
        )

    old = state([5, 5, 5, 2, 2, 2, 7, 7], names={5: "cats", 7: "dogs"}, next_id=9)
    new = inherit(old, state([0, 0, 0, 1, 1, 1, 2, 2], next_id=3))
    assert (
        new.cluster.tolist() == [5, 5, 5, 2, 2, 2, 7, 7]
        and new.names == old.names
        and new.next_id == 9
    )
    other = inherit(old, state([0, 0, 0, 0, 0, 0, 1, 2], next_id=3))
    assert set(other.cluster.tolist()) & {0, 1, 3, 4, 6, 8} == set() and other.next_id >= 9
    fresh = inherit(old, state([0, 1, 0, 1], rows=[20, 21, 22, 23], next_id=2))
    assert fresh.cluster.tolist() == [9, 10, 9, 10] and fresh.names == {} and fresh.next_id == 11


def test_sorted_stays_with_append_and_goes_only_where_it_is_said(
    words: list[str], capsys: pytest.CaptureFixture[str]
):
    run = Path("outputs/clusters-photos-k3")
    assert main([*words, "-k", "3"]) == 0
    Image.new("RGB", (14, 10), "blue").save("photos/blue/new.png")
    assert main([*words, "-k", "3", "--append", "--sort", "copy"]) == 0
    assert len(list((run / "sorted").rglob("*.png"))) == 63
    assert main([*words, "-k", "3", "--append", "--seed", "1"]) == 0
    assert len(list((run / "sorted").rglob("*.png"))) == 63
    assert FolderRun.open(run).history.verbs == ["cluster", "append"]  # nothing is new
    capsys.readouterr()
    assert main([*words, "-k", "3"]) == 0
    assert (
        "sorted/, which --sort left, is cleared" in capsys.readouterr().out
        and not (run / "sorted").exists()
    )


def test_images_whose_append_was_taken_back_can_be_appended_again(words: list[str]):
    run = "outputs/clusters-photos-k3"
    assert main([*words, "-k", "3"]) == 0
    first = table(run)
    shutil.copy("photos/red/002.png", "photos/blue/000.png")  # changed
    Image.new("RGB", (14, 10), "blue").save("photos/blue/new.png")
    assert main([*words, "-k", "3", "--append"]) == 0
    appended = table(run)
    assert main(["edit", run, "undo"]) == 0
    assert len(table(run)) == len(first)
    assert main([*words, "-k", "3", "--append"]) == 0
    assert len(appended) == len(first) + 1 and table(run) == appended


def test_seconds_are_those_of_the_command_and_do_not_pile_up(words: list[str]):
    facts = []
    for _ in range(3):
        assert main([*words, "-k", "3"]) == 0
        facts.append(json.loads(Path("outputs/clusters-photos-k3/run.json").read_text())["seconds"])
    assert all(each["features"] == facts[0]["features"] for each in facts)
    assert facts[2]["files"] < facts[1]["files"] + facts[0]["files"]


def test_places_that_cannot_be_written_are_named_with_the_option(
    words: list[str], monkeypatch, capsys
):
    Path("file").write_text("")
    for place in ("file", "file/below"):
        assert main([*words, "-k", "3", "--out", place]) == 2
        error = capsys.readouterr().err
        assert (
            f"{place} cannot be written: a file is in the way. Choose another place with --out DIR"
            in error
        )

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr("deepclust.training.run_folder.os.replace", full)
        assert main([*words, "-k", "3"]) == 2
    assert "the disk is full" in (error := capsys.readouterr().err) and "--out DIR" in error
    assert main([*words, "-k", "3", "-o", "my run"]) == 0
    assert "next: deepclust edit 'my run'" in capsys.readouterr().out
    shutil.copytree("photos", "others/photos")
    assert (
        main(
            ["cluster", "others/photos", *words[2:], "-k", "3", "--store", "store", "-o", "my run"]
        )
        == 2
    )
    assert "holds clusters of" in capsys.readouterr().err and not Path("store").exists()


def test_too_few_images_are_told_what_would_do(
    words: list[str], capsys: pytest.CaptureFixture[str]
):
    for count in range(1, 4):
        for copy in range(4):
            Path(f"few{count}").mkdir(exist_ok=True)
            if copy < count:
                shutil.copy("photos/red/002.png", f"few{count}/{copy}.png")
    assert main(["cluster", "few2", *words[2:]]) == 2
    assert "few2 holds 2 image(s); clustering needs three different ones" in capsys.readouterr().err
    assert main(["cluster", "few3", *words[2:]]) == 2
    assert (
        "3 image(s) can be read, 2 of them near-duplicates of others; clustering needs three"
        in capsys.readouterr().err
    )
    assert main([*words, "-k", "60"]) == 2
    assert "; choose from 2 to " in capsys.readouterr().err


def test_a_folder_that_moved_keeps_its_clusters(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = Path("outputs/clusters-photos-k3")
    assert main([*words, "-k", "3"]) == 0 and main(["edit", str(run), "rename", "0", "first"]) == 0
    before = [(Path(line["path"]).name, line["cluster"], line["name"]) for line in table(str(run))]
    Path("elsewhere").mkdir()
    for name in ("photos", "outputs", "nets.py"):
        Path(name).rename(Path("elsewhere") / name)
    monkeypatch.chdir(tmp_path / "elsewhere")
    for more in ([], ["--append"]):
        assert main([*words, "-k", "3", *more]) == 0
        after = table(str(run))
        assert [
            (Path(line["path"]).name, line["cluster"], line["name"]) for line in after
        ] == before
        assert all(Path(line["path"]).is_file() for line in after)
    Path("photos").rename("pictures")
    assert (
        main(
            [
                "cluster",
                "pictures",
                *words[2:],
                "--store",
                "outputs/features-photos",
                "-o",
                str(run),
                "--append",
            ]
        )
        == 0
    )
    assert all(Path(line["path"]).is_file() for line in table(str(run)))
