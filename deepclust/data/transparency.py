"""Images with transparent parts, laid on a background that keeps what is visible.

The background is white. Where what is visible is nearly white along the transparent parts (a white
icon), it is mid
grey: on white nothing would be left of it. An image whose every pixel is transparent is taken as if
it were opaque if it has more than one colour, and else as blank. The choice is the image's own and
always the same.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

WHITE, GREY = 255, 128
NEAR_WHITE = 24
"""Mean difference from white, of 255, below which a visible part would be lost on white."""
SIDE = 256
"""Longer side of the reduced image that the background is chosen on."""
LUMA = np.array([0.299, 0.587, 0.114])
"""ITU-R BT.601."""


def has_alpha(image: Image.Image) -> bool:
    """Whether an image has transparent parts, or could have: an alpha channel or a transparent
    colour.
    """
    in_palette = image.palette is not None and image.palette.mode.endswith("A")
    return image.mode.lower().endswith("a") or in_palette or "transparency" in image.info


def opaque(image: Image.Image) -> Image.Image:
    """An image with alpha as it looks on its background, without alpha."""
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return image.convert("RGB")
    if alpha.getextrema() == (0, 0):
        colours = image.convert("RGB")
        one_colour = colours.getcolors(1) is not None
        return Image.new("RGB", image.size, "white") if one_colour else colours
    level = background(image)
    return Image.alpha_composite(
        Image.new("RGBA", image.size, (level, level, level, 255)), image
    ).convert("RGB")


def background(image: Image.Image) -> int:
    """The grey level, 255 or 128, that an RGBA image lies on."""
    step = max(1, -(-max(image.size) // SIDE))
    small: np.ndarray = np.asarray(image)[step // 2 :: step, step // 2 :: step]
    alpha = small[..., 3].astype(float)
    from_white = WHITE - small[..., :3] @ LUMA
    edge = _edge(alpha >= alpha.max() / 2)
    weights = np.where(edge, alpha, 0.0) if edge.any() else alpha
    total = weights.sum()
    if total == 0:
        return WHITE
    return GREY if (weights * from_white).sum() / total < NEAR_WHITE else WHITE


def _edge(visible: np.ndarray) -> np.ndarray:
    """Which visible pixels (H, W) have a transparent one above, below, left or right."""
    padded = np.pad(visible, 1, constant_values=True)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return visible & ~inside
