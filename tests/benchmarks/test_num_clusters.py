"""The comparison of numbers of clusters: its cases, its figures, a package that is missing."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.quality import num_clusters
from benchmarks.quality.num_clusters_cases import BLOBS, Case, cases, rows_of
from deepclust.errors import UserError


def test_subsets_are_of_as_many_classes_and_other_draws_of_others(tmp_path):
    drawn = []
    for draw in (0, 1):
        x, classes = rows_of(Case("digits", 4, draw), tmp_path, None)
        assert len(x) == len(classes) and x.shape[1] == 64
        drawn.append(set(classes.tolist()))
    assert len(drawn[0]) == len(drawn[1]) == 4 and drawn[0] != drawn[1]
    x, classes = rows_of(Case("unequal blobs", 5, 0), tmp_path, None)
    sizes = np.bincount(classes)
    assert len(sizes) == 5 and sizes[0] > 8 * sizes[-1] and len(x) == sizes.sum()


def test_half_of_the_cases_are_held_out():
    every = cases({"clothing": "a", "fashion-lite0": "b"})
    held = [case for case in every if case.held_out]
    assert len(set(map(str, every))) == len(every) and 0.45 < len(held) / len(every) < 0.6
    assert {case.data for case in held} & {"digits-simclr", "clothing", "blobs"}
    assert "clothing" not in {case.data for case in cases({})}


def test_noise_counts_as_clusters_of_their_own(tmp_path):
    truth = np.array([0, 0, 1, 1, 2, 2])
    np.savez(tmp_path / "a.npz", labels=np.array([0, 0, 1, 1, -1, -1]), facts="{}")
    result = num_clusters.result(tmp_path / "a.npz", truth)
    assert result.k == 2 and result.noise == pytest.approx(1 / 3) and result.ari < 1
    np.savez(tmp_path / "b.npz", labels=truth, facts='{"k": 4}')
    result = num_clusters.result(tmp_path / "b.npz", truth)
    assert result.ari == 1 and result.k == 4


def test_the_table_leaves_out_what_is_missing_and_reads_what_is_there(
    tmp_path, monkeypatch, capsys
):
    calls = []

    def ours(x):
        calls.append(len(x))
        facts = {"k": 4, "low": 3, "high": 6, "sure": "likely", "votes": {"peaks": 5}}
        return np.arange(len(x)) % 4, facts

    def missing(x):
        raise UserError("EVoC needs its package: pip install evoc")

    monkeypatch.setattr(num_clusters, "METHODS", {"ours": ours, "evoc": missing})
    words = ["--out", str(tmp_path), "--sets", "blobs", "--methods", "ours", "evoc"]
    assert num_clusters.main(words) == 0 and len(calls) == 2 * len(BLOBS)
    assert num_clusters.main(words) == 0 and len(calls) == 2 * len(BLOBS)
    text = (tmp_path / "table.md").read_text()
    assert "EVoC" not in text and "| blobs | 5 | 1 | yes | 4 | 3-6 | likely |" in text
    assert "| blobs, held out (5) | ours |" in text and "| likely | 5 | 0 % |" in text
    assert "| peaks | 2.43 (20 %) | 2.43 (20 %) |" in text
    assert "| always 7 | 2.28 (20 %) |" in text
    assert "evoc is left out: EVoC needs its package" in capsys.readouterr().err
