"""Image folders: what is found, in which order, under which labels; and what is refused, in which
words.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deepclust.data import datasets, folders
from deepclust.data.folders import natural
from deepclust.data.image_set import channel_statistics
from deepclust.errors import UserError

MakeFolder = Callable[[Iterable[str]], Path]


def names(images: datasets.ImageSet) -> list[str]:
    assert images.classes is not None
    return [images.class_names[row] for row in images.classes]


def test_flat_and_nested_folders_come_in_natural_order(make_folder: MakeFolder) -> None:
    paths = [
        "img10.png",
        "img2.png",
        "Img1.PNG",
        "deep/er/still/b.png",
        "deep/a.png",
        "01.png",
        "1.png",
    ]
    train = datasets.image_folder(str(make_folder(paths)), size=8).train
    expected = [
        "01.png",
        "1.png",
        "deep/a.png",
        "deep/er/still/b.png",
        "Img1.PNG",
        "img2.png",
        "img10.png",
    ]
    assert train.paths == expected
    assert train.ids.tolist() == list(range(7)) and set(train.splits) == {"all"}
    assert train.classes is None and train.class_names == [], "images lie right in the root"


def test_natural_order_is_total_and_has_no_ties() -> None:
    texts = ["", "01", "1", "²", "a", "A", "a01", "a1", "a2", "a10", "é", "z"]
    assert len({natural(text) for text in texts}) == len(texts)
    assert sorted(texts, key=natural) == [
        "",
        "01",
        "1",
        "A",
        "a",
        "a01",
        "a1",
        "a2",
        "a10",
        "z",
        "²",
        "é",
    ]


def test_folder_names_are_labels(make_folder: MakeFolder) -> None:
    root = make_folder(["10/a.png", "2/b.png", "2/sub/c.png", "100/d.png"])
    (root / "empty").mkdir()
    data = datasets.image_folder(str(root), size=8)
    assert data.train.class_names == ["2", "10", "100"] and data.num_classes == 3
    assert names(data.train) == [path.split("/")[0] for path in data.train.paths]
    assert datasets.image_folder(str(root), size=8, labels="none").train.classes is None


def test_one_class_is_no_labelling(make_folder: MakeFolder) -> None:
    root = make_folder(["cats/a.png", "cats/b.png"])
    data = datasets.image_folder(str(root), size=8)
    assert data.train.classes is None and data.num_classes is None
    with pytest.raises(UserError, match="one class folder only, cats"):
        datasets.image_folder(str(root), size=8, labels="folders")
    Image.new("RGB", (5, 5)).save(root / "loose.png")
    with pytest.raises(UserError, match=r"loose\.png lies in no class folder"):
        datasets.image_folder(str(root), size=8, labels="folders")


SPLIT_PATHS = [
    "train/cat/1.png",
    "train/cat/2.png",
    "train/dog/1.png",
    "validation/dog/2.png",
    "test/emu/3.png",
]


def test_train_and_validation_folders_are_splits(make_folder: MakeFolder) -> None:
    root = str(make_folder(SPLIT_PATHS))
    data = datasets.image_folder(root, size=8)
    assert data.test is None and len(data.train) == 5
    assert data.train.splits.tolist() == [path.split("/")[0] for path in data.train.paths]
    assert data.train.class_names == ["cat", "dog", "emu"]
    assert names(data.train) == [path.split("/")[1] for path in data.train.paths]


def test_inductive_holds_out_all_but_train_and_maps_classes_by_name(
    make_folder: MakeFolder,
) -> None:
    data = datasets.image_folder(str(make_folder(SPLIT_PATHS)), size=8, protocol="inductive")
    assert data.test is not None and data.protocol == "inductive"
    assert set(data.train.splits) == {"train"} and set(data.test.splits) == {"validation", "test"}
    assert names(data.train) == ["cat", "cat", "dog"] and names(data.test) == ["emu", "dog"]
    assert data.num_classes == 2, "emu is not among the images that are clustered"
    assert sorted([*data.train.ids, *data.test.ids]) == list(range(5))
    assert (
        data.train.images is not None
        and data.test.mean == data.train.mean == channel_statistics(data.train.images)[0]
    )


def test_an_unlabelled_test_folder_beside_a_labelled_train_folder(make_folder: MakeFolder) -> None:
    root = str(make_folder(["train/cat/1.png", "train/dog/1.png", "test/1.png", "test/2.png"]))
    data = datasets.image_folder(root, size=8, protocol="inductive")
    assert data.test is not None and data.test.classes is None and data.train.classes is not None
    assert datasets.image_folder(root, size=8).train.classes is None


def test_a_train_folder_alone_and_split_names_among_others(make_folder: MakeFolder) -> None:
    root = make_folder(["train/cat/1.png", "train/dog/1.png"])
    assert names(datasets.image_folder(str(root), size=8).train) == ["cat", "dog"]
    with pytest.raises(UserError, match=r"protocol=inductive.*splits: train"):
        datasets.image_folder(str(root), size=8, protocol="inductive")
    Image.new("RGB", (5, 5)).save(root / "train" / "x.png")
    make_folder(["bus/1.png"])
    assert datasets.image_folder(str(root), size=8).train.class_names == ["bus", "train"]


def test_what_a_run_left_below_the_images_is_no_image(make_folder: MakeFolder) -> None:
    root = make_folder(["a.png", "outputs/clusters/sorted/000/a.png", "outputs/b.png"])
    (root / "outputs/clusters/.deepclust.lock").touch()
    assert folders.list_folder(str(root)).paths == ["a.png", "outputs/b.png"]
    (root / ".deepclust.lock").touch()
    assert folders.list_folder(str(root)).paths == ["a.png", "outputs/b.png"]


def test_hidden_files_and_other_kinds_are_no_images(make_folder: MakeFolder) -> None:
    hidden = [
        ".a.png",
        ".ipynb_checkpoints/x.png",
        "__MACOSX/cat/x.png",
        ".git/y.png",
        "cat/.z.png",
    ]
    root = make_folder(["cat/a.png", "dog/b.png", *hidden])
    for name in ("cat/Thumbs.db", "notes.txt", "dog/raw.cr2"):
        (root / name).write_bytes(b"no image")
    train = datasets.image_folder(str(root), size=8).train
    assert train.paths == ["cat/a.png", "dog/b.png"] and train.class_names == ["cat", "dog"]
    assert train.num_ignored == 2 and train.skipped == []


def test_links_are_followed_but_not_in_circles(make_folder: MakeFolder, tmp_path: Path) -> None:
    root = make_folder(["a/1.png", "a/b/2.png"])
    (root / "a" / "b" / "up").symlink_to(root / "a")
    (root / "a" / "self").symlink_to(root)
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    Image.new("RGB", (5, 5)).save(outside / "3.png")
    (root / "c").symlink_to(outside)
    assert datasets.image_folder(str(root), size=8).train.paths == [
        "a/1.png",
        "a/b/2.png",
        "c/3.png",
    ]
    (root / "round").symlink_to("round")
    (root / "round.png").symlink_to("round.png")
    found = datasets.image_folder(str(root), size=8).train
    assert found.num_ignored == 1 and [(each.path, each.reason) for each in found.skipped] == [
        ("round.png", "a link that leads to itself")
    ]


def test_listings_are_sorted_as_the_names_in_them() -> None:
    random = np.random.default_rng(0)
    parts = [
        "",
        "a",
        "A",
        "ab",
        "1",
        "01",
        "10",
        "2",
        " ",
        "-",
        "é",
        "É",
        "ß",
        "²",
        "0",
        "\udce9",
        ".",
    ]
    names = {
        "/".join("".join(random.choice(parts, 3)) or "x" for _ in range(random.integers(1, 4)))
        for _ in range(3000)
    }
    expected = sorted(names, key=lambda name: [natural(part) for part in name.split("/")])
    assert sorted(names, key=folders._order) == expected


def damaged(make_folder: MakeFolder) -> Path:
    root = make_folder(["1.png", "2.jpg", "3.png", "4.png", "5.png", "6.png"])
    (root / "2.jpg").write_text("a letter")
    (root / "4.png").write_bytes(b"")
    (root / "5.png").unlink()
    (root / "5.png").symlink_to(root / "gone.png")
    (root / "x.png").mkdir()
    return root


@pytest.mark.parametrize("memory_mb", [0, 100])
def test_unreadable_images_are_named_and_ids_stay(memory_mb: int, make_folder: MakeFolder) -> None:
    root = damaged(make_folder)
    train = datasets.image_folder(str(root), size=8, memory_mb=memory_mb).train
    assert train.paths == ["1.png", "3.png", "6.png"] and train.ids.tolist() == [0, 2, 5]
    assert [(skipped.id, skipped.path) for skipped in train.skipped] == [
        (1, "2.jpg"),
        (3, "4.png"),
        (4, "5.png"),
    ]
    assert "not an image" in train.skipped[0].reason and "empty" in train.skipped[1].reason
    for row, path in enumerate(train.paths):
        with Image.open(root / path) as image:
            expected = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert (train.read(row).numpy() == expected).all()


def test_a_set_on_disk_is_the_set_in_memory(make_folder: MakeFolder) -> None:
    root = str(make_folder([f"{name}/{row}.png" for name in "ab" for row in range(3)]))
    memory, disk = (datasets.image_folder(root, size=8, memory_mb=mb).train for mb in (1, 0))
    assert memory.images is not None and disk.images is None
    copy = pickle.loads(pickle.dumps(disk))
    for row in range(6):
        assert torch.equal(memory.images[row], disk.read(row)) and torch.equal(
            copy.read(row), disk.read(row)
        )
    assert memory.fingerprint() == disk.fingerprint() == copy.fingerprint()
    assert disk.mean == (0.485, 0.456, 0.406), "ImageNet's"


def test_channels_follow_the_images_or_the_setting(make_folder: MakeFolder) -> None:
    root = make_folder(["a.png", "b.png"])
    assert datasets.image_folder(str(root), size=8).train.channels == 3
    assert datasets.image_folder(str(root), size=8, channels=1).train.read(0).shape == (1, 8, 8)
    for name in ("a.png", "b.png"):
        Image.new("L", (9, 9), 7).save(root / name)
    assert datasets.image_folder(str(root), size=8).train.channels == 1
    assert datasets.image_folder(str(root), size=8, memory_mb=0, channels=1).train.mean == (0.449,)


def test_bad_folders_are_refused_in_words(make_folder: MakeFolder, tmp_path: Path) -> None:
    def refusal(root: Path | str) -> str:
        with pytest.raises(UserError) as caught:
            datasets.image_folder(str(root), size=8)
        return str(caught.value)

    root = make_folder(["a.png"])
    assert "needs at least 2 images, and 1 was found" in refusal(root)
    assert f"Did you mean {root}?" in refusal(tmp_path / "photo")
    assert f"nearest folder that exists is {tmp_path}" in refusal(tmp_path / "zebra" / "x" / "y")
    assert "this is a file" in refusal(root / "a.png")
    assert (
        "no such folder" in refusal("")
        and "no such folder" in refusal("a\0b")
        and "no such" in refusal("x" * 300)
    )
    (root / "a.png").write_text("letter")
    (root / "b.png").write_bytes(b"")
    text = refusal(root)
    assert "none of the 2 images can be read" in text and "b.png: empty file" in text
    (root / "a.png").rename(root / "a.cr2")
    (root / "b.png").rename(root / "b.cr2")
    text = refusal(root)
    assert "no image among 2 files (2 .cr2)" in text and ".jpg" in text
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / ".hidden.png").write_bytes(b"x")
    assert "is empty" in refusal(tmp_path / "bare")


def test_a_folder_without_permission_is_named() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        closed = Path(folder) / "closed"
        closed.mkdir(0)
        is_root = os.geteuid() == 0
        try:
            if is_root:
                os.seteuid(65534)
            for root in (folder, closed):
                with pytest.raises(UserError, match=f"the folder {closed} cannot be listed"):
                    datasets.image_folder(str(root))
            with pytest.raises(UserError, match=f"no permission to look into {closed}"):
                datasets.image_folder(str(closed / "photos"))
        finally:
            if is_root:
                os.seteuid(0)
            closed.chmod(0o700)


def test_names_that_are_not_utf8_are_left_out(make_folder: MakeFolder) -> None:
    root = make_folder(["a.png", "b.png", "c d,é\n.png"])
    try:
        (root / "a.png").rename(os.fsdecode(os.fsencode(root) + b"/\xff.png"))
    except OSError:
        pytest.skip("this file system allows no such names")
    train = datasets.image_folder(str(root), size=8).train
    assert train.paths == ["b.png", "c d,é\n.png"] and "UTF-8" in train.skipped[0].reason
    assert all("\n".join([*train.paths, train.skipped[0].path]).encode() for _ in range(1))


def test_the_fingerprint_knows_pixels_and_files_but_no_labels(make_folder: MakeFolder) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4), dtype=np.uint8)
    whole = datasets.from_arrays(images, labels=[0, 1, 2, 0, 1, 2]).train
    assert (
        whole.fingerprint()
        == datasets.from_arrays(images, labels=list("aabbcc")).train.fingerprint()
    )
    assert whole.fingerprint() != datasets.from_arrays(images[::-1]).train.fingerprint()
    assert whole.fingerprint() != datasets.from_arrays(images.reshape(6, 2, 8)).train.fingerprint()
    root = make_folder(["a/1.png", "b/2.png", "b/3.png"])
    before = datasets.image_folder(str(root), size=8).train.fingerprint()
    assert before == datasets.image_folder(str(root), size=8, labels="none").train.fingerprint()
    with open(root / "a" / "1.png", "ab") as file:
        file.write(b"!")
    assert datasets.image_folder(str(root), size=8).train.fingerprint() != before


def test_select_keeps_everything_in_step() -> None:
    images = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2)
    whole = datasets.from_arrays(images, labels=list("abcab")).train
    part = whole.select([4, 1])
    assert (
        part.ids.tolist() == [4, 1]
        and part.paths == ["all/4", "all/1"]
        and names(part) == ["b", "b"]
    )
    assert torch.equal(part.read(0), whole.read(4)) and len(part) == 2 and part.mean == whole.mean
    assert whole.select(np.array([False, True, False, False, True])).ids.tolist() == [1, 4]


def test_statistics_are_those_of_the_pixels_and_never_zero() -> None:
    images = torch.randint(
        0, 256, (50, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    mean, std = channel_statistics(images)
    pixels = images.numpy().transpose(1, 0, 2, 3).reshape(3, -1) / 255
    assert mean == pytest.approx(pixels.mean(1)) and std == pytest.approx(pixels.std(1))
    assert channel_statistics(torch.full((3, 1, 2, 2), 9, dtype=torch.uint8))[1] == pytest.approx(
        [1 / 255]
    )
