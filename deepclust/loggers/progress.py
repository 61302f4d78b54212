"""How far a pass over many images is, and how long it will take: said after a few batches."""

from __future__ import annotations

import time
from collections.abc import Callable

from deepclust.loggers.console import ConsoleLogger

WARM_UP, PROBE_BATCHES, PROBE_SECONDS = 2, 5, 4.0
SECONDS_BETWEEN_ESTIMATES = 30.0


class Progress:
    """The bar, and how long it takes once a few batches are through.

    clock: seconds. stage: what the bar says. rest: seconds of what was before and comes behind.
    """

    def __init__(
        self,
        console: ConsoleLogger,
        total: int,
        clock: Callable[[], float] = time.monotonic,
        stage: str = "features",
        rest: float = 0.0,
    ) -> None:
        self.console, self.total, self.clock, self.stage, self.rest = console, total, clock, stage, rest
        self.started = clock()
        self.done = self.batches = 0
        self.began = (self.started, 0)
        self.told: tuple[float, float] | None = None

    def step(self, count: int) -> None:
        """A batch of `count` images is done."""
        now = self.clock()
        self.done += count
        self.batches += 1
        if self.batches <= WARM_UP:  # the first ones warm up
            self.began = (now, self.done)
            return
        seconds, images = now - self.began[0], self.done - self.began[1]
        rate = images / max(seconds, 1e-9)
        if self.batches > PROBE_BATCHES and seconds >= PROBE_SECONDS:
            self._estimate(now, rate)
        where = {"stage_step": self.done, "stage_steps": self.total, "images_per_second": rate}
        self.console.log(where, self.done, self.stage)

    def _estimate(self, now: float, rate: float) -> None:
        """Says how long it will take, and again where it turns out otherwise by a fifth."""
        left = (self.total - self.done) / rate
        whole = now - self.started + left + self.rest
        if self.told and (0.8 < whole / self.told[1] < 1.25 or now - self.told[0] < SECONDS_BETWEEN_ESTIMATES):
            return
        text = f"{'now ' if self.told else ''}about {clock_time(left)} (h:mm:ss) for {self.total - self.done:,} images"
        text += f", {rate:,.0f} a second"
        if self.rest:
            text += f"; with all else about {clock_time(whole)} in all"
        self.told = (now, whole)
        self.console.message(text)

    def finish(self) -> None:
        """Takes the bar down."""
        self.console.finish("finished")


def clock_time(seconds: float) -> str:
    """h:mm:ss"""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
