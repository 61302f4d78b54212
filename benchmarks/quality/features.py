"""Features of a labelled data set by a backbone, as a file that the comparisons read.

    python -m benchmarks.quality.features clothing.npz data=image_folder data.root=CLOTHING \\
        data.size=160 --module scripts/efficientnet_lite.py:lite0

wrote the features of the clothing photos, CLOTHING, behind the committed figures. (The features of
folders without labels are a matter of `deepclust features`.) Words are those of train.py: any data
set, any backbone, the clean view of any augmentation:

    python -m benchmarks.quality.features OUT.npz data=image_folder data.root=PHOTOS \\
        backbone=timm backbone.name=NAME backbone.pretrained=true augment.size=224

`data=features data.file=OUT.npz` reads the file, too. --module FILE.py:FUNCTION takes a torch
module of your own instead: the function gives it, weights and all, and its attribute `preprocess`
says how it is fed (scripts/efficientnet_lite.py is an example); without it, 224 px normalised as
for ImageNet.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality.common import save_arrays
from deepclust.backbones import Preprocess
from deepclust.config.build import build
from deepclust.config.load import load
from deepclust.config.run_config import RunConfig
from deepclust.data.bank import collect
from deepclust.data.image_set import ImageData, ImageSet
from deepclust.data.views.transform import ViewTransform
from deepclust.features.encoder import load_function

SIDE = 224
IMAGENET = Preprocess(SIDE, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""How a module is fed that does not say it."""


def columns(net: nn.Module, data: ImageData, view: ViewTransform) -> dict[str, np.ndarray]:
    """Arrays by name, with one row for each readable image, held-out ones last.

    net: (B, C, H, W) to features (B, ...), which are flattened.
    data: its parts `train` and, if there, `test`.
    view: pixels to what the network is fed.

    Returns `features` (N, D) float32, `splits` and `paths` (N,); `labels` (N,) if all are known.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = net.to(device).eval()
    sets = {"train": data.train}
    if data.test is not None:
        sets["test"] = data.test
    features: list[Tensor] = []
    splits: list[str] = []
    paths: list[str] = []
    labels: list[str] = []
    for split, images in sets.items():
        rows, index = features_of_set(net, images, view, device)
        features.append(rows)
        splits += [split] * len(index)
        paths += [images.paths[number] for number in index.tolist()]
        if images.classes is not None:
            # Names and not numbers: a file must say what its labels mean.
            labels += [images.class_names[number] for number in images.classes[index.numpy()]]
    arrays: dict[str, Any] = {"features": torch.cat(features).numpy()}
    arrays |= {"splits": splits, "paths": paths}
    if len(labels) == len(paths):
        arrays["labels"] = labels
    return {name: np.asarray(column) for name, column in arrays.items()}


@torch.no_grad()
def features_of_set(
    net: nn.Module,
    images: ImageSet,
    view: ViewTransform,
    device: str,
) -> tuple[Tensor, Tensor]:
    """Features (n, D) float32 on the CPU, and the rows (n,) of the images that they belong to.

    net: on the device, in evaluation mode.
    images: those that cannot be read are left out.
    view: pixels to what the network is fed.
    device: where it computes.
    """

    # channels_last: the layout in which most devices compute convolutions fastest.
    def forward(batch: Tensor) -> Tensor:
        return net(batch.contiguous(memory_format=torch.channels_last)).flatten(1)

    rows = range(len(images))
    features, index = collect(forward, images, view, rows, batch_size=128, device=device)
    return features.cpu(), index


def backbone_of(config: RunConfig, data: ImageData) -> tuple[nn.Module, ViewTransform]:
    """The configuration's backbone, and the clean view that it is fed.

    The size is that of the augmentation, else of the backbone, else of the images.
    """
    augment = config.stages["main"].augment
    shape = {
        "in_channels": data.train.channels,
        "image_size": augment["size"] or data.train.size[0],
    }
    net = build(config.backbone, trust=config.trust, **shape)
    size = augment["size"]
    mean = data.train.mean
    std = data.train.std
    if net.preprocess is not None:
        # Pretrained weights know their own normalisation, whatever the data set's.
        size = size or net.preprocess.size
        mean = net.preprocess.mean
        std = net.preprocess.std
    view = ViewTransform(augment["views"]["clean"], size or data.train.size, mean, std)
    return net, view


def module_of(name: str, config: RunConfig) -> tuple[nn.Module, ViewTransform]:
    """The module that FILE.py:FUNCTION gives, and the clean view that it is fed."""
    net = load_function(name, "--module")()
    preprocess = getattr(net, "preprocess", None) or IMAGENET
    description = config.stages["main"].augment["views"]["clean"]
    size = preprocess.size or SIDE
    return net, ViewTransform(description, size, preprocess.mean, preprocess.std)


def main(arguments: Sequence[str] | None = None) -> int:
    """Computes, writes and says where."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a .npz file")
    parser.add_argument("--module", help="FILE.py:FUNCTION or MODULE:FUNCTION")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    # A head is composed as well, and not used; `scan` needs nothing else.
    config = load([*options.overrides, "recipe=single", "head=scan"])
    data = build(config.data, trust=config.trust)
    if options.module:
        net, view = module_of(options.module, config)
    else:
        net, view = backbone_of(config, data)
    save_arrays(options.out, **columns(net, data, view))
    print(f"{options.out}: data=features data.file={options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
