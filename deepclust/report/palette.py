"""Colours of clusters: apart from each other for any eye, and visible on light and on dark paper."""

from __future__ import annotations

from functools import cache

import numpy as np

NOISE_COLOUR = "#8d9499"
FIRST = ("#2a6fc4", "#e6841a", "#14a085", "#b93a4c", "#a487e0", "#7fa83a", "#56b4e9", "#e08bc0", "#8a5a2b", "#c9b42d")
"""Blue, orange, teal, red, purple, green, sky, pink, brown and gold, after Okabe and Ito: most maps need no more."""
LUMINANCE, CHROMA = (0.125, 0.42), (0.07, 0.17)
"""Of the others: a contrast of at least 2.2 to white and 3 to the dark page, neither grey nor glaring (OKLab)."""
TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
"""Linear sRGB to cones, and their cube roots to OKLab (Ottosson 2020)."""
DEUTAN = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]])
PROTAN = np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]])
"""Linear sRGB as seen without green or without red cones (Machado, Oliveira and Fernandes 2009, severity 1)."""


@cache
def palette(count: int) -> tuple[str, ...]:
    """`count` colours as `#rrggbb`; a longer palette begins like a shorter one.

    Behind the `FIRST`, each is the one whose smallest distance (OKLab, to a normal eye and to the two common kinds of
    colour blindness) to all before it and to the grey of noise is the largest.
    """
    first = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in (NOISE_COLOUR, *FIRST)]
    grid = np.stack(np.meshgrid(*[np.linspace(0, 255, 16)] * 3, indexing="ij"), -1).reshape(-1, 3)
    codes = np.concatenate([np.array(first, dtype=np.float64), grid])
    linear = _linear(codes)
    light = linear @ np.array([0.2126, 0.7152, 0.0722])
    eyes = [_lab(linear), *(_lab(np.clip(linear @ kind.T, 0, 1)) for kind in (DEUTAN, PROTAN))]
    chroma = np.hypot(*eyes[0][:, 1:].T)
    allowed = (LUMINANCE[0] <= light) & (light <= LUMINANCE[1]) & (CHROMA[0] <= chroma) & (chroma <= CHROMA[1])
    nearest = np.where(allowed, np.inf, -np.inf)
    chosen: list[int] = []
    for place in range(count + 1):
        chosen.append(place if place < len(first) else int(nearest.argmax()))
        for lab in eyes:
            np.minimum(nearest, np.linalg.norm(lab - lab[chosen[-1]], axis=1), out=nearest)
    return tuple("#" + "".join(f"{round(part):02x}" for part in codes[each]) for each in chosen[1:])


def _linear(codes: np.ndarray) -> np.ndarray:
    """sRGB codes (n, 3) from 0 to 255 to linear light from 0 to 1."""
    part = codes / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def _lab(linear: np.ndarray) -> np.ndarray:
    return np.cbrt(linear @ TO_LMS.T) @ TO_LAB.T
