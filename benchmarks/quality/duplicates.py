"""Near-duplicates found: altered copies of some photos of a folder, held against all of its photos.

    python -m benchmarks.quality.duplicates CLOTHING WORK \\
        --backbone scripts/efficientnet_lite.py:lite0 --count 300

printed the committed figures. WORK keeps the copies and both feature stores for the next time.
Printed are

1. by kind of copy, cosine and differing bits between a copy and its original, and what thresholds
   find: recall (its original is close enough) and precision (of all photos that are close enough to
   a copy, those that are its original; photos that were twice in the folder count as mistakes);
2. pairs of the folder's own photos that thresholds take for the same, and which: to be looked at;
3. what `near_duplicates` makes of photos and copies together, and its CPU time for 50,000 rows.

A rule `0.85-/12` asks for a cosine of 0.85 at equal perceptual hashes, allows 12 differing bits,
and asks for a higher cosine the more bits differ, as `near_duplicates` does. `0.90/8` asks for the
same cosine at any number of bits up to 8.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from deepclust.collection.duplicates import DIFFERING, SIMILARITY, STRICTER, UNLIKE, near_duplicates
from deepclust.data.perceptual import BITS, hash_bits
from deepclust.data.store import FeatureStore
from deepclust.features.extract import Asked, extract

Change = Callable[[Image.Image], Image.Image]


class Rule(NamedTuple):
    """Thresholds at which two pictures are taken for the same."""

    similarity: float
    """Least cosine of features, at equal perceptual hashes."""
    differing: int
    """Most bits in which the hashes may differ."""
    stricter: float
    """Share of what the cosine may lack of 1 that is gone at the last of these bits."""


RULES = {
    "0.95/12": Rule(0.95, 12, 0.0),
    "0.90/6": Rule(0.90, 6, 0.0),
    "0.90/8": Rule(0.90, 8, 0.0),
    "0.90/12": Rule(0.90, 12, 0.0),
    "0.85/12": Rule(0.85, 12, 0.0),
    "0.90-/12": Rule(0.90, 12, STRICTER),
    "0.85-/8": Rule(0.85, 8, STRICTER),
    "0.85-/12": Rule(SIMILARITY, DIFFERING, STRICTER),
    "0.80-/12": Rule(0.80, 12, STRICTER),
    "0.85-/16": Rule(0.85, 16, STRICTER),
}
LOOSEST = "0.80-/12"
"""The rule whose pairs among the folder's own photos are listed."""
MANY = 50_000


# --- altered copies ---------------------------------------------------------------------------


def jpeg(quality: int) -> Change:
    """A change that compresses an image once."""

    def change(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(io.BytesIO(buffer.getvalue()))

    return change


def resized(share: float) -> Change:
    """A change that makes width and height this share of what they were."""

    def change(image: Image.Image) -> Image.Image:
        width = max(1, round(image.width * share))
        height = max(1, round(image.height * share))
        return image.resize((width, height), Image.Resampling.LANCZOS)

    return change


def cropped(share: float) -> Change:
    """A change that cuts this share of width and height away."""

    def change(image: Image.Image) -> Image.Image:
        # More on one side than on the other: an even crop would keep the picture's centre.
        left = round(image.width * share * 0.7)
        top = round(image.height * share * 0.3)
        right = image.width - round(image.width * share * 0.3)
        bottom = image.height - round(image.height * share * 0.7)
        return image.crop((left, top, right, bottom))

    return change


KINDS: dict[str, Change] = {
    "jpeg 90": jpeg(90),
    "jpeg 60": jpeg(60),
    "jpeg 30": jpeg(30),
    "resize 50 %": resized(0.5),
    "resize 75 %": resized(0.75),
    "resize 200 %": resized(2.0),
    "crop 2 %": cropped(0.02),
    "crop 5 %": cropped(0.05),
    "brightness +10 %": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "brightness -20 %": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "contrast +15 %": lambda image: ImageEnhance.Contrast(image).enhance(1.15),
    "border 2 %": lambda image: ImageOps.expand(image, round(0.02 * image.width), "black"),
    "mirrored": ImageOps.mirror,
}


def make_copies(photos: Path, paths: Sequence[str], folder: Path) -> None:
    """Writes every kind of copy of every photo as `<kind>/<number>.jpg`; keeps existing ones.

    photos: the folder of the photos.
    paths: of the photos in it; a photo's number is its position here.
    folder: of the copies.
    """
    for kind, change in KINDS.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        # Copies of a JPEG kind keep its quality; the others are saved well.
        quality = int(kind.split()[1]) if kind.startswith("jpeg") else 90
        for number, path in enumerate(paths):
            target = folder / kind / f"{number}.jpg"
            if target.exists():
                continue
            with Image.open(photos / path) as image:
                copy = change(ImageOps.exif_transpose(image).convert("RGB"))
            copy.convert("RGB").save(target, quality=quality)


# --- features and hashes ----------------------------------------------------------------------


def store_of(folder: Path, store: Path, backbone: str) -> FeatureStore:
    """The folder's feature store, made now or before.

    folder: of images.
    store: where it is kept.
    backbone: as of `deepclust features`.
    """
    extract(Asked(folder, store, [backbone]))
    return FeatureStore.open(store)


class Rows:
    """Paths, features (n, D) of length one, hashes and sizes of a store's n usable images."""

    def __init__(self, store: FeatureStore) -> None:
        rows = store.rows()
        self.paths = [store.paths[row] for row in rows.tolist()]
        self.hashes = [store.hashes[row] for row in rows.tolist()]
        features = np.asarray(store.features()[rows], dtype=np.float32)
        self.features = features / np.linalg.norm(features, axis=1, keepdims=True)
        self.perceptual = store.perceptual[rows]
        self.known = store.has_perceptual[rows]
        self.sizes = store.sizes[rows]


def measures(first: Rows, second: Rows) -> tuple[np.ndarray, np.ndarray]:
    """(n, m) cosines of features, and (n, m) numbers of differing bits, of all pairs."""
    # Of bits as signs the product is (equal - differing), and equal + differing is 64.
    signs = [2 * hash_bits(rows.perceptual).astype(np.float32) - 1 for rows in (first, second)]
    bits = (BITS - signs[0] @ signs[1].T) / 2
    return first.features @ second.features.T, bits


def close(rule: Rule, cosine: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Which pairs a rule takes for the same, in the shape of `cosine` and `bits`."""
    lacking = (1 - rule.similarity) * (1 - rule.stricter * bits / rule.differing)
    return (bits <= rule.differing) & (1 - cosine <= lacking)


# --- the three parts --------------------------------------------------------------------------


def by_kind(photos: Rows, copies: Rows, truth: np.ndarray) -> None:
    """Prints part 1: what is found by kind of copy.

    photos: n of them.
    copies: m of them.
    truth: (m,) each copy's original, its position among the photos.
    """
    cosines, bits = measures(copies, photos)
    kinds = np.array([path.split("/")[0] for path in copies.paths])
    is_original = np.zeros(cosines.shape, dtype=bool)
    is_original[np.arange(len(truth)), truth] = True
    print(f"{'':18s}{'cosine':>13s}{'bits':>9s}   recall and precision in %")
    heads = "".join(f"{name:>13s}" for name in RULES)
    print(f"{'kind':18s}{'median    5%':>13s}{'med  95%':>9s}{heads}")
    for kind in [*KINDS, "all but mirrored"]:
        # Mirrored copies count as different pictures: their hashes are.
        rows = kinds == kind if kind in KINDS else kinds != "mirrored"
        print(f"{kind:18s}{_kind_line(cosines[rows], bits[rows], is_original[rows])}")


def _kind_line(cosine: np.ndarray, bits: np.ndarray, is_original: np.ndarray) -> str:
    """Figures of one kind, from (copies, photos) matrices."""
    line = f"{np.median(cosine[is_original]):7.3f}{np.quantile(cosine[is_original], 0.05):6.3f}"
    line += f"{np.median(bits[is_original]):4.0f}{np.quantile(bits[is_original], 0.95):5.0f}"
    for rule in RULES.values():
        same = close(rule, cosine, bits)
        hits = int((same & is_original).sum())
        recall = 100 * hits / is_original.sum()
        # Where nothing is taken for the same, there is no precision.
        precision = 100 * hits / int(same.sum()) if same.any() else np.nan
        line += f"{recall:7.1f}{precision:6.1f}"
    return line


def among_photos(photos: Rows) -> None:
    """Prints part 2: pairs of the folder's own photos that rules take for the same."""
    cosines, bits = measures(photos, photos)
    first, second = np.triu_indices(len(cosines), 1)
    cosine = cosines[first, second]
    differing = bits[first, second]
    repeated = len(photos.paths) - len(set(photos.hashes))
    print(f"\n{len(photos.paths):,} photos, {repeated:,} of them of another's content")
    # Every 31st of these pairs is enough for quantiles, and sorts in a moment.
    unlike = np.quantile(cosine[differing >= UNLIKE][::31], [0.5, 0.99, 0.999])
    quantiles = "median {:.2f}, 99 % {:.2f}, 99.9 % {:.2f}".format(*unlike)
    print(f"cosines of unlike photos ({UNLIKE} bits or more): {quantiles}")
    for name, rule in RULES.items():
        print(f"  {name:9s} takes {close(rule, cosine, differing).sum():,} pairs for the same")
    pairs = np.flatnonzero(close(RULES[LOOSEST], cosine, differing))
    for pair in pairs[np.argsort(-cosine[pairs])].tolist():
        names = f"{photos.paths[first[pair]]}  {photos.paths[second[pair]]}"
        print(f"    cosine {cosine[pair]:.3f}, {differing[pair]:.0f} bits: {names}")


def grouped(photos: Rows, copies: Rows, truth: np.ndarray) -> None:
    """Prints part 3: what `near_duplicates` makes of photos and copies together, and its time.

    photos: n of them.
    copies: m of them.
    truth: (m,) each copy's original, its position among the photos.
    """
    pictured = np.concatenate([np.arange(len(photos.paths)), truth])
    copy_of = near_duplicates(
        np.concatenate([photos.features, copies.features]),
        # Without content hashes: features and perceptual hashes alone are to find the copies.
        [None] * len(pictured),
        np.concatenate([photos.perceptual, copies.perceptual]),
        np.concatenate([photos.known, copies.known]),
        np.concatenate([photos.sizes, copies.sizes]),
    )
    representative = np.where(copy_of >= 0, copy_of, np.arange(len(pictured)))
    kinds = ["original"] * len(photos.paths) + [path.split("/")[0] for path in copies.paths]
    together = representative == representative[pictured]
    print(
        f"\n{len(pictured):,} photos and copies, no content hashes: share that is in its original's"
        " group, in %"
    )
    shares = [f"{kind} {100 * together[np.array(kinds) == kind].mean():.1f}" for kind in KINDS]
    print(f"  {', '.join(shares)}")
    wrong = int((pictured != pictured[representative]).sum())
    count = int((copy_of >= 0).sum())
    print(f"  {count:,} images grouped, {wrong:,} of them with one of another photo")
    time_grouping(photos)


def time_grouping(photos: Rows) -> None:
    """Prints the CPU time of `near_duplicates` for 50,000 rows, the photos repeated."""
    rows = np.arange(MANY) % len(photos.paths)
    # As a feature store keeps them.
    features = photos.features.astype(np.float16)[rows]
    random_bits = np.random.default_rng(0)
    # Exact copies leave few pictures to compare; with noise in the hashes all pairs are looked at.
    for title, noise in (("the photos repeated", 0), ("the same with 24 random bits each", 24)):
        bits = photos.perceptual[rows]
        for _ in range(noise):
            flipped = random_bits.integers(0, BITS, MANY, dtype=np.uint64)
            bits = bits ^ (np.uint64(1) << flipped)
        known = np.ones(MANY, dtype=bool)
        start = time.process_time()
        copy_of = near_duplicates(features, [None] * MANY, bits, known, photos.sizes[rows])
        seconds = time.process_time() - start
        left = f"{int((copy_of < 0).sum()):,} pictures left"
        print(f"  {MANY:,} rows, {title}: {seconds:.1f} s of CPU time, {left}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints all three parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument(
        "--seed", type=int, default=0, help="chooses the photos; thresholds were chosen on seed 0"
    )
    options = parser.parse_args(arguments)
    photos = Rows(store_of(options.photos, options.work / "photos", options.backbone))
    chosen = random.Random(options.seed).sample(range(len(photos.paths)), options.count)
    folder = options.work / f"copies-{options.seed}"
    make_copies(options.photos, [photos.paths[index] for index in chosen], folder)
    copies = Rows(store_of(folder, options.work / f"store-{options.seed}", options.backbone))
    truth = np.array([chosen[int(Path(path).stem)] for path in copies.paths])
    by_kind(photos, copies, truth)
    among_photos(photos)
    grouped(photos, copies, truth)
    return 0


if __name__ == "__main__":
    sys.exit(main())
