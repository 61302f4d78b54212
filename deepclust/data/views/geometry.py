"""Operations that move pixels: crops, flips, affine maps.

All interpolate bilinearly, also where SCAN's code takes the nearest pixel.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from deepclust.data.views.base import (
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
from deepclust.types import Count, Fraction, Natural, NonNegative, Positive

# Rectangles that are drawn before giving up on one that fits: torchvision's number. All are drawn
# at once, so that the number of uniforms does not depend on what is drawn.
_TRIES = 10


class Resize(Geometric):
    """Makes the shorter side `ratio` times `size` pixels and keeps the aspect.

    size: default: the shorter side of the view.
    interpolation: `bicubic` is Pillow's, antialiased, in both engines; for presets whose papers
        enlarge with it.
    """

    fill: Fill | None = "border"

    def __init__(
        self,
        ratio: Positive = 1.0,
        size: Count | None = None,
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    ) -> None:
        self.ratio = ratio
        self.size = size
        self.interpolation = interpolation
        self.alone = interpolation == "bicubic"

    def out_size(self, size: Size, target: Size) -> Size:
        short = round(self.ratio * (self.size or min(target)))
        # the longer side is cut to whole pixels, as torchvision does
        if size[0] < size[1]:
            return (short, max(1, int(short * size[1] / size[0])))
        return (max(1, int(short * size[0] / size[1])), short)

    def matrix(self, params: Params, size: Size, target: Size) -> Tensor:
        # coordinates are relative to an image's size, so a change of size alone is the identity
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
        # rounded to a whole pixel as torchvision does, so that both engines cut the same pixels
        top = round((size[0] - target[0]) / 2.0)
        left = round((size[1] - target[1]) / 2.0)
        return crop_matrix(size, top, left, target[0], target[1])

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return TF.center_crop(image, list(target))


class RandomCrop(Geometric):
    """Cuts the view's size out at a random position of the image.

    padding: black pixels around the image that the crop may reach into.
    """

    draws = 2

    def __init__(self, padding: Natural = 0) -> None:
        self.padding = padding

    def out_size(self, size: Size, target: Size) -> Size:
        return target

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        # the range of positions depends on the view's size, which is known in `_corner` only
        return {"y": uniforms[:, 0], "x": uniforms[:, 1]}

    def _corner(self, params: Params, size: Size, target: Size) -> tuple[Tensor, Tensor]:
        """Top and left of the crop in pixels of the image without padding; may be negative."""
        free_y = max(0, size[0] + 2 * self.padding - target[0])
        free_x = max(0, size[1] + 2 * self.padding - target[1])
        top = integers(params["y"], free_y + 1) - self.padding
        left = integers(params["x"], free_x + 1) - self.padding
        return top, left

    def matrix(self, params: Params, size: Size, target: Size) -> Tensor:
        top, left = self._corner(params, size, target)
        return crop_matrix(size, top, left, target[0], target[1])

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        top, left = self._corner(params, (image.shape[-2], image.shape[-1]), target)
        return TF.crop(image, int(top), int(left), target[0], target[1])


class RandomResizedCrop(Geometric):
    """A random part of the image, resized to `size`, as torchvision's operation of this name.

    scale: range of the part's area, as a fraction of the image's.
    ratio: range of its width over height, log-uniform: 1 : 2 is as likely as 2 : 1.
    size: side in pixels; default: the view's size.
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
        if self.size:
            return (self.size, self.size)
        return target

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        """The first of ten drawn parts that fits, else the largest centred one of allowed ratio."""
        high = float(size[0])
        wide = float(size[1])
        low_ratio, high_ratio = self.ratio
        area = high * wide * between(uniforms[:, :_TRIES], *self.scale)
        logs = between(uniforms[:, _TRIES : 2 * _TRIES], math.log(low_ratio), math.log(high_ratio))
        ratio = torch.exp(logs)
        widths = torch.round(torch.sqrt(area * ratio))
        heights = torch.round(torch.sqrt(area / ratio))
        fits = (widths > 0) & (widths <= wide) & (heights > 0) & (heights <= high)
        # argmax gives the first of equal values; of uint8, as bool has no argmax
        first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
        any_fits = fits.any(dim=1)
        # torchvision's fallback: the whole image, of which one side is cut to the nearest ratio
        largest_width = min(wide, float(round(high * high_ratio)))
        largest_height = min(high, float(round(wide / low_ratio)))
        width = torch.where(any_fits, widths.gather(1, first)[:, 0], largest_width)
        height = torch.where(any_fits, heights.gather(1, first)[:, 0], largest_height)
        free_y = high - height
        free_x = wide - width
        top = torch.where(any_fits, integers(uniforms[:, -2], free_y + 1), torch.floor(free_y / 2))
        left = torch.where(any_fits, integers(uniforms[:, -1], free_x + 1), torch.floor(free_x / 2))
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

    The first four are largest absolute values of a uniform number of either sign.

    degrees: angle.
    shear: pixels along x per pixel along y.
    translate: fraction of the side.
    aspect: the content becomes wider by exp(aspect) and lower by as much.
    scale: range of the zoom; above 1 the content becomes larger.
    p: probability that an image is moved.
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
        self.degrees = degrees
        self.shear = shear
        self.translate = translate
        self.scale = ordered("scale", scale, 1e-2)
        self.aspect = aspect
        self.p = p

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
        angle = torch.deg2rad(params["degrees"])
        cos = torch.cos(angle)
        sin = torch.sin(angle)
        # the map leads from output to input, so content grows where coordinates shrink
        across = torch.exp(-params["aspect"]) / params["scale"]
        down = torch.exp(params["aspect"]) / params["scale"]
        shear = params["shear"]
        # rotation times shear times the diagonal of both scales, multiplied out
        a = cos * across
        b = (cos * shear - sin) * down
        c = sin * across
        d = (sin * shear + cos) * down
        return centred(size, a, b, params["x"], c, d, params["y"])


class Rotate(Geometric):
    """Turns about the centre by an angle uniform in [-degrees, degrees].

    Positive angles turn counter-clockwise.
    """

    draws = 1

    def __init__(self, degrees: NonNegative = 30.0, p: Fraction = 1.0) -> None:
        self.degrees = degrees
        self.p = p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        return {"degrees": self.degrees * (2 * uniforms[:, 0] - 1)}

    def matrix(self, params: Params, size: Size, target: Size) -> Tensor:
        angle = torch.deg2rad(params["degrees"])
        cos = torch.cos(angle)
        sin = torch.sin(angle)
        # As y points down, this is a clockwise turn, and it leads from output to input: what is
        # seen turns the other way.
        return centred(size, cos, -sin, 0.0, sin, cos, 0.0)


class ShearX(SignedAmount):
    """Moves rows sideways, the lower ones by more.

    x_in = x + amount * y, in pixels from the upper left corner.
    """

    def matrix(self, params: Params, size: Size, target: Size) -> Tensor:
        # in units of half the width; the offset is such that the upper edge, y = -1, stays
        slope = params["amount"] * (size[0] / size[1])
        return affine(1.0, slope, slope, 0.0, 1.0, 0.0)


class ShearY(SignedAmount):
    """Moves columns up or down, those further right by more.

    y_in = y + amount * x, in pixels from the upper left corner.
    """

    def matrix(self, params: Params, size: Size, target: Size) -> Tensor:
        slope = params["amount"] * (size[1] / size[0])
        return affine(1.0, 0.0, 0.0, slope, 1.0, slope)


class TranslateX(SignedAmount):
    """Shifts sideways by a fraction of the width."""

    def matrix(self, params: Params, size: Size, target: Size) -> Tensor:
        # times 2, as an image is 2 wide in these coordinates
        return affine(1.0, 0.0, 2 * params["amount"], 0.0, 1.0, 0.0)


class TranslateY(SignedAmount):
    """Shifts up or down by a fraction of the height."""

    def matrix(self, params: Params, size: Size, target: Size) -> Tensor:
        return affine(1.0, 0.0, 0.0, 0.0, 1.0, 2 * params["amount"])
