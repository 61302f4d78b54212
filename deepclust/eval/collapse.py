"""The collapse alarm: says in words when a clustering is dying, and what to try."""

from __future__ import annotations

import math
from collections.abc import Callable

ALARMS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "cross_entropy": (
        lambda value, k: abs(value - math.log(k)) <= 0.01 * math.log(k),
        "the loss has stayed at {value:.3f} = ln {k:.4g}: every image is as likely in every cluster, nothing "
        "is being learnt. Try an optim.lr that fits the batch, a lower temperature or epsilon, a head initialised from "
        "k-means (init=kmeans); where prototypes are learnt, keep them frozen for longer (freeze_steps), take about "
        "ten for each expected cluster, fewer crops, or a queue that is shorter or starts later.",
    ),
    "clusters_used": (
        lambda value, k: 2 * value <= k,
        "only {value} of {k:.4g} clusters are in use. Try a larger entropy weight, a batch of several times "
        "num_clusters, a head initialised from k-means (init=kmeans), or fewer clusters.",
    ),
    "assignment_entropy": (
        lambda value, k: value < 0.5 * math.log(k),
        "a few of {k:.4g} clusters take nearly all images (entropy of cluster sizes: {value:.2f} nats). Try a larger "
        "entropy weight or a larger batch; where such sizes are expected, a method for imbalanced data.",
    ),
    "mean_confidence": (
        lambda value, k: value * k < 1.05,
        "the mean confidence is {value:.3f}, hardly above 1/{k:.4g}: the head tells no image from another. Try a "
        "larger optim.lr, more epochs, or a head initialised from k-means (init=kmeans).",
    ),
}
"""Figure to (is it bad at this value and K?, what to say)."""


class CollapseAlarm:
    """Watches one stage. Make a new one for each stage: every alarm is raised once.

    A fresh head looks collapsed for a few steps, so a batch's figure must be bad for `patience` checks in a row;
    figures of the whole data set (`evaluated`) count at once.
    """

    def __init__(self, stage: str = "", *, patience: int = 10) -> None:
        self.stage = stage
        self.patience = patience
        self._streaks = dict.fromkeys(ALARMS, 0)

    def check(
        self,
        step: int,
        num_clusters: float,
        *,
        cross_entropy: float | None = None,
        clusters_used: int | None = None,
        assignment_entropy: float | None = None,
        mean_confidence: float | None = None,
        evaluated: bool = False,
    ) -> list[str]:
        """New alarms, each one line; usually none. A figure that is None is not looked at.

        num_clusters: of what the figures are about; for several sets of prototypes at once the geometric mean.
        cross_entropy: in nats, towards targets over `num_clusters`. clusters_used: clusters that got a sample, counted
        over at least a few times `num_clusters` samples. assignment_entropy: in nats, of the distribution of samples
        over clusters (ln K = equal, 0 = one takes all). mean_confidence: mean largest probability of a sample.
        """
        figures = {
            "cross_entropy": cross_entropy,
            "clusters_used": clusters_used,
            "assignment_entropy": assignment_entropy,
            "mean_confidence": mean_confidence,
        }
        where = f"Collapse alarm, {f'stage {self.stage}, ' if self.stage else ''}step {step}: "
        messages = []
        for name, value in figures.items():
            is_bad, words = ALARMS[name]
            if value is None or num_clusters < 2:
                continue
            if self._due(name, is_bad(value, num_clusters), evaluated):
                messages.append(where + words.format(value=value, k=num_clusters))
        return messages

    def _due(self, name: str, is_bad: bool, evaluated: bool) -> bool:
        """Counts bad checks in a row; True on the one that raises the alarm, never again after it."""
        if self._streaks[name] >= self.patience:
            return False
        if not is_bad:
            self._streaks[name] = 0
        else:
            self._streaks[name] = self.patience if evaluated else self._streaks[name] + 1
        return self._streaks[name] >= self.patience
