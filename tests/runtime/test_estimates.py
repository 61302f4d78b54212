"""What a run can do without: whichever estimate fails, the run finishes with its clusters and says
what is missing.
"""

from __future__ import annotations

import csv
import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepclust.cli import main
from deepclust.clustering import number
from deepclust.clustering.number import CRITERIA, estimate_num_clusters
from deepclust.collection.derived import Derived
from deepclust.collection.run import FolderRun
from deepclust.errors import UserError
from deepclust.runtime.estimates import Estimates
from deepclust.runtime.files import NotWritten
from deepclust.runtime.signals import StopRequested
from tests.collection.toys import NETS, toy_photos
from tests.runs import small_data, small_run

LABELS = [0, 1, 2, 3] * 15


def fail(*_: Any, **__: Any) -> Any:
    raise np.linalg.LinAlgError("boom")


def fail_too(*_: Any, **__: Any) -> Any:
    raise RuntimeError("boom")


def test_an_estimate_that_fails_is_missing_with_its_reason(monkeypatch, capsys):
    said: list[str] = []
    estimates = Estimates(said.append, "scan")
    assert estimates("fine", lambda: 3) == 3 and not estimates.missing
    assert estimates("silhouette", fail) is None
    assert estimates.missing["silhouette"].startswith("LinAlgError: boom (test_estimates.py, line ")
    assert (
        "scan: silhouette is missing: LinAlgError: boom" in said[0]
        and "DEEPCLUST_TRACEBACK=1" in said[0]
    )
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("DEEPCLUST_TRACEBACK", "1")
    estimates("silhouette", fail)
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "in fail" in shown


@pytest.mark.parametrize(
    "error",
    [
        UserError("wrong input"),
        NotWritten(Path("file"), OSError(errno.EACCES, "no")),
        OSError(errno.ENOSPC, "no space left"),
        KeyboardInterrupt(),
        StopRequested("SIGTERM"),
    ],
)
def test_what_is_no_matter_of_an_estimate_passes(error: BaseException):
    def raises() -> None:
        raise error

    estimates = Estimates()
    with pytest.raises(type(error)):
        estimates("silhouette", raises)
    assert not estimates.missing


# --- a run of training ------------------------------------------------------------------------

SCORES = {
    "silhouette": ("training.results.silhouette", ["silhouette"]),
    "agreement": ("training.results.neighbor_agreement", ["neighbor_agreement"]),
    "neighbours": ("training.results.neighbor_graph", ["neighbor_agreement"]),
    "churn": ("training.results.churn", ["churn"]),
    "opinions": ("training.results.reference_clusterings", ["calibration"]),
    "calibration": ("training.results.confidence_report", ["calibration"]),
    "knn_probe": ("training.results.knn_probe", ["knn_probe"]),
    "linear_probe": ("training.results.linear_probe", ["linear_probe"]),
    "classes": ("training.results.clustering_scores", ["acc", "nmi", "ari"]),
}


@pytest.mark.parametrize("which", list(SCORES))
def test_a_score_that_fails_ends_no_training(tmp_path, monkeypatch, capsys, which):
    target, names = SCORES[which]
    monkeypatch.setattr(f"deepclust.{target}", fail if which in ("opinions", "churn") else fail_too)
    more = ["eval.probes=true", "eval.baselines=[kmeans]", "logger.console=true"]
    assert small_run(tmp_path, *more, data=small_data(60, LABELS)) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    scores = summary["stages"]["selflabel"]
    assert all(scores[name] is None for name in names)
    assert "boom" in scores["missing"][names[0]]
    kept = summary["stages"][summary["kept_stage"]]
    assert summary["kept_stage"] in ("scan", "selflabel") and kept["clusters_used"] >= 1
    with open(tmp_path / "clusters.csv") as file:
        assert all(line["cluster"] for line in csv.DictReader(file))
    name = names[0].replace("_", " ")
    assert f"selflabel: {name} is missing" in (tmp_path / "report.html").read_text()
    assert f"{names[0]} is missing: " in (tmp_path / "log.txt").read_text()
    assert f"{names[0]} is missing: " in capsys.readouterr().out
    assert (
        small_run(tmp_path, *more, data=small_data(60, LABELS)) == 0
    )  # the table of a finished run


def test_a_baseline_that_fails_ends_no_training(tmp_path, monkeypatch):
    monkeypatch.setattr("deepclust.clustering.baselines.cluster", fail)
    assert small_run(tmp_path, "eval.baselines=[kmeans,gmm]", data=small_data(60, LABELS)) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert all(
        "LinAlgError: boom" in summary["baselines"][name]["failed"] for name in ("kmeans", "gmm")
    )
    assert "LinAlgError: boom" in (tmp_path / "report.html").read_text()


def test_a_full_disk_in_a_score_still_ends_a_run(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr("deepclust.training.results.silhouette", full)
    with pytest.raises(OSError, match="no space"):
        small_run(tmp_path, data=small_data(60, LABELS))


# --- clusters of a folder ---------------------------------------------------------------------


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    toy_photos(tmp_path / "photos", 60)
    (tmp_path / "nets.py").write_text(NETS.format(labels=False))
    return [
        "cluster",
        "photos",
        "-o",
        "run",
        "--backbone",
        "nets.py:colours",
        "--clusterers",
        "ward,spectral",
    ]


def facts() -> dict[str, Any]:
    return json.loads(Path("run/run.json").read_text())


def lines() -> list[dict[str, str]]:
    with open("run/clusters.csv", newline="") as file:
        return list(csv.DictReader(file))


FOLDER = {
    "near-duplicates": "collection.derived.near_duplicates",
    "map": "collection.derived.embed",
    "outliers": "collection.derived.Derived._outliers",
    "number": "collection.find.estimate_num_clusters",
    "confidence": "collection.find.trust_in",
    "criteria": "collection.find.criteria",
}


@pytest.mark.parametrize("name", list(FOLDER))
def test_an_estimate_that_fails_ends_no_clustering(words, monkeypatch, capsys, name):
    more = ["--noise"] if name == "number" else ["-k", "3", "--noise"]
    with monkeypatch.context() as patch:
        patch.setattr(f"deepclust.{FOLDER[name]}", fail)
        assert main([*words, *more]) == 0
    said = capsys.readouterr().out
    assert f"{name} is missing: LinAlgError: boom" in said
    assert list(facts()["missing"]) == [name] and "LinAlgError: boom" in facts()["missing"][name]
    assert f"{name} is missing: LinAlgError: boom" in Path("run/report.html").read_text()
    found = lines()
    assert len(found) == 62 and all(line["cluster"] for line in found)
    assert all(bool(line["confidence"]) == (name != "confidence") for line in found)
    assert all(bool(line["x"] and line["y"]) == (name != "map") for line in found)
    assert ("canvas" in Path("run/report.html").read_text()) == (name != "map")
    assert any(line["duplicate_of"] for line in found) == (name != "near-duplicates")
    if name == "number":
        assert facts()["number"] is None and "Give a number with -k" in said
    if name == "criteria":
        assert facts()["criterion"] is None and facts()["clusterer"] == "ward"
    assert main(["edit", "run", "merge", "0", "1"]) == 0
    assert main(["edit", "run"]) == 0 and ("unknown" in capsys.readouterr().out) == (
        name == "confidence"
    )
    assert main(["predict", "run", "photos", "-o", "again.csv"]) == 0
    assert ("shares of votes; how far to trust them" in capsys.readouterr().out) == (
        name == "confidence"
    )
    # Once it works the same command has it; an edited run is left alone.
    assert main([*words, *more]) == 0 and facts()["missing"]
    assert main([*words, *more, "--new"]) == 0 and not facts()["missing"]
    fresh = lines()
    assert all(line["confidence"] and line["x"] for line in fresh)
    store = FolderRun.open("run").store
    derived = Derived(store, store.backbone().name)
    assert len(derived.landmarks) == 60 and int(derived.nearest[1].max()) < 60


def test_what_was_missing_is_tried_again_by_the_same_command(words, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("deepclust.collection.find.trust_in", fail)
        assert main([*words, "-k", "3"]) == 0
    assert main([*words, "-k", "3"]) == 0 and not facts()["missing"]
    assert all(line["confidence"] for line in lines())


def test_clusterers_that_fail_are_left_out_and_only_all_of_them_end_the_command(
    words, monkeypatch, capsys
):
    from deepclust.clustering.methods import METHODS

    monkeypatch.setitem(METHODS, "ward", fail)
    assert main([*words, "-k", "3"]) == 0
    assert "ward is left out: LinAlgError: boom" in capsys.readouterr().out
    assert facts()["clusterer"] == "spectral" and "boom" in facts()["choice"]["ward"]["failed"]
    assert "LinAlgError: boom" in Path("run/report.html").read_text()
    monkeypatch.setitem(METHODS, "spectral", fail_too)
    assert main([*words, "-k", "4"]) == 2
    error = capsys.readouterr().err
    assert "none of the clusterers finds clusters" in error and "--clusterers" in error
    assert "ward: LinAlgError: boom" in error and "spectral: RuntimeError: boom" in error
    assert facts()["asked"]["num_clusters"] == 3, "the run is as it was"


# --- the number of clusters -------------------------------------------------------------------

PARTS = {
    "density_peaks": ["peaks"],
    "spectral_components": ["eigengap", "modularity", "agreement"],
    "modularity": ["modularity"],
    "principal": ["prediction"],
    "prediction_strength": ["prediction"],
}


def blobs() -> np.ndarray:
    random = np.random.default_rng(0)
    return (10 * random.normal(size=(4, 16)))[np.arange(120) % 4] + random.normal(size=(120, 16))


@pytest.mark.parametrize("part", list(PARTS))
def test_a_criterion_that_fails_has_no_vote_and_the_others_decide(monkeypatch, part):
    monkeypatch.setattr(number, part, fail)
    found = estimate_num_clusters(blobs())
    assert sorted(found.missing) == sorted(PARTS[part])
    assert (
        list(found.votes)
        == list(found.curves)
        == [name for name in CRITERIA if name not in PARTS[part]]
    )
    assert found.k == 4 and found.low <= 4 <= found.high and found.sure != "clear"
    assert all(name in found.statement for name in PARTS[part])


def test_without_any_criterion_there_is_no_number(monkeypatch):
    for part in PARTS:
        monkeypatch.setattr(number, part, fail)
    with pytest.raises(RuntimeError, match=r"no criterion could be computed: peaks: LinAlgError"):
        estimate_num_clusters(blobs())
