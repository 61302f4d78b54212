"""`--noise`: what lies apart is noise for the clusters, for the model, for appended images, before
and after edits.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import LocalOutlierFactor

from deepclust import Clusterer
from deepclust.cli import main
from deepclust.collection import derived as parts
from deepclust.collection.derived import Derived
from deepclust.collection.landmarks import Landmarks
from deepclust.collection.run import FolderRun
from deepclust.errors import UserError
from tests.collection.toys import NETS, toy_photos

COMMAND = [
    "cluster",
    "photos",
    "-k",
    "3",
    "-o",
    "run",
    "--store",
    "store",
    "--backbone",
    "nets.py:colours",
]
COMMAND += ["--clusterers", "ward", "--noise"]


def odd(name: str, seed: int) -> None:
    """An image unlike the blue, green and red ones: light in one half, noise in the other."""
    random = np.random.default_rng(seed)
    pixels = np.full((10, 14, 3), 250, dtype=np.uint8)
    pixels[:5] = random.integers(0, 40, (5, 14, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(f"photos/{name}.png")


def usual(name: str, seed: int) -> None:
    """One more blue image."""
    pixels = np.random.default_rng(seed).integers(0, 100, (10, 14, 3), dtype=np.uint8)
    pixels[..., 2] += 150
    Image.fromarray(pixels).save(f"photos/{name}.png")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    toy_photos(tmp_path / "photos", 60)
    (tmp_path / "nets.py").write_text(NETS.format(labels=False))
    odd("odd0", 0)
    assert main(COMMAND) == 0
    return tmp_path


def table(path: str = "run/clusters.csv") -> dict[str, str]:
    """Clusters by the name of the file."""
    with open(path, newline="") as file:
        return {Path(line["path"]).name: line["cluster"] for line in csv.DictReader(file)}


def predicted() -> dict[str, str]:
    assert main(["predict", "run", "photos", "-o", "found.csv"]) == 0
    return table("found.csv")


def test_the_model_and_appended_images_follow_the_rule_of_the_clusters(folder: Path):
    before = table()
    assert before["odd0.png"] == "-1" and 0 < list(before.values()).count("-1") < 8
    run = FolderRun.open("run")
    state = run.state()
    model = Clusterer.load("run")
    assert np.array_equal(model.predict(run.features(state.rows)), state.cluster)
    assert model.predict_proba(run.features(state.rows)).shape == (len(state.rows), 3)
    found = predicted()
    assert {name: found[name] for name in before} == before
    odd("odd1", 1)
    usual("new", 2)
    found = predicted()
    assert found["odd1.png"] == "-1" and found["new.png"] != "-1"
    assert main([*COMMAND, "--append"]) == 0
    after = table()
    assert after == {name: found[name] for name in after} and len(after) == len(before) + 2


def test_without_noise_every_new_image_has_a_cluster(folder: Path):
    assert main([*COMMAND[:-1], "--new"]) == 0
    odd("odd1", 1)
    assert "-1" not in predicted().values() and "-1" not in table().values()
    assert not Clusterer.load("run").network.head.tells_noise
    assert main([*COMMAND[:-1], "--append"]) == 0 and "-1" not in table().values()


def test_edits_say_what_is_noise(folder: Path):
    odd("odd1", 1)
    assert main(["edit", "run", "merge", "0", "noise"]) == 0
    assert "-1" not in predicted().values(), (
        "what was noise is a cluster, and nothing is noise any more"
    )
    assert main(["edit", "run", "undo"]) == 0 and predicted()["odd1.png"] == "-1"
    run = FolderRun.open("run")
    state = run.state()
    kept = replace(
        state, cluster=np.where(state.rows == state.rows[state.cluster == -1][0], 1, state.cluster)
    )
    run.push("merge", kept)
    assert main(["edit", "run"]) == 0
    assert predicted()[Path(run.store.paths[state.rows[state.cluster == -1][0]]).name] == "1"


def test_outliers_are_those_of_scikit_learn_on_landmarks_and_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(parts, "NUM_LANDMARKS", 40)
    run = FolderRun.open("run")
    for file in Path("store/derived").iterdir():
        file.unlink()
    derived = Derived(run.store, run.facts["backbone"])
    x, own = derived.x.numpy().astype(np.float64), derived.landmarks
    model = LocalOutlierFactor(4, novelty=True).fit(x[own])
    factors = -model.negative_outlier_factor_
    low, high = np.percentile(factors, [25, 75])
    assert np.array_equal(derived.outlying[own], factors > high + 3 * (high - low))
    others = np.setdiff1d(np.flatnonzero(derived.copy_of < 0), own)
    assert len(others) > 10
    assert np.array_equal(
        derived.outlying[others], -model.score_samples(x[others]) > high + 3 * (high - low)
    )
    copies = np.flatnonzero(derived.copy_of >= 0)
    assert np.array_equal(derived.outlying[copies], derived.outlying[derived.copy_of[copies]])


def test_landmarks_of_an_earlier_version_learn_to_tell_noise(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    run = FolderRun.open("run")
    del run.facts["landmarks"]
    old = replace(Landmarks.load(run), noise=None)
    replace(old, x=old.x.astype(np.float16)).save(run.path / "landmarks.npz")
    run.facts.pop("shown")
    run.save()
    assert main(["edit", "run"]) == 0
    odd("odd1", 1)
    capsys.readouterr()
    assert predicted()["odd1.png"] != "-1"
    said = capsys.readouterr().out
    assert "noise is not told, every image gets a cluster" in said
    words = said.split("does not know how yet; deepclust ")[1].splitlines()[0].split()
    assert main(words) == 0
    assert table()["odd1.png"] == "-1" and predicted()["odd1.png"] == "-1"


def test_a_model_that_tells_more_than_this_version_knows_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    model = Clusterer.load("run")
    assert model.network.head.tells_noise
    with monkeypatch.context() as later:
        later.setattr("deepclust.model.NOISE_FORMAT", 3)
        model.save("later.safetensors")
    with pytest.raises(UserError, match="update deepclust"):
        Clusterer.load("later.safetensors")
