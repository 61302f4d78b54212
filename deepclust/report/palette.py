"""Colours of clusters: apart from each other for any eye, visible on light and on dark paper."""

from __future__ import annotations

from functools import cache

import numpy as np

NOISE_COLOUR = "#8d9499"
FIRST = (
    *("#2a6fc4", "#e6841a", "#14a085", "#b93a4c", "#a487e0"),
    *("#7fa83a", "#56b4e9", "#e08bc0", "#8a5a2b", "#c9b42d"),
)
"""Blue, orange, teal, red, purple, green, sky, pink, brown and gold, after Okabe and Ito.

Most maps need no more.
"""
# Bounds of the further colours. The luminance gives a contrast of at least 2.2 to white and of 3 to
# the dark page; the chroma (OKLab) makes them neither grey nor glaring.
LUMINANCE = (0.125, 0.42)
CHROMA = (0.07, 0.17)
# sRGB codes along each axis of the grid that further colours are chosen from.
_GRID_STEPS = 16
TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
"""Linear sRGB to the responses of the eye's cones, for OKLab (Ottosson 2020)."""
TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
"""Cube roots of the cones' responses to OKLab (Ottosson 2020)."""
DEUTAN = np.array(
    [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
)
"""Linear sRGB as seen without green cones (Machado, Oliveira and Fernandes 2009, severity 1)."""
PROTAN = np.array(
    [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ]
)
"""Linear sRGB as seen without red cones (same source)."""


@cache
def palette(count: int) -> tuple[str, ...]:
    """`count` colours as `#rrggbb`; a longer palette begins like a shorter one.

    The `FIRST` ones are followed by those that a greedy search finds: each is the colour whose
    smallest distance to all before it, and to the grey of noise, is the largest. A distance is in
    OKLab; the smallest of a normal eye and the two common kinds of colour blindness counts.
    """
    first = [_codes(colour) for colour in (NOISE_COLOUR, *FIRST)]
    axis = np.linspace(0, 255, _GRID_STEPS)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    codes = np.concatenate([np.array(first, dtype=np.float64), grid])
    linear = _linear(codes)
    # relative luminance of linear sRGB, as in WCAG's contrast
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    eyes = [_lab(linear)]
    # the matrices lead out of the colours that a screen shows, hence clip
    eyes += [_lab(np.clip(linear @ eye.T, 0, 1)) for eye in (DEUTAN, PROTAN)]
    chroma = np.hypot(*eyes[0][:, 1:].T)
    allowed = (LUMINANCE[0] <= luminance) & (luminance <= LUMINANCE[1])
    allowed &= (CHROMA[0] <= chroma) & (chroma <= CHROMA[1])
    nearest = np.where(allowed, np.inf, -np.inf)
    chosen: list[int] = []
    # one more than asked for: the grey of noise comes first, and is left out at the end
    for number in range(count + 1):
        chosen.append(number if number < len(first) else int(nearest.argmax()))
        for lab in eyes:
            distance = np.linalg.norm(lab - lab[chosen[-1]], axis=1)
            np.minimum(nearest, distance, out=nearest)
    return tuple(_hexadecimal(codes[index]) for index in chosen[1:])


def _codes(colour: str) -> list[int]:
    """The three sRGB codes, 0 to 255, of `#rrggbb`."""
    return [int(colour[start : start + 2], 16) for start in (1, 3, 5)]


def _hexadecimal(codes: np.ndarray) -> str:
    """Three sRGB codes as `#rrggbb`."""
    return "#" + "".join(f"{round(code):02x}" for code in codes)


def _linear(codes: np.ndarray) -> np.ndarray:
    """(n, 3) linear light from 0 to 1 of (n, 3) sRGB codes from 0 to 255 (IEC 61966-2-1)."""
    value = codes / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _lab(linear: np.ndarray) -> np.ndarray:
    """(n, 3) OKLab lightness and two colour axes of (n, 3) linear sRGB."""
    return np.cbrt(linear @ TO_LMS.T) @ TO_LAB.T
