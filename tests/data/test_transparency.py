"""Transparent parts: what is visible stays so, whatever its colour and the kind of file."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from deepclust.data.images import decode
from deepclust.data.transparency import GREY, WHITE, background
from deepclust.features.decode_ahead import perceptual_hash

SIDE = 32
SHAPES = ("disc", "bar", "frame")


def mask(shape: str, side: int = SIDE) -> Image.Image:
    """Where a shape is, as 8-bit grey: 0 or 255."""
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    low, high = side // 4, 3 * side // 4
    if shape == "disc":
        draw.ellipse((low, low, high, high), fill=255)
    elif shape == "bar":
        draw.rectangle((0, low, side, side // 2), fill=255)
    else:
        draw.rectangle((low, low, high, high), outline=255, width=3)
    return image


def icon(
    shape: str, colour: tuple[int, int, int], hidden: tuple[int, int, int] = (0, 0, 0)
) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), hidden)
    image.paste(colour, mask=mask(shape))
    image.putalpha(mask(shape))
    return image


def rgba16(image: Image.Image) -> bytes:
    """A 16-bit RGBA PNG by its specification, which Pillow does not write."""
    values = np.asarray(image).astype(np.uint16) * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", *image.size, 16, 6, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def save(image: Image.Image, kind: str, folder: Path) -> Path:
    """An RGBA icon as a file of a kind."""
    path = folder / f"x.{kind.split()[0]}"
    if kind == "png 16":
        path.write_bytes(rgba16(image))
    elif kind == "png LA":
        image.convert("LA").save(path)
    elif kind in ("png P", "gif"):
        indexed = Image.fromarray((np.asarray(image)[..., 3] > 127).astype(np.uint8), "L").convert(
            "P"
        )
        colour = np.asarray(image)[np.asarray(image)[..., 3] > 127][0, :3].tolist()
        indexed.putpalette([0, 0, 0, *colour])
        indexed.save(path, transparency=0)
    elif kind == "tif PA":
        image.quantize(16).convert("PA").save(path)
    elif kind == "webp":
        image.save(path, lossless=True, exact=True)
    elif kind == "png tRNS":
        image.convert("RGB").save(path, transparency=image.getpixel((0, 0))[:3])  # pyright: ignore
    else:
        image.save(path)
    return path


@pytest.mark.parametrize(
    "kind", ["png", "png 16", "png LA", "png P", "png tRNS", "gif", "tif", "tif PA", "webp"]
)
def test_white_icons_are_told_apart_and_dark_ones_lie_on_white(kind: str, tmp_path: Path) -> None:
    for shape in SHAPES:
        visible = np.asarray(mask(shape)) > 0
        white = decode(save(icon(shape, (255, 255, 255)), kind, tmp_path), SIDE, 3)
        assert (white[:, visible] == 255).all() and (white[:, ~visible] == GREY).all()
        dark = decode(save(icon(shape, (20, 40, 30), (255, 0, 0)), kind, tmp_path), SIDE, 1)[0]
        assert (dark[~visible] == WHITE).all() and dark[visible].max() < 60
    hashes = {
        perceptual_hash(decode(save(icon(s, (255, 255, 255)), kind, tmp_path), SIDE, 3))
        for s in SHAPES
    }
    assert len(hashes) == 3, "no near-duplicates of each other"


@pytest.mark.parametrize(
    ("colour", "level"),
    [
        ((255, 255, 255), GREY),
        ((245, 245, 250), GREY),
        ((255, 255, 200), GREY),
        ((230, 0, 0), WHITE),
        ((255, 230, 0), WHITE),
        ((128, 128, 128), WHITE),
        ((0, 0, 0), WHITE),
    ],
)
def test_the_background_is_white_unless_that_hides_the_icon(
    colour: tuple[int, int, int], level: int
) -> None:
    assert {background(icon(shape, colour)) for shape in SHAPES} == {level}


def test_an_outline_keeps_a_white_shape_on_white_and_dark_details_do_not_save_its_outline() -> None:
    outlined = icon("disc", (255, 255, 255))
    ImageDraw.Draw(outlined).ellipse((8, 8, 24, 24), outline=(0, 0, 0, 255), width=2)
    assert background(outlined) == WHITE
    with_eyes = icon("disc", (255, 255, 255))
    ImageDraw.Draw(with_eyes).rectangle((12, 12, 20, 20), fill=(0, 0, 0, 255))
    assert background(with_eyes) == GREY


def test_a_white_picture_that_is_in_its_alpha_alone_is_seen() -> None:
    ramp = np.broadcast_to(np.linspace(140, 255, SIDE).astype(np.uint8), (SIDE, SIDE))
    picture = Image.fromarray(np.dstack([np.full((SIDE, SIDE, 3), 255, np.uint8), ramp]))
    assert background(picture) == GREY


def test_large_icons_have_the_background_of_small_ones() -> None:
    for colour in ((255, 255, 255), (30, 30, 30)):
        small = icon("frame", colour)
        assert background(small.resize((900, 900), Image.Resampling.NEAREST)) == background(small)


def test_an_image_whose_alpha_is_nothing_everywhere_shows_its_colours(tmp_path: Path) -> None:
    """They were all one white image, and each other's duplicates."""
    colours = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    image = Image.fromarray(np.dstack([colours, np.zeros((SIDE, SIDE), np.uint8)]))
    for kind in ("png", "tif", "webp", "png 16"):
        assert (decode(save(image, kind, tmp_path), SIDE, 3) == colours.transpose(2, 0, 1)).all()
    blank = Image.new("RGBA", (SIDE, SIDE), (10, 20, 30, 0))
    assert (decode(save(blank, "png", tmp_path), SIDE, 3) == 255).all(), (
        "one colour and nothing visible: blank"
    )
