"""Perceptual hash: 64 bits of an image's pixels that change little where the image looks the same.

Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", section 3.2.1: the lowest frequencies
of the discrete cosine transform of the grey image, each compared with their median. Where we differ: the transform is
taken of the pixels as they are, not of a 32 x 32 reduction of a blurred copy: its low frequencies see no more than
that, at any side. The 8 x 8 coefficients start at frequency 0 (as the package ImageHash does), and the mean, whose bit
is set unless all is black, stays out of the median. Coefficients are rounded, so that a flat image has a hash, 1 << 63,
and no noise. This file imports no torch.
"""

from __future__ import annotations

from functools import cache

import numpy as np

SIDE = 8
BITS = SIDE * SIDE
GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""ITU-R BT.601 luma."""
STEP = 1 / 32
"""Coefficients are rounded to multiples of it, in units of a pixel's 0..255."""


def perceptual_hash(pixels: np.ndarray) -> int:
    """The hash of a (C, H, W) uint8 image, C 1 or 3: from 0 to 2**64 - 1.

    Bit 63 - (8 v + u) belongs to u waves across and v waves down (half waves). Images below 8 pixels of side have one,
    too, of fewer frequencies. Equal pixels have equal hashes; those of a side of 160 and of 224 pixels of one file are
    a bit or two apart.
    """
    channels, height, width = pixels.shape
    grey = pixels.reshape(channels, -1).astype(np.float32)
    grey = (GREY @ grey if channels == 3 else grey).reshape(height, width)
    found = np.rint(_cosines(height) @ grey @ _cosines(width).T / STEP).ravel()
    median = np.sort(found[1:])[(BITS - 1) // 2]
    return int.from_bytes(np.packbits(found > median).tobytes(), "big")


def hash_bits(hashes: np.ndarray) -> np.ndarray:
    """(n,) uint64 hashes as (n, 64) uint8 of 0 and 1, the highest bit first."""
    return np.unpackbits(hashes.astype(">u8").view(np.uint8).reshape(-1, 8), axis=1)


@cache
def _cosines(side: int) -> np.ndarray:
    """(8, side) float32: half waves 0..7 over `side` pixels, scaled to an image's mean; type II of the transform.

    Zeros for those that so few pixels cannot hold.
    """
    angle = np.pi / side * np.outer(np.arange(SIDE), np.arange(side) + 0.5)
    scale = np.where(np.arange(SIDE) == 0, 1.0, np.sqrt(2.0)) / side
    scale[side:] = 0
    return (scale[:, None] * np.cos(angle)).astype(np.float32)
