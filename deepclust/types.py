"""Named ranges for constructor signatures, and the number that stands for no cluster.

A signature is the schema of its part of the configuration. `config/signature.py` reads these names
from the source by `ast`, so a bad value is refused before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """Closed or open bounds of a number; a bound that is None does not bind."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            value == value
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        bounds = ((">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt))
        return " and ".join(f"{sign} {bound:.12g}" for sign, bound in bounds if bound is not None)


Positive = Annotated[float, Range(gt=0, lt=float("inf"))]
NonNegative = Annotated[float, Range(ge=0, lt=float("inf"))]
Weight = Annotated[float, Range(gt=0)]
Share = Annotated[float, Range(gt=0, le=1)]
Imbalance = Annotated[float, Range(ge=1, lt=float("inf"))]
Fraction = Annotated[float, Range(ge=0, le=1)]
Decay = Annotated[float, Range(ge=0, lt=1)]
Count = Annotated[int, Range(ge=1)]
Natural = Annotated[int, Range(ge=0)]

ALIASES = {
    "Positive": Positive,
    "NonNegative": NonNegative,
    "Weight": Weight,
    "Share": Share,
    "Imbalance": Imbalance,
    "Fraction": Fraction,
    "Decay": Decay,
    "Count": Count,
    "Natural": Natural,
}

NOISE = -1
"""The cluster of images that are unlike all others, wherever clusters are numbers."""
