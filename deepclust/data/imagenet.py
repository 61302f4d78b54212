"""ImageNet, the subsets that clustering papers use, and Tiny-ImageNet, from folders on disk."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from deepclust.data.benchmarks import splits_to_read
from deepclust.data.folders import Listing, check_folder, list_folder, load_files
from deepclust.data.image_set import ImageData
from deepclust.errors import UserError, near
from deepclust.types import Count, Imbalance, Natural

# WordNet ids of classes. HUNDRED and TWO_HUNDRED are what the larger subset adds to the smaller.
FIFTY = """
n01601694 n01669191 n01755581 n01770393 n01855672 n02018207 n02058221 n02096177 n02097130 n02099267
n02100877 n02104365 n02106030 n02114855 n02125311 n02133161 n02484975 n02489166 n02747177 n02906734
n03124170 n03272010 n03337140 n03483316 n03498962 n03710721 n03717622 n03733281 n03759954 n03775071
n03814639 n03837869 n03838899 n03854065 n03954731 n03983396 n04026417 n04200800 n04209239 n04311004
n04380533 n04428191 n04443257 n04509417 n04525305 n04554684 n04606251 n07583066 n07711569 n07753592
"""
HUNDRED = """
n01558993 n01751748 n01756291 n01871265 n02037110 n02087046 n02088632 n02093256 n02093754 n02094114
n02097298 n02105855 n02106166 n02107142 n02110341 n02120079 n02120505 n02128385 n02277742 n02325366
n02364673 n02708093 n02835271 n02909870 n03085013 n03127747 n03160309 n03255030 n03291819 n03450230
n03530642 n03623198 n03649909 n03929855 n03930313 n03956157 n04004767 n04065272 n04235860 n04325704
n04336792 n04346328 n04458633 n04483307 n04515003 n04591157 n04592741 n07613480 n07693725 n11879895
"""
TWO_HUNDRED = """
n01443537 n01514668 n01770081 n01773797 n01775062 n01806143 n01819313 n01917289 n02002724 n02028035
n02033041 n02088094 n02090622 n02091134 n02093859 n02096294 n02099849 n02100735 n02105251 n02107683
n02110185 n02111889 n02113799 n02123597 n02129165 n02130308 n02219486 n02229544 n02342885 n02437616
n02454379 n02488702 n02492660 n02510455 n02536864 n02643566 n02655020 n02666196 n02730930 n02769748
n02783161 n02791124 n02794156 n02804414 n02804610 n02837789 n02865351 n02877765 n02910353 n02916936
n02977058 n02978881 n02981792 n02992211 n03063599 n03134739 n03208938 n03347037 n03355925 n03445924
n03447447 n03447721 n03457902 n03599486 n03617480 n03627232 n03763968 n03764736 n03782006 n03841143
n03868863 n03874293 n03877845 n03976467 n03976657 n04146614 n04238763 n04252077 n04263257 n04264628
n04265275 n04266014 n04275548 n04330267 n04332243 n04335435 n04350905 n04366367 n04367480 n04392985
n04479046 n04532106 n04579145 n04604644 n07584110 n07615774 n07684084 n07714990 n07749582 n09288635
"""
TEN = """
n04467665 n07747607 n02692877 n04254680 n02690373 n03095699 n02128757 n04285008 n02085936 n02056570
"""
DOGS = """
n02107142 n02110958 n02112137 n02099601 n02105056 n02105855 n02101388 n02101556 n02105412 n02102177
n02086646 n02088238 n02085936 n02097130 n02091467
"""
SUBSETS: dict[str, Sequence[str]] = {
    "imagenet10": sorted(TEN.split()),
    "imagenet50": FIFTY.split(),
    "imagenet100": sorted((FIFTY + HUNDRED).split()),
    "imagenet200": sorted((FIFTY + HUNDRED + TWO_HUNDRED).split()),
    "imagenet_dogs": sorted(DOGS.split()),
}
"""WordNet ids of the classes of each subset.

ImageNet-50, -100 and -200: those of SCAN (Van Gansbeke et al. 2020), each within the next.
ImageNet-10 and the 15 Dogs: those of DAC (Chang et al. 2017).
"""
FOLDERS = {
    "train": ("train", "ILSVRC2012_img_train"),
    "val": ("val", "ILSVRC2012_img_val", "validation"),
}
"""Split to the folder names that it may have; the first that is there is taken."""
TINY = "tiny-imagenet-200"
LAYOUT = (
    "Wanted: train/n01440764/*.JPEG and val/n01440764/*.JPEG, a folder per class.\n"
    "The official archives come from image-net.org (an account is needed); "
    "torchvision.datasets.ImageNet(root, split='val') unpacks them so."
)


def imagenet(
    root: str = "data/imagenet",
    subset: str = "all",
    split: Literal["train", "val", "all"] = "train",
    protocol: Literal["transductive", "inductive", "longtail"] = "inductive",
    size: Count = 256,
    memory_mb: Natural = 2048,
    imbalance: Imbalance | None = None,
) -> ImageData:
    """ImageNet (ILSVRC 2012), or a subset of its classes.

    root: folder with the folders train and val, which hold a folder per class, named by its WordNet
        id.
    subset: `all`, a name of `SUBSETS`, or a text file with a WordNet id per line (what follows the
        id is not read).
    split: `all` is train and val together.
    protocol: with `inductive` and `longtail` the val split is held out.
    size: shorter side in pixels after resizing; then the centre is cropped, before any random view
        is made (SCAN's code crops after it).
    memory_mb, imbalance: see the top of `datasets.py`.

    Raises:
        UserError: no such folder or subset, or a class of it without a folder.
    """
    home = check_folder(root)
    wanted = _classes_of(subset)
    listing = Listing(home, [])
    for split_name in splits_to_read(split, protocol, "val"):
        names = FOLDERS[split_name]
        folder = next((name for name in names if (home / name).is_dir()), None)
        if folder is None:
            raise UserError(
                f"data.root={root}: there is no folder {' or '.join(names)} in it. {LAYOUT}"
            )
        present = sorted(entry.name for entry in os.scandir(home / folder) if entry.is_dir())
        _check_classes(home / folder, wanted, present)
        for wnid in wanted or present:
            files = list_folder(str(home / folder / wnid))
            _add(listing, files, f"{folder}/{wnid}", wnid, split_name)
    name = "imagenet" if subset == "all" else Path(subset).stem
    return load_files(name, listing, size, 3, memory_mb, protocol, imbalance)


def _check_classes(folder: Path, wanted: Sequence[str], present: Collection[str]) -> None:
    """Raises UserError if classes have no folder; `wanted` is empty where all are wanted."""
    missing = sorted(set(wanted) - set(present))
    if missing:
        first = ", ".join(missing[:3])
        classes = f"{len(missing)} of {len(wanted)} classes, {first} first,"
        raise UserError(f"{folder}: {classes} have no folder there. {LAYOUT}")
    if not present:
        raise UserError(f"{folder}: all classes have no folder there. {LAYOUT}")


def _classes_of(subset: str) -> list[str]:
    """WordNet ids of a subset; empty for `all`."""
    if subset == "all":
        return []
    if subset in SUBSETS:
        return list(SUBSETS[subset])
    path = Path(os.path.expanduser(subset))
    if not path.is_file():
        close = near(subset, SUBSETS)
        advice = f"did you mean {close}?" if close else f"names are all, {', '.join(SUBSETS)}"
        raise UserError(f"data.subset={subset}: neither a subset's name nor a text file; {advice}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.subset={subset}: cannot be read as UTF-8 text ({error}).") from error
    # lists of subsets often have a name behind each id, so only the first word counts
    ids = {line.split()[0] for line in lines if line.strip()}
    if len(ids) < 2:
        raise UserError(
            f"data.subset={subset}: names fewer than two classes; give one WordNet id per line."
        )
    return sorted(ids)


def _add(listing: Listing, more: Listing, below: str, label: str, split: str) -> None:
    """Appends the files of a folder that lies `below` the listing's root."""
    listing.paths += [f"{below}/{path}" for path in more.paths]
    listing.labels += [label] * len(more.paths)
    listing.splits += [split] * len(more.paths)
    listing.num_ignored += more.num_ignored


def tiny_imagenet(
    root: str = "data",
    split: Literal["train", "val", "all"] = "train",
    protocol: Literal["transductive", "inductive", "longtail"] = "transductive",
    size: Count = 64,
    memory_mb: Natural = 2048,
    imbalance: Imbalance | None = None,
) -> ImageData:
    """Tiny-ImageNet: 64 x 64 RGB, 200 classes; 100,000 train and 10,000 val images.

    Read as its archive unpacks: the val images lie in one folder, and val_annotations.txt names
    their classes. A val folder sorted into one folder per class is read as well. The test images
    have no labels and are left out.

    root: the folder tiny-imagenet-200, or the one that holds it.
    split: `all` is train and val together.
    protocol: by default the train images are trained on and clustered; with `inductive` and
        `longtail` the val split is held out.
    size, memory_mb, imbalance: see the top of `datasets.py`.

    Raises:
        UserError: no such folder or file, or a val image without a class.
    """
    home = check_folder(root)
    if (home / TINY).is_dir():
        home = home / TINY
    listing = Listing(home, [])
    for split_name in splits_to_read(split, protocol, "val"):
        folder = home / split_name
        if not folder.is_dir():
            raise UserError(
                f"data.root={root}: there is no folder {split_name} in {home}; give the folder"
                f" {TINY}."
            )
        paths = list_folder(str(folder)).paths
        sheet = folder / "val_annotations.txt"
        classes = _val_classes(sheet) if sheet.is_file() else {}
        for path in paths:
            wnid = _tiny_class(path, classes)
            if wnid is None:
                raise UserError(
                    f"{folder / path} has no class: it is not in {sheet}. Unpack the archive again."
                )
            _add(listing, Listing(home, [path]), split_name, wnid, split_name)
    return load_files("tiny_imagenet", listing, size, 3, memory_mb, protocol, imbalance)


def _tiny_class(path: str, classes: dict[str, str]) -> str | None:
    """WordNet id of an image by its path below a split's folder; None where it has none.

    Train images lie at `WNID/images/FILE`, val images at `images/FILE`, or sorted at `WNID/FILE`.

    classes: file name to WordNet id of the val images in `images`.
    """
    first, _, rest = path.partition("/")
    # a file right in the split's folder has no class
    if not rest:
        return None
    if first == "images":
        return classes.get(rest)
    return first


def _val_classes(sheet: Path) -> dict[str, str]:
    """File name to WordNet id, from lines of a name, an id and a box, divided by tabs."""
    rows = (line.split("\t") for line in sheet.read_text(encoding="utf-8").splitlines())
    return {row[0]: row[1] for row in rows if len(row) > 1}
