"""Operations that move pixels: crops, flips, affine maps. Bilinear, also where SCAN's code takes the nearest pixel."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from deepclust.data.view_base import (
    Fill,
    Geometric,
    Params,
    SignedAmount,
    Size,
    affine,
    between,
    centred,
    crop_matrix,
    integers,
    ordered,
)
from deepclust.schema import Count, Fraction, Natural, NonNegative, Positive

_TRIES = 10


class Resize(Geometric):
    """Makes the shorter side `ratio` times `size` (default: the view's size) and keeps the aspect.

    interpolation: `bicubic` is Pillow's, antialiased, in both engines; for presets whose papers enlarge with it.
    """

    fill: Fill | None = "border"

    def __init__(
        self,
        ratio: Positive = 1.0,
        size: Count | None = None,
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    ) -> None:
        self.ratio, self.size, self.interpolation = ratio, size, interpolation
        self.alone = interpolation == "bicubic"

    def out_size(self, size: Size, target: Size) -> Size:
        short = round(self.ratio * (self.size or min(target)))
        if size[0] < size[1]:
            return (short, max(1, int(short * size[1] / size[0])))
        return (max(1, int(short * size[0] / size[1])), short)

    def matrix(self, params: Params, size: Size, target: Size) -> Tensor:
        return torch.eye(3)[None]

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        size = self.out_size((image.shape[-2], image.shape[-1]), target)
        return TF.resize(image, list(size), InterpolationMode(self.interpolation), antialias=True)

    def batch(self, images: Tensor, target: Size) -> Tensor:
        size = self.out_size((images.shape[-2], images.shape[-1]), target)
        return F.interpolate(images, size, mode=self.interpolation, antialias=True).clamp_(0, 1)


class CenterCrop(Geometric):
    """Cuts the view's size out of the middle."""

    fill: Fill | None = None

    def out_size(self, size: Size, target: Size) -> Size:
        return target

    def matrix(self, params: Params, size: Size, target: Size) -> Tensor:
        top, left = (round((side - wanted) / 2.0) for side, wanted in zip(size, target))
        return crop_matrix(size, top, left, target[0], target[1])

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return TF.center_crop(image, list(target))


class RandomCrop(Geometric):
    """Cuts the view's size out at a random place of the image with `padding` black pixels around it."""

    draws = 2

    def __init__(self, padding: Natural = 0) -> None:
        self.padding = padding

    def out_size(self, size: Size, target: Size) -> Size:
        return target

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        return {"y": uniforms[:, 0], "x": uniforms[:, 1]}

    def _corner(self, params: Params, size: Size, target: Size) -> tuple[Tensor, Tensor]:
        free = [max(0, side + 2 * self.padding - wanted) for side, wanted in zip(size, target)]
        return integers(params["y"], free[0] + 1) - self.padding, integers(params["x"], free[1] + 1) - self.padding

    def matrix(self, params: Params, size: Size, target: Size) -> Tensor:
        top, left = self._corner(params, size, target)
        return crop_matrix(size, top, left, target[0], target[1])

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        top, left = self._corner(params, (image.shape[-2], image.shape[-1]), target)
        return TF.crop(image, int(top), int(left), target[0], target[1])


class RandomResizedCrop(Geometric):
    """A random part of the image, resized to `size` (default: the view's size), as torchvision's.

    scale: range of the part's area, as a fraction of the image's. ratio: range of its width over height, log-uniform.
    """

    fill: Fill | None = "border"
    draws = 2 * _TRIES + 2

    def __init__(
        self,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        size: Count | None = None,
    ) -> None:
        self.scale = ordered("scale", scale, 1e-4, 1.0)
        self.ratio = ordered("ratio", ratio, 1e-2)
        self.size = size

    def out_size(self, size: Size, target: Size) -> Size:
        return (self.size, self.size) if self.size else target

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        """The first of ten drawn parts that fits; else the largest centred one whose ratio is allowed."""
        high, wide = float(size[0]), float(size[1])
        area = high * wide * between(uniforms[:, :_TRIES], *self.scale)
        ratio = torch.exp(between(uniforms[:, _TRIES : 2 * _TRIES], math.log(self.ratio[0]), math.log(self.ratio[1])))
        width, height = torch.round(torch.sqrt(area * ratio)), torch.round(torch.sqrt(area / ratio))
        fits = (width > 0) & (width <= wide) & (height > 0) & (height <= high)
        first, found = fits.to(torch.uint8).argmax(dim=1, keepdim=True), fits.any(dim=1)
        width = torch.where(found, width.gather(1, first)[:, 0], min(wide, float(round(high * self.ratio[1]))))
        height = torch.where(found, height.gather(1, first)[:, 0], min(high, float(round(wide / self.ratio[0]))))
        top = torch.where(found, integers(uniforms[:, -2], high - height + 1), torch.floor((high - height) / 2))
        left = torch.where(found, integers(uniforms[:, -1], wide - width + 1), torch.floor((wide - width) / 2))
        return {"top": top, "left": left, "height": height, "width": width}

    def matrix(self, params: Params, size: Size, target: Size) -> Tensor:
        return crop_matrix(size, **params)

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        box = [int(params[name]) for name in ("top", "left", "height", "width")]
        size = self.out_size((image.shape[-2], image.shape[-1]), target)
        return TF.resized_crop(image, *box, size=list(size), antialias=True)


class HorizontalFlip(Geometric):
    """Mirrors left and right."""

    fill: Fill | None = None

    def __init__(self, p: Fraction = 0.5) -> None:
        self.p = p

    def matrix(self, params: Params, size: Size, target: Size) -> Tensor:
        return affine(-1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return TF.horizontal_flip(image)


class RandomAffine(Geometric):
    """Turns, shears, zooms and shifts at once.

    degrees, shear (x per y), translate (fraction of the side), aspect (wider by exp(aspect), lower by as much): largest
    absolute value; uniform, of either sign. scale: range of the zoom; above 1 makes the content larger.
    """

    draws = 6

    def __init__(
        self,
        degrees: NonNegative = 0.0,
        shear: NonNegative = 0.0,
        translate: Fraction = 0.0,
        scale: tuple[float, float] = (1.0, 1.0),
        aspect: NonNegative = 0.0,
        p: Fraction = 1.0,
    ) -> None:
        self.degrees, self.shear, self.translate, self.aspect, self.p = degrees, shear, translate, aspect, p
        self.scale = ordered("scale", scale, 1e-2)

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        sign = 2 * uniforms - 1
        return {
            "degrees": self.degrees * sign[:, 0],
            "shear": self.shear * sign[:, 1],
            "x": self.translate * size[1] * sign[:, 2],
            "y": self.translate * size[0] * sign[:, 3],
            "scale": between(uniforms[:, 4], *self.scale),
            "aspect": self.aspect * sign[:, 5],
        }

    def matrix(self, params: Params, size: Size, target: Size) -> Tensor:
        cos, sin = torch.cos(torch.deg2rad(params["degrees"])), torch.sin(torch.deg2rad(params["degrees"]))
        across = torch.exp(-params["aspect"]) / params["scale"]
        down = torch.exp(params["aspect"]) / params["scale"]
        shear = params["shear"]
        a, b = cos * across, (cos * shear - sin) * down
        c, d = sin * across, (sin * shear + cos) * down
        return centred(size, a, b, params["x"], c, d, params["y"])


class Rotate(Geometric):
    """Turns about the centre by an angle uniform in [-degrees, degrees]; positive is counter-clockwise."""

    draws = 1

    def __init__(self, degrees: NonNegative = 30.0, p: Fraction = 1.0) -> None:
        self.degrees, self.p = degrees, p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        return {"degrees": self.degrees * (2 * uniforms[:, 0] - 1)}

    def matrix(self, params: Params, size: Size, target: Size) -> Tensor:
        cos, sin = torch.cos(torch.deg2rad(params["degrees"])), torch.sin(torch.deg2rad(params["degrees"]))
        return centred(size, cos, -sin, 0.0, sin, cos, 0.0)


class ShearX(SignedAmount):
    """Moves rows sideways, the more the lower they lie: x_in = x + amount * y in pixels from the upper left corner."""

    def matrix(self, params: Params, size: Size, target: Size) -> Tensor:
        slope = params["amount"] * (size[0] / size[1])
        return affine(1.0, slope, slope, 0.0, 1.0, 0.0)


class ShearY(SignedAmount):
    """Moves columns down, the more the further right they lie: y_in = y + amount * x from the upper left corner."""

    def matrix(self, params: Params, size: Size, target: Size) -> Tensor:
        slope = params["amount"] * (size[1] / size[0])
        return affine(1.0, 0.0, 0.0, slope, 1.0, slope)


class TranslateX(SignedAmount):
    """Shifts sideways by a fraction of the width."""

    def matrix(self, params: Params, size: Size, target: Size) -> Tensor:
        return affine(1.0, 0.0, 2 * params["amount"], 0.0, 1.0, 0.0)


class TranslateY(SignedAmount):
    """Shifts up or down by a fraction of the height."""

    def matrix(self, params: Params, size: Size, target: Size) -> Tensor:
        return affine(1.0, 0.0, 0.0, 0.0, 1.0, 2 * params["amount"])
