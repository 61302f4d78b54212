"""Named data sets: digits, and published sets from small files of the same format."""

from __future__ import annotations

import gzip
import pickle
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_digits
from torchvision.datasets import mnist

from deepclust.data import benchmarks, datasets
from deepclust.errors import UserError

MakeFolder = Callable[[Iterable[str]], Path]


def names(images: datasets.ImageSet) -> list[str]:
    assert images.classes is not None
    return [images.class_names[row] for row in images.classes]


def test_digits_are_scikit_learns() -> None:
    data = datasets.digits()
    images, labels = load_digits(return_X_y=True)
    assert data.train.images is not None and data.train.images.dtype == torch.uint8
    assert data.train.images.shape == (1797, 1, 8, 8) and data.train.images.max() == 255
    assert np.abs(data.train.images.numpy().reshape(1797, 64) / 255 * 16 - images).max() < 0.04
    assert (data.train.classes == labels).all() and data.num_classes == 10
    assert data.test is None and data.protocol == "transductive"
    assert data.train.mean == pytest.approx([images.mean() / 16], abs=1e-3)
    assert data.train.std == pytest.approx([images.std() / 16], abs=1e-3)


def write_idx(path: Path, values: np.ndarray) -> None:
    content = (
        struct.pack(">BBBB", 0, 0, 8, values.ndim)
        + struct.pack(f">{values.ndim}I", *values.shape)
        + values.tobytes()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion(folder: Path, suffix: str, counts: dict[str, int]) -> dict[str, np.ndarray]:
    images = {}
    for seed, (stem, count) in enumerate(counts.items()):
        random = np.random.default_rng(seed)
        images[stem] = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(folder / f"{stem}-images-idx3-ubyte{suffix}", images[stem])
        write_idx(
            folder / f"{stem}-labels-idx1-ubyte{suffix}", (np.arange(count) % 10).astype(np.uint8)
        )
    return images


@pytest.mark.parametrize(
    ("layout", "suffix"),
    [("FashionMNIST/raw", ""), ("FashionMNIST/raw", ".gz"), ("", ".gz"), ("debian", ".gz")],
)
def test_fashion_mnist_is_found_where_it_may_lie(
    layout: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarks, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    root = tmp_path if layout != "debian" else tmp_path / "nothing here"
    images = write_fashion(tmp_path / layout, suffix, {"train": 30, "t10k": 20})
    data = datasets.fashion_mnist(str(root))
    assert (
        data.train.images is not None and (data.train.images[:, 0].numpy() == images["t10k"]).all()
    )
    assert names(data.train)[:2] == ["T-shirt/top", "Trouser"] and data.num_classes == 10
    both = datasets.fashion_mnist(str(root), split="all").train
    assert both.splits.tolist() == ["train"] * 30 + ["test"] * 20 and both.paths[30] == "test/0"
    held_out = datasets.fashion_mnist(str(root), split="train", protocol="inductive")
    assert held_out.test is not None and len(held_out.train) == 30 and len(held_out.test) == 20
    with pytest.raises(UserError, match=r"data.split=test with data.protocol=inductive"):
        datasets.fashion_mnist(str(root), split="test", protocol="inductive")


def test_idx_files_are_read_as_torchvision_reads_them_and_broken_ones_refused(
    tmp_path: Path,
) -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    write_idx(tmp_path / "x", values)
    assert (
        benchmarks.read_idx(tmp_path / "x") == mnist.read_image_file(str(tmp_path / "x")).numpy()
    ).all()
    write_idx(tmp_path / "x.gz", values)
    packed = (tmp_path / "x.gz").read_bytes()
    for content in (
        packed[:-20],
        b"",
        packed[:30] + b"!!!" + packed[33:],
        gzip.compress(b"\0\0\x08\x01\0\0\0\x09abc"),
        gzip.compress(b"no"),
    ):
        (tmp_path / "x.gz").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.gz"):
            benchmarks.read_idx(tmp_path / "x.gz")


def test_a_missing_set_says_both_ways_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarks, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    with pytest.raises(
        UserError, match=r"(?s)data.download=true.*apt-get install dataset-fashion-mnist"
    ):
        datasets.fashion_mnist(str(tmp_path))
    for function in (datasets.cifar10, datasets.cifar20, datasets.cifar100, datasets.stl10):
        with pytest.raises(UserError, match=r"data\.download=true"):
            function(str(tmp_path))


def test_a_failed_download_is_said_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(benchmarks, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", fail)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", fail)
    for function in (datasets.fashion_mnist, datasets.cifar10):
        with pytest.raises(UserError, match="could not be downloaded"):
            function(str(tmp_path), download=True)


def write_cifar(root: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """A few images in CIFAR's own files (pickled dicts); torchvision's list of MD5 sums is emptied
    for the test.
    """
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    fine = kind is torchvision.datasets.CIFAR100
    pixels = {}
    for which in ("train_list", "test_list"):
        files = [name for name, _ in getattr(kind, which)]
        monkeypatch.setattr(kind, which, [(name, None) for name in files])
        parts = []
        for seed, name in enumerate(files):
            values = np.random.default_rng(seed).integers(0, 256, (20, 3072), dtype=np.uint8)
            labels = [(7 * row) % (100 if fine else 10) for row in range(20)]
            content = {"data": values, "fine_labels" if fine else "labels": labels}
            (folder / name).write_bytes(pickle.dumps(content))
            parts.append(values.reshape(-1, 3, 32, 32))
        pixels[which] = np.concatenate(parts)
    classes = (
        sorted(" ".join(benchmarks.CIFAR20_CLASSES.values()).split())
        if fine
        else [f"class {n}" for n in range(10)]
    )
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: classes}))
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": None})
    return pixels


def test_cifar_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_cifar(tmp_path, torchvision.datasets.CIFAR10, monkeypatch)
    data = datasets.cifar10(str(tmp_path))
    assert data.protocol == "inductive" and data.test is not None and data.num_classes == 10
    assert (
        data.train.images is not None and (data.train.images.numpy() == pixels["train_list"]).all()
    )
    assert data.test.images is not None and (data.test.images.numpy() == pixels["test_list"]).all()
    assert (
        names(data.test)[:3] == ["class 0", "class 7", "class 4"] and data.test.paths[0] == "test/0"
    )
    everything = datasets.cifar10(str(tmp_path), split="all", protocol="transductive")
    assert len(everything.train) == len(data.train) + len(data.test) and everything.test is None


def test_cifar_superclasses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, torchvision.datasets.CIFAR100, monkeypatch)
    fine = datasets.cifar100(str(tmp_path)).train
    coarse = datasets.cifar20(str(tmp_path)).train
    assert len(fine.class_names) == 100 and len(coarse.class_names) == 20
    for one, other in zip(names(fine), names(coarse)):
        assert one in benchmarks.CIFAR20_CLASSES[other].split()


def test_the_superclass_table_is_the_published_one() -> None:
    """The list that the CIFAR-100 files give as coarse label of each fine label, in the order of
    the fine labels.
    """
    published = """
        4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11 5
        5 19 8 8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 16 12 9 13 15 13
        16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13"""
    table = benchmarks.fine_to_coarse()
    assert table.tolist() == [int(word) for word in published.split()]
    assert (np.bincount(table) == 5).all() and len(table) == 100


def test_stl10_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = torchvision.datasets.STL10
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3, 96, 96), dtype=np.uint8)
    for split, rows in (
        ("train", slice(0, 5)),
        ("test", slice(5, 12)),
        ("unlabeled", slice(0, 12)),
    ):
        pixels[rows].transpose(0, 1, 3, 2).tofile(folder / f"{split}_X.bin")
        (np.arange(12)[rows] % 10 + 1).astype(np.uint8).tofile(folder / f"{split}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"class {n}" for n in range(10)))
    (folder / "fold_indices.txt").write_text("")
    for which in ("train_list", "test_list"):
        monkeypatch.setattr(kind, which, [[name, None] for name, _ in getattr(kind, which)])
    data = datasets.stl10(str(tmp_path))
    assert data.train.images is not None and (data.train.images.numpy() == pixels[:5]).all()
    assert data.test is not None and names(data.test)[:2] == ["class 5", "class 6"]
    unlabelled = datasets.stl10(str(tmp_path), split="unlabeled", protocol="transductive")
    assert (
        len(unlabelled.train) == 12
        and unlabelled.train.classes is None
        and unlabelled.num_classes is None
    )
    both = datasets.stl10(str(tmp_path), extra=True)
    assert (
        both.extra is not None
        and both.num_classes == 5
        and both.fingerprint() != data.fingerprint()
    )
    images = both.training_images(True)
    assert (
        images.images is not None
        and (images.images.numpy() == np.concatenate([pixels[:5], pixels])).all()
    )
    assert (
        images.classes is None
        and images.paths[4:6] == ["train/4", "unlabeled/0"]
        and len(images) == 17
    )
    assert both.training_images(False) is both.train and images.mean == both.train.mean
    with pytest.raises(UserError, match=r"data.extra=true with data.split=unlabeled"):
        datasets.stl10(str(tmp_path), split="unlabeled", protocol="transductive", extra=True)
