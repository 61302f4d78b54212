"""Cases of `benchmarks.quality.num_clusters`: features whose number of clusters is known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.quality.common import features_of

SETS = ("clothing", "digits", "digits-simclr", "fashion-lite0", "fashion-simclr")
"""Sets of ten classes, of which subsets are drawn as well; the two that are files must be given."""
LONG_TAILS = ("digits-10", "fashion_mnist-10")
SIMCLR = {
    "digits-simclr": "digits-1",
    "fashion-simclr": "fashion_mnist-1",
    "digits-10": "digits-10",
    "fashion_mnist-10": "fashion_mnist-10",
}
"""Set to BASE-IMBALANCE of the SimCLR stage that its features are of."""
SUBSETS = (4, 6, 8)
BLOBS = {3: 16, 5: 32, 8: 64, 20: 128, 40: 24}
"""Numbers of blobs and their dimensions in the draw that was looked at; 48 in the other."""
MAX_ROWS = {"subset": 1500, "whole": 3500}


@dataclass(frozen=True)
class Case:
    """A set and how many of its classes."""

    data: str
    classes: int
    draw: int = 0
    """Which of the classes; of blobs, which points."""

    @property
    def held_out(self) -> bool:
        """Whether it was left alone while the estimate was built."""
        if self.data in ("digits", "fashion-lite0"):
            return False
        other_set = self.data not in ("clothing", "blobs", "unequal blobs")
        return other_set or self.draw == 1 or self.classes == 10

    def __str__(self) -> str:
        return f"{self.data}_{self.classes}_{self.draw}"


def cases(files: dict[str, str]) -> list[Case]:
    """All cases that can be had.

    files: of features, by name of the set.
    """
    of_ten: list[str] = []
    for name in (*SETS, *(name for name in files if name not in SETS)):
        if name in files or name == "digits" or name in SIMCLR:
            of_ten.append(name)
    result: list[Case] = []
    for name in of_ten:
        result.append(Case(name, 10))
        result += [Case(name, classes, draw) for classes in SUBSETS for draw in (0, 1)]
    result += [Case(name, 10) for name in LONG_TAILS]
    for kind in ("blobs", "unequal blobs"):
        result += [Case(kind, k, draw) for k in BLOBS for draw in (0, 1)]
    return result


def rows_of(case: Case, out: Path, file: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, D) float32 and classes (n,) of a case.

    case: set, number of classes and draw.
    out: of the comparison, where features of SimCLR are kept.
    file: of the set's features, if it is one.
    """
    if "blobs" in case.data:
        return blobs(case.classes, case.data == "blobs", case.draw)
    x, classes = whole(case.data, out, file)
    names = np.unique(classes)
    is_subset = case.classes < len(names)
    if is_subset:
        # Each set has draws of its own: else digits and clothes would lose the same classes.
        number = SETS.index(case.data) + 1 if case.data in SETS else len(SETS) + len(case.data)
        random = np.random.default_rng([number, case.classes, case.draw])
        kept = random.permutation(len(names))[: case.classes]
        drawn = np.isin(classes, names[kept])
        x = x[drawn]
        classes = classes[drawn]
    most = MAX_ROWS["subset" if is_subset else "whole"]
    if len(x) > most:
        rows = np.sort(np.random.default_rng(0).permutation(len(x))[:most])
        x = x[rows]
        classes = classes[rows]
    return x, classes


@cache
def whole(name: str, out: Path, file: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Features and classes of the first 5,000 images of a set.

    name: of the set.
    out: of the comparison, where features of SimCLR are kept.
    file: of the set's features, if it is one.
    """
    if name == "digits" and file is None:
        from sklearn.datasets import load_digits

        pixels, classes = load_digits(return_X_y=True)
        return pixels.astype(np.float32), classes
    features, classes = features_of(SIMCLR.get(name, name), 0, out, file)
    # The estimate looks at no more rows either.
    return features.numpy()[:5000], classes[:5000]


def blobs(num_clusters: int, equal: bool, draw: int) -> tuple[np.ndarray, np.ndarray]:
    """Some 1,500 points (n, D) float32 of Gaussians, and whose they are (n,).

    Centres and spreads are drawn too.

    num_clusters: a key of `BLOBS`.
    equal: as many points each; else their numbers fall to a twelfth.
    draw: 0 or 1; the second has other dimensions and larger spreads.
    """
    # 8 and 10 keep the streams of equal and unequal blobs apart.
    random = np.random.default_rng([num_clusters, 8 if equal else 10, draw])
    dim = 48 if draw else BLOBS[num_clusters]
    sizes = np.geomspace(1, 1 if equal else 1 / 12, num_clusters)
    sizes = (1500 * sizes / sizes.sum()).round().astype(int)
    # Blobs of a point or two would be no clusters for anybody.
    sizes = np.maximum(sizes, 8)
    centers = random.normal(size=(num_clusters, dim))
    spreads = random.uniform(0.5, 1.0, size=num_clusters)
    if draw:
        spreads = spreads * 1.25
    labels = np.repeat(np.arange(num_clusters), sizes)
    noise = random.normal(size=(len(labels), dim)) * spreads[labels, None]
    return (centers[labels] + noise).astype(np.float32), labels
