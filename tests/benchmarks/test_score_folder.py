"""Scores of a toy run whose clusters are its classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import score_folder
from deepclust.collection.derived import Derived
from deepclust.collection.history import relabelled
from deepclust.collection.landmarks import FILE, Landmarks
from tests.collection.toys import toy_run


def test_clusters_that_are_the_classes_score_full_and_merged_ones_less(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = toy_run(tmp_path)
    derived = Derived(run.store, run.facts["backbone"])
    x = derived.x.numpy()[derived.landmarks].astype(np.float16)
    trust = np.ones(len(x), dtype=np.float32)
    rows = derived.rows[derived.landmarks]
    Landmarks(rows, x, trust, derived.basis.numpy()).save(run.path / FILE)
    scores = score_folder.scores_of(run)
    assert scores["acc"] == scores["macro_acc"] == 1 and scores["nmi"] == pytest.approx(1)
    state = run.state()
    merged = np.where(state.cluster == 2, 0, state.cluster)
    run.history.push("merge", relabelled(state, merged))
    assert 0.5 < score_folder.scores_of(run)["acc"] < 0.8
    assert score_folder.main([str(run.path)]) == 0 and "ece" in capsys.readouterr().out
