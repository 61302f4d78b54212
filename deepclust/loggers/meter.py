"""Means of what a step reports, over the steps between two log lines."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepclust.distributed import World


class Meter:
    """Means over all rows of all ranks since the last flush, and images per second."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._sums: dict[str, Tensor] = {}
        self._rows = 0
        self._since = time.perf_counter()

    def start(self) -> None:
        """The clock of the first interval starts."""
        self._since = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """The interval that a stop cuts in two, for this rank: the line that is logged later must hold all of it."""
        return {"sums": dict(self._sums), "rows": self._rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the interval that `state_dict` was taken in."""
        self._sums = {name: value.to(self.world.device) for name, value in state["sums"].items()}
        self._rows = state["rows"]

    def add(self, sums: Mapping[str, Tensor], rows: int) -> None:
        """Metrics of a step, each summed over this rank's rows."""
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._rows += rows

    def flush(self) -> dict[str, float]:
        """The means; the next interval begins. Every rank must call it."""
        names = sorted(self._sums)
        rows = torch.tensor(float(self._rows), dtype=torch.float64, device=self.world.device)
        total = self.world.sum(torch.stack([*(self._sums[name].double() for name in names), rows]))
        now = time.perf_counter()
        means = {name: float(total[i] / total[-1]) for i, name in enumerate(names)}
        means["images_per_second"] = float(total[-1]) / (now - self._since)
        self._sums, self._rows, self._since = {}, 0, now
        return means
