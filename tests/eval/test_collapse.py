"""The alarm sounds on figures of a collapsed clustering, once, and not on those of a sound one."""

from __future__ import annotations

import math

import pytest

from deepclust.eval.collapse import CollapseAlarm

LN10 = math.log(10)
SOUND = {
    "cross_entropy": 0.9,
    "clusters_used": 10,
    "assignment_entropy": 2.2,
    "mean_confidence": 0.8,
}
COLLAPSED = [
    ({"cross_entropy": LN10}, "ln 10"),
    ({"clusters_used": 1}, "only 1 of 10"),
    ({"clusters_used": 5}, "only 5 of 10"),
    ({"assignment_entropy": 0.01}, "nearly all images"),
    ({"mean_confidence": 0.1}, "mean confidence"),
]


def test_a_sound_run_is_silent() -> None:
    alarm = CollapseAlarm("scan")
    assert not any(alarm.check(step, 10, **SOUND) for step in range(100))
    assert alarm.check(100, 10, **SOUND, evaluated=True) == []
    assert alarm.check(101, 10) == []


@pytest.mark.parametrize(("figures", "words"), COLLAPSED)
def test_each_alarm_says_what_and_what_to_try_once(figures: dict[str, float], words: str) -> None:
    alarm = CollapseAlarm("scan", patience=3)
    heard = [alarm.check(step, 10, **figures) for step in range(8)]
    assert [len(messages) for messages in heard] == [0, 0, 1, 0, 0, 0, 0, 0]
    assert (
        words in heard[2][0]
        and "Try" in heard[2][0]
        and "scan" in heard[2][0]
        and "step 2" in heard[2][0]
    )
    assert "\n" not in heard[2][0]
    assert alarm.check(9, 10, **figures, evaluated=True) == []


@pytest.mark.parametrize(("figures", "words"), COLLAPSED)
def test_figures_of_the_whole_data_set_count_at_once(figures: dict[str, float], words: str) -> None:
    assert words in CollapseAlarm().check(1, 10, **figures, evaluated=True)[0]


def test_a_good_figure_starts_the_count_again() -> None:
    alarm = CollapseAlarm(patience=2)
    values = [LN10, 1.0, LN10, LN10]
    assert [
        len(alarm.check(step, 10, cross_entropy=value)) for step, value in enumerate(values)
    ] == [0, 0, 0, 1]


def test_one_cluster_cannot_collapse() -> None:
    alarm = CollapseAlarm(patience=1)
    assert (
        alarm.check(
            0, 1, cross_entropy=0.0, clusters_used=1, assignment_entropy=0.0, mean_confidence=1.0
        )
        == []
    )
