"""The tables of a folder's clusters: CSV and Parquet hold the same, whatever the paths are like."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from deepclust.collection.derived import Derived
from deepclust.collection.outputs import up_to_date, write_all
from deepclust.collection.run import FolderRun
from deepclust.collection.tables import EXCLUDED, as_csv, clusters_table, duplicate_of
from tests.collection.toys import toy_landmarks, toy_run

COLUMNS = ["path", "cluster", "confidence", "x", "y", "neighbours", "duplicate_of", "name", "index"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FolderRun:
    found = toy_run(tmp_path_factory.mktemp("outputs"))
    toy_landmarks(found)
    return found


def lines(data: bytes | Path) -> list[dict[str, str]]:
    text = (data.read_bytes() if isinstance(data, Path) else data).decode()
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_all_files_are_there_and_both_tables_hold_the_same(run: FolderRun):
    state = run.state()
    excluded = np.zeros(len(state.rows), dtype=bool)
    excluded[[1, 4]] = True
    state = replace(state, excluded=excluded, names={2: 'red, "very"\nred'})
    run.history.push("exclude", state)
    assert not up_to_date(run)
    write_all(run, state)
    assert up_to_date(FolderRun.open(run.path))
    assert (run.path / "report.html").is_file() and (run.path / "model.safetensors").is_file()
    table = pyarrow.parquet.read_table(run.path / "clusters.parquet")
    rows, found = lines(run.path / "clusters.csv"), table.to_pylist()
    assert table.column_names == COLUMNS == list(rows[0]) and len(rows) == len(found) == len(
        state.kept
    )
    for line, row in zip(rows, found):
        near = row.pop("neighbours")
        assert [int(word) for word in line.pop("neighbours").split()] == near["ids"]
        assert near["distances"] == sorted(near["distances"])
        numbers = {
            "cluster": int,
            "index": int,
            "confidence": np.float32,
            "x": np.float32,
            "y": np.float32,
        }
        for name, value in row.items():
            if name in numbers:
                assert numbers[name](line[name]) == numbers[name](value)
            else:
                assert line[name] == (value or "")
    assert [row["path"] for row in found] == [
        str(run.root / run.store.paths[row]) for row in state.rows[state.kept]
    ]
    assert {row["name"] for row in found if row["cluster"] == 2} == {'red, "very"\nred'}
    assert {row["cluster"] for row in found} == {-1, 0, 1, 2}
    out = {line["path"]: line["reason"] for line in lines(run.path / "left_out.csv")}
    assert len(out) == 3 and out[str(run.root / run.store.paths[state.rows[4]])] == EXCLUDED
    assert "not an image" in out[str(run.root / "red/broken.png")]


def test_neighbours_are_rows_of_the_table_and_the_nearest_by_cosine(run: FolderRun):
    state = run.history.files()[0] and replace(
        run.state(), excluded=np.arange(len(run.state().rows)) == 3
    )
    table = clusters_table(run, state, Derived(run.store, run.facts["backbone"]))
    x = run.features(state.rows[state.kept])
    cosines = x @ x.T
    for row, near in enumerate(table["neighbours"].to_pylist()):
        assert row not in near["ids"] and len(near["ids"]) in (14, 15)
        assert np.allclose(1 - cosines[row, near["ids"]], near["distances"], atol=1e-4)
        others = np.setdiff1d(np.arange(len(x)), [*near["ids"], row])
        if len(near["ids"]) == 15 and len(others):
            assert cosines[row, others].max() <= cosines[row, near["ids"]].min() + 1e-4


def test_a_group_whose_original_is_taken_out_has_another_one(run: FolderRun):
    state = run.state()
    copies = np.flatnonzero(state.copy_of >= 0)
    original = np.searchsorted(state.rows, state.copy_of[copies[0]])
    assert set(duplicate_of(state)[np.isin(state.kept, copies)]) == {state.rows[original]}
    without = replace(state, excluded=np.arange(len(state.rows)) == original)
    found = duplicate_of(without)[np.isin(without.kept, copies)]
    assert found.tolist() == [-1, state.rows[copies[0]]]


def test_odd_paths_survive(run: FolderRun, monkeypatch: pytest.MonkeyPatch):
    odd = [
        "a,b.png",
        'q"uote.png',
        "new\nline.png",
        "return\rcarriage.png",
        "tab\t;.png",
        " blank ",
        "ünï日本.png",
    ]
    paths = [*odd, "bytes\udcff.png", *run.store.paths[len(odd) + 1 :]]
    monkeypatch.setattr(run.store, "paths", paths)
    state = run.state()
    table = clusters_table(run, state, Derived(run.store, run.facts["backbone"]))
    read = [line["path"] for line in lines(as_csv(table))]
    assert read == table["path"].to_pylist()
    expected = [str(run.root / path) for path in [*odd, "bytes\\udcff.png"]]
    by_row = dict(zip(table["index"].to_pylist(), read))
    assert [by_row[row] for row in range(8) if row in by_row] == [
        expected[row] for row in range(8) if row in by_row
    ]


def test_pandas_reads_both_alike(run: FolderRun):
    pandas = pytest.importorskip("pandas")
    state = run.state()
    write_all(run, state)
    text, binary = (
        pandas.read_csv(run.path / "clusters.csv"),
        pandas.read_parquet(run.path / "clusters.parquet"),
    )
    assert (text["path"] == binary["path"]).all() and (text["cluster"] == binary["cluster"]).all()
    assert list(text) == list(binary) == COLUMNS
