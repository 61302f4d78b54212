"""Long-tailed subsets of balanced data sets: labels decide which images are kept, nothing else."""

from __future__ import annotations

import numpy as np

from deepclust.data.image_set import ImageSet
from deepclust.errors import UserError

SEED = 0
"""Fixed, so that a data set and its imbalance name one benchmark; the seed of P2OT's code."""


def tail_counts(num_images: int, num_classes: int, imbalance: float) -> list[int]:
    """Number of images kept of each class c: int(n r^(c / (C - 1))) with r = 1 / imbalance.

    The counts fall exponentially from n to about n / imbalance. CIFAR-100 with its 500 images a
    class and imbalance 100 keeps 10,847 in all (Cao et al. 2019; P2OT, section 5.1).

    num_images: n, images of the first and largest class.
    num_classes: C, at least 2.
    imbalance: ratio of the largest class to the smallest.
    """
    # the order of these float operations is the reference's: int() cuts, so a last bit may matter
    ratio = 1 / imbalance
    return [int(num_images * ratio ** (rank / (num_classes - 1))) for rank in range(num_classes)]


def long_tail(images: ImageSet, imbalance: float) -> ImageSet:
    """The subset of a labelled set whose largest class has `imbalance` times the smallest's images.

    The largest class keeps as many images as the smallest class of the full set has. Classes
    shrink in the order of their indices (sorted names). Rows stay in their order.

    images: a set with classes.
    imbalance: see `tail_counts`.

    Raises:
        UserError: the set has no labels, or a class would be left without images.
    """
    if images.classes is None:
        raise UserError(
            f"data.imbalance={imbalance:g}: {images.name} has no labels to thin it by; leave it"
            " out."
        )
    classes, sizes = np.unique(images.classes, return_counts=True)
    counts = tail_counts(int(sizes.min()), len(classes), imbalance)
    if counts[-1] < 1:
        most = f"give at most {sizes.min()}, the size of the smallest class"
        raise UserError(f"data.imbalance={imbalance:g}: the last class would have no image; {most}")
    # One legacy generator shuffles class after class and a prefix of each is kept: as the
    # reference draws its subset, whose images are then the same.
    random = np.random.RandomState(SEED)
    kept = []
    for label, count in zip(classes, counts):
        rows = np.flatnonzero(images.classes == label)
        random.shuffle(rows)
        kept.append(rows[:count])
    return images.select(np.sort(np.concatenate(kept)))
