"""Long tails made of balanced sets: labels decide which images are kept, and nothing else."""

from __future__ import annotations

import numpy as np

from deepclust.data.image_set import ImageSet
from deepclust.errors import UserError

SEED = 0
"""Fixed, so that a set and its imbalance name one benchmark; the reference's."""


def tail_counts(num_images: int, num_classes: int, imbalance: float) -> list[int]:
    """Images kept of each class: int(n r^(c / (C - 1))) with r = 1 / imbalance, so from n down to about n / imbalance.

    CIFAR-100 with its 500 images a class and imbalance 100: 10,847 in all (Cao et al. 2019; P2OT, section 5.1).
    """
    ratio = 1 / imbalance
    return [int(num_images * ratio ** (place / (num_classes - 1))) for place in range(num_classes)]


def long_tail(images: ImageSet, imbalance: float) -> ImageSet:
    """A part of a labelled set whose largest class has `imbalance` times the images of its smallest.

    n of `tail_counts` is the size of the smallest class. Classes shrink in the order of their names; each is shuffled
    and keeps a prefix, in one stream of NumPy's RandomState, as the reference draws them. Rows stay in their order.
    Raises UserError without labels, or where a class would be left without images.
    """
    if images.classes is None:
        raise UserError(f"data.imbalance={imbalance:g}: {images.name} has no labels to thin it by; leave it out.")
    names, sizes = np.unique(images.classes, return_counts=True)
    counts = tail_counts(int(sizes.min()), len(names), imbalance)
    if counts[-1] < 1:
        most = f"give at most {sizes.min()}, the size of the smallest class"
        raise UserError(f"data.imbalance={imbalance:g}: the last class would have no image; {most}")
    random, kept = np.random.RandomState(SEED), []
    for name, count in zip(names, counts):
        rows = np.flatnonzero(images.classes == name)
        random.shuffle(rows)
        kept.append(rows[:count])
    return images.select(np.sort(np.concatenate(kept)))
