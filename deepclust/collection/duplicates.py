"""Near-duplicates of a folder: the same file, the same pixels, or pictures that anybody would call
the same.

Three steps, of which each goes on with the representatives that the one before has left:

1. Files of equal content (SHA-256), where the store has hashes. 2. Equal perceptual hashes with
features of nearly the same direction (`SAME`): however many copies there are. 3. Pairs with close
features and a few different bits in their perceptual hashes; the more bits, the closer must the
   features be. All pairs of hashes are compared, so none is missed for having many neighbours. A
   group is a star: every member is close to the representative itself, so that chains of small
   changes end where the picture has become another one.

Neither measure would do alone: on photos of things before a plain wall the 64 bits are often close
by chance, and features of a network are close for two things of the same kind. How close is a
matter of the backbone, and the folder
tells: where pictures that are not alike have cosines beyond what is usual (`USUAL`), the cosines
asked for rise with them. An image without a perceptual hash (an older store) is only grouped with
files of the same content and with images of the very same features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from deepclust.data.perceptual import BITS, hash_bits

SIMILARITY = 0.85
DIFFERING = 12
"""Chosen on altered copies of clothing photos by `benchmarks/quality/duplicates.py`, which prints
what others would find.
"""
STRICTER = 0.6
"""Share of what cosines may lack of 1 that is gone at the last bit that may differ."""
USUAL = 0.76
"""What 999 of 1,000 pairs of unlike photos stay below in the features that the thresholds were
chosen on.
"""
UNLIKE = 17
"""Bits from which on two pictures are taken for unlike."""
SAMPLE, ENOUGH = 512, 1000
"""Images that are paired to see how close unlike ones come, and pairs from which that can be told.
"""
SAME = 0.999
"""Cosine of features that were computed from the same pixels, with room for the rounding of
bfloat16.
"""
ROUNDS = 16
"""Pictures that one perceptual hash may stand for before step 3 has to tell them apart."""
AT_ONCE = 8_000_000
"""Pairs that are compared at a time, in up to `CHUNK` rows."""
CHUNK = 128


def near_duplicates(
    features: np.ndarray,
    hashes: Sequence[bytes | None],
    perceptual: np.ndarray,
    has_perceptual: np.ndarray,
    sizes: np.ndarray,
    *,
    similarity: float = SIMILARITY,
    differing: int = DIFFERING,
) -> np.ndarray:
    """Which images are copies of which.

    features: (n, D), any floating dtype and length, a memory map if need be. hashes: n times
    SHA-256 of the file or None. perceptual: (n,) uint64, has_perceptual: (n,) bool. sizes: (n, 2)
    width and height in pixels: the largest image of a group represents it, the first of equals. All
    as a `FeatureStore` has them. similarity: least cosine of pictures with equal perceptual hashes.
    differing: most bits of 64 in which hashes may differ, 0..64; there cosines may lack 0.4 times
    as much of 1, and in between in proportion. Mirrored images are different ones: their hashes
    are.

    Returns (n,) int64: the place of the image that this one is a copy of, -1 for those that
    represent a group or themselves. A representative is never a copy. Time goes with n, and with
    the square of the number of pictures that are left after step 2 (some nanoseconds a pair).
    Raises ValueError where shapes or thresholds do not fit.
    """
    count = len(features)
    for name, given in (
        ("hashes", hashes),
        ("perceptual", perceptual),
        ("has_perceptual", has_perceptual),
    ):
        if len(given) != count:
            raise ValueError(
                f"{name} is of {len(given)} images and features of {count}: give the same rows of"
                " both"
            )
    if len(sizes) != count:
        raise ValueError(
            f"sizes is of {len(sizes)} images and features of {count}: give the same rows of both"
        )
    if not 0 <= differing <= BITS or not -1 <= similarity <= 1:
        raise ValueError(
            f"differing={differing} must be from 0 to {BITS}, similarity={similarity} from -1 to 1"
        )
    pixels = np.prod(sizes, axis=1, dtype=np.int64)
    order = np.lexsort((np.arange(count), -pixels))  # whoever comes first represents
    copy_of = np.full(count, -1, dtype=np.int64)
    _same_content(order, hashes, copy_of)
    left = order[copy_of[order] < 0]
    _same_pixels(left, features, perceptual, has_perceptual, copy_of)
    left = left[(copy_of[left] < 0) & has_perceptual[left]]
    bits = 2 * hash_bits(perceptual[left]).astype(np.float32) - 1
    _stars(left, features, bits, similarity, differing, copy_of)
    return _roots(copy_of)


def _same_content(order: np.ndarray, hashes: Sequence[bytes | None], copy_of: np.ndarray) -> None:
    first: dict[bytes, int] = {}
    for place in order.tolist():
        content = hashes[place]
        if content is not None and (known := first.setdefault(content, place)) != place:
            copy_of[place] = known


def _same_pixels(
    places: np.ndarray,
    features: np.ndarray,
    perceptual: np.ndarray,
    known: np.ndarray,
    copy_of: np.ndarray,
) -> None:
    """Joins images of one perceptual hash whose features are the same but for rounding."""
    groups: dict[int | bytes, list[int]] = {}
    for place in places.tolist():
        key = (
            int(perceptual[place])
            if known[place]
            else hashlib.sha256(features[place].tobytes()).digest()
        )
        groups.setdefault(key, []).append(place)
    for members in groups.values():
        others = np.array(members)
        for _ in range(ROUNDS):
            if len(others) < 2:
                break
            rows = _unit(features, others)
            same = rows[1:] @ rows[0] >= SAME
            copy_of[others[1:][same]] = others[0]
            others = others[1:][~same]


def _stars(
    places: np.ndarray,
    features: np.ndarray,
    bits: np.ndarray,
    similarity: float,
    differing: int,
    copy_of: np.ndarray,
) -> None:
    """Each image, in order, that is no copy yet takes all later ones that are close to it and no
    copies yet.
    """
    lacking = (1 - similarity) * _strictness(places, features, bits)
    lacking *= 1 - STRICTER * np.arange(differing + 1) / max(differing, 1)
    for centre, members in _close(places, features, bits, 1 - lacking):
        if copy_of[centre] < 0:
            copy_of[members[copy_of[members] < 0]] = centre


def _strictness(places: np.ndarray, features: np.ndarray, bits: np.ndarray) -> float:
    """From 0 to 1: how far pictures that are not alike stay from a cosine of 1, as against what is
    usual.
    """
    some = np.sort(np.random.default_rng(0).permutation(len(places))[:SAMPLE])
    rows = _unit(features, places[some])
    unlike = np.triu(bits[some] @ bits[some].T <= BITS - 2 * UNLIKE, 1)
    cosines = (rows @ rows.T)[unlike]
    if len(cosines) < ENOUGH:
        return 1.0
    return float(np.clip((1 - np.quantile(cosines, 0.999)) / (1 - USUAL), 0, 1))


def _close(
    places: np.ndarray, features: np.ndarray, bits: np.ndarray, least: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Images in order, and the later ones close to them, where there are any.

    bits: (n, 64) float32, -1 or 1. least: cosine that is needed by the number of bits that differ.
    """
    chunk = max(1, min(CHUNK, AT_ONCE // max(len(places), 1)))
    for start in range(0, len(places), chunk):
        agreeing = (
            bits[start : start + chunk] @ bits[start:].T
        )  # 64 less two for each bit that differs, exactly
        first, second = np.nonzero(agreeing > BITS - 2 * len(least))
        later = second > first
        first, second = first[later], second[later]
        if not len(first):
            continue
        needed = least[(BITS - agreeing[first, second]).astype(np.int64) // 2]
        rows, row = np.unique(first, return_inverse=True)
        columns, column = np.unique(second, return_inverse=True)
        cosines = _unit(features, places[start + rows]) @ _unit(features, places[start + columns]).T
        close = cosines[row, column] >= needed
        first, second = first[close], second[close]
        for centre in np.unique(first).tolist():
            yield int(places[start + centre]), places[start + second[first == centre]]


def _unit(features: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(n, D) float32 rows of length one; rows of zeros stay."""
    rows = np.asarray(features[places], dtype=np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _roots(copy_of: np.ndarray) -> np.ndarray:
    """Copies of copies become copies of the representative; each step added one link at most."""
    for _ in range(2):
        linked = copy_of >= 0
        further = np.where(linked, copy_of[copy_of], -1)
        copy_of = np.where(further >= 0, further, copy_of)
    return copy_of
