"""Long tails: exact counts, nothing but labels decides, what is held out stays whole; lists of
benchmark splits.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from deepclust.config.build import build
from deepclust.config.load import load
from deepclust.data.datasets import digits, from_arrays, image_list
from deepclust.data.features import from_features
from deepclust.data.longtail import long_tail, tail_counts
from deepclust.errors import UserError

LABELS = np.repeat(np.arange(5), [30, 20, 25, 40, 22])
PIXELS = np.random.default_rng(0).integers(0, 256, (len(LABELS), 8, 8), dtype=np.uint8)


def script(name: str) -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("imbalance", "total"), [(100, 10_847), (50, 12_608), (20, 15_907)])
def test_cifar100_has_the_papers_counts(imbalance: float, total: int) -> None:
    counts = tail_counts(500, 100, imbalance)
    assert sum(counts) == total and counts[0] == 500 and counts == sorted(counts, reverse=True)
    if imbalance == 100:
        assert counts[:5] == [500, 477, 455, 434, 415] and counts[-4:] == [5, 5, 5, 5]
        assert [sum(counts[:30]), sum(counts[30:70]), sum(counts[70:])] == [8262, 2280, 305]


def test_cifar_files_thinned_and_the_test_split_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CIFAR-100 in its own format, 40 images a class in train and 2 in test."""
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR100

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    sums = {}
    for name, each in (("train", 40), ("test", 2)):
        fine = np.tile(np.arange(100), each).tolist()
        pixels = np.random.default_rng(each).integers(0, 256, (len(fine), 3072), dtype=np.uint8)
        (folder / name).write_bytes(
            pickle.dumps({"data": pixels, "fine_labels": fine, "coarse_labels": fine})
        )
    (folder / "meta").write_bytes(
        pickle.dumps({"fine_label_names": [f"c{n:02d}" for n in range(100)]})
    )
    for name in ("train", "test", "meta"):
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    data = build(load(["data=cifar100", f"data.root={tmp_path}", "data.imbalance=20"]).data)
    assert data.protocol == "longtail"
    assert np.bincount(data.train.classes).tolist() == tail_counts(40, 100, 20)
    assert np.bincount(data.test.classes).tolist() == [2] * 100
    with pytest.raises(UserError, match="at most 40, the size of the smallest class"):
        build(load(["data=cifar100", f"data.root={tmp_path}", "data.imbalance=50"]).data)


def test_the_same_images_each_time_in_their_order() -> None:
    first, again = (from_arrays(PIXELS, LABELS, imbalance=4).train for _ in range(2))
    assert first.classes is not None and again.classes is not None and first.images is not None
    assert np.bincount(first.classes).tolist() == tail_counts(20, 5, 4) == [20, 14, 10, 7, 5]
    assert first.ids.tolist() == again.ids.tolist() == sorted(first.ids.tolist())
    assert (LABELS[first.ids] == first.classes).all()
    assert torch.equal(first.images[:, 0], torch.from_numpy(PIXELS[first.ids]))
    assert len(digits(imbalance=1).train) == 174 * 10


def test_without_labels_there_is_no_tail_to_make() -> None:
    with pytest.raises(UserError, match=r"data\.imbalance=10: arrays has no labels"):
        from_arrays(PIXELS, imbalance=10)


def test_longtail_holds_out_what_it_finds_balanced() -> None:
    rows = np.random.default_rng(1).normal(size=(60, 4))
    labels, splits = np.tile(np.arange(3), 20), ["train"] * 42 + ["test"] * 18
    data = from_features(rows, labels, splits, protocol="longtail", imbalance=7)
    assert (
        data.test is not None and data.test.classes is not None and data.train.classes is not None
    )
    assert (data.protocol, np.bincount(data.train.classes).tolist()) == (
        "longtail",
        tail_counts(14, 3, 7),
    )
    assert np.bincount(data.test.classes).tolist() == [6, 6, 6]
    assert from_features(rows, labels, splits, protocol="longtail").protocol == "longtail"
    whole = long_tail(data.test, 1)
    assert len(whole) == 18


def folders(root: Path, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(PIXELS[number]).save(root / name / f"{number}.png")


def test_imagenet_r_lists_are_the_split_wherever_they_go(tmp_path: Path) -> None:
    module, counts = script("write_lists"), {"n02": 27, "n01": 23, "n03": 30}
    folders(tmp_path, counts)
    splits = module.imagenet_r(tmp_path)
    assert splits == module.imagenet_r(tmp_path)
    assert {
        name: sum(label == name for _, label in splits["test"]) for name in counts
    } == dict.fromkeys(counts, 20)
    assert {path for lines in splits.values() for path, _ in lines} == {
        f"{name}/{number}.png" for name, count in counts.items() for number in range(count)
    }
    for split, lines in splits.items():
        module.write(tmp_path / f"{split}.csv", lines)
    data = image_list(
        str(tmp_path / "train.csv"),
        size=8,
        test_file=str(tmp_path / "test.csv"),
        protocol="longtail",
    )
    assert data.test is not None and (len(data.train), len(data.test), data.protocol) == (
        20,
        60,
        "longtail",
    )
    with pytest.raises(UserError, match="Give both or neither"):
        image_list(str(tmp_path / "train.csv"), size=8, protocol="longtail")


def test_inaturalist_subsets_are_nested_and_ties_are_stable(tmp_path: Path) -> None:
    module = script("write_lists")
    ranked = list(range(8142))
    subsets = {size: module.nested_subset(ranked, size) for size in module.SUBSETS}
    assert {size: len(kept) for size, kept in subsets.items()} == {
        size: size for size in module.SUBSETS
    }
    for larger, smaller in zip(module.SUBSETS, module.SUBSETS[1:]):
        assert set(subsets[smaller]) <= set(subsets[larger])
    assert (
        subsets[2000][:3] == [0, 4, 8]
        and subsets[1000][:3] == [0, 8, 16]
        and subsets[100][:2] == [0, 64]
    )
    categories = np.repeat(np.arange(9000, 9000 + 700), 1 + np.arange(700) % 3)
    for split, chosen in (("train", categories[::-1]), ("val", np.unique(categories))):
        images = [
            {"id": place, "file_name": f"{split}/{place}.jpg"} for place in range(len(chosen))
        ]
        marks = [{"image_id": place, "category_id": int(name)} for place, name in enumerate(chosen)]
        (tmp_path / f"{split}2018.json").write_text(
            json.dumps({"images": images, "annotations": marks})
        )
    module.SUBSETS = (100, 50)
    splits = module.inaturalist(tmp_path, 50)
    order = sorted(range(700), key=lambda name: (-(1 + name % 3), name))[::4][:100][::2]
    expected = {f"{rank:04d}": 1 + name % 3 for rank, name in enumerate(order)}
    found: dict[str, int] = {}
    for _, label in splits["train"]:
        found[label] = found.get(label, 0) + 1
    assert found == expected and len(splits["test"]) == 50
    module.write(tmp_path / "train.csv", splits["train"])
    with open(tmp_path / "train.csv") as file:
        assert next(csv.reader(file)) == ["path", "label"]
