"""How far a pass over many images is, and how long it will take: told after a few batches."""

from __future__ import annotations

import time
from collections.abc import Callable

from deepclust.loggers.console import ConsoleLogger

# The first batches are slow: files are opened, kernels are chosen, threads are started.
WARM_UP = 2
# After fewer batches, or a shorter time, an estimate would be too rough to be of use.
PROBE_BATCHES = 5
PROBE_SECONDS = 4.0
# An estimate is corrected only where the new one is beyond these factors of the old one, and not
# more often than this.
CORRECTED_BELOW = 0.8
CORRECTED_ABOVE = 1.25
SECONDS_BETWEEN_ESTIMATES = 30.0


class Progress:
    """Moves the bar of a pass, and says how long the pass takes once a few batches are through.

    console: where both appear.
    total: images of the pass.
    clock: time in seconds; given by tests.
    stage: what the bar is called.
    rest: seconds of what was done before and comes after the pass, for an estimate of the whole.
    """

    def __init__(
        self,
        console: ConsoleLogger,
        total: int,
        clock: Callable[[], float] = time.monotonic,
        stage: str = "features",
        rest: float = 0.0,
    ) -> None:
        self.console = console
        self.total = total
        self.clock = clock
        self.stage = stage
        self.rest = rest
        self.started = clock()
        self.done = 0
        self.batches = 0
        # time and images at the end of the warm-up, from where the rate is measured
        self.warm_time = self.started
        self.warm_done = 0
        # time of the last estimate and the seconds that it gave for the whole
        self.last_estimate: tuple[float, float] | None = None

    def step(self, count: int) -> None:
        """Adds a batch of `count` images that is done."""
        now = self.clock()
        self.done += count
        self.batches += 1
        if self.batches <= WARM_UP:
            self.warm_time = now
            self.warm_done = self.done
            return
        seconds = now - self.warm_time
        # a clock may stand still between two batches
        rate = (self.done - self.warm_done) / max(seconds, 1e-9)
        if self.batches > PROBE_BATCHES and seconds >= PROBE_SECONDS:
            self._estimate(now, rate)
        metrics = {
            "stage_step": self.done,
            "stage_steps": self.total,
            "images_per_second": rate,
        }
        self.console.log(metrics, self.done, self.stage)

    def _estimate(self, now: float, rate: float) -> None:
        """Says how long it will take; again only if it turns out otherwise by a fifth or more."""
        remaining = self.total - self.done
        left = remaining / rate
        whole = now - self.started + left + self.rest
        if self.last_estimate:
            last_time, last_whole = self.last_estimate
            if CORRECTED_BELOW < whole / last_whole < CORRECTED_ABOVE:
                return
            if now - last_time < SECONDS_BETWEEN_ESTIMATES:
                return
        text = f"about {clock_time(left)} (h:mm:ss) for {remaining:,} images, {rate:,.0f} a second"
        if self.last_estimate:
            text = f"now {text}"
        if self.rest:
            text += f"; with all else about {clock_time(whole)} in all"
        self.last_estimate = (now, whole)
        self.console.message(text)

    def finish(self) -> None:
        """Takes the bar down."""
        self.console.finish("finished")


def clock_time(seconds: float) -> str:
    """The duration as h:mm:ss, rounded to whole seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
