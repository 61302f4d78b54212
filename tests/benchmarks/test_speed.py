"""Speed benchmarks: what is measured and printed, and that small ones run."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.speed import harness, kmeans, ops, views
from benchmarks.speed.folder import announced_seconds


def test_every_contestant_runs_once_more_than_counts_and_returns_its_last_result():
    calls = {"ours": 0, "other": 0}

    def run(name: str) -> int:
        calls[name] += 1
        return calls[name]

    timings = harness.measure({name: lambda n=name: run(n) for name in calls}, 4)
    assert calls == {"ours": 5, "other": 5}
    assert [timing.result for timing in timings.values()] == [5, 5]


def test_the_median_leaves_out_the_first_round(monkeypatch):
    clock = iter([0, 100, 100, 101, 101, 103, 103, 106])  # 100, 1, 2 and 3 seconds
    monkeypatch.setattr(harness.time, "process_time", lambda: next(clock))
    timing = harness.measure({"ours": lambda: None}, 3)["ours"]
    assert timing.seconds == 2 and timing.spread == pytest.approx((3 - 1) / 2)


def test_ratios_are_per_pass_to_ours_and_to_the_fastest_floor(capsys):
    seconds = {"ours": 0.4, "other": 0.9, "floor a": 0.1, "floor b": 0.2}
    timings = {name: harness.Timing(value, 0.0, None) for name, value in seconds.items()}
    harness.print_timings("title", timings, {"ours": 2, "other": 3}, {"other": "a note"})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "title"
    ratios = re.findall(r"([\d.]+) ms +([\d.]+) x ours +([\d.]+) x floor", "\n".join(lines))
    assert [tuple(map(float, row)) for row in ratios] == [
        (200.0, 1.0, 2.0),
        (300.0, 1.5, 3.0),
        (100.0, 0.5, 1.0),
        (200.0, 1.0, 2.0),
    ]
    assert lines[2].endswith("a note")


def test_kmeans_contestants_agree_on_the_inertia(monkeypatch, capsys):
    monkeypatch.setattr(kmeans, "SHAPES", {"tiny": (600, 16, 5, 3)})
    monkeypatch.setattr(
        "sys.argv", ["ops", "--only", "lloyd", "--shapes", "tiny", "--repeats", "1"]
    )
    threads = torch.get_num_threads()
    try:
        ops.main()
    finally:
        torch.set_num_threads(threads)
    inertias = re.findall(r"(ours|faiss|scikit-learn) .*inertia ([\d.]+)", capsys.readouterr().out)
    assert ("scikit-learn", "1.000000") in inertias and ("ours", "1.000000") in inertias


def test_engines_make_views_of_one_shape():
    case = views.CASES[3]
    speed = views.rates(case, 4, 1)
    assert list(speed) == ["batch", "sample", "torchvision PIL", "torchvision tensors"]
    assert all(value > 0 for value in speed.values())
    small = views.photo_like(3, case.channels, case.side)
    assert small.shape == (3, 1, 8, 8) and small.dtype == torch.uint8


def test_the_announced_time_is_read_off_the_output():
    assert announced_seconds("x\nabout 1:02:03 in all, …") == 3723
    assert announced_seconds("nothing") is None
