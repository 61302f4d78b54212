"""Presets hold the settings that papers and their code published."""

from __future__ import annotations

import re
from typing import Any

import pytest

from deepclust.config.augment import split_view
from deepclust.config.compose import conf_folder, options
from deepclust.config.load import load
from deepclust.errors import ConfigError


@pytest.mark.parametrize(
    "name", [name for name, _ in options("experiment") if name.startswith("scan_")]
)
def test_presets_of_scan_are_the_papers(name, tmp_path):
    """Van Gansbeke et al. 2020, reference code; by data set: batch and epochs of SCAN, of
    self-labelling.
    """
    published = {
        "scan_cifar10": (128, 50, 1000, 200),
        "scan_cifar20": (512, 100, 1000, 200),
        "scan_stl10": (128, 100, 1000, 100),
        "scan_imagenet50": (512, 100, 512, 25),
        "scan_imagenet100": (1024, 100, 512, 25),
        "scan_imagenet200": (1024, 100, 512, 25),
    }
    large = "imagenet" in name
    weights = tmp_path / "moco.pth"
    if large:
        with pytest.raises(ConfigError, match=r"drawn at random; give backbone\.weights=FILE"):
            load([f"experiment={name}"])
    config = load([f"experiment={name}", *([f"backbone.weights={weights}"] if large else [])])
    scan, own = config.stages["scan"], config.stages["selflabel"]
    sizes = [
        number
        for stage in (scan, own)
        for number in (stage.trainer.batch_size, stage.trainer.epochs)
    ]
    assert tuple(sizes) == published[name]
    assert all(
        stage.trainer.num_images is None and stage.optim.schedule == "constant"
        for stage in (scan, own)
    )
    assert scan.head["num_neighbors"] == (50 if large else 20) and scan.head["num_heads"] == (
        10 if large else 1
    )
    assert (scan.optim.name, scan.optim.lr) == (("sgd", 5.0) if large else ("adam", 1e-4))
    assert (own.optim.name, own.optim.lr) == (("sgd", 0.03) if large else ("adam", 1e-4))
    assert (
        own.head["threshold"] == 0.99
        and own.head["balance"] is not large
        and scan.head["entropy_weight"] == 5
    )
    assert (own.trainer.ema, own.trainer.ema_mode) == (
        (0.999, "reference") if large else (None, "teacher")
    )
    if not large:
        pretext = config.stages["pretext"]
        assert (pretext.trainer.epochs, pretext.trainer.batch_size, pretext.optim.lr) == (
            500,
            512,
            0.4,
        )
        assert (
            pretext.optim.schedule_per == "epoch"
            and pretext.head["one_sided"]
            and scan.head["mine_on"] == "embedding"
        )
        assert (
            pretext.trainer.extra_images
            == config.data.get("extra", False)
            == (name == "scan_stl10")
        )


def stage(name: str) -> Any:
    """The only stage of a preset."""
    (found,) = load([f"experiment={name}"]).stages.values()
    return found


def view_of(stage: Any, name: str) -> dict[str, Any]:
    """Operations of a view by name, with their parameters."""
    description = stage.augment["views"][name]
    return {key: value for op in split_view(description, (32, 32))[0] for key, value in op.items()}


def comment(name: str) -> str:
    """What a preset says of itself, in one line."""
    text = (conf_folder() / "experiment" / f"{name}.yaml").read_text()
    lines = [
        line[2:] for line in text.partition("defaults:")[0].splitlines() if line.startswith("# ")
    ]
    return " ".join(lines)


@pytest.mark.parametrize("name", ["sela_cifar10", "sela_cifar100"])
def test_sela_on_cifar_is_the_references_script(name: str) -> None:
    """Asano et al. 2020, cifar.py: a tenth of the rate at 240 and at 320 of 400; heads see the last
    ReLU's output.
    """
    found, backbone = stage(name), load([f"experiment={name}"]).backbone
    assert found.optim.milestones == [240, 320] and found.optim.milestone_factor == 0.1
    assert (found.optim.lr, found.optim.momentum, found.optim.weight_decay) == (0.03, 0.9, 5e-4)
    assert (found.trainer.epochs, found.trainer.batch_size) == (400, 128)
    assert view_of(found, "simclr")["random_resized_crop"]["scale"] == [0.2, 1.0]
    assert (backbone["name"], backbone["sobel"], backbone["relu"]) == ("alexnet", False, True)


def test_deepcluster_with_resnet_50_has_the_views_of_openselfsup() -> None:
    weak = view_of(stage("deepcluster_resnet50_imagenet"), "weak")
    assert list(weak) == [
        "random_resized_crop",
        "horizontal_flip",
        "rotate",
        "color_jitter",
        "grayscale",
    ]
    assert weak["rotate"] == {"degrees": 2} and weak["grayscale"] == {"p": 0.2}
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 1.0, "hue": 0.5, "p": 1.0}
    assert weak["color_jitter"] == jitter == view_of(stage("odc_imagenet"), "weak")["color_jitter"]


@pytest.mark.parametrize(
    "name", [name for name, _ in options("experiment") if name.startswith("cdc_")]
)
def test_cdc_has_the_references_pretext_and_start(name: str) -> None:
    """Jia et al. 2025: MoCo v2+ of solo-learn (no batch norm, two queues), k-means of 10 restarts
    of 300 iterations.
    """
    stages = load([f"experiment={name}"]).stages
    pretext, head = stages["pretext"].head, stages["calibration"].head
    assert pretext["batch_norm"] is False and pretext["separate_queues"] and pretext["symmetric"]
    assert (pretext["queue_size"], pretext["hidden_dim"], pretext["embedding_dim"]) == (
        32768,
        4096,
        256,
    )
    assert (head["start_restarts"], head["start_iterations"]) == (10, 300)
    assert (head["restarts"], head["iterations"], head["warm_start"]) == (10, 300, False)
    text = (conf_folder() / "recipe" / "cdc.yaml").read_text()
    assert "instead of rising to 0.999" in text and "share batch statistics" in text


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
@pytest.mark.parametrize("method", ["swav", "deepcluster_v2"])
def test_swav_and_deepcluster_v2_on_cifar_have_no_blur(method: str, data: str) -> None:
    """solo-learn's scripts of the time: `gaussian_prob 0.0 0.0`, jitter 0.8, 0.8, 0.8, 0.2."""
    views = view_of(stage(f"{method}_{data}"), "global")
    assert "gaussian_blur" not in views and views["grayscale"] == {"p": 0.2}
    assert views["color_jitter"] == {
        "brightness": 0.8,
        "contrast": 0.8,
        "saturation": 0.8,
        "hue": 0.2,
        "p": 0.8,
    }
    assert "share batch statistics" in comment(f"{method}_{data}")


@pytest.mark.parametrize(
    "name", ["p2ot_cifar100_lt", "p2ot_imagenet_r", "p2ot_inature100", "p2ot_inature1000"]
)
def test_p2ot_enlarges_by_bicubic_interpolation(name: str) -> None:
    """Zhang et al. 2024: Resize(256, bicubic), then a crop of 224, random for training."""
    found = stage(name)
    for view, crop in (("weak", "random_crop"), ("clean", "center_crop")):
        ops = view_of(found, view)
        assert (
            round(224 * ops["resize"]["ratio"]) == 256
            and ops["resize"]["interpolation"] == "bicubic"
        )
        assert crop in ops
    assert "the last epoch counts" in comment("p2ot_cifar100_lt")


@pytest.mark.parametrize("name", [name for name, _ in options("experiment") if "imagenet" in name])
def test_presets_for_imagenet_say_that_views_start_from_a_central_square(name: str) -> None:
    text = (conf_folder() / "experiment" / f"{name}.yaml").read_text()
    base = re.search(r"^  - (\w*imagenet\w*)$", text, re.MULTILINE)
    said = comment(base[1] if base else name)
    assert "central square" in said or "tiny" in name
