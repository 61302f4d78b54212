"""The comparison of clusterers: what it computes, what it reads again, what it writes."""

from __future__ import annotations

import csv
import re

import numpy as np
from sklearn.datasets import make_blobs

from benchmarks.quality import clusterers
from deepclust.clustering.choice import CRITERIA

X, Y = make_blobs(60, 8, centers=3, cluster_std=0.5, random_state=0)


def test_cells_are_computed_once_and_the_chosen_is_marked(tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "blobs.npz", features=X.astype(np.float32), labels=Y)
    words = ["--out", str(tmp_path / "out"), "--features", f"blobs={tmp_path / 'blobs.npz'}"]
    words += ["--sets", "blobs", "--methods", "diffusion", "ward", "--seeds", "0"]
    assert clusterers.main(words) == 0
    printed = capsys.readouterr().out
    row = r"\| diffusion \| 3 \| 100.0 \| 100.0 \| 100.0 \| 100.0 \| \d+\.\d \| ★ \|"
    assert "**blobs**, 1 seed" in printed and re.search(row, printed)
    assert "| always ward | 0.0 | 0.0 |" in printed
    assert (tmp_path / "out/table.md").read_text() in printed
    cells = list(csv.DictReader((tmp_path / "out/cells.csv").open()))
    assert [cell["method"] for cell in cells] == ["diffusion", "ward"]
    assert all(float(cells[0][name]) >= 0 for name in CRITERIA)

    monkeypatch.setattr(clusterers, "compute", None)  # a finished cell is not computed again
    assert clusterers.main(words) == 0
    assert capsys.readouterr().out == printed


def test_a_head_that_trains_is_a_column_as_any_other():
    result = clusterers.by_head("temi", X.astype(np.float32), 3, 0)
    assert result.labels.shape == result.confidence.shape == Y.shape
    assert set(result.labels) <= {0, 1, 2}
