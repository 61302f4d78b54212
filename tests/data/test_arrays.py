"""Lists of paths and arrays: every layout gives the same images, and what is wrong is said in
words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deepclust.data import datasets
from deepclust.data.arrays import as_images
from deepclust.data.given import gathered
from deepclust.errors import UserError

MakeFolder = Callable[[Iterable[str]], Path]


def names(images: datasets.ImageSet) -> list[str]:
    assert images.classes is not None
    return [images.class_names[row] for row in images.classes]


@pytest.mark.parametrize(
    ("file", "text", "labelled"),
    [
        ("list.txt", "a.png\n\nsub/b, c.png\r\nmissing.png\n", False),
        ("list.txt", "path\tlabel\na.png\tx\nsub/b, c.png\ty\nmissing.png\ty\n", True),
        ("list.csv", '\ufeffpath,label\na.png,x\n"sub/b, c.png",y\nmissing.png,x\n', True),
        ("list.csv", 'a.png\n"sub/b, c.png"\nmissing.png', False),
    ],
)
def test_lists_of_paths(file: str, text: str, labelled: bool, make_folder: MakeFolder) -> None:
    root = make_folder(["a.png", "sub/b, c.png"])
    (root / file).write_text(text, encoding="utf-8", newline="")
    data = datasets.image_list(str(root / file), size=8)
    assert data.train.paths == ["a.png", "sub/b, c.png"] and data.name == "list"
    assert [(skipped.id, skipped.path) for skipped in data.train.skipped] == [(2, "missing.png")]
    assert (names(data.train) == ["x", "y"]) if labelled else (data.train.classes is None)


def test_lists_may_hold_absolute_paths_and_bad_lists_are_refused(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    root = make_folder(["a.png", "b.png"])
    file = tmp_path / "list.csv"
    file.write_text(f"{root}/b.png\n{root}/a.png\n")
    assert datasets.image_list(str(file), size=8).train.paths == [
        f"{root}/b.png",
        f"{root}/a.png",
    ], "the list's order"
    file.write_text("photos/a.png,x\nphotos/b.png\n")
    with pytest.raises(UserError, match=r"entry 2 \(photos/b.png\) has no label"):
        datasets.image_list(str(file))
    assert datasets.image_list(str(file), size=8, labels="none").num_classes is None
    file.write_text("path,label\n\n")
    with pytest.raises(UserError, match="names no image"):
        datasets.image_list(str(file))
    with pytest.raises(UserError, match=r"no such file.*Did you mean"):
        datasets.image_list(str(tmp_path / "lst.csv"))
    file.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(UserError, match="UTF-8"):
        datasets.image_list(str(file))


def test_arrays_of_every_layout_are_the_same_images() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    same: list[Any] = [
        pixels,
        pixels.transpose(0, 3, 1, 2),
        torch.from_numpy(pixels),
        pixels.astype(np.int64),
        pixels.astype(">u2"),
        pixels[::-1].copy()[::-1],
        pixels.astype(np.float64) / 255,
        expected.float() / 255,
    ]
    for images in same:
        train = datasets.from_arrays(images).train
        assert (
            train.images is not None
            and torch.equal(train.images, expected)
            and train.size == (5, 6)
        )
    grey = datasets.from_arrays(pixels[..., 0] > 99).train
    assert (
        grey.channels == 1
        and grey.images is not None
        and set(grey.images.unique().tolist()) == {0, 255}
    )


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((4, 9)), "shape (4, 9): one grey image is images[None]"),
        (np.zeros((40, 30, 3)), "taken as (1, 40, 30, 3); at least 2 image"),
        (np.zeros((40, 30, 1)), "at least 2 image"),
        (np.zeros((40, 30, 4)), "alpha channel is images[..., :3]"),
        (np.zeros((5, 40, 30, 4)), "alpha channel is left out"),
        (np.zeros((5, 3, 3)), "one colour image is images[None], grey images are images[..., None]"),
        (np.zeros((4, 5, 5, 2)), "C = 1 or 3"),
        (np.zeros((1, 5, 5)), "at least 2 image"),
        (np.zeros((0, 5, 5)), "at least 2 image"),
        (np.zeros((3, 0, 5)), "at least one pixel"),
        (np.array([0, np.nan, np.inf]).reshape(3, 1, 1), "NaN or infinite pixels in 2 rows, first 1, 2"),
        (np.array([0.0, 16.0]).reshape(2, 1, 1), "0.0 to 16.0; floats must lie in [0, 1]. Rows outside: 1, first 1"),
        (np.full((2, 2, 2), -1), "integers must lie in 0..255"),
        (np.zeros((2, 2, 2), complex), "of type complex128"),
    ],
)  # fmt: skip
def test_bad_arrays_are_refused_in_words(images: np.ndarray, words: str) -> None:
    with pytest.raises(UserError) as caught:
        datasets.from_arrays(images)
    assert words in str(caught.value)


def test_one_image_is_one_image_and_what_could_be_either_is_refused() -> None:
    """An (H, W, 3) array was H grey images of W x 3 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    for channels in (None, 1, 3):
        whole = as_images(pixels, 1, channels)
        assert whole.shape == (1, 3, 40, 30) and (whole[0].permute(1, 2, 0).numpy() == pixels).all()
        assert torch.equal(as_images(pixels / 255.0, 1, channels), whole)
        assert as_images(pixels[..., :1], 1, channels).shape == (1, 1, 40, 30)
        assert as_images(pixels[..., :1].transpose(2, 0, 1), 1, channels).shape == (1, 1, 40, 30)
        assert as_images(np.zeros((7, 30, 3, 1)), 1, channels).shape == (7, 1, 30, 3), (
            "grey images 3 wide"
        )
        with pytest.raises(UserError, match=r"one grey image is images\[None\]"):
            as_images(pixels[..., 0], 1, channels)
    first = pixels.transpose(2, 0, 1)
    assert as_images(first, 1, 1).shape == as_images(first).shape == (3, 1, 40, 30)
    with pytest.raises(
        UserError, match=r"one colour image is images\[None\], and three grey images"
    ):
        as_images(first, 1, 3)


def test_what_people_hold_is_gathered_or_refused_in_words() -> None:
    array = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    pictures, names = [Image.fromarray(each) for each in array], [f"{row}.png" for row in range(6)]
    for paths in (
        names,
        tuple(names),
        [Path(name) for name in names],
        np.array(names),
        np.array(names, object),
    ):
        assert gathered(paths) == names
    assert gathered(name for name in names) == names
    assert gathered(pictures) == pictures and gathered(pictures[0]) == pictures[:1]
    for stack in (
        array,
        list(array),
        tuple(array),
        (each for each in array),
        [torch.from_numpy(a) for a in array],
    ):
        assert np.array_equal(gathered(stack), array)
    assert gathered([array[0, :, :, 0]] * 3).shape == (3, 1, 8, 8), (
        "three grey images, not one of colour"
    )
    refused: list[tuple[Any, str]] = [
        (set(names), "a set has no order"),
        ({"a": array}, "a dict has no order"),
        ([], "an empty list"),
        (3, "int; expected paths"),
        ([names[0], pictures[0]], "a mixture of Image, str"),
        ([array[0], array[1, :5]], r"different shapes, \(8, 8, 3\) and \(5, 8, 3\)"),
        ([[1, 2], [3]], "of different lengths"),
        ([None, None], "of type NoneType"),
    ]
    for given, words in refused:
        with pytest.raises(UserError, match=words):
            gathered(given)


def test_pillow_images_are_decoded_as_their_files_are(tmp_path: Path) -> None:
    """Whatever their mode: `np.asarray` of a palette image is its indices."""
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    modes = [Image.fromarray(colours).convert(mode) for mode in ("RGB", "P", "RGBA", "CMYK")]
    turned = Image.Exif()
    turned[0x0112] = 6
    modes[0].save(tmp_path / "turned.png", exif=turned)
    train = datasets.from_pictures([*modes, Image.open(tmp_path / "turned.png")]).train
    assert train.images is not None and train.images.shape == (5, 3, 8, 8)
    for image, picture in zip(train.images[:4].numpy(), modes):
        assert (image == np.asarray(picture.convert("RGB")).transpose(2, 0, 1)).all()
    assert (train.images[4].numpy() == np.rot90(colours, -1).transpose(2, 0, 1)).all()
    sizes = [Image.new("L", (90 + row, 80), 20 * row) for row in range(4)]
    train = datasets.from_pictures(sizes).train
    assert train.images is not None and train.images.shape == (4, 1, 64, 64)
    assert train.images[:, 0, 5, 5].tolist() == [0, 20, 40, 60]
    with pytest.raises(UserError, match=r"a Pillow image: holds NaN"):
        datasets.from_pictures([Image.fromarray(np.full((4, 4), np.nan, np.float32))] * 2)


def test_labels_of_arrays() -> None:
    images = np.zeros((4, 2, 2), np.uint8)
    assert names(datasets.from_arrays(images, [10, 2, 100, 2]).train) == ["10", "2", "100", "2"]
    assert datasets.from_arrays(images, [10, 2, 100, 2]).train.class_names == ["2", "10", "100"]
    assert datasets.from_arrays(images, torch.tensor([1.0, 0.0, 1.0, 0.0])).num_classes == 2
    assert datasets.from_arrays(images, ["x"] * 4).num_classes is None
    for labels, words in (
        ([1, 2], r"shape \(2,\); expected \(4,\)"),
        ([0.5, 1, 1, 1], "0.5 in row 0"),
        ([], "expected"),
    ):
        with pytest.raises(UserError, match=words):
            datasets.from_arrays(images, labels)
    with pytest.raises(UserError, match="of type object"):
        datasets.from_arrays(images, np.array([1, None, "x", 2], dtype=object))


def test_numpy_files(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 2, 2), dtype=np.uint8)
    labels = np.array([0, 1, 1, 0])
    np.save(tmp_path / "x.npy", images)
    np.save(tmp_path / "y.npy", labels)
    np.savez(tmp_path / "both.npz", images=images, labels=labels)
    for first, second in (("x.npy", "y.npy"), ("both.npz", "both.npz")):
        train = datasets.arrays(str(tmp_path / first), str(tmp_path / second)).train
        assert train.images is not None and (train.images[:, 0].numpy() == images).all()
        assert train.classes is not None and (train.classes == labels).all()
    np.savez(tmp_path / "other.npz", a=images, b=images)
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("hello")
    np.save(tmp_path / "cut.npy", images)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-3])
    faults = {"other.npz": "holds a, b; expected", "pickled.npy": "Python objects", "text.npy": "cannot be read",
              "cut.npy": "cannot be read", "gone.npy": "no such file"}  # fmt: skip
    for file, words in faults.items():
        with pytest.raises(UserError, match=words):
            datasets.arrays(str(tmp_path / file))
