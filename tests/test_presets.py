"""Presets hold the settings that papers and their code published."""

from __future__ import annotations

import pytest

from deepclust.config import ConfigError, load, options


@pytest.mark.parametrize("name", [name for name, _ in options("experiment") if name.startswith("scan_")])
def test_presets_of_scan_are_the_papers(name, tmp_path):
    """Van Gansbeke et al. 2020, reference code; by data set: batch and epochs of SCAN, of self-labelling."""
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
    sizes = [number for stage in (scan, own) for number in (stage.trainer.batch_size, stage.trainer.epochs)]
    assert tuple(sizes) == published[name]
    assert all(stage.trainer.num_images is None and stage.optim.schedule == "constant" for stage in (scan, own))
    assert scan.head["num_neighbors"] == (50 if large else 20) and scan.head["num_heads"] == (10 if large else 1)
    assert (scan.optim.name, scan.optim.lr) == (("sgd", 5.0) if large else ("adam", 1e-4))
    assert (own.optim.name, own.optim.lr) == (("sgd", 0.03) if large else ("adam", 1e-4))
    assert own.head["threshold"] == 0.99 and own.head["balance"] is not large and scan.head["entropy_weight"] == 5
    assert (own.trainer.ema, own.trainer.ema_mode) == ((0.999, "reference") if large else (None, "teacher"))
    if not large:
        pretext = config.stages["pretext"]
        assert (pretext.trainer.epochs, pretext.trainer.batch_size, pretext.optim.lr) == (500, 512, 0.4)
        assert (
            pretext.optim.schedule_per == "epoch" and pretext.head["one_sided"] and scan.head["mine_on"] == "embedding"
        )
        assert pretext.trainer.extra_images == config.data.get("extra", False) == (name == "scan_stl10")
