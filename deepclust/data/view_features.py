"""Operations on feature vectors (n, D, 1, 1) in place of images: what a view of a frozen feature may differ by."""

from __future__ import annotations

import torch
from torch import Tensor

from deepclust.data.view_base import Feature, Params, Size, integers
from deepclust.data.view_pixels import NOISE_OFFSETS, noise_like
from deepclust.schema import Decay, Fraction, NonNegative


class _Random(Feature):
    """A vector's randomness is a window of `noise_like`'s table."""

    draws = 1

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        return {"offset": integers(uniforms[:, 0], NOISE_OFFSETS)}


class FeatureNoise(_Random):
    """Adds normal noise of `std` times the root mean square of the vector's own entries."""

    def __init__(self, std: NonNegative = 0.1, p: Fraction = 1.0) -> None:
        self.std, self.p = std, p

    def batch(self, images: Tensor, params: Params) -> Tensor:
        scale = images.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        return torch.addcmul(images, noise_like(images, params["offset"]), scale, value=self.std)


class FeatureDropout(_Random):
    """Sets each entry to 0 with probability `rate` and divides the others by 1 - rate."""

    def __init__(self, rate: Decay = 0.1, p: Fraction = 1.0) -> None:
        self.rate, self.p = rate, p

    def batch(self, images: Tensor, params: Params) -> Tensor:
        limit = torch.special.ndtri(torch.tensor(self.rate, dtype=torch.float64))
        kept = noise_like(images, params["offset"]) >= limit.to(images)
        return images * kept / (1 - self.rate)
