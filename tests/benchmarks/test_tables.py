"""Tables of comparisons that take hours: rows, verdicts and spreads of figures made up."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from sklearn.datasets import make_blobs

from benchmarks.quality import calibration, imbalanced, seeds
from benchmarks.quality.common import Cell


def scores(macro: float) -> dict[str, float]:
    return {
        **dict.fromkeys(imbalanced.SCORES, 0.5),
        "macro_acc": macro,
        "clusters": 3,
        "seconds": 1,
    }


def test_p2ot_stands_beside_the_best_balanced_method():
    macro = {"kmeans": 0.9, "scan": 0.4, "hard": 0.6, "p2ot": 0.7, "sp2ot": 0.55}
    cells = [
        (Cell("digits-10", seed, method, 1.5), scores(value + seed / 100))
        for method, value in macro.items()
        for seed in (0, 2)
    ]
    text = imbalanced.markdown(cells)
    assert text.startswith("**digits-10**, 3 clusters (1.5 x classes), 2 seeds\n")
    assert "| SCAN | 41.0 ± 1.4 | 50.0 ± 0.0 |" in text
    hard = "against hard (equal clusters)"
    assert f"* digits-10, 1.5 x classes: P²OT +10.0 macro ACC {hard}" in text
    assert f"* digits-10, 1.5 x classes: SP²OT -5.0 macro ACC {hard}" in text


def test_imbalanced_cells_are_computed_once(tmp_path, monkeypatch, capsys):
    x, y = make_blobs([40, 20, 10], 8, cluster_std=0.5, random_state=0)
    np.savez(tmp_path / "blobs.npz", features=x.astype(np.float32), labels=y)
    words = ["--out", str(tmp_path / "out"), "--features", f"blobs={tmp_path / 'blobs.npz'}"]
    words += ["--sets", "blobs", "--methods", "kmeans", "swav", "--factors", "1", "--seeds", "0"]
    monkeypatch.setattr(imbalanced, "STEPS", 10)
    assert imbalanced.main(words) == 0
    printed = capsys.readouterr().out
    assert "**blobs**, 3 clusters (1 x classes), 1 seeds" in printed
    assert "| k-means | 100.0 | 100.0 | 100.0 | 100.0 |" in printed
    with open(tmp_path / "out/cells.csv", newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["kmeans", "swav"]
    monkeypatch.setattr(imbalanced, "compute", None)  # a finished cell is not computed again
    assert imbalanced.main(words) == 0
    assert capsys.readouterr().out == printed


def test_calibration_has_means_and_spreads_and_empty_cells():
    figures = [
        {"selflabel/predicted": {"acc": acc, "brier": acc, "ece": None}} for acc in (0.5, 0.7)
    ]
    rows = calibration.table(figures)
    assert rows[0]["acc"] == pytest.approx(0.6) and rows[0]["acc_std"] == pytest.approx(0.1)
    lines = calibration.markdown("digits", rows).splitlines()
    assert lines[0] == "### digits"
    cells = [cell.strip() for cell in lines[-1].split("|")[1:-1]]
    named = dict(zip(["method", *calibration.COLUMNS], cells, strict=True))
    assert named["method"] == "self-labelling: raw head"
    assert named["acc"] == "60.0 ± 10.0" and named["brier"] == "0.60 ± 0.10"
    assert named["ece"] == named["estimated_ece"] == ""


def test_seeds_have_a_median_a_mean_and_the_baselines_that_never_failed():
    def summary(value: float, reason: dict[str, object]) -> dict[str, object]:
        stage = dict.fromkeys(seeds.SCORES, value)
        baselines = {"kmeans": dict.fromkeys(seeds.SCORES, 0.5), "gmm": reason or stage}
        stages = {"pretext": {"acc": 0.25}, "scan": stage}
        return {"stages": stages, "kept_stage": "scan", "baselines": baselines, "seconds": 7.4}

    runs = [summary(0.6, {}), summary(0.7, {"reason": "no"}), summary(0.95, {})]
    lines = seeds.table(list(enumerate(runs))).splitlines()
    assert lines[2] == "| 0 | 60.0 | 60.0 | 60.0 | scan | pretext 25.0, scan 60.0 | 7 |"
    assert lines[5:] == [
        "| **median** | 70.0 | 70.0 | 70.0 | | | |",
        "| **mean** | 75.0 | 75.0 | 75.0 | | | |",
        "| kmeans, mean | 50.0 | 50.0 | 50.0 | | | |",
    ]
