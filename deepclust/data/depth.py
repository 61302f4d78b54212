"""Pixels of more than 8 bits to 8, by one rule for each file.

A file's full scale is what it declares (a TIFF's bits per sample, or its MaxSampleValue where that
is 2^n - 1; a PGM's maxval) or else what its container holds: 65535 for 16 bits; 1, 255 or 65535 for
floats and 32-bit integers, the first that holds all values. A picture that uses a quarter of it or
more is scaled by it, and pictures stay comparable. One that uses less (of a thermal camera, or 12
bits in 16) would keep a few grey levels: its own 0.1th and 99.9th percentiles become black and
white. All channels of a colour picture are scaled alike. Files of 8 bits, and of 8 bits in 16, are
left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

NARROW = 0.25
"""Share of the full scale below which a picture is stretched: above, 64 of 256 levels are left."""
PERCENTILES = (0.1, 99.9)
SAMPLE = 1_000_000
"""Pixels, evenly spaced, whose percentiles stand for those of all: sorting a large picture would
take seconds.
"""
BITS_PER_SAMPLE, MAX_SAMPLE_VALUE = 258, 281
"""Tags of TIFF 6.0."""
OTHER_BYTE = {"B": "L", "L": "B", "N": "L" if sys.byteorder == "big" else "B"}
"""The byte order in which Pillow, which keeps the high byte of 16 bits, keeps the low one instead.
"""


def is_deep_grey(image: Image.Image) -> bool:
    """Whether an image holds integers of more than 8 bits, or floats."""
    return image.mode[0] in "IF"


def grey_of(image: Image.Image) -> Image.Image:
    """An image of 16-bit or 32-bit integers or of floats as 8-bit grey, with what it declares
    transparent.

    Raises ValueError for values that are not finite, negative or beyond 65535.
    """
    values = np.asarray(image)
    grey = Image.fromarray(scaled(values, full_scale(image, values)))
    hidden = image.info.get("transparency")
    if isinstance(hidden, int):
        grey.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return grey


def full_scale(image: Image.Image, values: np.ndarray) -> float:
    """The value that is white in a grey image. Raises ValueError for values that fit no scale."""
    if not np.isfinite(values).all():
        raise ValueError("holds NaN or infinite pixels")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535:
        raise ValueError(
            f"pixel values from {low:g} to {high:g} fit none of 0..1, 0..255 and 0..65535"
        )
    declared = _declared(image)
    if declared and high <= declared:
        return declared
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 65535.0
    if values.dtype.kind == "f" and high <= 1:
        return 1.0
    return 255.0 if high <= 255 else 65535.0


def _declared(image: Image.Image) -> float | None:
    """The full scale that a TIFF of integers declares, if it is between 8 and 16 bits."""
    tags = getattr(image, "tag_v2", None)
    if tags is None or image.mode == "F":
        return None
    for tag, is_bits in ((BITS_PER_SAMPLE, True), (MAX_SAMPLE_VALUE, False)):
        value = tags.get(tag)
        first = value[0] if isinstance(value, tuple) and value else value
        if not isinstance(first, int):
            continue
        most = 2**first - 1 if is_bits and first < 16 else first
        if 255 < most < 65535 and (most & (most + 1)) == 0:
            return float(most)
    return None


def scaled(values: np.ndarray, full: float, seen: np.ndarray | None = None) -> np.ndarray:
    """Numbers from 0 to `full` as uint8 of the same shape, by the rule at the top of this file.

    seen: which of them count for the range that is used, a mask; default: all.
    """
    counted = values.ravel() if seen is None else values[seen].ravel()
    low, high = used_range(counted)
    if high - low >= NARROW * full or _is_of_bytes(values, full):
        low, high = 0.0, full
    elif high == low and counted.size:  # a few bright points, or one value throughout
        low, high = float(counted.min()), float(counted.max())
    if high == low:
        low, high = 0.0, full
    return np.rint(
        (values.astype(np.float64) - low).clip(0, high - low) * (255.0 / (high - low))
    ).astype(np.uint8)


def _is_of_bytes(values: np.ndarray, full: float) -> bool:
    """Whether 16 bits hold no more than 8: multiples of 257, as converters write them, or of
    256."""
    return full == 65535 and any(not (values % step).any() for step in (257, 256))


def used_range(values: np.ndarray) -> tuple[float, float]:
    """The percentiles of (n,) numbers between which the rest is taken to lie."""
    if not values.size:
        return 0.0, 0.0
    low, high = np.percentile(values[:: max(1, values.size // SAMPLE)], PERCENTILES)
    return float(low), float(high)


def is_deep_colour(image: Image.Image) -> bool:
    """Whether an image that is not loaded yet holds 16 bits of a colour, of which Pillow keeps the
    higher 8.
    """
    tiles = getattr(image, "tile", [])
    return bool(image.mode in ("RGB", "RGBA") and tiles and ";16" in _raw_mode(tiles[0]))


def colours_of(image: Image.Image, again: Callable[[], ImageFile]) -> Image.Image:
    """A loaded image of 16-bit colours with its narrow range stretched, or as it is where its range
    is not narrow.

    again: opens its file once more, for the lower bytes.
    """
    high = np.asarray(image)
    seen = high[..., 3] > 0 if high.shape[2] == 4 else np.ones(high.shape[:2], dtype=bool)
    low_end, high_end = used_range(high[seen][:, :3].ravel())
    if high_end - low_end >= NARROW * 255:
        return image
    low = _low_bytes(again)
    if low is None:
        return image
    whole = high[..., :3].astype(np.uint16) * 256 + low
    pixels = scaled(whole, 65535.0, seen)
    return Image.fromarray(pixels if high.shape[2] == 3 else np.dstack([pixels, high[..., 3]]))


def _low_bytes(again: Callable[[], ImageFile]) -> np.ndarray | None:
    """(H, W, 3) uint8: the lower bytes of 16-bit colours; None where this Pillow cannot give
    them."""
    with again() as image:
        raw = _raw_mode(image.tile[0])
        grey_and_alpha = raw == "LA;16B"  # 4 bytes a pixel: grey high and low, alpha high and low
        wanted = "RGBA" if grey_and_alpha else raw[:-1] + OTHER_BYTE[raw[-1]]
        image.tile = [_with_raw_mode(tile, wanted) for tile in image.tile]
        try:
            pixels = np.asarray(image)
        except ValueError:  # an older Pillow: unknown raw mode
            return None
    return pixels[..., [1, 1, 1]] if grey_and_alpha else pixels[..., :3]


def _raw_mode(tile: Any) -> str:
    """How the samples lie in the file: the first argument of a tile's decoder."""
    arguments = tile[3]
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _with_raw_mode(tile: Any, raw: str) -> Any:
    arguments = (raw, *tile[3][1:]) if isinstance(tile[3], tuple) else raw
    if hasattr(tile, "_replace"):
        return tile._replace(args=arguments)
    return (*tile[:3], arguments)  # Pillow 10
