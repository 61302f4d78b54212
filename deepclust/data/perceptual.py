"""Perceptual hash: 64 bits of an image's pixels that change little where the image looks the same.

Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", section 3.2.1:
the lowest frequencies of the discrete cosine transform of the grey image, each compared with their
median. Where we differ:

- The transform is of the pixels as they are, not of a 32 x 32 reduction of a blurred copy. Low
  frequencies see no more detail than such a copy has, whatever the side of the image.
- The 8 x 8 coefficients start at frequency 0, as in the package ImageHash.
- The coefficient of frequency 0 (the mean) is left out of the median. Its bit is set unless the
  image is all black.
- Coefficients are rounded, so that a flat image has the hash 1 << 63 and no bits of noise.

This file imports no torch.
"""

from __future__ import annotations

from functools import cache

import numpy as np

SIDE = 8
"""Frequencies across and down: 8 x 8 coefficients give the 64 bits."""
BITS = SIDE * SIDE
GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Weights of red, green and blue in a grey value: the luma of ITU-R BT.601."""
STEP = 1 / 32
"""Coefficients are rounded to its multiples; in units of a pixel's value 0..255."""


def perceptual_hash(pixels: np.ndarray) -> int:
    """The hash of an image, from 0 to 2**64 - 1.

    Bit 63 - (8 v + u) belongs to u half waves across and v half waves down. Equal pixels have equal
    hashes. One file decoded at a side of 160 and of 224 pixels gives hashes that differ by a bit or
    two.

    pixels: (C, H, W) uint8, C 1 or 3. Sides below 8 pixels hold fewer frequencies; the others count
        as 0.
    """
    channels, height, width = pixels.shape
    values = pixels.reshape(channels, -1).astype(np.float32)
    if channels == 3:
        values = GREY @ values
    grey = values.reshape(height, width)
    # the 2-D transform is separable: one product for the columns, one for the rows
    frequencies = _cosines(height) @ grey @ _cosines(width).T
    coefficients = np.rint(frequencies / STEP).ravel()
    # of the 63 coefficients without the mean, an odd number, so the median is one of them
    median = np.sort(coefficients[1:])[(BITS - 1) // 2]
    # the comparison is strict, so in a flat image, where all but the mean are 0, only bit 63 is set
    return int.from_bytes(np.packbits(coefficients > median).tobytes(), "big")


def hash_bits(hashes: np.ndarray) -> np.ndarray:
    """(n, 64) uint8 of 0 and 1 from (n,) uint64 hashes, the highest bit first."""
    # big-endian bytes, so that the order of bits is the same on every machine
    return np.unpackbits(hashes.astype(">u8").view(np.uint8).reshape(-1, 8), axis=1)


@cache
def _cosines(side: int) -> np.ndarray:
    """(8, side) float32 matrix of the cosine transform of type II: 0..7 half waves over `side`.

    Rows are scaled so that the first gives the mean of the pixels. Rows of frequencies that so few
    pixels cannot hold are zero.
    """
    frequencies = np.arange(SIDE)
    centres = np.arange(side) + 0.5
    angle = np.pi / side * np.outer(frequencies, centres)
    # sqrt(2) makes all rows equally long, as the cosines of frequency 0 are all 1
    scale = np.where(frequencies == 0, 1.0, np.sqrt(2.0)) / side
    scale[side:] = 0
    return (scale[:, None] * np.cos(angle)).astype(np.float32)
