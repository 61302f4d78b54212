"""Backbones: image (B, C, H, W) to feature vector (B, D). Each has `num_features` (D) and `preprocess` (or None)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.errors import UserError
from deepclust.schema import Count


@dataclass(frozen=True)
class Preprocess:
    """What a pretrained network wants to be fed: side in pixels, per-channel mean and standard deviation in [0, 1]."""

    size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Backbone(nn.Module):
    """A network with `num_features` outputs; `preprocess` overrides the data set's own statistics and size."""

    def __init__(self, body: nn.Module, num_features: int, preprocess: Preprocess | None = None) -> None:
        super().__init__()
        self.body = body
        self.num_features = num_features
        self.preprocess = preprocess

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float images to (B, D) features."""
        return self.body(images).flatten(1)


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, relu: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)


class PoolTo(nn.Module):
    """Averages 2x2 and gives (B, C, *size) whatever came in, so that crops of any size have as many features."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, *size)."""
        pooled = F.avg_pool2d(x, 2, ceil_mode=True) if min(x.shape[2:]) > 1 else x
        return pooled if tuple(pooled.shape[2:]) == self.size else F.adaptive_avg_pool2d(x, self.size)


class Residual(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2016, basic block)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.main = nn.Sequential(_conv(inputs, outputs, 3, stride), _conv(outputs, outputs, relu=False))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, 1, stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, outputs, H / stride, W / stride)."""
        return torch.relu(self.main(x) + self.shortcut(x))


def small_convnet(
    in_channels: Count, image_size: Count, *, width: Count = 32, freeze: list[str] | None = None
) -> Backbone:
    """A net for images of 8 to 64 px on a CPU: strided convolutions and a residual block, pooled to a few positions.

    Images of 16 px and more begin with a 5x5 convolution of stride 2, those over 40 px have one more stride. The last
    map is averaged 2x2, not to one position: where things are matters in small images (k-means on such features was
    8 points better on clothes). Smaller crops are averaged to as many positions as an image of `image_size`.
    """
    steps = 3 if image_size <= 40 else 4
    stem = _conv(in_channels, width, 5, 2) if image_size >= 16 else _conv(in_channels, width)
    middle = [_conv(width * 2**i, width * 2 ** (i + 1), 3, 2) for i in range(steps - 2)]
    last = width * 2 ** (steps - 1)
    body = nn.Sequential(stem, *middle, Residual(last // 2, last, 2)).eval()
    with torch.no_grad():
        positions = (body(torch.zeros(1, in_channels, image_size, image_size)).shape[2] + 1) // 2
    body.append(PoolTo((positions, positions)))
    return _frozen(Backbone(body.train(), last * positions**2), freeze)


def identity(in_channels: Count, image_size: Count) -> Backbone:
    """The input itself as features: for `data=features`; of images, their pixels. Nothing in it is trained."""
    return Backbone(nn.Identity(), in_channels * image_size**2)


def cifar_resnet(
    in_channels: Count,
    *,
    depth: Literal[18, 34] = 18,
    stem: Literal["cifar", "stl"] = "cifar",
    freeze: list[str] | None = None,
) -> Backbone:
    """ResNet-18 or -34 with the stem for small images: 3x3 stride 1, no max-pool (`stl`: 2x2 max-pool, padding 1)."""
    import torchvision

    net = torchvision.models.get_model(f"resnet{depth}", weights=None)
    net.conv1 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
    net.maxpool = nn.MaxPool2d(2, 2, 1) if stem == "stl" else nn.Identity()
    net.fc = nn.Identity()
    return _frozen(Backbone(net, 512), freeze)


def timm_backbone(
    in_channels: Count,
    *,
    name: str,
    pretrained: bool = False,
    weights: str | None = None,
    image_size: Count | None = None,
    freeze: list[str] | None = None,
) -> Backbone:
    """Any timm model by name, its pooled features; with its own normalisation and input size where it is pretrained.

    weights: a local file (.safetensors, or .pth read with `weights_only=True`). Raises UserError for an unknown name,
    with the nearest ones, and for weights that cannot be had or do not fit.
    """
    import difflib

    import timm
    from timm.data.config import resolve_model_data_config

    if name not in timm.list_models() and name.split(".")[0] not in timm.list_models():
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        raise UserError(f"backbone.name={name}: timm has no such model; nearest: {', '.join(near) or 'none'}")
    overlay = {"file": weights} if weights else None
    try:
        net = timm.create_model(
            name,
            pretrained=pretrained or weights is not None,
            in_chans=in_channels,
            num_classes=0,
            pretrained_cfg_overlay=overlay,
        )
    except Exception as error:
        source = f"backbone.weights={weights}" if weights else f"the weights of backbone.name={name}"
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{source} could not be loaded ({line}); give a local file as backbone.weights=PATH") from error
    config = resolve_model_data_config(net)
    own = pretrained or weights is not None
    mean, std = (tuple(config[key]) for key in ("mean", "std"))
    if in_channels == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    size = image_size or (config["input_size"][-1] if own else None)
    preprocess = Preprocess(size, mean, std) if own or size else None
    num_features: Any = net.num_features
    return _frozen(Backbone(net, num_features, preprocess), freeze)


def _frozen(backbone: Backbone, prefixes: list[str] | None) -> Backbone:
    """Freezes the parameters whose names (inside the body) begin with one of the prefixes; `['']` freezes all."""
    for prefix in prefixes or []:
        chosen = [p for name, p in backbone.body.named_parameters() if name.startswith(prefix)]
        if not chosen:
            parts = sorted({name.split(".")[0] for name, _ in backbone.body.named_parameters()})
            raise UserError(f"backbone.freeze: nothing begins with {prefix!r}; parts are {', '.join(parts)}")
        for parameter in chosen:
            parameter.requires_grad_(False)
    return backbone
