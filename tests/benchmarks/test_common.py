"""What the quality benchmarks share: cells, features of a set, files, tables."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import common
from benchmarks.quality.common import Cell


def test_cells_with_and_without_a_factor_have_files_of_their_own(tmp_path):
    assert Cell("digits-1", 2, "scan").file(tmp_path, ".npz").name == "digits-1_2_scan.npz"
    cell = Cell("digits-10", 2, "scan", factor=1.5)
    assert cell.file(tmp_path, ".json") == tmp_path / "cells/digits-10_1.5_2_scan.json"


def test_features_are_made_once_and_read_the_next_time(tmp_path, monkeypatch):
    calls = []

    def pretext(name: str, seed: int) -> dict[str, np.ndarray]:
        calls.append((name, seed))
        return {"features": np.arange(12.0).reshape(6, 2), "labels": np.arange(6) % 3}

    monkeypatch.setattr(common, "pretext", pretext)
    for _ in range(2):
        common.features_of.cache_clear()
        features, classes = common.features_of("digits-1", 5, tmp_path, None)
        assert features.shape == (6, 2) and features[1].tolist() == [2, 3]
        assert classes.tolist() == [0, 1, 2, 0, 1, 2]
    assert calls == [("digits-1", 5)]
    assert [path.name for path in (tmp_path / "features").iterdir()] == ["digits-1-5.npz"]


def test_a_file_without_labels_ends_the_program(tmp_path):
    np.savez(tmp_path / "x.npz", features=np.zeros((4, 2)))
    with pytest.raises(SystemExit, match=r"x\.npz: has no labels"):
        common.features_of("x", 0, tmp_path, str(tmp_path / "x.npz"))


def test_arrays_are_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new/a.npz"
    common.save_arrays(path, x=np.arange(3))
    with np.load(path) as content:
        assert content["x"].tolist() == [0, 1, 2]

    def fails(file: Path, **_: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(np, "savez_compressed", fails)
    with pytest.raises(OSError, match="no space"):
        common.save_arrays(tmp_path / "b.npz", x=np.arange(3))
    assert not (tmp_path / "b.npz").exists()


def test_figures_rows_and_lines(tmp_path):
    assert common.figure([0.5]) == "50.0"
    assert common.figure([0.5, 0.7]) == "60.0 ± 14.1"  # 100 * |0.5 - 0.7| / sqrt(2)
    assert common.table_row(["a", "b"]) == "| a | b |"
    assert common.table_rule(1, 2) == "| --- | ---: | ---: |"
    assert common.named_files(["a=x.npz", "b=y=z"]) == {"a": "x.npz", "b": "y=z"}
    common.write_csv(tmp_path / "a.csv", ["x", "y"], [[1, None], ["ü", 2]])
    assert (tmp_path / "a.csv").read_bytes() == "x,y\n1,\nü,2\n".encode()
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file))[1] == {"x": "ü", "y": "2"}
