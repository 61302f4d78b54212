"""The time that is announced grows with the work, and follows the machine."""

from __future__ import annotations

import pytest

from deepclust.collection import estimate as speed


def test_more_work_takes_longer_and_a_slower_machine_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "slowness", lambda: 1.0)
    small, large = speed.seconds_for(400, 10), speed.seconds_for(50_000, 10)
    assert small < large < speed.seconds_for(50_000, None)
    assert speed.seconds_for(50_000, 10, derived=True) < large
    monkeypatch.setattr(speed, "slowness", lambda: 3.0)
    assert speed.seconds_for(400, 10) == pytest.approx(3 * small)


def test_the_probe_is_short_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(ticks)))
    assert speed.slowness() == 5.0 and next(ticks) < 10
