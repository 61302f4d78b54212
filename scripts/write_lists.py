"""List files of naturally long-tailed benchmarks, so that everybody trains and tests alike.

    python scripts/write_lists.py imagenet_r ROOT
    python scripts/write_lists.py inaturalist ROOT 500

write ROOT/train.csv and ROOT/test.csv (20 test images a class), and ROOT/inature500_train.csv and
ROOT/inature500_test.csv, with which

    python train.py data=image_list data.file=ROOT/train.csv data.test_file=ROOT/test.csv \\
        data.protocol=longtail

trains. imagenet_r: ROOT holds one folder per class. The reference's split followed the order in
which a file system lists files; here paths are sorted first and the test images drawn with seed 0,
and the files are then the split.

inaturalist: ROOT holds train2018.json, val2018.json (the 2018 challenge's annotations) and the
images that they name. Of 8142 classes ranked by training images every 4th is kept, 2000 in all; of
those every 2nd, 1000; then 500, 200 and 100 likewise, so that each subset lies in the larger ones
(P2OT, appendix). Equally frequent classes go by category id. A label is the class's rank in the
subset.
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
"""Numbers of classes of iNaturalist's subsets."""
STEPS = (4, 2, 2, 2, 2)
"""Every how many classes of the larger subset (first: of all) are kept."""


def main() -> int:
    """Writes two files and says how many lines they have."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=("imagenet_r", "inaturalist"))
    parser.add_argument("root", type=Path)
    parser.add_argument(
        "classes", type=int, nargs="?", default=1000, choices=SUBSETS, help="of inaturalist"
    )
    options = parser.parse_args()
    if options.benchmark == "imagenet_r":
        splits = imagenet_r(options.root)
        stem = ""
    else:
        splits = inaturalist(options.root, options.classes)
        stem = f"inature{options.classes}_"
    for split, lines in splits.items():
        path = options.root / f"{stem}{split}.csv"
        write(path, lines)
        print(f"{path}: {len(lines)} images")
    return 0


def write(path: Path, lines: Iterable[tuple[str, str]]) -> None:
    """Writes path,label lines under a header."""
    # Line ends and encoding are the same on every system, and so is the file's hash.
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("path", "label"), *lines])


def imagenet_r(root: Path, num_test: int = 20, seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """(path, class) lines of `train` and `test`.

    root: one folder per class.
    num_test: random test images of each class.
    seed: of the draw.

    Ends the program where a class has too few images.
    """
    draw = random.Random(seed)
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    # Sorted, here and below: draws follow the order, and file systems have none.
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in IMAGES)
        if len(names) <= num_test:
            raise SystemExit(
                f"{folder}: {len(names)} images; a class needs more than the {num_test} that are"
                " held out"
            )
        test = set(draw.sample(names, num_test))
        for name in names:
            split = "test" if name in test else "train"
            splits[split].append((f"{folder.name}/{name}", folder.name))
    return splits


def nested_subset(ranked: list[int], num_classes: int) -> list[int]:
    """Categories of a subset, out of all.

    ranked: all categories, from the most frequent on.
    num_classes: one of `SUBSETS`.
    """
    kept = ranked
    for size, step in zip(SUBSETS, STEPS):
        # Every 4th of 8142 are 2036, every 2nd of 500 are 250: the rarest beyond the size go.
        kept = kept[::step][:size]
        if size == num_classes:
            break
    return kept


def inaturalist(root: Path, num_classes: int) -> dict[str, list[tuple[str, str]]]:
    """(path, rank) lines of `train` and `test`, the latter the official validation images.

    root: of the annotations and the images.
    num_classes: one of `SUBSETS`.
    """
    splits = {
        "train": annotated(root / "train2018.json"),
        "test": annotated(root / "val2018.json"),
    }
    counts = Counter(category for _, category in splits["train"])
    ranked = sorted(counts, key=lambda category: (-counts[category], category))
    subset = nested_subset(ranked, num_classes)
    # With leading zeros, so that sorting labels as text keeps the ranks in order.
    rank = {category: f"{number:04d}" for number, category in enumerate(subset)}
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
