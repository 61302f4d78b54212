"""Writes the list files of naturally long-tailed benchmarks, so that everybody trains and tests on the same images.

    python scripts/write_lists.py imagenet_r ROOT          # ROOT/train.csv, ROOT/test.csv: 20 test images a class
    python scripts/write_lists.py inaturalist ROOT 500     # ROOT/inature500_train.csv, ROOT/inature500_test.csv

then `python train.py data=image_list data.file=ROOT/train.csv data.test_file=ROOT/test.csv data.protocol=longtail`.

imagenet_r: ROOT holds one folder per class. The reference's split followed the order in which a file system lists
files; here paths are sorted first and the test images drawn with seed 0, and the files are then the split.
inaturalist: ROOT holds train2018.json, val2018.json (the 2018 challenge's annotations) and the images that they name.
Of 8142 classes ranked by training images every 4th is kept, 2000 in all; of those every 2nd, 1000; then 500, 200 and
100 likewise, so that each subset lies in the larger ones (P2OT, appendix). Equally frequent classes go by category id.
A label is the class's rank in the subset.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

IMAGES = {".jpg", ".jpeg", ".png"}
SUBSETS = (2000, 1000, 500, 200, 100)


def main() -> int:
    """Writes two files and says how many lines they have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("imagenet_r", "inaturalist"))
    parser.add_argument("root", type=Path)
    parser.add_argument("classes", type=int, nargs="?", default=1000, choices=SUBSETS, help="of inaturalist")
    asked = parser.parse_args()
    if asked.what == "imagenet_r":
        splits, stem = imagenet_r(asked.root), ""
    else:
        splits, stem = inaturalist(asked.root, asked.classes), f"inature{asked.classes}_"
    for split, lines in splits.items():
        path = asked.root / f"{stem}{split}.csv"
        write(path, lines)
        print(f"{path}: {len(lines)} images")
    return 0


def write(path: Path, lines: Iterable[tuple[str, str]]) -> None:
    """path,label lines under a header."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("path", "label"), *lines])


def imagenet_r(root: Path, num_test: int = 20, seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """(path, class) lines of `train` and `test`: `num_test` random test images of each class."""
    draw, splits = random.Random(seed), {"train": [], "test": []}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in IMAGES)
        if len(names) <= num_test:
            raise SystemExit(f"{folder}: {len(names)} images; a class needs more than the {num_test} that are held out")
        test = set(draw.sample(names, num_test))
        for name in names:
            splits["test" if name in test else "train"].append((f"{folder.name}/{name}", folder.name))
    return splits


def nested_subset(ranked: list[int], num_classes: int) -> list[int]:
    """Categories of a subset out of all, ranked from the most frequent on."""
    kept = ranked
    for size in SUBSETS:
        kept = kept[:: 4 if size == SUBSETS[0] else 2][:size]
        if size == num_classes:
            break
    return kept


def inaturalist(root: Path, num_classes: int) -> dict[str, list[tuple[str, str]]]:
    """(path, rank) lines of `train` and `test` (the official validation images)."""
    splits = {"train": annotated(root / "train2018.json"), "test": annotated(root / "val2018.json")}
    counts = Counter(category for _, category in splits["train"])
    ranked = sorted(counts, key=lambda category: (-counts[category], category))
    rank = {category: f"{place:04d}" for place, category in enumerate(nested_subset(ranked, num_classes))}
    return {
        split: [(path, rank[category]) for path, category in pairs if category in rank]
        for split, pairs in splits.items()
    }


def annotated(path: Path) -> list[tuple[str, int]]:
    """(file name, category id) of every image of an annotation file, in the order of image ids."""
    content = json.loads(path.read_text(encoding="utf-8"))
    files = {image["id"]: image["file_name"] for image in content["images"]}
    pairs = {entry["image_id"]: entry["category_id"] for entry in content["annotations"]}
    return [(files[image], pairs[image]) for image in sorted(pairs)]


if __name__ == "__main__":
    sys.exit(main())
