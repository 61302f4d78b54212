"""ImageNet's folders and subsets, and Tiny-ImageNet's own layout, from small files of the same
format.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from timm.data.imagenet_info import ImageNetInfo
from torchvision.datasets import ImageFolder

from deepclust.data.imagenet import SUBSETS, imagenet, tiny_imagenet
from deepclust.errors import UserError

MakeFolder = Callable[[Iterable[str]], Path]
DOGS = SUBSETS["imagenet_dogs"]


def classes_of(images) -> list[str]:
    return [images.class_names[row] for row in images.classes]


def test_subsets_are_classes_of_imagenet_each_within_the_next() -> None:
    assert {name: len(set(ids)) for name, ids in SUBSETS.items()} == {
        "imagenet10": 10,
        "imagenet50": 50,
        "imagenet100": 100,
        "imagenet200": 200,
        "imagenet_dogs": 15,
    }
    timms = ImageNetInfo()
    known = set(timms.label_names())
    assert len(known) == 1000
    for ids in SUBSETS.values():
        assert ids == sorted(ids) and set(ids) <= known
    assert set(SUBSETS["imagenet50"]) < set(SUBSETS["imagenet100"]) < set(SUBSETS["imagenet200"])
    described = [
        str(timms.label_name_to_description(wnid))
        for wnid in ("n02085936", "n07753592", "n04606251")
    ]
    assert [words.split(",")[0].split()[0].lower() for words in described] == [
        "maltese",
        "banana",
        "wreck",
    ]


@pytest.mark.parametrize(
    "places", [("train", "val"), ("ILSVRC2012_img_train", "ILSVRC2012_img_val")]
)
def test_a_subset_is_what_torchvision_finds_in_its_folders(
    places: tuple[str, str], make_folder: MakeFolder
) -> None:
    train, val = places
    files = [
        f"{train}/{wnid}/{wnid}_{number}.JPEG"
        for wnid in [*DOGS, "n01440764"]
        for number in (2, 10)
    ]
    files += [
        f"{val}/{wnid}/ILSVRC2012_val_0000000{number}.JPEG"
        for number, wnid in enumerate([*DOGS, "n01440764"])
    ]
    root = make_folder(files)
    data = imagenet(str(root), subset="imagenet_dogs", size=8)
    assert data.protocol == "inductive" and data.num_classes == 15 and data.test is not None
    assert data.train.class_names == DOGS and data.train.size == (8, 8) and data.train.channels == 3
    reference = ImageFolder(str(root / train))
    wanted = {
        (path, reference.classes[label])
        for path, label in reference.samples
        if reference.classes[label] in DOGS
    }
    found = {
        (str(root / path), name) for path, name in zip(data.train.paths, classes_of(data.train))
    }
    assert found == wanted and len(found) == 30 and len(data.test) == 15
    everything = imagenet(str(root), size=8, split="all", protocol="transductive")
    assert everything.num_classes == 16 and len(everything.train) == 48
    assert set(everything.train.splits.tolist()) == {"train", "val"}


def test_a_subset_from_the_users_own_list(make_folder: MakeFolder, tmp_path: Path) -> None:
    root = make_folder(
        [f"train/{wnid}/{number}.JPEG" for wnid in ("n01", "n02", "n03") for number in range(3)]
    )
    (tmp_path / "mine.txt").write_text("n03 a bird\n\nn01 a fish\n")
    data = imagenet(str(root), subset=str(tmp_path / "mine.txt"), protocol="transductive", size=8)
    assert data.name == "mine" and data.train.class_names == ["n01", "n03"] and len(data.train) == 6
    (tmp_path / "mine.txt").write_text("n03\nn04\n")
    with pytest.raises(UserError, match=r"1 of 2 classes, n04 first"):
        imagenet(str(root), subset=str(tmp_path / "mine.txt"), protocol="transductive", size=8)
    (tmp_path / "mine.txt").write_text("n03\n")
    with pytest.raises(UserError, match="fewer than two classes"):
        imagenet(str(root), subset=str(tmp_path / "mine.txt"), size=8)


def test_what_is_wrong_with_imagenet_is_said_in_words(make_folder: MakeFolder) -> None:
    root = make_folder(["train/n01/1.JPEG", "train/n02/1.JPEG", "val/ILSVRC2012_val_00000001.JPEG"])
    with pytest.raises(UserError, match=r"did you mean imagenet50"):
        imagenet(str(root), subset="imagenet5")
    with pytest.raises(
        UserError, match=r"(?s)val: all classes have no folder there.*a folder per class"
    ):
        imagenet(str(root))
    with pytest.raises(UserError, match=r"data.split=val with data.protocol=inductive"):
        imagenet(str(root), split="val")
    with pytest.raises(UserError, match=r"50 of 50 classes"):
        imagenet(str(root), subset="imagenet50")
    shutil.rmtree(root / "val")
    with pytest.raises(UserError, match=r"no folder val or ILSVRC2012_img_val"):
        imagenet(str(root))


def test_tiny_imagenet_reads_its_own_val_layout(make_folder: MakeFolder) -> None:
    train = [
        f"train/{wnid}/images/{wnid}_{number}.JPEG"
        for wnid in ("n01", "n02")
        for number in range(3)
    ]
    val = {f"val_{number}.JPEG": f"n0{2 - number % 2}" for number in range(4)}
    root = make_folder(
        [
            f"tiny-imagenet-200/{path}"
            for path in [*train, *(f"val/images/{name}" for name in val), "test/images/0.JPEG"]
        ]
    )
    home = root / "tiny-imagenet-200"
    (home / "train/n01/n01_boxes.txt").write_text("n01_0.JPEG\t0\t0\t62\t62\n")
    sheet = home / "val/val_annotations.txt"
    sheet.write_text("".join(f"{name}\t{wnid}\t0\t32\t44\t62\n" for name, wnid in val.items()))
    data = tiny_imagenet(str(root), size=8)
    assert data.protocol == "transductive" and len(data.train) == 6
    assert classes_of(data.train) == ["n01"] * 3 + ["n02"] * 3
    held_out = tiny_imagenet(str(home), protocol="inductive", size=8).test
    assert held_out is not None
    assert dict(zip((Path(path).name for path in held_out.paths), classes_of(held_out))) == val
    sheet.write_text("val_0.JPEG\tn02\t0\t32\t44\t62\n")
    with pytest.raises(UserError, match=r"val_1\.JPEG has no class"):
        tiny_imagenet(str(root), protocol="inductive", size=8)
    for name, wnid in val.items():  # the way many people sort it
        (home / "val" / wnid / "images").mkdir(parents=True, exist_ok=True)
        shutil.move(home / "val/images" / name, home / "val" / wnid / "images" / name)
    held_out = tiny_imagenet(str(home), protocol="inductive", size=8).test
    assert held_out is not None
    assert dict(zip((Path(path).name for path in held_out.paths), classes_of(held_out))) == val
    with pytest.raises(UserError, match="there is no folder train"):
        tiny_imagenet(str(home / "test"))
