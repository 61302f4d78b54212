"""What near-duplicates are found: altered copies of some photos of a folder, held against all of its photos.

    python -m benchmarks.quality.duplicates PHOTOS WORK --backbone scripts/efficientnet_lite.py:lite0 --count 300

WORK keeps the copies and both feature stores for the next time. Printed are

1. by kind of copy, cosine and differing bits between a copy and its original, and what thresholds find: recall (its
   original is close enough) and precision (of all photos that are close enough to a copy, those that are its original;
   photos that were twice in the folder before count as mistakes);
2. pairs of the folder's own photos that thresholds take for the same, and which ones: to be looked at;
3. what `near_duplicates` makes of photos and copies together, and how long it takes for 50,000 rows.

A rule `0.85-/12` is one of `near_duplicates(similarity=0.85, differing=12)`: the least cosine at equal hashes, and the
most bits, at which the cosine may lack 0.4 times as much of 1. `0.90/8` asks for the same cosine at any number of bits.
"""

from __future__ import annotations

import argparse
import io
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from deepclust.data.perceptual import hash_bits
from deepclust.data.store import FeatureStore
from deepclust.extract import Asked, extract
from deepclust.folder.duplicates import DIFFERING, SIMILARITY, STRICTER, near_duplicates

Change = Callable[[Image.Image], Image.Image]
RULES = {
    "0.95/12": (0.95, 12, 0.0),
    "0.90/6": (0.90, 6, 0.0),
    "0.90/8": (0.90, 8, 0.0),
    "0.90/12": (0.90, 12, 0.0),
    "0.85/12": (0.85, 12, 0.0),
    "0.90-/12": (0.90, 12, STRICTER),
    "0.85-/8": (0.85, 8, STRICTER),
    "0.85-/12": (SIMILARITY, DIFFERING, STRICTER),
    "0.80-/12": (0.80, 12, STRICTER),
    "0.85-/16": (0.85, 16, STRICTER),
}
MANY = 50_000


def jpeg(quality: int) -> Change:
    """Compresses it once."""

    def change(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(io.BytesIO(buffer.getvalue()))

    return change


def resized(share: float) -> Change:
    """Makes width and height this share of what they were."""
    return lambda image: image.resize(
        (max(1, round(image.width * share)), max(1, round(image.height * share))), Image.Resampling.LANCZOS
    )


def cropped(share: float) -> Change:
    """Cuts this share of width and height away, more of it at one side than at the other."""

    def change(image: Image.Image) -> Image.Image:
        left, top = round(image.width * share * 0.7), round(image.height * share * 0.3)
        return image.crop(
            (
                left,
                top,
                image.width - round(image.width * share * 0.3),
                image.height - round(image.height * share * 0.7),
            )
        )

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


def make_copies(photos: Path, paths: list[str], folder: Path) -> None:
    """Every kind of every photo as `<kind>/<number>.jpg` (quality 90 where the kind says nothing else)."""
    for kind, change in KINDS.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(paths):
            target = folder / kind / f"{number}.jpg"
            if target.exists():
                continue
            with Image.open(photos / path) as image:
                copy = change(ImageOps.exif_transpose(image).convert("RGB"))
            quality = int(kind.split()[1]) if kind.startswith("jpeg") else 90
            copy.convert("RGB").save(target, quality=quality)


def store_of(folder: Path, store: Path, backbone: str) -> FeatureStore:
    """The folder's features, made now or before."""
    extract(Asked(folder, store, [backbone]))
    return FeatureStore.open(store)


class Rows:
    """The images of a store that can be worked with: paths, features (n, D) of length one, hashes, sizes."""

    def __init__(self, store: FeatureStore) -> None:
        rows = store.rows()
        self.paths = [store.paths[row] for row in rows.tolist()]
        self.hashes = [store.hashes[row] for row in rows.tolist()]
        found = np.asarray(store.features()[rows], dtype=np.float32)
        self.features = found / np.linalg.norm(found, axis=1, keepdims=True)
        self.perceptual, self.known, self.sizes = store.perceptual[rows], store.has_perceptual[rows], store.sizes[rows]


def measures(first: Rows, second: Rows) -> tuple[np.ndarray, np.ndarray]:
    """(n, m) cosines and numbers of differing bits of all pairs."""
    signs = [2 * hash_bits(rows.perceptual).astype(np.float32) - 1 for rows in (first, second)]
    return first.features @ second.features.T, (64 - signs[0] @ signs[1].T) / 2


def close(rule: str, cosine: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Which pairs a rule takes for the same."""
    similarity, differing, stricter = RULES[rule]
    return (bits <= differing) & (1 - cosine <= (1 - similarity) * (1 - stricter * bits / differing))


def by_kind(photos: Rows, copies: Rows, truth: np.ndarray) -> None:
    """Part 1. truth: (n,) each copy's original, its place among the photos."""
    cosines, bits = measures(copies, photos)
    kinds = np.array([path.split("/")[0] for path in copies.paths])
    own = np.zeros(cosines.shape, dtype=bool)
    own[np.arange(len(truth)), truth] = True
    print(f"{'':18s}{'cosine':>13s}{'bits':>9s}   recall and precision in %")
    print(f"{'kind':18s}{'median    5%':>13s}{'med  95%':>9s}" + "".join(f"{rule:>13s}" for rule in RULES))
    for kind in [*KINDS, "all but mirrored"]:
        here = kinds == kind if kind in KINDS else kinds != "mirrored"
        cosine, differing, right = cosines[here], bits[here], own[here]
        line = f"{kind:18s}{np.median(cosine[right]):7.3f}{np.quantile(cosine[right], 0.05):6.3f}"
        line += f"{np.median(differing[right]):4.0f}{np.quantile(differing[right], 0.95):5.0f}"
        for rule in RULES:
            found = close(rule, cosine, differing)
            hits, all_found = int((found & right).sum()), int(found.sum())
            line += f"{100 * hits / right.sum():7.1f}{100 * hits / all_found if all_found else np.nan:6.1f}"
        print(line)


def among_photos(photos: Rows) -> None:
    """Part 2."""
    cosines, bits = measures(photos, photos)
    first, second = np.triu_indices(len(cosines), 1)
    cosine, differing = cosines[first, second], bits[first, second]
    content = {value: place for place, value in enumerate(photos.hashes)}
    print(f"\n{len(photos.paths):,} photos, {len(photos.paths) - len(content):,} of them of another's content")
    unlike = np.quantile(cosine[differing >= 17][::31], [0.5, 0.99, 0.999])
    print("cosines of unlike photos (17 bits or more): median {:.2f}, 99 % {:.2f}, 99.9 % {:.2f}".format(*unlike))
    for rule in RULES:
        found = np.flatnonzero(close(rule, cosine, differing))
        print(f"  {rule:9s} takes {len(found):,} pairs for the same")
    found = np.flatnonzero(close("0.80-/12", cosine, differing))
    for pair in found[np.argsort(-cosine[found])].tolist():
        names = f"{photos.paths[first[pair]]}  {photos.paths[second[pair]]}"
        print(f"    cosine {cosine[pair]:.3f}, {differing[pair]:.0f} bits: {names}")


def grouped(photos: Rows, copies: Rows, truth: np.ndarray) -> None:
    """Part 3."""
    both = [
        np.concatenate([getattr(photos, name), getattr(copies, name)])
        for name in ("features", "perceptual", "known", "sizes")
    ]
    features, perceptual, known, sizes = both
    shows = np.concatenate([np.arange(len(photos.paths)), truth])
    copy_of = near_duplicates(features, [None] * len(shows), perceptual, known, sizes)
    representative = np.where(copy_of >= 0, copy_of, np.arange(len(shows)))
    kinds = np.array(["original"] * len(photos.paths) + [path.split("/")[0] for path in copies.paths])
    together = representative == representative[shows]
    print(f"\n{len(shows):,} photos and copies, no content hashes: share that is in its original's group, in %")
    print("  " + ", ".join(f"{kind} {100 * together[kinds == kind].mean():.1f}" for kind in KINDS))
    wrong = shows != shows[representative]
    print(f"  {int((copy_of >= 0).sum()):,} images grouped, {int(wrong.sum()):,} of them with one of another photo")
    rows = np.arange(MANY) % len(photos.paths)
    numbers = np.random.default_rng(0)
    given = features[: len(photos.paths)].astype(np.float16)
    for title, noise in (("the photos repeated", 0), ("the same with 24 random bits each", 24)):
        bits = photos.perceptual[rows]
        for _ in range(noise):
            bits = bits ^ (np.uint64(1) << numbers.integers(0, 64, MANY, dtype=np.uint64))
        start = time.process_time()
        found = near_duplicates(given[rows], [None] * MANY, bits, np.ones(MANY, dtype=bool), photos.sizes[rows])
        seconds = time.process_time() - start
        print(f"  {MANY:,} rows, {title}: {seconds:.1f} s of CPU time, {int((found < 0).sum()):,} pictures left")


def main() -> None:
    """All three parts."""
    parser = argparse.ArgumentParser(description="near-duplicates among altered copies of photos")
    parser.add_argument("photos", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="chooses the photos; thresholds were chosen on those of 0")
    asked = parser.parse_args()
    photos = Rows(store_of(asked.photos, asked.work / "photos", asked.backbone))
    chosen = random.Random(asked.seed).sample(range(len(photos.paths)), asked.count)
    folder = asked.work / f"copies-{asked.seed}"
    make_copies(asked.photos, [photos.paths[place] for place in chosen], folder)
    copies = Rows(store_of(folder, asked.work / f"store-{asked.seed}", asked.backbone))
    truth = np.array([chosen[int(Path(path).stem)] for path in copies.paths])
    by_kind(photos, copies, truth)
    among_photos(photos)
    grouped(photos, copies, truth)


if __name__ == "__main__":
    main()
