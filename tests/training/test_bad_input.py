"""Bad input through the command line: one clear message, exit code 2, no traceback, and nothing
lost.
"""

from __future__ import annotations

import csv
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from deepclust.cli import main
from deepclust.data.datasets import from_arrays
from tests.runs import pixels, small_run, words


@pytest.fixture
def said(capsys):
    """What was said on stderr since the last call, checked to be words and not a traceback or an
    exception's name.
    """

    def read():
        text = capsys.readouterr().err
        assert (
            text.strip()
            and "Traceback" not in text
            and not re.search(r"\w(Error|Exception):", text)
        ), text
        return text

    return read


@pytest.fixture
def photos(tmp_path):
    """A folder of 12 small images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(12):
        Image.fromarray(
            np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        ).save(folder / f"{number}.png")
    return folder


def command(tmp_path, *more, clusters=3):
    """A small run over `tmp_path/photos`."""
    found = [
        word for word in words(tmp_path / "run", *more) if not word.startswith("num_clusters=4")
    ]
    place = [f"num_clusters={clusters}"] if clusters is not None else []
    return [
        "train",
        *found,
        *place,
        "data=image_folder",
        f"data.root={tmp_path}/photos",
        "data.size=16",
    ]


# ------------------------------------------------------------------------------------------- se

BAD_SETTINGS = {
    "stages.pretext.optim.lr=abc": "stages.pretext.optim.lr=abc",
    "stages.scan.optim.lr=nan": "stages.scan.optim.lr=nan",
    "stages.selflabel.optim.lr=-1": "stages.selflabel.optim.lr=-1",
    "num_clusters=0": "num_clusters=0",
    "seed=-1": "seed=-1",
    "+stages.scan.optim.lrr=1": "stages.scan.optim.lr",
    "trainer.batchsize=3": "batch_size",
    "stages.scan.head.num_neighbours=3": "num_neighbors",
    "data.sise=3": "size",
    "eval.baselines=[kmean]": "kmeans",
    "run.name=../x": "run.name",
    "resume=nowhere": "resume",
}
MORE = {"num_clusters=-3": "num_clusters=-3", "heads=scan": "head", "run.name=/x": "run.name"}
MORE |= {f"run.name={'x' * 300}": "run.name", "trainer.device=cuda:99": "trainer.device"}


def test_all_bad_settings_are_named_at_once_before_anything_is_written(photos, tmp_path, said):
    assert main([*command(tmp_path, clusters=None), *BAD_SETTINGS]) == 2
    text = said()
    assert [word for word, told in BAD_SETTINGS.items() if told not in text] == []
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("word", [*BAD_SETTINGS, *MORE])
def test_a_bad_setting_alone(photos, tmp_path, said, word):
    clusters = None if word.startswith("num_clusters") else 3
    assert main([*command(tmp_path, clusters=clusters), word]) == 2
    assert {**BAD_SETTINGS, **MORE}[word] in said()
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------- im


def test_an_empty_folder_and_a_folder_that_is_not_there(tmp_path, said):
    (tmp_path / "photos").mkdir()
    assert main(command(tmp_path)) == 2
    assert "empty" in said()
    (tmp_path / "photos").rmdir()
    assert main(command(tmp_path)) == 2
    assert "no such folder" in said()
    (tmp_path / "photos").write_text("I am a file")
    assert main(command(tmp_path)) == 2
    assert "this is a file" in said()


def test_one_image_or_none_that_can_be_read(photos, tmp_path, said):
    for number in range(1, 12):
        (photos / f"{number}.png").unlink()
    assert main(command(tmp_path)) == 2
    assert "at least 2 images" in said()
    (photos / "0.png").write_bytes(b"no image")
    assert main(command(tmp_path)) == 2
    assert "0.png" in said()
    (photos / "0.png").rename(photos / "0.doc")
    assert main(command(tmp_path)) == 2
    assert ".doc" in said()


@pytest.mark.parametrize(
    ("clusters", "words_"),
    [(13, "num_clusters=13 is more than the 12 images"), (None, "num_clusters is needed")],
)
def test_more_clusters_than_images_and_no_number_of_clusters(
    photos, tmp_path, said, clusters, words_
):
    assert main(command(tmp_path, clusters=clusters)) == 2
    assert words_ in said()
    assert not (tmp_path / "run").exists()


def test_broken_files_among_good_ones_are_named_and_left_out(photos, tmp_path, capsys):
    (photos / "3.png").write_bytes((photos / "3.png").read_bytes()[:40])
    (photos / "5.png").write_bytes(b"")
    (photos / "dangling.png").symlink_to(photos / "gone")
    (photos / "notes.txt").write_text("no image")
    (photos / ".hidden.png").write_bytes(b"no image")
    assert main(command(tmp_path, "logger.console=true")) == 0
    shown = "".join(capsys.readouterr().out.split())
    with open(tmp_path / "run" / "clusters.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    bad = {row["path"] for row in rows if row["split"] == "unreadable"}
    assert bad == {"3.png", "5.png", "dangling.png"} and all(name in shown for name in bad)
    assert len(rows) == 13 and sorted(int(row["index"]) for row in rows) == list(range(13))
    assert all((row["cluster"] == "") == (row["path"] in bad) for row in rows)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped"] == 3


def test_an_image_that_goes_bad_during_the_run_is_left_out(photos, tmp_path, monkeypatch):
    """Decoded anew each time; after the start-up scan one file is broken."""
    from deepclust.data.image_set import ImageSet

    original = ImageSet.read

    def read(self, row):
        if self.paths[row] == "4.png":
            (photos / "4.png").write_bytes(b"gone bad")
        return original(self, row)

    monkeypatch.setattr(ImageSet, "read", read)
    assert (
        main(
            [
                *command(tmp_path, "eval.gallery_images=1", "trainer.batch_size=6"),
                "data.memory_mb=0",
            ]
        )
        == 0
    )
    with open(tmp_path / "run" / "clusters.csv", newline="") as file:
        rows = {row["path"]: row["cluster"] for row in csv.DictReader(file)}
    assert [path for path, cluster in rows.items() if cluster == ""] == ["4.png"]
    assert "4.png could not be read" in (tmp_path / "run" / "log.txt").read_text()


# ------------------------------------------------------------------------------------------- od


def test_one_image_more_than_batches_hold(tmp_path):
    assert small_run(tmp_path / "run", data=from_arrays(pixels(21))) == 0


@pytest.mark.parametrize("clusters", [1, 12])
def test_one_cluster_and_one_for_each_image(photos, tmp_path, clusters):
    assert (
        main(command(tmp_path, "eval.baselines=[kmeans,gmm,spectral,tsne_gmm]", clusters=clusters))
        == 0
    )
    model = tmp_path / "run" / "model.safetensors"
    assert b"NaN" not in model.read_bytes()[:4096]
    with open(tmp_path / "run" / "clusters.csv", newline="") as file:
        assert all(0 <= int(row["cluster"]) < clusters for row in csv.DictReader(file))


def test_two_images(tmp_path):
    assert small_run(tmp_path / "run", "num_clusters=2", data=from_arrays(pixels(2))) == 0


@pytest.mark.parametrize("kind", ["constant", "duplicates"])
def test_images_that_are_all_alike_raise_the_alarm_and_no_nan(tmp_path, kind):
    images = (
        np.full((30, 1, 8, 8), 128, np.uint8)
        if kind == "constant"
        else np.repeat(pixels(1), 30, axis=0)
    )
    assert small_run(tmp_path / "run", "eval.baselines=all", data=from_arrays(images)) == 0
    assert "Collapse alarm" in (tmp_path / "run" / "log.txt").read_text()
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert all(value is not None for value in json.loads(line).values()), line
    with open(tmp_path / "run" / "clusters.csv", newline="") as file:
        assert all(0 <= float(row["confidence"]) <= 1 for row in csv.DictReader(file))


def test_a_batch_of_one_is_refused_in_words(photos, tmp_path, said):
    assert main([*command(tmp_path), "trainer.batch_size=1"]) == 2
    assert "at least two images" in said()


def test_a_loss_that_explodes_says_what_to_try(photos, tmp_path, said):
    assert (
        main(
            [
                *command(tmp_path),
                "stages.pretext.optim.lr=1e30",
                "stages.pretext.optim.warmup_steps=0",
            ]
        )
        == 2
    )
    assert "optim.lr" in said()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


# ------------------------------------------------------------------------------------------- pl


def test_no_place_to_write(photos, tmp_path, said):
    """Also for root, who may write everywhere else."""
    (tmp_path / "file").write_text("in the way")
    for place in ("/proc/deepclust", f"{tmp_path}/file", f"{tmp_path}/file/run"):
        assert main([*command(tmp_path), f"run.dir={place}"]) == 2
        assert place.split("/run")[0] in said()


def test_a_folder_of_somebody_else_is_left_alone(photos, tmp_path, said):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "clusters.csv").write_text("mine")
    for more in ([], ["run.new=true"]):
        assert main([*command(tmp_path), *more]) == 2
        assert "clusters.csv, which no run wrote" in said()
    assert (tmp_path / "run" / "clusters.csv").read_text() == "mine"


def test_links_do_not_lead_out_of_the_run_folder(photos, tmp_path, said):
    (tmp_path / "other").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".deepclust.lock").write_text("")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "other")
    assert main(command(tmp_path)) == 2
    assert "leads outside" in said()
    assert not list((tmp_path / "other").iterdir())


# ------------------------------------------------------------------------------------------- mo


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert small_run(folder) == 0
    return folder


def test_predict_says_what_it_could_not_read(finished, photos, tmp_path, capsys):
    (photos / "3.png").write_bytes(b"no image")
    assert main(["predict", str(finished), str(photos), "-o", str(tmp_path / "out.csv")]) == 0
    assert "11 images clustered, 1 could not be read" in capsys.readouterr().out
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [os.path.basename(row["path"]) for row in rows if row["cluster"] == ""] == ["3.png"]
    assert "not an image" in next(row["error"] for row in rows if row["cluster"] == "")


def test_checkpoint_commands_name_the_checkpoint_that_may_have_been_meant(finished, said):
    for path in (finished, finished / "checkpoints"):
        assert main(["checkpoint", "verify", str(path)]) == 2
        assert "its newest one is" in said()
    assert main(["checkpoint", "digest", str(finished / "model.safetensors")]) == 2
    assert "is not a checkpoint" in said()


def damaged(path, kind):
    content = bytearray(path.read_bytes())
    if kind == "bit":
        content[-100] ^= 1
    elif kind == "header":
        content[20] ^= 1
    elif kind == "length":
        content[3] ^= 255
    elif kind == "truncated":
        content = content[:-10]
    return {"empty": b"", "text": b"not a model at all", "zeros": bytes(500)}.get(
        kind, bytes(content)
    )


@pytest.mark.parametrize("kind", ["bit", "header", "length", "truncated", "empty", "text", "zeros"])
def test_a_broken_model_is_never_loaded(finished, photos, tmp_path, said, kind):
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(damaged(finished / "model.safetensors", kind))
    assert main(["predict", str(broken), str(photos), "-o", str(tmp_path / "out.csv")]) == 2
    assert str(broken) in said()
    assert not (tmp_path / "out.csv").exists()


def test_somebody_elses_weights_are_no_model(photos, tmp_path, said):
    import torch
    from safetensors.torch import save_file

    for metadata in (
        None,
        {"deepclust": "[]"},
        {"deepclust": "{}"},
        {"deepclust": '{"format": 99}'},
    ):
        save_file({"weight": torch.zeros(3)}, tmp_path / "x.safetensors", metadata)
        assert (
            main(
                [
                    "predict",
                    str(tmp_path / "x.safetensors"),
                    str(photos),
                    "-o",
                    str(tmp_path / "out.csv"),
                ]
            )
            == 2
        )
        assert "x.safetensors" in said()


def test_predict_names_places_that_are_not_there(finished, photos, tmp_path, said):
    out = str(tmp_path / "out.csv")
    for run, images, to in (
        (tmp_path / "nowhere", photos, out),
        (finished, tmp_path / "nowhere", out),
        (photos, photos, out),
        (finished, photos, "/proc/out.csv"),
        (finished, photos, f"{tmp_path}/nowhere/out.csv"),
        (finished, photos, str(tmp_path)),
    ):
        assert main(["predict", str(run), str(images), "-o", to]) == 2
        said()
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(finished), str(tmp_path / "empty"), "-o", out]) == 2
    assert "empty" in said()
