"""A whole run: what it leaves behind, when it goes on, when it refuses, and that no label reaches
it.
"""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest

from deepclust.cli import main
from deepclust.config.load import load
from deepclust.data.datasets import digits, from_arrays
from deepclust.errors import UserError
from deepclust.model import Clusterer
from deepclust.runtime import checkpoint
from deepclust.training.recipe import train
from tests.runs import RESULTS, outcome, pixels, small_data, small_run, status, stop_at, words

PROMISED = {
    "config.yaml",
    "env.json",
    "log.txt",
    "metrics.jsonl",
    "metrics.csv",
    "status.json",
    "checkpoints",
}
PROMISED |= {"clusters.csv", "summary.json", "report.html", "model.safetensors"}
LABELS = digits().train.classes[:60]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run from start to end."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert small_run(folder, "eval.baselines=[kmeans,pixels]", data=small_data(labels=LABELS)) == 0
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(whole, tmp_path / "copy")


def contents(folder):
    """Bytes and modification time of every file but the lock, which names the process that looked
    last.
    """
    files = (
        path for path in folder.rglob("*") if path.is_file() and path.name != ".deepclust.lock"
    )
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_run_leaves_what_is_promised_and_nothing_else(whole):
    assert {path.name for path in whole.iterdir()} == PROMISED | {".deepclust.lock"}
    assert status(whole) == {
        "state": "finished",
        "stage": None,
        "epoch": 0,
        "step": 0,
        "reason": None,
    }
    summary = json.loads((whole / "summary.json").read_text())
    assert list(summary["stages"]) == ["pretext", "scan", "selflabel"]
    assert summary["kept_stage"] in ("scan", "selflabel") and summary["why"]
    assert summary["seconds"] > 0 and summary["peak_memory_mb"] > 0
    for scores in (*summary["stages"].values(), *summary["baselines"].values()):
        assert {"acc", "nmi", "ari", "seconds"} <= set(scores)
        assert 0 <= scores["acc"] <= 1
    assert set(summary["baselines"]) == {"kmeans", "pixels"}, (
        "k-means on the first stage's features stands here"
    )
    assert [name for name, scores in summary["stages"].items() if "kmeans" in scores] == [
        "scan",
        "selflabel",
    ]
    assert {"acc", "nmi", "ari"} <= set(summary["stages"]["scan"]["kmeans"])
    for scores in summary["stages"].values():
        assert {"clusters_used", "size_entropy", "mean_confidence", "neighbor_agreement"} <= set(
            scores
        )


def test_every_image_has_a_line_and_the_model_finds_its_cluster_again(whole):
    with open(whole / "clusters.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(60))
    probabilities = Clusterer.load(whole).predict_proba(pixels())
    assert [int(row["cluster"]) for row in rows] == probabilities.argmax(1).tolist()
    np.testing.assert_allclose(
        [float(row["confidence"]) for row in rows], probabilities.max(1), atol=1e-5
    )


def test_every_step_is_logged_once(whole):
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 19))
    assert [row["stage"] for row in rows] == ["pretext"] * 6 + ["scan"] * 6 + ["selflabel"] * 6
    assert [row["stage_step"] for row in rows] == [1, 2, 3, 4, 5, 6] * 3
    with open(whole / "metrics.csv", newline="") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [row["loss"] for row in rows]


def test_every_stage_keeps_its_last_checkpoint(whole):
    ends = [
        path
        for path in checkpoint.listing(whole / "checkpoints")
        if checkpoint.manifest(path)["meta"]["finished"]
    ]
    assert [path.parent.name for path in ends] == ["00-pretext", "01-scan", "02-selflabel"]
    assert not any(checkpoint.verify(path) for path in ends)


def test_a_finished_run_shows_its_table_again_and_changes_nothing(copy, capsys):
    before = contents(copy)
    assert (
        small_run(
            copy,
            "logger.console=true",
            "eval.baselines=[kmeans,pixels]",
            data=small_data(labels=LABELS),
        )
        == 0
    )
    assert contents(copy) == before
    shown = capsys.readouterr().out
    assert "finished" in shown and "selflabel" in shown and "clusters.csv" in shown


@pytest.mark.parametrize("again", ["run.new=true", "resume=never"])
def test_starting_over_leaves_what_the_user_put_there(copy, again):
    results = {name: (copy / name).read_bytes() for name in RESULTS}
    (copy / "notes.txt").write_text("mine")
    (copy / "model.safetensors").write_bytes(b"old")
    assert small_run(copy, again) == 0
    assert {name: (copy / name).read_bytes() for name in RESULTS} == results
    assert (copy / "notes.txt").read_text() == "mine"
    assert json.loads((copy / "summary.json").read_text())["baselines"] == {}


def test_other_settings_are_refused_with_the_difference(copy):
    before = contents(copy)
    with pytest.raises(UserError, match=r"seed: 0 -> 1\n(.|\n)*run\.new=true"):
        small_run(copy, "seed=1")
    with pytest.raises(UserError, match=r"stages\.scan\.head\.num_neighbors: 5 -> 3"):
        small_run(copy, "stages.scan.head.num_neighbors=3")
    with pytest.raises(UserError, match=r"trainer\.max_steps: null -> 3"):
        small_run(copy, "trainer.max_steps=3")
    assert contents(copy) == before


def _forget_settings(folder):
    """As checkpoints were that did not record them."""
    for path in checkpoint.listing(folder / "checkpoints"):
        manifest = checkpoint.manifest(path)
        del manifest["meta"]["config"]
        (path / checkpoint.MANIFEST).write_bytes(checkpoint._render(manifest))


@pytest.mark.parametrize("gone", [["config.yaml"], ["config.yaml", "status.json"], ["status.json"]])
def test_other_settings_are_refused_where_the_folder_no_longer_tells(
    copy, tmp_path, monkeypatch, gone
):
    stop_at(monkeypatch, 5)
    assert small_run(tmp_path / "stopped") == 143
    monkeypatch.undo()
    for folder in (copy, tmp_path / "stopped"):
        for name in gone:
            (folder / name).unlink()
        before = contents(folder)
        with pytest.raises(UserError, match=r"seed: 0 -> 1\n(.|\n)*run\.new=true"):
            small_run(folder, "seed=1")
        assert contents(folder) == before
    assert small_run(tmp_path / "stopped") == 0 and small_run(copy) == 0


def test_checkpoints_that_do_not_tell_are_refused_only_without_config_yaml(
    copy, tmp_path, monkeypatch
):
    stop_at(monkeypatch, 5)
    assert small_run(tmp_path / "stopped") == 143
    monkeypatch.undo()
    for folder in (copy, tmp_path / "stopped"):
        _forget_settings(folder)
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").unlink()
        with pytest.raises(
            UserError, match=r"config.yaml is gone(.|\n)*Bring config.yaml back, .*run\.new=true"
        ):
            small_run(folder)
        (folder / "config.yaml").write_text(text)
        assert small_run(folder) == 0


def test_a_run_that_failed_before_it_saved_anything_does_not_stand_in_the_way(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="batch_size=1"):
        small_run(folder, "trainer.batch_size=1")
    assert status(folder)["state"] == "failed" and small_run(folder) == 0


@pytest.mark.parametrize("anew", ["run.new=true", "resume=never"])
def test_a_stopped_new_start_says_what_to_leave_out(tmp_path, monkeypatch, anew):
    stop_at(monkeypatch, 3)
    assert small_run(tmp_path / "run", anew) == 143
    assert f"the same command without {anew} goes on" in (tmp_path / "run/log.txt").read_text()


def test_no_baseline_is_fitted_where_no_label_could_judge_it(tmp_path):
    assert small_run(tmp_path / "run", "eval.baselines=[kmeans]") == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["baselines"] == {} and "A pretext's k-means is not compared" in summary["why"]


def test_other_images_are_refused_in_a_finished_and_in_a_stopped_run(copy, tmp_path, monkeypatch):
    stop_at(monkeypatch, 3)
    assert small_run(tmp_path / "stopped") == 143
    for folder in (copy, tmp_path / "stopped"):
        before = contents(folder)
        with pytest.raises(UserError, match=r"not those that .* was trained on"):
            small_run(folder, data=from_arrays(255 - pixels()))
        assert contents(folder) == before


@pytest.mark.parametrize("what", ["folder", "checkpoint"])
def test_a_new_folder_goes_on_from_another_runs_checkpoint(whole, tmp_path, monkeypatch, what):
    with monkeypatch.context() as patch:
        stop_at(patch, 12)
        assert small_run(tmp_path / "old") == 143
    at = checkpoint.listing(tmp_path / "old" / "checkpoints")[-1]
    assert at.parent.name == "01-scan"
    source = at if what == "checkpoint" else tmp_path / "old"
    assert small_run(tmp_path / "new", f"resume={source}") == 0
    for name in RESULTS:
        assert (tmp_path / "new" / name).read_bytes() == (whole / name).read_bytes()
    assert f"Continues {at}" in (tmp_path / "new" / "log.txt").read_text()


def test_resume_from_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoint is there"):
        small_run(tmp_path / "run", f"resume={tmp_path}")


def test_a_broken_stage_end_is_named(copy):
    end = next(
        path
        for path in checkpoint.listing(copy / "checkpoints")
        if path.parent.name == "00-pretext"
    )
    (end / "head.pt").write_bytes(b"")
    (copy / "status.json").write_text(json.dumps({**status(copy), "state": "running"}))
    with pytest.raises(UserError, match=r"stage pretext is needed: .*head\.pt has 0 bytes"):
        small_run(copy)


def test_no_label_reaches_training(whole, tmp_path):
    """The same images with labels, with shuffled labels and without: not a byte of model or
    clusters differs.
    """
    shuffled = np.random.default_rng(0).permutation(LABELS)
    for name, labels in (("shuffled", shuffled), ("none", None)):
        assert small_run(tmp_path / name, "eval.probes=true", data=small_data(labels=labels)) == 0
        for file in RESULTS:
            assert (tmp_path / name / file).read_bytes() == (whole / file).read_bytes()
    scores = json.loads((tmp_path / "shuffled" / "summary.json").read_text())["stages"]
    assert scores["scan"]["acc"] < 0.9 and "knn_probe" in scores["scan"]
    assert (
        "acc" not in json.loads((tmp_path / "none" / "summary.json").read_text())["stages"]["scan"]
    )


def test_a_run_does_not_depend_on_what_was_drawn_before_it(whole, tmp_path):
    import random

    import torch

    torch.manual_seed(99), np.random.seed(99), random.seed(99)  # noqa: NPY002
    assert small_run(tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == outcome(whole)


def test_another_seed_is_another_model(whole, tmp_path):
    assert small_run(tmp_path / "run", "seed=1") == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != (
        whole / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_wandb_without_key_changes_nothing(whole, tmp_path, monkeypatch, mode):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert small_run(tmp_path / "run", f"logger.wandb={mode}", data=small_data(labels=LABELS)) == 0
    assert outcome(tmp_path / "run") == outcome(whole)
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1


def test_the_command_line_runs_predicts_and_refuses(tmp_path, capsys):
    np.save(tmp_path / "images.npy", pixels())
    command = [
        "train",
        *words(tmp_path / "run"),
        "data=arrays",
        f"data.images={tmp_path}/images.npy",
    ]
    assert main(command) == 0 and main(command) == 0
    assert main([*command, "seed=1"]) == 2
    said = capsys.readouterr().err
    assert "seed: 0 -> 1" in said and "Traceback" not in said
    end = checkpoint.listing(tmp_path / "run" / "checkpoints")[-1]
    assert main(["checkpoint", "verify", str(end)]) == 0
    assert main(["checkpoint", "digest", str(end)]) == 0
    assert capsys.readouterr().out.count("  ") >= 5


def test_held_out_images_are_clustered_and_reported_apart(tmp_path):
    data = small_data(80, digits().train.classes[:80])
    data.train, data.test, data.protocol = (
        data.train.select(range(60)),
        data.train.select(range(60, 80)),
        "inductive",
    )
    data.test.splits = np.full(20, "test")
    assert train(load(words(tmp_path / "run")), data) == 0
    with open(tmp_path / "run" / "clusters.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(80))
    assert [row["split"] for row in rows[60:]] == ["test"] * 20 and all(
        row["cluster"] for row in rows
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "acc" in summary["stages"]["scan"]["test"]


def test_a_stage_may_train_on_extra_images_which_are_not_clustered(tmp_path, monkeypatch):
    data, more = small_data(), "stages.pretext.trainer.extra_images=true"
    data.extra = from_arrays(digits().train.images[60:100].numpy()).train
    with pytest.raises(
        UserError, match=r"would do nothing.*stages\.pretext\.trainer\.extra_images=true"
    ):
        small_run(tmp_path / "no", data=data)
    with pytest.raises(
        UserError, match=r"extra_images=true: arrays holds no extra images.*data\.extra=true"
    ):
        small_run(tmp_path / "no", more)
    assert small_run(tmp_path / "whole", more, data=data) == 0
    rows = [
        json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    ]
    assert [row["stage"] for row in rows] == ["pretext"] * 10 + ["scan"] * 6 + ["selflabel"] * 6
    assert (tmp_path / "whole/clusters.csv").read_text().count("\n") == 61
    stop_at(monkeypatch, 5)
    assert small_run(tmp_path / "stopped", more, data=data) == 143
    monkeypatch.undo()
    assert small_run(tmp_path / "stopped", more, data=data) == 0
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
