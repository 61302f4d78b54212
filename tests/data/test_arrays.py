"""Lists of paths and arrays: every layout gives the same images, and what is wrong is said in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepclust.data import datasets
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


def test_lists_may_hold_absolute_paths_and_bad_lists_are_refused(make_folder: MakeFolder, tmp_path: Path) -> None:
    root = make_folder(["a.png", "b.png"])
    file = tmp_path / "list.csv"
    file.write_text(f"{root}/b.png\n{root}/a.png\n")
    assert datasets.image_list(str(file), size=8).train.paths == [f"{root}/b.png", f"{root}/a.png"], "the list's order"
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
        assert train.images is not None and torch.equal(train.images, expected) and train.size == (5, 6)
    grey = datasets.from_arrays(pixels[..., 0] > 99).train
    assert grey.channels == 1 and grey.images is not None and set(grey.images.unique().tolist()) == {0, 255}


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((4, 9)), "shape (4, 9)"),
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
