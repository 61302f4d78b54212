"""The collapse alarm: warnings when a clustering collapses, with what to try."""

from __future__ import annotations

import math
from collections.abc import Callable

ALARMS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    # Within 1 % of the loss of a head that answers 1/K everywhere.
    "cross_entropy": (
        lambda value, k: abs(value - math.log(k)) <= 0.01 * math.log(k),
        "the loss has stayed at {value:.3f} = ln {k:.4g}: every image is as likely in every "
        "cluster, nothing is being learnt. Try an optim.lr that fits the batch, a lower "
        "temperature or epsilon, a head initialised from k-means (init=kmeans); where prototypes "
        "are learnt, keep them frozen for longer (freeze_steps), take about ten for each expected "
        "cluster, fewer crops, or a queue that is shorter or starts later.",
    ),
    # Half of the clusters are empty: with a few samples for each, chance leaves far fewer.
    "clusters_used": (
        lambda value, k: 2 * value <= k,
        "only {value} of {k:.4g} clusters are in use. Try a larger entropy weight, a batch of "
        "several times num_clusters, a head initialised from k-means (init=kmeans), or fewer "
        "clusters.",
    ),
    # As if √K equally large clusters held everything.
    "assignment_entropy": (
        lambda value, k: value < 0.5 * math.log(k),
        "a few of {k:.4g} clusters take nearly all images (entropy of cluster sizes: {value:.2f} "
        "nats). Try a larger entropy weight or a larger batch; where such sizes are expected, a "
        "method for imbalanced data.",
    ),
    # Within 5 % of the confidence of a head that answers 1/K everywhere.
    "mean_confidence": (
        lambda value, k: value * k < 1.05,
        "the mean confidence is {value:.3f}, hardly above 1/{k:.4g}: the head tells no image from "
        "another. Try a larger optim.lr, more epochs, or a head initialised from k-means "
        "(init=kmeans).",
    ),
}
"""Figure → (whether a value is bad for K clusters, the warning)."""


class CollapseAlarm:
    """Watches the figures of one stage; every alarm is raised once.

    A fresh head looks collapsed for a few steps, so a batch's figure must be bad for several checks
    in a row; figures of the whole data set count at once. Make a new alarm for each stage.

    Args:
        stage: its name, for the warnings.
        patience: bad checks in a row that raise an alarm.
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
        """New warnings, each one line; usually none. A figure that is None is not looked at.

        Args:
            step: of the training, for the warnings.
            num_clusters: K of the figures; of several sets of prototypes the geometric mean.
            cross_entropy: in nats, towards targets over K clusters.
            clusters_used: clusters that got a sample, among at least a few times K samples.
            assignment_entropy: in nats, of the distribution of samples over clusters (ln K = equal,
                0 = one takes all).
            mean_confidence: mean largest probability of a sample.
            evaluated: whether the figures are of the whole data set.
        """
        figures = {
            "cross_entropy": cross_entropy,
            "clusters_used": clusters_used,
            "assignment_entropy": assignment_entropy,
            "mean_confidence": mean_confidence,
        }
        stage = f"stage {self.stage}, " if self.stage else ""
        prefix = f"Collapse alarm, {stage}step {step}: "
        messages = []
        for name, value in figures.items():
            is_bad, words = ALARMS[name]
            # One cluster cannot collapse.
            if value is None or num_clusters < 2:
                continue
            if self._due(name, is_bad(value, num_clusters), evaluated):
                messages.append(prefix + words.format(value=value, k=num_clusters))
        return messages

    def _due(self, name: str, is_bad: bool, evaluated: bool) -> bool:
        """Counts bad checks in a row; True for the one that raises the alarm, never after it."""
        if self._streaks[name] >= self.patience:
            return False
        if not is_bad:
            self._streaks[name] = 0
        elif evaluated:
            self._streaks[name] = self.patience
        else:
            self._streaks[name] += 1
        return self._streaks[name] >= self.patience
