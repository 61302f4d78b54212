"""Every experiment composes, and its heads, backbone and views can be built as it says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from deepclust.config.build import build
from deepclust.config.compose import options
from deepclust.config.load import load
from deepclust.data.views.transform import build_views

EXPERIMENTS = [name for name, _ in options("experiment")]
CHANNELS = {"digits": 1, "fashion_mnist": 1}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_composes_and_its_parts_can_be_built(name):
    """On the meta device: no memory for large heads, no data."""
    given = (
        ["backbone.weights=FILE"] if name.startswith("scan_imagenet") else []
    )  # refused without, as it says
    config = load([f"experiment={name}", "num_clusters=20", *given])
    channels = CHANNELS.get(config.choices["data"], 3)
    images = SimpleNamespace(size=(32, 32), mean=(0.5,) * channels, std=(0.25,) * channels)
    with torch.device("meta"):
        for stage in config.stages.values():
            head = build(stage.head, dim=64, num_clusters=20, num_samples=50)
            for each in build_views(
                stage.augment, images, ["clean", *(view.augment for view in head.views)]
            ).values():
                assert min(each.size) >= 4


def settings(name):
    (stage,) = load([f"experiment={name}"]).stages.values()
    return stage.head, stage.optim, stage.trainer, stage.augment


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "lr", "local", "queue_start"),
    [
        ("swav_imagenet", 800, 4096, 4.8, 6, None),
        ("swav_imagenet_400ep", 400, 4096, 4.8, 6, None),
        ("swav_imagenet_200ep", 200, 4096, 4.8, 6, None),
        ("swav_imagenet_100ep", 100, 4096, 4.8, 6, None),
        ("swav_imagenet_400ep_2x224", 400, 4096, 4.8, 0, None),
        ("swav_imagenet_400ep_b256", 400, 256, 0.6, 6, 15),
        ("swav_imagenet_200ep_b256", 200, 256, 0.6, 6, 15),
        ("deepcluster_v2_imagenet", 800, 4096, 4.8, 6, None),
        ("deepcluster_v2_imagenet_400ep", 400, 4096, 4.8, 4, None),
        ("deepcluster_v2_imagenet_400ep_2x224", 400, 4096, 4.8, 0, None),
    ],
)
def test_published_schedules_are_what_was_published(name, epochs, batch, lr, local, queue_start):
    head, optim, trainer, augment = settings(name)
    assert (trainer.epochs, trainer.num_images, trainer.batch_size) == (epochs, None, batch)
    assert (optim.name, optim.lr, optim.weight_decay, optim.final_lr_fraction) == (
        "lars",
        lr,
        1e-6,
        0.001,
    )
    assert optim.warmup_epochs == (10 if batch == 4096 else 0)
    assert (
        head["num_local"] == local and head["embedding_dim"] == 128 and head["hidden_dim"] == 2048
    )
    assert augment["size"] == 224 and augment["views"]["local"]["size"] == 96
    assert augment["views"]["global"]["size"] in (
        (160,) if name.endswith("v2_imagenet_400ep") else (None, 224)
    )
    smallest = augment["views"]["global"]["ops"][0]["random_resized_crop"]["scale"][0]
    assert smallest == (0.14 if local == 6 else 0.08)
    if queue_start:
        assert head["queue_length"] == 3840 and head["queue_from"] * epochs == queue_start
