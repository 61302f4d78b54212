"""`deepclust features` and what comes behind it: backbones of every kind, and heads that train on a
store.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deepclust import Clusterer
from deepclust.cli import main
from deepclust.data.features import features
from deepclust.data.store import FeatureStore
from deepclust.errors import UserError
from deepclust.features.encoder import saw_labels
from deepclust.features.extract import Asked, extract
from deepclust.loggers.progress_bar import Progress

NETS = """
import torch
from deepclust.backbones import Preprocess

class Colours(torch.nn.Module):
    preprocess, trained_with_labels = Preprocess(8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)), False

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)

def colours():
    return Colours()
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Red and blue images in a folder each, one of them broken."""
    random = np.random.default_rng(0)
    for number in range(30):
        name = ("blue", "red")[number % 2]
        pixels = random.integers(0, 100, (10, 14, 3), dtype=np.uint8)
        pixels[..., 0 if name == "red" else 2] += 150
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    (tmp_path / "photos/red/broken.png").write_bytes(b"no image")
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path / "photos"


def test_a_head_trains_on_a_store_and_its_report_shows_the_images(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    words = [
        "features",
        str(photos),
        "--backbone",
        f"{tmp_path / 'nets.py'}:colours",
        "--store",
        str(store),
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert (
        "31 images in" in said
        and "red/broken.png: not an image" in said
        and "trained without labels" in said
    )
    assert f"data=features data.file={store}" in said
    data = features(str(store))
    assert (
        data.num_classes == 2
        and data.train.class_names == ["blue", "red"]
        and len(data.train) == 30
    )
    assert features(str(store), labels="none").num_classes is None
    (photos / "blue/0.png").unlink()
    run = [
        "train",
        "data=features",
        f"data.file={store}",
        f"run.dir={tmp_path / 'run'}",
        "head.num_neighbors=3",
    ]
    run += [
        "trainer.epochs=2",
        "trainer.batch_size=15",
        "eval.baselines=none",
        "logger.console=false",
    ]
    assert main([*run, "head.init=kmeans"]) == 0, capsys.readouterr()
    with open(tmp_path / "run/clusters.csv") as file:
        lines = list(csv.DictReader(file))
    assert (
        len(
            {
                line["cluster"]
                for line in lines
                if line["path"].startswith("red") and line["cluster"]
            }
        )
        == 1
    )
    assert lines[-1] == {
        "index": "30",
        "path": "red/broken.png",
        "split": "unreadable",
        "cluster": "",
        "confidence": "",
    }
    page = (tmp_path / "run/report.html").read_text()
    assert page.count('<li role="img"') == 30 and "blue/2.png" in page
    grey, blue = (
        data.train.picture(data.train.paths.index(path)) for path in ("blue/0.png", "blue/2.png")
    )
    assert (grey == 200).all() and blue[2].mean() > 150 > blue[0].mean()


def test_a_store_that_is_not_whole_is_refused_by_training(tmp_path: Path, photos: Path) -> None:
    asked = Asked(photos, tmp_path / "store", [f"{tmp_path / 'nets.py'}:colours"])
    extract(asked)
    store = FeatureStore.open(tmp_path / "store")
    file = store.file(store.backbone().name)
    data = bytearray(file.read_bytes())
    data[200] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"was changed on disk \(SHA-256, 1 blocks"):
        features(str(tmp_path / "store"))
    extract(asked)
    with pytest.raises(UserError, match="has no backbones other; there are: colours-"):
        features(str(tmp_path / "store"), backbone="other")
    np.save(tmp_path / "rows.npy", np.ones((4, 3)))
    with pytest.raises(UserError, match="chooses among those of a feature store"):
        features(str(tmp_path / "rows.npy"), backbone="other")
    with pytest.raises(UserError, match="is no feature store"):
        features(str(photos))


def test_timm_models_with_local_weights_and_without_any(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    state = timm.create_model("test_vit").state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in state.items()}},
        tmp_path / "w.pt",
    )
    for name in ("w.safetensors", "w.pt"):
        extract(Asked(photos, tmp_path / "store", ["test_vit"], [str(tmp_path / name)], size=32))
    store = FeatureStore.open(tmp_path / "store")
    assert [each.dim for each in store.backbones.values()] == [64], (
        "the same weights are the same backbone"
    )
    assert store.backbone("test_vit").identity["preprocess"]["size"] == 32
    with pytest.raises(UserError, match=r"--weights is given 1 time\(s\) and --backbone 2"):
        extract(Asked(photos, tmp_path / "new", ["test_vit", "test_resnet"], ["w.pt"]))
    with pytest.raises(UserError, match="timm has no such model; nearest: test_vit"):
        extract(Asked(photos, tmp_path / "new", ["test_vitt"]))

    def offline(*given: Any, **more: Any) -> None:
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        UserError,
        match=r"(?s)weights of test_vit cannot be had here: the hub cannot .*--weights FILE.*--train",
    ):
        extract(Asked(photos, tmp_path / "new", ["test_vit"]))
    assert not (tmp_path / "new").exists()


def test_without_weights_a_backbone_is_trained_on_the_images_if_asked_for(
    tmp_path: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import timm

    from deepclust.features import extract as module

    def offline(*given: Any, **more: Any) -> None:
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr(timm, "create_model", offline)
    small = [
        "data.size=16",
        "backbone.width=8",
        "trainer.num_images=60",
        "trainer.batch_size=10",
        "logger.console=false",
    ]
    small += ["eval.probes=false", "optim.warmup_steps=2", "trainer.num_workers=0"]
    monkeypatch.setattr(module, "SIMCLR", (*module.SIMCLR, *small))
    asked = Asked(photos, tmp_path / "store", ["test_vit"], dtype="float32", train=True)
    assert extract(asked) == 0
    said = capsys.readouterr().out
    assert (
        "the hub cannot be reached" in said
        and "is trained on these images first, without labels: SimCLR" in said
    )
    store = FeatureStore.open(tmp_path / "store")
    assert store.backbone("simclr").identity["trained_with_labels"] is False
    model = Clusterer.load(tmp_path / "store/simclr")
    direct = model.transform([photos / store.paths[row] for row in store.rows()])
    np.testing.assert_allclose(store.features()[store.rows()], direct, rtol=1e-4, atol=1e-5)
    assert extract(asked) == 0 and "is used instead" in capsys.readouterr().out
    assert (
        extract(
            Asked(photos, tmp_path / "other", [str(tmp_path / "store/simclr")], dtype="float32")
        )
        == 0
    )
    again = FeatureStore.open(tmp_path / "other")
    assert list(again.backbones) == list(store.backbones)
    assert np.array_equal(again.features(), store.features())
    with pytest.raises(UserError, match="a trained model has a size of its own"):
        extract(Asked(photos, tmp_path / "other", [str(tmp_path / "store/simclr")], size=8))


@pytest.mark.parametrize(
    ("tag", "labels"),
    [
        ("dino", False),
        ("lvd142m", False),
        ("mim_in22k", False),
        ("a1_in1k", True),
        ("augreg_in21k", True),
        ("fcmae_ft_in22k_in1k", True),
        ("openai", None),
        ("", None),
    ],
)
def test_whether_labels_were_seen_is_read_from_a_tag(tag: str, labels: bool | None) -> None:
    assert saw_labels(tag) is labels


def test_the_time_is_estimated_from_the_first_batches() -> None:
    class Console:
        said: list[str] = []  # noqa: RUF012

        def message(self, text: str) -> None:
            self.said.append(text)

        def log(self, *given: object) -> None: ...

    times = iter([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0] * 2 + [40.0])
    clock: Callable[[], float] = lambda: next(times)  # noqa: E731
    progress = Progress(Console(), 40_000, clock)  # pyright: ignore[reportArgumentType]
    for _ in range(7):  # two warm up, four seconds are the probe
        progress.step(10)
    assert Console.said == ["about 1:06:34 (h:mm:ss) for 39,940 images, 10 a second"]
    progress = Progress(Console(), 40_000, clock, rest=60.0)  # pyright: ignore[reportArgumentType]
    for _ in range(8):
        progress.step(10)
    assert Console.said[1] == f"{Console.said[0]}; with all else about 1:07:40 in all"
    assert Console.said[2].startswith("now about 7:")  # six times slower than was said


def test_a_file_of_ones_own_that_lacks_a_package_or_its_function_is_told_so(tmp_path: Path):
    from deepclust.features.encoder import find_encoder

    (tmp_path / "net.py").write_text("def net():\n    import package_that_nobody_has\n")
    with pytest.raises(
        UserError, match=r"No module named 'package_that_nobody_has'. Install the package"
    ):
        find_encoder(f"{tmp_path}/net.py:net")
    with pytest.raises(
        UserError, match=r"give the function too, as in --backbone .*net.py:FUNCTION"
    ):
        find_encoder(f"{tmp_path}/net.py")
