"""What a run says about its confidences, with labels and without."""

from __future__ import annotations

import csv
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deepclust.config.load import load
from deepclust.eval import calibration_scores
from deepclust.eval.confidence import confidence_report, reference_clusterings
from deepclust.heads.readout import KMeansHead
from deepclust.model import Clusterer, Network
from deepclust.report.reliability import reliability_section, trust_table, trust_words
from deepclust.training.recipe import train
from tests.runs import SMALL, pixels, small_data, small_run


class Sharp(KMeansHead):
    """Calibrates by flattening what it had."""

    def predict(self, z):
        return (self.layer(z)[0] / 4).softmax(1)

    def uncalibrated(self, z):
        return super().predict(z)


def blobs() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    classes = random.integers(0, 4, 300)
    return (random.normal(size=(4, 16))[classes] + random.normal(size=(300, 16)) / 2).astype(
        np.float32
    ), classes


def network(kind: type[KMeansHead], features: np.ndarray) -> Network:
    head = kind(16, 4)
    with torch.no_grad():
        head.layer.init_clusters(torch.from_numpy(features), ["kmeans"])
    return Network(nn.Identity(), head)


def report(net: Network, features: np.ndarray, classes: np.ndarray | None) -> dict[str, Any]:
    return confidence_report(net, features, classes, reference_clusterings(features, 4), 4)


def test_without_a_calibration_the_variants_are_three():
    features, classes = blobs()
    net = network(KMeansHead, features)
    found = report(net, features, classes)
    assert list(found["scores"]) == ["predicted", "temperature", "constant"]
    with torch.no_grad():
        expected = calibration_scores(net.head.predict(torch.from_numpy(features)), classes)
    assert found["reliability"]["predicted"] == expected.pop("reliability")
    assert found["scores"]["predicted"] == expected
    assert found["scores"]["constant"]["auroc"] in (0.5, None)
    estimate = found["estimate"]
    assert estimate["accuracy_error"] == pytest.approx(estimate["accuracy"] - expected["acc"])
    assert abs(estimate["accuracy_error"]) < 0.05
    assert found["scores"]["temperature"]["confidence"] == pytest.approx(
        estimate["accuracy"], abs=1e-4
    )


def test_a_calibrating_head_is_shown_beside_what_it_calibrates():
    features, classes = blobs()
    found = report(network(Sharp, features), features, classes)
    assert list(found["scores"]) == ["predicted", "uncalibrated", "temperature", "constant"]
    assert (
        found["scores"]["predicted"]["confidence"] < found["scores"]["uncalibrated"]["confidence"]
    )
    raw = report(network(KMeansHead, features), features, classes)
    assert found["scores"]["uncalibrated"] == raw["scores"]["predicted"]
    assert found["scores"]["temperature"] == raw["scores"]["temperature"]


def test_without_labels_there_is_an_estimate_and_no_score():
    features, classes = blobs()
    with_labels = report(network(KMeansHead, features), features, classes)
    found = report(network(KMeansHead, features), features, None)
    assert found["scores"] == {} and set(found["estimate"]) == {"accuracy", "ece", "temperature"}
    assert all(
        found["estimate"][name] == with_labels["estimate"][name] for name in found["estimate"]
    )
    assert "it is" not in trust_words(found) and "<table" not in reliability_section(found)
    assert "agreement with independent clusterings" in reliability_section(found)


def test_table_and_section_show_every_variant():
    features, classes = blobs()
    found = report(network(Sharp, features), features, classes)
    columns, rows = trust_table(found)
    assert len(rows) == 4 and all(len(row) == len(columns) for row in rows)
    section = reliability_section(found)
    assert section.count("<figure") == 3 and section.count('<tr role="row">') == 5
    assert "nan" not in section.lower() and reliability_section(None) == ""


@pytest.mark.parametrize("labels", [None, [0, 1, 2, 3] * 15])
def test_a_run_reports_its_confidences(tmp_path, labels):
    small_run(tmp_path, data=small_data(60, labels))
    stages = json.loads((tmp_path / "summary.json").read_text())["stages"]
    for scores in stages.values():
        assert scores["calibration"]["samples"] == 60
        assert bool(scores["calibration"]["scores"]) == (labels is not None)
    page = (tmp_path / "report.html").read_text()
    assert "Confidences</h2>" in page and page.count('class="curve reliability"') == (
        1 if labels is None else 2
    )


def test_clusters_and_predictions_carry_the_calibrated_confidence(tmp_path):
    words = [word for word in SMALL if not word.startswith("stages.")]
    words += [
        "head=calibration",
        "head.mini_clusters=5",
        "trainer.num_images=120",
        "num_clusters=4",
        f"run.dir={tmp_path}",
    ]
    words += ["trainer.micro_batches=2", "optim.step_per=micro"]
    assert train(load(words), small_data(60, [0, 1, 2, 3] * 15)) == 0
    with open(tmp_path / "clusters.csv") as file:
        rows = list(csv.DictReader(file))
    p = Clusterer.load(tmp_path).predict_proba(pixels(60))
    assert [int(row["cluster"]) for row in rows] == p.argmax(1).tolist()
    np.testing.assert_allclose([float(row["confidence"]) for row in rows], p.max(1), atol=1e-5)
    (scores,) = json.loads((tmp_path / "summary.json").read_text())["stages"].values()
    assert scores["calibration"]["scores"]["predicted"]["confidence"] == pytest.approx(
        float(p.max(1).mean()), abs=1e-5
    )
    assert "uncalibrated" in scores["calibration"]["scores"]


def test_a_run_may_leave_it_out(tmp_path):
    small_run(tmp_path, "eval.calibration=false")
    assert (
        "calibration" not in json.loads((tmp_path / "summary.json").read_text())["stages"]["scan"]
    )
