"""Operations that mix channels: brightness, contrast, saturation, hue, grey; the last three leave grey images alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from deepclust.data.view_base import Color, Factor, Params, Size, between
from deepclust.schema import Fraction, NonNegative

_LUMA = (0.2989, 0.587, 0.114)


def luma(like: Tensor) -> Tensor:
    """(C,) weights of the grey value of images with `like`'s last axis of C = 1 or 3 channels."""
    return like.new_tensor((1.0,) if like.shape[-1] == 1 else _LUMA)


def homogeneous(linear: Tensor, offset: Tensor | None = None) -> Tensor:
    """(n, C, C) and (n, C) to (n, C+1, C+1)."""
    count, channels = linear.shape[:2]
    out = linear.new_zeros(count, channels + 1, channels + 1)
    out[:, :channels, :channels] = linear
    out[:, channels, channels] = 1.0
    if offset is not None:
        out[:, :channels, channels] = offset
    return out


def scaled(factor: Tensor, means: Tensor) -> Tensor:
    """Each channel times (B,) `factor`."""
    return homogeneous(factor[:, None, None] * torch.eye(means.shape[1], device=means.device))


class Brightness(Factor):
    """Multiplies by the factor."""

    def matrix(self, params: Params, means: Tensor) -> Tensor:
        return scaled(params["factor"], means)

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return TF.adjust_brightness(image, float(params["factor"]))


class Contrast(Factor):
    """Multiplies the distance from the image's mean grey value by the factor."""

    def matrix(self, params: Params, means: Tensor) -> Tensor:
        grey = means @ luma(means)
        out = scaled(params["factor"], means)
        out[:, :-1, -1] = ((1 - params["factor"]) * grey)[:, None]
        return out

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return TF.adjust_contrast(image, float(params["factor"]))


class Saturation(Factor):
    """Multiplies each pixel's distance from its own grey value by the factor."""

    def matrix(self, params: Params, means: Tensor) -> Tensor:
        factor = params["factor"][:, None, None]
        return homogeneous(factor * torch.eye(means.shape[1], device=means.device) + (1 - factor) * luma(means))

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return TF.adjust_saturation(image, float(params["factor"]))


class Grayscale(Color):
    """Gives every channel the grey value."""

    def __init__(self, p: Fraction = 0.2) -> None:
        self.p = p

    def matrix(self, params: Params, means: Tensor) -> Tensor:
        return homogeneous(luma(means).expand(1, means.shape[1], means.shape[1]))

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return TF.rgb_to_grayscale(image, num_output_channels=image.shape[0])


def hue_matrix(turn: Tensor, means: Tensor) -> Tensor:
    """A turn of the colour cube about its grey diagonal by `turn` (B,) of a full circle.

    Linear, so that it is part of the one colour matrix; HSV's hue shift, which the sample engine does, walks a hexagon
    where this walks a circle. They agree for greys and at thirds of the circle; between, they change an image by about
    as much, in slightly different directions.
    """
    if means.shape[1] == 1:
        return scaled(torch.ones_like(turn), means)
    cos, sin = torch.cos(2 * math.pi * turn), torch.sin(2 * math.pi * turn) / math.sqrt(3)
    same, other = (1 + 2 * cos) / 3, (1 - cos) / 3
    rows = torch.stack([same, other - sin, other + sin], dim=1)
    return homogeneous(torch.stack([rows, rows.roll(1, 1), rows.roll(2, 1)], dim=1))


class ColorJitter(Color):
    """Random brightness, contrast, saturation and hue with torchvision's ranges, in this order (there: a random one).

    brightness, contrast, saturation: a factor uniform in [max(0, 1 - value), 1 + value]. hue: a turn of the colour
    circle uniform in [-hue, hue].
    """

    draws = 4

    def __init__(
        self,
        brightness: NonNegative = 0.4,
        contrast: NonNegative = 0.4,
        saturation: NonNegative = 0.4,
        hue: Fraction = 0.1,
        p: Fraction = 0.8,
    ) -> None:
        if hue > 0.5:
            raise ValueError(f"hue={hue}: half a turn of the colour circle, 0.5, is the most there is")
        self.strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        self.hue, self.p = hue, p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        params = {
            name: between(uniforms[:, column], max(0.0, 1 - strength), 1 + strength)
            for column, (name, strength) in enumerate(self.strengths.items())
        }
        return {**params, "hue": self.hue * (2 * uniforms[:, 3] - 1)}

    def matrix(self, params: Params, means: Tensor) -> Tensor:
        bright = Brightness().matrix({"factor": params["brightness"]}, means)
        contrast = Contrast().matrix({"factor": params["contrast"]}, params["brightness"][:, None] * means)
        saturation = Saturation().matrix({"factor": params["saturation"]}, means)
        return hue_matrix(params["hue"], means) @ saturation @ contrast @ bright

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        image = TF.adjust_brightness(image, float(params["brightness"]))
        image = TF.adjust_contrast(image, float(params["contrast"]))
        image = TF.adjust_saturation(image, float(params["saturation"]))
        return TF.adjust_hue(image, float(params["hue"]))
