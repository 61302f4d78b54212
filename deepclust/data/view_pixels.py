"""Operations on pixel values that are no channel mix, and those that paint over a part of the image."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from deepclust.data.random import normals
from deepclust.data.view_base import Erase, Params, Pixel, Size, between, integers, ordered
from deepclust.schema import Count, Fraction, NonNegative

NOISE_OFFSETS = 1 << 16
_TRIES = 10


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
        self.log_range, self.p = log_range, p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        return {"power": torch.exp(self.log_range * (2 * uniforms[:, 0] - 1))}

    def batch(self, images: Tensor, params: Params) -> Tensor:
        # four times faster than pow; log(0) = -inf comes back as exp(-inf) = 0
        return images.log().mul_(per_image(params["power"])).exp_()

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return TF.adjust_gamma(image, float(params["power"]))


@functools.lru_cache(maxsize=8)
def _noise_table(length: int, device: torch.device) -> Tensor:
    return normals(torch.zeros(1, dtype=torch.int64), length)[0].to(device)


def noise_like(images: Tensor, offset: Tensor) -> Tensor:
    """Standard normal numbers of the shape of (n, ...) images: windows of the fixed table at (n,) offsets."""
    length = images[0].numel()
    table = _noise_table(NOISE_OFFSETS + length, images.device)
    return table.as_strided((NOISE_OFFSETS, length), (1, 1))[offset.long()].view_as(images)


class PixelNoise(Pixel):
    """Adds normal noise of standard deviation `std` (of a range of 1) to every value.

    An image's noise is a window at a random place of one fixed table of normal numbers: a copy instead of a logarithm
    and a cosine for every pixel.
    """

    draws = 1

    def __init__(self, std: NonNegative = 0.03, p: Fraction = 1.0) -> None:
        self.std, self.p = std, p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        return {"offset": integers(uniforms[:, 0], NOISE_OFFSETS)}

    def batch(self, images: Tensor, params: Params) -> Tensor:
        return torch.add(images, noise_like(images, params["offset"]), alpha=self.std).clamp_(0, 1)

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return as_bytes(self.batch(image[None] / 255, params))[0]


def as_bytes(images: Tensor) -> Tensor:
    """Values in [0, 1] to uint8, rounded."""
    return (images * 255).round_().to(torch.uint8)


class GaussianBlur(Pixel):
    """Blurs with a standard deviation in pixels uniform in `sigma`; borders are mirrored.

    kernel: side of the square that is averaged, odd; default: a tenth of the image's side, at least 3.
    """

    draws = 1

    def __init__(self, sigma: tuple[float, float] = (0.1, 2.0), kernel: Count | None = None, p: Fraction = 0.5) -> None:
        if kernel is not None and kernel % 2 == 0:
            raise ValueError(f"kernel={kernel}: an odd number, for example {kernel + 1}")
        self.sigma, self.kernel, self.p = ordered("sigma", sigma, 1e-3), kernel, p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        return {"sigma": between(uniforms[:, 0], *self.sigma)}

    def _radius(self, height: int, width: int) -> int:
        kernel = self.kernel or max(3, round(0.1 * min(height, width)))
        return min(kernel // 2, min(height, width) - 1)

    def batch(self, images: Tensor, params: Params) -> Tensor:
        """Two products with band matrices, which hold the mirrored borders as well."""
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
    """(n, 2r+1) kernels to (n, side, side) matrices that filter a mirrored line of pixels."""
    radius = weights.shape[1] // 2
    out = torch.arange(side, device=weights.device)
    source = (out[None] + torch.arange(-radius, radius + 1, device=weights.device)[:, None]).abs()
    source = torch.where(source >= side, 2 * (side - 1) - source, source)
    taps = F.one_hot(source, side).to(weights.dtype)
    return torch.tensordot(weights, taps, dims=1)


class Solarize(Pixel):
    """Inverts values that are not below a threshold, uniform in the range `threshold` on the scale 0 to 256."""

    draws = 1

    def __init__(self, threshold: tuple[float, float] = (0.0, 256.0), p: Fraction = 1.0) -> None:
        self.threshold, self.p = ordered("threshold", threshold, 0.0, 256.0), p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        return {"threshold": between(uniforms[:, 0], *self.threshold)}

    def batch(self, images: Tensor, params: Params) -> Tensor:
        return torch.where(images * 255 < per_image(params["threshold"]), images, 1 - images)

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return torch.where(image < params["threshold"], image, 255 - image)


class Posterize(Pixel):
    """Keeps the highest bits of each byte: the whole part of a number uniform in the range `bits`."""

    draws = 1

    def __init__(self, bits: tuple[float, float] = (4.0, 8.0), p: Fraction = 1.0) -> None:
        self.bits, self.p = ordered("bits", bits, 1.0, 8.0), p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        return {"bits": torch.floor(between(uniforms[:, 0], *self.bits))}

    def batch(self, images: Tensor, params: Params) -> Tensor:
        step = per_image(2.0 ** (8 - params["bits"]))
        return (images * 255).round_().div_(step).floor_().mul_(step / 255)

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return TF.posterize(image, int(params["bits"]))


class Equalize(Pixel):
    """Spreads each channel's values so that its histogram becomes flat, as Pillow does."""

    def __init__(self, p: Fraction = 1.0) -> None:
        self.p = p

    def batch(self, images: Tensor, params: Params) -> Tensor:
        pixels = images.shape[2] * images.shape[3]
        values = as_bytes(images).flatten(2).flatten(0, 1).long()
        counts = torch.zeros(values.shape[0], 256, dtype=torch.int64, device=images.device)
        counts.scatter_add_(1, values, torch.ones_like(values))
        highest = counts.gather(1, values.amax(dim=1, keepdim=True))
        step = torch.div(pixels - highest, 255, rounding_mode="floor")
        below = counts.cumsum(dim=1) - counts
        table = torch.div(below + torch.div(step, 2, rounding_mode="floor"), step.clamp(min=1), rounding_mode="floor")
        table = torch.where(step > 0, table, torch.arange(256, device=images.device)).clamp_(max=255)
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
        flat = extent < 1 / 512
        low, extent = torch.where(flat, 0.0, low), torch.where(flat, 1.0, extent)
        return (images - low[..., None]).div_(extent[..., None])

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return TF.autocontrast(image)


class Sharpness(Pixel):
    """Mixes with a smoothed image; a factor below 1, uniform in the range `factor`, softens. The border row stays."""

    draws = 1

    def __init__(self, factor: tuple[float, float] = (0.05, 0.95), p: Fraction = 1.0) -> None:
        self.factor, self.p = ordered("factor", factor, 0.0), p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        return {"factor": between(uniforms[:, 0], *self.factor)}

    def batch(self, images: Tensor, params: Params) -> Tensor:
        if min(images.shape[2:]) < 3:
            return images
        out, inner = images.clone(), images[:, :, 1:-1, 1:-1]
        lines = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
        smooth = (lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:]).add_(inner, alpha=4).div_(13)
        out[:, :, 1:-1, 1:-1] = smooth.lerp_(inner, per_image(params["factor"])).clamp_(0, 1)
        return out

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return TF.adjust_sharpness(image, float(params["factor"]))


class Cutout(Erase):
    """Paints one square: centre anywhere, side a whole number from 1 to `fraction` of the image's; cut at borders."""

    draws = 3

    def __init__(self, fraction: Fraction = 0.5, p: Fraction = 1.0) -> None:
        self.fraction, self.p = fraction, p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        side = integers(uniforms[:, 0], max(1, round(self.fraction * min(size)))) + 1
        top = integers(uniforms[:, 1], size[0]) - torch.floor(side / 2)
        left = integers(uniforms[:, 2], size[1]) - torch.floor(side / 2)
        return {"top": top, "left": left, "height": side, "width": side}


class RandomErasing(Erase):
    """Paints one rectangle that lies inside the image, as torchvision's.

    scale: range of its area as a fraction of the image's. ratio: range of its height over width, log-uniform.
    """

    draws = 2 * _TRIES + 2

    def __init__(
        self, scale: tuple[float, float] = (0.02, 0.33), ratio: tuple[float, float] = (0.3, 3.3), p: Fraction = 0.5
    ) -> None:
        self.scale, self.ratio, self.p = ordered("scale", scale, 0.0, 1.0), ordered("ratio", ratio, 1e-2), p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        """The first of ten drawn rectangles that fits; none where none fits."""
        area = size[0] * size[1] * between(uniforms[:, :_TRIES], *self.scale)
        logs = between(uniforms[:, _TRIES : 2 * _TRIES], math.log(self.ratio[0]), math.log(self.ratio[1]))
        height, width = torch.round(torch.sqrt(area * logs.exp())), torch.round(torch.sqrt(area / logs.exp()))
        fits = (height < size[0]) & (width < size[1])
        first, found = fits.to(torch.uint8).argmax(dim=1, keepdim=True), fits.any(dim=1)
        height, width = height.gather(1, first)[:, 0] * found, width.gather(1, first)[:, 0] * found
        top, left = integers(uniforms[:, -2], size[0] - height + 1), integers(uniforms[:, -1], size[1] - width + 1)
        return {"top": top, "left": left, "height": height, "width": width}
