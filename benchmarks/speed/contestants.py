"""Our trainer, the bare network and lightly's loop, made alike, for `benchmarks.speed.train`."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn

from benchmarks.speed.views import photo_like
from deepclust.backbones import Backbone, cifar_resnet, small_convnet
from deepclust.config.settings import OptimSettings, TrainerSettings
from deepclust.data.datasets import from_arrays
from deepclust.data.image_set import ImageSet
from deepclust.data.views.transform import ViewTransform, build_views
from deepclust.heads import Head
from deepclust.heads.simclr import SimCLR
from deepclust.heads.swav import SwAV
from deepclust.ops.precision import autocast
from deepclust.training.trainer import Trainer

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8}
VIEW: list[dict[str, Any]] = [
    {"random_resized_crop": {"scale": [0.2, 1.0]}},
    {"horizontal_flip": {}},
    {"color_jitter": JITTER},
    {"grayscale": {"p": 0.2}},
]
GRAY_VIEW = [*VIEW[:2], {"color_jitter": {**JITTER, "saturation": 0.0, "hue": 0.0}}]
NETS: dict[str, tuple[Callable[[int, int], nn.Module], int]] = {
    "small ConvNet": (lambda channels, side: small_convnet(channels, side), 256),
    "ResNet-18": (lambda channels, side: cifar_resnet(channels), 64),
}
"""Constructor by channels and side in pixels, and the batch."""
NUM_PROTOTYPES = 64
"""As many as the smaller batch has rows."""


def pictures(count: int, side: int = 32) -> ImageSet:
    """`count` smooth random colour images of side x side pixels."""
    return from_arrays(photo_like(count, 3, side)).train


def transforms_for(images: ImageSet) -> dict[str, ViewTransform]:
    """The views `clean` and `strong` of colour or grey images."""
    view = VIEW if images.channels == 3 else GRAY_VIEW
    augment = {"size": None, "views": {"clean": [], "strong": view}}
    return build_views(augment, images, ["clean", "strong"])


def head_for(method: str, dim: int) -> Head:
    """A SimCLR or SwAV head on features of `dim` columns."""
    if method == "simclr":
        return SimCLR(dim, view="strong")
    return SwAV(dim, 10, num_prototypes=[NUM_PROTOTYPES], global_view="strong")


def trainer_for(method: str, net: str, images: ImageSet, **settings: Any) -> Trainer:
    """Our trainer with its defaults.

    method: `simclr` or `swav`.
    net: of `NETS`.
    images: to train on.
    settings: of the trainer, beside its batch.
    """
    build, batch_size = NETS[net]
    torch.manual_seed(0)
    backbone = cast(Backbone, build(images.channels, images.size[0]))
    # So many epochs that steps or seconds end the training, never the passes.
    chosen = TrainerSettings(**{"epochs": 10_000, "batch_size": batch_size, **settings})
    return Trainer(
        backbone,
        head_for(method, backbone.num_features),
        images,
        transforms_for(images),
        settings=chosen,
        optim=OptimSettings(schedule="constant"),
    )


def lightly_loops(method: str, trainer: Trainer, batch_size: int) -> dict[str, Any]:
    """lightly's loops by name, from our first weights; none where lightly is not installed."""
    if find_spec("lightly") is None:
        return {}
    from benchmarks.speed.peers import Lightly

    network = trainer.network
    projector = cast(nn.Module, network.head.projector)
    dtypes = {"lightly, float32": None, "lightly, autocast too": trainer.stepper.dtype}
    return {
        name: Lightly(
            method, network.backbone, projector, trainer.images, batch_size, NUM_PROTOTYPES, dtype
        )
        for name, dtype in dtypes.items()
    }


def bare(trainer: Trainer, num_views: int) -> Callable[[], None]:
    """Forward and backward of a copy of the network on ready tensors, as the trainer computes them.

    trainer: gives network, shape of the images, precision and memory layout.
    num_views: rows of the batch.
    """
    network = copy.deepcopy(trainer.network).train()
    batch = torch.randn(num_views, trainer.images.channels, *trainer.images.size)

    def run() -> None:
        features = network.features(batch, autocast(batch.device, trainer.stepper.dtype))
        # Any scalar will do as a loss: only what the network itself costs is of interest.
        network.head(features, 0).embedding.square().mean().backward()
        network.zero_grad()

    return run


def alternate(trainer: Trainer, others: Mapping[str, Callable[[], None]]) -> dict[str, float]:
    """Median CPU seconds of our steps, and of the others', which run between ours.

    trainer: must log every step; a step is all that it does between two lines of the log.
    others: steps by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", *others)}
    last = time.process_time()

    def between(*_: Any) -> None:
        nonlocal last
        seconds["ours"].append(time.process_time() - last)
        for name, run in others.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
        last = time.process_time()

    trainer.hooks.log = between
    trainer.fit()
    # The first step sets up memory and kernels for all that follow.
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}
