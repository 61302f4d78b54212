"""Operations on feature vectors (n, D, 1, 1) instead of images: random views of fixed features."""

from __future__ import annotations

import torch
from torch import Tensor

from deepclust.data.views.base import Feature, Params, Size, integers
from deepclust.data.views.pixels import NOISE_OFFSETS, noise_like
from deepclust.types import Decay, Fraction, NonNegative


class _Random(Feature):
    """Base of operations with a random number per entry: a window of `noise_like`'s table."""

    draws = 1

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        return {"offset": integers(uniforms[:, 0], NOISE_OFFSETS)}


class FeatureNoise(_Random):
    """Adds normal noise of `std` times the root mean square of the vector's own entries."""

    def __init__(self, std: NonNegative = 0.1, p: Fraction = 1.0) -> None:
        self.std = std
        self.p = p

    def batch(self, images: Tensor, params: Params) -> Tensor:
        # relative to the vector, as features of different networks differ in scale
        scale = images.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        noise = noise_like(images, params["offset"])
        return torch.addcmul(images, noise, scale, value=self.std)


class FeatureDropout(_Random):
    """Sets each entry to 0 with probability `rate` and divides the others by 1 - rate."""

    def __init__(self, rate: Decay = 0.1, p: Fraction = 1.0) -> None:
        self.rate = rate
        self.p = p

    def batch(self, images: Tensor, params: Params) -> Tensor:
        # a normal number lies below the normal distribution's quantile of `rate` with that chance
        limit = torch.special.ndtri(torch.tensor(self.rate, dtype=torch.float64))
        kept = noise_like(images, params["offset"]) >= limit.to(images)
        # divided by 1 - rate, so that the expectation of every entry stays
        return images * kept / (1 - self.rate)
