"""The comparison of heads: what it runs, what it reads again, what it writes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.quality import heads
from deepclust.config.compose import options
from deepclust.config.load import load


@pytest.fixture
def started(monkeypatch):
    """The words of every run that was started; runs take no time, and seed s has 90 + s per cent.

    `simclr` has no clusters of its own, `scan` fails.
    """
    started = []

    def run(command, **_):
        words = dict(word.split("=", 1) for word in command[2:])
        started.append(words)
        if words["head"] == "scan":
            return SimpleNamespace(returncode=2, stderr="scan: no\nmore", stdout="")
        value = 0.9 + int(words["seed"]) / 100
        stage = {"acc": value, "nmi": value, "ari": value, "knn_probe": 0.5, "linear_probe": 0.25}
        stage |= {"seconds": 10.0}
        stage |= {"reads": "k-means"} if words["head"] == "simclr" else {}
        kmeans = {"acc": 0.8, "nmi": 0.7}
        summary = {"num_images": 100, "stages": {"main": stage}, "baselines": {"kmeans": kmeans}}
        folder = Path(words["run.dir"])
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "status.json").write_text(json.dumps({"state": "finished"}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(heads.subprocess, "run", run)
    return started


def test_every_head_of_the_configuration_is_run_and_its_words_are_valid(started, tmp_path):
    assert heads.main(["--seeds", "1", "--out", str(tmp_path), "backbone.width=8"]) == 1
    assert [words["head"] for words in started] == sorted(name for name, _ in options("head"))
    for words in started:
        load([f"{key}={value}" for key, value in words.items()])


def test_the_table_the_csv_and_the_readme(started, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{heads.BEGIN}\nold\n{heads.END}\nafter\n")
    words = ["--heads", "simclr,swav,scan", "--budget", "250", "--out", str(tmp_path / "out")]
    words += ["--readme", str(readme)]
    assert heads.main([*words, "--write-readme"]) == 1
    shown = capsys.readouterr().out
    row = "| simclr | – | – | – | 80.0 (80.0–80.0) | 70.0 (70.0–70.0) | – | 50.0 (50.0–50.0) |"
    assert row in shown
    assert "| swav | 91.0 (90.0–92.0) | 91.0 (90.0–92.0) |" in shown
    assert shown.rstrip().endswith("scan failed: scan: no")
    assert "| 10 (10–10) | 20 |" in shown  # 2 passes of 100 images in 10 s
    assert (tmp_path / "out/compare.md").read_text() == shown
    with open(tmp_path / "out/compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    runs = [(row["head"], row["seed"]) for row in rows]
    assert runs == [(head, str(seed)) for head in ("simclr", "swav") for seed in range(3)]
    assert rows[3]["acc"] == "0.9" and rows[0]["acc"] == ""
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "old" not in text and shown.strip() in text
    assert "`python -m benchmarks.quality.heads --heads simclr,swav,scan --budget 250" in text
    assert "median of 3" in text and "--write-readme" not in text
    heads.main([*words, "--write-readme"])
    assert readme.read_text() == text
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="add the two lines"):
        heads.main([*words, "--write-readme"])


def test_the_committed_table_stands_between_markers_of_the_page_that_is_written():
    text = heads.PAGE.read_text(encoding="utf-8")
    assert heads.BEGIN in text and heads.END in text


def test_finished_runs_are_read_stopped_ones_go_on_and_changed_ones_start_over(started, tmp_path):
    words = ["--heads", "swav", "--seeds", "2", "--out", str(tmp_path)]
    assert heads.main(words) == 0 and len(started) == 2
    assert heads.main([*words, "--statistic", "mean"]) == 0 and len(started) == 2
    assert "90.5 ± 0.7" in (tmp_path / "compare.md").read_text()
    (tmp_path / "digits-swav-1/status.json").write_text(json.dumps({"state": "preempted"}))
    heads.main(words)
    assert [words["seed"] for words in started] == ["0", "1", "1"]
    assert "run.new" not in started[-1]
    heads.main([*words, "--budget", "100"])
    assert len(started) == 5 and started[-1]["run.new"] == "true"


def test_a_real_run(tmp_path):
    words = ["--heads", "moco", "--seeds", "1", "--budget", "1797", "--out", str(tmp_path)]
    words += ["backbone.width=8", "trainer.num_workers=0", "trainer.num_threads=1"]
    words += ["eval.probes=false"]
    command = [sys.executable, "-m", "benchmarks.quality.heads", *words]
    done = subprocess.run(command, cwd=heads.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2].startswith("| moco | – | – | – |")
