"""Operations that mix channels: brightness, contrast, saturation, hue, grey.

Saturation, hue and grey leave images of one channel as they are. Each operation has two forms: a
matrix for the batch engine; for the sample engine torchvision's function, which rounds to bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from deepclust.data.views.base import Color, Factor, Params, Size, between
from deepclust.types import Fraction, NonNegative

# Weights of red, green and blue in a grey value (ITU-R BT.601), with torchvision's digits.
_LUMA = (0.2989, 0.587, 0.114)


def luma(like: Tensor) -> Tensor:
    """(C,) weights of the grey value of images; C = 1 or 3 is the last axis of `like`."""
    weights = (1.0,) if like.shape[-1] == 1 else _LUMA
    return like.new_tensor(weights)


def homogeneous(linear: Tensor, offset: Tensor | None = None) -> Tensor:
    """(n, C+1, C+1) maps of (channels, 1).

    linear: (n, C, C) matrices.
    offset: (n, C) what is added; nothing by default.
    """
    count, channels = linear.shape[:2]
    out = linear.new_zeros(count, channels + 1, channels + 1)
    out[:, :channels, :channels] = linear
    out[:, channels, channels] = 1.0
    if offset is not None:
        out[:, :channels, channels] = offset
    return out


def scaled(factor: Tensor, means: Tensor) -> Tensor:
    """(B, C+1, C+1) maps that multiply each channel.

    factor: (B,) of each image.
    means: (B, C) channel means, for their number and device.
    """
    identity = torch.eye(means.shape[1], device=means.device)
    return homogeneous(factor[:, None, None] * identity)


class Brightness(Factor):
    """Multiplies by the factor."""

    def matrix(self, params: Params, means: Tensor) -> Tensor:
        return scaled(params["factor"], means)

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return TF.adjust_brightness(image, float(params["factor"]))


class Contrast(Factor):
    """Multiplies the distance from the image's mean grey value by the factor."""

    def matrix(self, params: Params, means: Tensor) -> Tensor:
        # factor * pixel + (1 - factor) * grey; the mean of grey values is the grey value of means
        grey = means @ luma(means)
        out = scaled(params["factor"], means)
        out[:, :-1, -1] = ((1 - params["factor"]) * grey)[:, None]
        return out

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return TF.adjust_contrast(image, float(params["factor"]))


class Saturation(Factor):
    """Multiplies the distance of each pixel from its own grey value by the factor."""

    def matrix(self, params: Params, means: Tensor) -> Tensor:
        factor = params["factor"][:, None, None]
        identity = torch.eye(means.shape[1], device=means.device)
        return homogeneous(factor * identity + (1 - factor) * luma(means))

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return TF.adjust_saturation(image, float(params["factor"]))


class Grayscale(Color):
    """Gives every channel the grey value."""

    def __init__(self, p: Fraction = 0.2) -> None:
        self.p = p

    def matrix(self, params: Params, means: Tensor) -> Tensor:
        channels = means.shape[1]
        # the same weights in every row: all channels become the same weighted sum
        return homogeneous(luma(means).expand(1, channels, channels))

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return TF.rgb_to_grayscale(image, num_output_channels=image.shape[0])


def hue_matrix(turn: Tensor, means: Tensor) -> Tensor:
    """(B, C+1, C+1) rotations of the colour cube about its grey diagonal.

    Being linear, a rotation can be part of the one colour matrix. The hue shift in HSV, which the
    sample engine does, moves a colour along a hexagon where this moves it along a circle. Both
    agree for greys and at thirds of the circle. In between they change an image by about as much,
    in slightly different directions.

    turn: (B,) fraction of a full circle.
    means: (B, C) channel means, for their number and device.
    """
    if means.shape[1] == 1:
        return scaled(torch.ones_like(turn), means)
    # Rodrigues' formula for the axis (1, 1, 1) / sqrt(3): a circulant matrix, whose rows are one
    # row shifted
    cos = torch.cos(2 * math.pi * turn)
    sin = torch.sin(2 * math.pi * turn) / math.sqrt(3)
    diagonal = (1 + 2 * cos) / 3
    rest = (1 - cos) / 3
    row = torch.stack([diagonal, rest - sin, rest + sin], dim=1)
    return homogeneous(torch.stack([row, row.roll(1, 1), row.roll(2, 1)], dim=1))


class ColorJitter(Color):
    """Random brightness, contrast, saturation and hue with torchvision's ranges.

    They are applied in this order; torchvision's order is random.

    brightness, contrast, saturation: the factor is uniform in [max(0, 1 - value), 1 + value].
    hue: the turn is uniform in [-hue, hue], in fractions of the colour circle; at most 0.5.
    p: probability that an image gets all four.
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
            raise ValueError(
                f"hue={hue}: half a turn of the colour circle, 0.5, is the most there is"
            )
        self.strengths = {
            "brightness": brightness,
            "contrast": contrast,
            "saturation": saturation,
        }
        self.hue = hue
        self.p = p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        params = {
            name: between(uniforms[:, column], max(0.0, 1 - strength), 1 + strength)
            for column, (name, strength) in enumerate(self.strengths.items())
        }
        return {**params, "hue": self.hue * (2 * uniforms[:, 3] - 1)}

    def matrix(self, params: Params, means: Tensor) -> Tensor:
        bright = Brightness().matrix({"factor": params["brightness"]}, means)
        # contrast turns about the mean of the image that it gets, which is the brightened one
        bright_means = params["brightness"][:, None] * means
        contrast = Contrast().matrix({"factor": params["contrast"]}, bright_means)
        saturation = Saturation().matrix({"factor": params["saturation"]}, means)
        # the last factor acts first
        return hue_matrix(params["hue"], means) @ saturation @ contrast @ bright

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        image = TF.adjust_brightness(image, float(params["brightness"]))
        image = TF.adjust_contrast(image, float(params["contrast"]))
        image = TF.adjust_saturation(image, float(params["saturation"]))
        return TF.adjust_hue(image, float(params["hue"]))
