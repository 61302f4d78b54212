"""Operations on pixel values that do not mix channels, and those that paint over a part."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from deepclust.data.random import normals
from deepclust.data.views.base import Erase, Params, Pixel, Size, between, integers, ordered
from deepclust.types import Count, Fraction, NonNegative

NOISE_OFFSETS = 1 << 16
"""Positions at which an image's window of the noise table may begin."""
# Rectangles that are drawn before giving up on one that fits: torchvision's number.
_TRIES = 10
# Values of bytes: a histogram has so many bins, and the largest is one less.
_LEVELS = 256


def per_image(values: Tensor) -> Tensor:
    """(n,) to (n, 1, 1, 1)."""
    return values[:, None, None, None]


class Identity(Pixel):
    """Changes nothing."""

    def batch(self, images: Tensor, params: Params) -> Tensor:
        return images

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return image


class Gamma(Pixel):
    """Raises values in [0, 1] to the power exp(g), g uniform in [-log_range, log_range]."""

    draws = 1

    def __init__(self, log_range: NonNegative = 0.6, p: Fraction = 1.0) -> None:
        self.log_range = log_range
        self.p = p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        return {"power": torch.exp(self.log_range * (2 * uniforms[:, 0] - 1))}

    def batch(self, images: Tensor, params: Params) -> Tensor:
        # four times faster than pow; log(0) = -inf comes back as exp(-inf) = 0
        return images.log().mul_(per_image(params["power"])).exp_()

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return TF.adjust_gamma(image, float(params["power"]))


# A run has a few sizes of views, each of which needs its own length of the table.
@functools.lru_cache(maxsize=8)
def _noise_table(length: int, device: torch.device) -> Tensor:
    """(length,) float32 standard normal numbers on the device: always the same, those of key 0."""
    key = torch.zeros(1, dtype=torch.int64)
    return normals(key, length)[0].to(device)


def noise_like(images: Tensor, offset: Tensor) -> Tensor:
    """Standard normal numbers of the shape of the images: windows of one fixed table.

    images: (n, ...), for the shape and the device.
    offset: (n,) where each window begins, from 0 to `NOISE_OFFSETS` - 1.
    """
    length = images[0].numel()
    table = _noise_table(NOISE_OFFSETS + length, images.device)
    # all windows as rows of a matrix that shares the table's memory: only those chosen are copied
    windows = table.as_strided((NOISE_OFFSETS, length), (1, 1))
    return windows[offset.long()].view_as(images)


class PixelNoise(Pixel):
    """Adds normal noise of standard deviation `std` to every value in [0, 1].

    The noise of an image is a window at a random position of one fixed table of normal numbers: a
    copy instead of a logarithm and a cosine for every pixel.
    """

    draws = 1

    def __init__(self, std: NonNegative = 0.03, p: Fraction = 1.0) -> None:
        self.std = std
        self.p = p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        return {"offset": integers(uniforms[:, 0], NOISE_OFFSETS)}

    def batch(self, images: Tensor, params: Params) -> Tensor:
        noise = noise_like(images, params["offset"])
        return torch.add(images, noise, alpha=self.std).clamp_(0, 1)

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return as_bytes(self.batch(image[None] / 255, params))[0]


def as_bytes(images: Tensor) -> Tensor:
    """Values in [0, 1] to uint8, rounded."""
    return (images * 255).round_().to(torch.uint8)


class GaussianBlur(Pixel):
    """Blurs with a Gaussian; borders are mirrored.

    sigma: range of its standard deviation in pixels, uniform; SimCLR's by default.
    kernel: side in pixels of the square that is averaged, odd; default: a tenth of the image's
        side, as in SimCLR, and at least 3.
    p: probability that an image is blurred.
    """

    draws = 1

    def __init__(
        self,
        sigma: tuple[float, float] = (0.1, 2.0),
        kernel: Count | None = None,
        p: Fraction = 0.5,
    ) -> None:
        if kernel is not None and kernel % 2 == 0:
            raise ValueError(f"kernel={kernel}: an odd number, for example {kernel + 1}")
        self.sigma = ordered("sigma", sigma, 1e-3)
        self.kernel = kernel
        self.p = p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        return {"sigma": between(uniforms[:, 0], *self.sigma)}

    def _radius(self, height: int, width: int) -> int:
        """Pixels on each side of the middle one that are averaged."""
        side = min(height, width)
        kernel = self.kernel or max(3, round(0.1 * side))
        # a border is mirrored without its outermost pixel, so it has side - 1 pixels to give
        return min(kernel // 2, side - 1)

    def batch(self, images: Tensor, params: Params) -> Tensor:
        """Two products with band matrices, which hold the mirrored borders as well.

        Each image has its own sigma, so its own kernel: one batched product in place of a
        convolution per image.
        """
        radius = self._radius(images.shape[2], images.shape[3])
        taps = torch.arange(-radius, radius + 1, device=images.device)
        weights = torch.exp(-0.5 * (taps / params["sigma"][:, None]) ** 2)
        weights = weights / weights.sum(dim=1, keepdim=True)
        down, across = (_bands(weights, side) for side in images.shape[2:])
        return down[:, None] @ images @ across[:, None].mT

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        kernel = 2 * self._radius(image.shape[-2], image.shape[-1]) + 1
        return TF.gaussian_blur(image, [kernel, kernel], [float(params["sigma"])] * 2)


def _bands(weights: Tensor, side: int) -> Tensor:
    """(n, side, side) matrices that filter a mirrored line of pixels with (n, 2r+1) kernels."""
    radius = weights.shape[1] // 2
    out = torch.arange(side, device=weights.device)
    taps = torch.arange(-radius, radius + 1, device=weights.device)
    # pixel -i is pixel i; pixel side - 1 + i is pixel side - 1 - i
    source = (out[None] + taps[:, None]).abs()
    source = torch.where(source >= side, 2 * (side - 1) - source, source)
    # (2r+1, side, side): 1 where a tap of an output pixel reads an input pixel
    reads = F.one_hot(source, side).to(weights.dtype)
    return torch.tensordot(weights, reads, dims=1)


class Solarize(Pixel):
    """Inverts values that are not below a threshold.

    threshold: its range on the scale of bytes, uniform; at 256 nothing is inverted.
    """

    draws = 1

    def __init__(self, threshold: tuple[float, float] = (0.0, 256.0), p: Fraction = 1.0) -> None:
        self.threshold = ordered("threshold", threshold, 0.0, 256.0)
        self.p = p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        return {"threshold": between(uniforms[:, 0], *self.threshold)}

    def batch(self, images: Tensor, params: Params) -> Tensor:
        below = images * 255 < per_image(params["threshold"])
        return torch.where(below, images, 1 - images)

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return torch.where(image < params["threshold"], image, 255 - image)


class Posterize(Pixel):
    """Keeps the highest bits of each byte.

    bits: range of their number; the whole part of a uniform number counts.
    """

    draws = 1

    def __init__(self, bits: tuple[float, float] = (4.0, 8.0), p: Fraction = 1.0) -> None:
        self.bits = ordered("bits", bits, 1.0, 8.0)
        self.p = p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        return {"bits": torch.floor(between(uniforms[:, 0], *self.bits))}

    def batch(self, images: Tensor, params: Params) -> Tensor:
        # clearing the lowest 8 - bits bits rounds down to multiples of 2^(8 - bits)
        step = per_image(2.0 ** (8 - params["bits"]))
        return (images * 255).round_().div_(step).floor_().mul_(step / 255)

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return TF.posterize(image, int(params["bits"]))


class Equalize(Pixel):
    """Spreads each channel's values so that its histogram becomes flat, as Pillow does.

    Value v becomes (n + step / 2) / step in whole numbers. n is the number of pixels darker than v,
    and step is 1/255 of those darker than the lightest value.
    """

    def __init__(self, p: Fraction = 1.0) -> None:
        self.p = p

    def batch(self, images: Tensor, params: Params) -> Tensor:
        num_pixels = images.shape[2] * images.shape[3]
        # each channel of each image is a row of bytes and has its own histogram
        values = as_bytes(images).flatten(2).flatten(0, 1).long()
        counts = torch.zeros(values.shape[0], _LEVELS, dtype=torch.int64, device=images.device)
        counts.scatter_add_(1, values, torch.ones_like(values))
        lightest = counts.gather(1, values.amax(dim=1, keepdim=True))
        step = torch.div(num_pixels - lightest, _LEVELS - 1, rounding_mode="floor")
        half = torch.div(step, 2, rounding_mode="floor")
        below = counts.cumsum(dim=1) - counts
        table = torch.div(below + half, step.clamp(min=1), rounding_mode="floor")
        # a step of 0, of a nearly constant channel, leaves it as it is
        unchanged = torch.arange(_LEVELS, device=images.device)
        table = torch.where(step > 0, table, unchanged).clamp_(max=_LEVELS - 1)
        return table.gather(1, values).view(images.shape) / 255

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return TF.equalize(image)


class AutoContrast(Pixel):
    """Stretches each channel so that its darkest value is 0 and its lightest 1."""

    def __init__(self, p: Fraction = 1.0) -> None:
        self.p = p

    def batch(self, images: Tensor, params: Params) -> Tensor:
        low, high = torch.aminmax(images.flatten(2), dim=2, keepdim=True)
        extent = high - low
        # Half a step of a byte or less: a channel of one value, which stays as it is instead of
        # being divided by 0.
        flat = extent < 1 / 512
        low = torch.where(flat, 0.0, low)
        extent = torch.where(flat, 1.0, extent)
        return (images - low[..., None]).div_(extent[..., None])

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return TF.autocontrast(image)


class Sharpness(Pixel):
    """Mixes the image with a smoothed one; the outermost pixels stay, as torchvision's do.

    factor: range of its weight, uniform; below 1 softens, above 1 sharpens.
    """

    draws = 1

    def __init__(self, factor: tuple[float, float] = (0.05, 0.95), p: Fraction = 1.0) -> None:
        self.factor = ordered("factor", factor, 0.0)
        self.p = p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        return {"factor": between(uniforms[:, 0], *self.factor)}

    def batch(self, images: Tensor, params: Params) -> Tensor:
        if min(images.shape[2:]) < 3:
            return images
        out = images.clone()
        inner = images[:, :, 1:-1, 1:-1]
        # Pillow's smoothing kernel: 5 in the middle, 1 around it, divided by 13. It is the 3 x 3
        # box, summed along one axis and then the other, plus 4 times the middle.
        lines = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
        box = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:]
        smooth = box.add_(inner, alpha=4).div_(13)
        out[:, :, 1:-1, 1:-1] = smooth.lerp_(inner, per_image(params["factor"])).clamp_(0, 1)
        return out

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return TF.adjust_sharpness(image, float(params["factor"]))


class Cutout(Erase):
    """Paints one square (DeVries and Taylor 2017): its centre is anywhere, borders cut it.

    fraction: largest side as a fraction of the image's; the side is uniform in whole pixels from 1.
    """

    draws = 3

    def __init__(self, fraction: Fraction = 0.5, p: Fraction = 1.0) -> None:
        self.fraction = fraction
        self.p = p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        largest = max(1, round(self.fraction * min(size)))
        side = integers(uniforms[:, 0], largest) + 1
        half = torch.floor(side / 2)
        top = integers(uniforms[:, 1], size[0]) - half
        left = integers(uniforms[:, 2], size[1]) - half
        return {"top": top, "left": left, "height": side, "width": side}


class RandomErasing(Erase):
    """Paints one rectangle that lies inside the image, as torchvision's operation of this name.

    scale: range of its area as a fraction of the image's.
    ratio: range of its height over width, log-uniform: 1 : 2 is as likely as 2 : 1.
    p: probability that an image is painted.
    """

    draws = 2 * _TRIES + 2

    def __init__(
        self,
        scale: tuple[float, float] = (0.02, 0.33),
        ratio: tuple[float, float] = (0.3, 3.3),
        p: Fraction = 0.5,
    ) -> None:
        self.scale = ordered("scale", scale, 0.0, 1.0)
        self.ratio = ordered("ratio", ratio, 1e-2)
        self.p = p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        """The first of ten drawn rectangles that fits; one without area where none fits."""
        low_ratio, high_ratio = self.ratio
        area = size[0] * size[1] * between(uniforms[:, :_TRIES], *self.scale)
        logs = between(uniforms[:, _TRIES : 2 * _TRIES], math.log(low_ratio), math.log(high_ratio))
        heights = torch.round(torch.sqrt(area * logs.exp()))
        widths = torch.round(torch.sqrt(area / logs.exp()))
        # strictly smaller, as torchvision asks: the rectangle never covers a whole side
        fits = (heights < size[0]) & (widths < size[1])
        # argmax gives the first of equal values; of uint8, as bool has no argmax
        first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
        any_fits = fits.any(dim=1)
        height = heights.gather(1, first)[:, 0] * any_fits
        width = widths.gather(1, first)[:, 0] * any_fits
        top = integers(uniforms[:, -2], size[0] - height + 1)
        left = integers(uniforms[:, -1], size[1] - width + 1)
        return {"top": top, "left": left, "height": height, "width": width}
