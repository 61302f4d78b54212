"""Whole small runs of SwAV and DeepCluster-v2: stopped anywhere, they end the same; both figures
are in the table.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepclust.config.load import load
from deepclust.data.datasets import digits
from deepclust.training.recipe import train
from tests.runs import outcome, small_data, status, stop_at

WORDS = (
    "head.num_prototypes=[4,8]",
    "head.hidden_dim=16",
    "head.embedding_dim=8",
    "trainer.batch_size=20",
    "trainer.epochs=3",
    "trainer.num_images=null",
    "trainer.num_threads=1",
    "trainer.num_workers=0",
    "trainer.log_every_steps=1",
    "backbone.width=8",
    "optim.warmup_steps=2",
    "checkpoint.every_steps=2",
    "eval.baselines=[kmeans]",
    "eval.probes=false",
    "eval.gallery_images=2",
    "logger.console=false",
    "num_clusters=4",
)
HEADS = {
    "swav": ["head.queue_length=30", "head.num_local=1"],
    "deepcluster_v2": ["trainer.ema=0.9"],
}


def run(head: str, folder: Path) -> int:
    config = load([f"head={head}", *HEADS[head], *WORDS, f"run.dir={folder}"])
    return train(config, small_data(labels=digits().train.classes[:60].tolist()))


@pytest.mark.parametrize("head", HEADS)
def test_a_run_stopped_again_and_again_ends_as_if_nobody_had(head, tmp_path, monkeypatch):
    """Looks come after each step and before each clustering and evaluation."""
    assert run(head, tmp_path / "whole") == 0
    for polls in (5, 3):
        with monkeypatch.context() as patch:
            stop_at(patch, polls)
            assert run(head, tmp_path / "run") == 143
        assert status(tmp_path / "run")["state"] == "preempted"
    assert run(head, tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (
        0 < summary["stages"]["main"]["acc"] <= 1 and 0 < summary["baselines"]["kmeans"]["acc"] <= 1
    )
    assert "k-means, same features" in (tmp_path / "run/log.txt").read_text()


def test_what_a_head_has_to_say_is_in_the_log(tmp_path):
    config = load(["head=swav", *WORDS, "head.num_prototypes=[40]", f"run.dir={tmp_path}/run"])
    assert train(config, small_data()) == 0
    assert "cannot be balanced over 40 prototypes" in (
        tmp_path / "run/log.txt"
    ).read_text().replace("\n", " ")
