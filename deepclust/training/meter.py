"""Means of the metrics that steps report, over the interval between two log lines."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepclust.runtime.distributed import World


class Meter:
    """Means over all rows of all ranks since the last flush, and images per second.

    world: the ranks and this rank's device.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._sums: dict[str, Tensor] = {}
        self._rows = 0
        self._since = time.perf_counter()

    def start(self) -> None:
        """Starts the clock of the first interval."""
        self._since = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """This rank's sums of the unfinished interval, for a checkpoint.

        A run that is stopped within an interval logs the mean over all of it after it is resumed.
        """
        return {"sums": dict(self._sums), "rows": self._rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the interval that `state_dict` was taken in."""
        device = self.world.device
        self._sums = {name: value.to(device) for name, value in state["sums"].items()}
        self._rows = state["rows"]

    def add(self, sums: Mapping[str, Tensor], rows: int) -> None:
        """Adds the metrics of a step.

        sums: name to a scalar tensor, the sum over this rank's rows.
        rows: number of this rank's rows.
        """
        # sums stay on the device: reading them at every step would make it wait for the device
        for name, value in sums.items():
            if name in self._sums:
                value = self._sums[name] + value
            self._sums[name] = value
        self._rows += rows

    def flush(self) -> dict[str, float]:
        """Means over the rows of all ranks, and images per second; the next interval begins.

        Every rank must call it.
        """
        # sorted, so that ranks whose metrics came in another order add the same ones
        names = sorted(self._sums)
        rows = torch.tensor(float(self._rows), dtype=torch.float64, device=self.world.device)
        # one message for all sums and the rows; float64, as float32 counts rows only up to 2^24
        total = self.world.sum(torch.stack([*(self._sums[name].double() for name in names), rows]))
        now = time.perf_counter()
        means = {name: float(total[i] / total[-1]) for i, name in enumerate(names)}
        means["images_per_second"] = float(total[-1]) / (now - self._since)
        self._sums = {}
        self._rows = 0
        self._since = now
        return means
