"""More than 8 bits: a narrow range keeps its grey levels, a wide one its scale, in every kind of
file.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepclust.data.depth import scaled
from deepclust.data.images import decode, decode_file

H, W = 48, 64
RAMP = np.broadcast_to(np.linspace(0, 1, W), (H, W))


def png(values: np.ndarray, text: bytes = b"") -> bytes:
    """A 16-bit PNG of (H, W, C) by its specification: C = 1 grey, 2 with alpha, 3 colours, 4 with
    alpha.
    """
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    if text:
        chunks.insert(1, (b"tRNS", text))
    packed = [
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def tiff(values: np.ndarray, order: str = "<", deflated: bool = False, most: int = 0) -> bytes:
    """A 16-bit TIFF of (H, W, C) by TIFF 6.0, one strip; most: its MaxSampleValue."""
    height, width, channels = values.shape
    body = values.astype(order + "u2").tobytes()
    body = zlib.compress(body) if deflated else body
    short, long = 3, 4
    colour = 2 if channels >= 3 else 1
    tags = [
        (256, short, width),
        (257, short, height),
        (259, short, 8 if deflated else 1),
        (262, short, colour),
    ]
    tags += [(277, short, channels), (278, short, height), (279, long, len(body)), (284, short, 1)]
    tags += [(338, short, 2)] if channels == 4 else []
    tags += [(281, short, most)] if most else []
    after = 8 + 2 + 12 * (len(tags) + 2) + 4
    bits = struct.pack(order + f"{channels}H", *[16] * channels)
    entries = [(273, long, after + len(bits)), *tags]
    packed = {
        258: struct.pack(order + "HHI", 258, short, channels) + struct.pack(order + "I", after)
    }
    if channels == 1:
        packed[258] = struct.pack(order + "HHIHH", 258, short, 1, 16, 0)
    for tag, kind, value in entries:
        number = (
            struct.pack(order + "HH", value, 0)
            if kind == short
            else struct.pack(order + "I", value)
        )
        packed[tag] = struct.pack(order + "HHI", tag, kind, 1) + number
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(packed))
    return (
        head
        + b"".join(packed[tag] for tag in sorted(packed))
        + struct.pack(order + "I", 0)
        + bits
        + body
    )


def by_pillow(kind: str) -> Callable[[np.ndarray], bytes]:
    def write(values: np.ndarray) -> bytes:
        out = io.BytesIO()
        Image.fromarray(values[..., 0]).save(out, kind)
        return out.getvalue()

    return write


GREY_FILES: dict[str, Callable[[np.ndarray], bytes]] = {
    "png": lambda values: png(values.astype(np.uint16)),
    "tif little-endian": lambda values: tiff(values, "<"),
    "tif big-endian": lambda values: tiff(values, ">"),
    "tif deflated": lambda values: tiff(values, "<", True),
    "tif int32": lambda values: by_pillow("TIFF")(values.astype(np.int32)),
    "tif float": lambda values: by_pillow("TIFF")(values.astype(np.float32)),
    "tif float unit": lambda values: by_pillow("TIFF")((values / 65535).astype(np.float32)),
    "pgm": lambda values: b"P5\n%d %d\n65535\n" % (W, H) + values.astype(">u2").tobytes(),
}
COLOUR_FILES: dict[str, Callable[[np.ndarray], bytes]] = {
    "png": lambda values: png(values),
    "png alpha": lambda values: png(np.dstack([values, np.full((H, W), 65535)])),
    "tif little-endian": lambda values: tiff(values, "<"),
    "tif big-endian": lambda values: tiff(values, ">"),
    "tif deflated": lambda values: tiff(values, "<", True),
    "tif alpha": lambda values: tiff(np.dstack([values, np.full((H, W), 65535)])),
}


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("file", GREY_FILES)
def test_a_narrow_range_keeps_its_levels_in_every_file_of_grey(file: str, tmp_path: Path) -> None:
    """200 values, as of a thermal camera: before, 65535 / 257 left one or two grey levels of them."""
    values = np.rint(7300 + 200 * RAMP)[..., None]
    pixels = decode(written(tmp_path / "x", GREY_FILES[file](values)), H, 1)[0].astype(int)
    assert len(np.unique(pixels)) >= 0.95 * W * H / W
    assert pixels[0, 0] < pixels[0, -1] and (np.diff(pixels, axis=1) >= 0).all()
    centre = slice((W - H) // 2, (W + H) // 2)
    expected = 255 * (values[:, centre, 0] - 7300) / 200
    assert np.abs(pixels - expected).max() <= 2


@pytest.mark.parametrize("file", GREY_FILES)
def test_a_wide_range_keeps_its_scale_in_every_file_of_grey(file: str, tmp_path: Path) -> None:
    values = np.rint(20000 + 20000 * RAMP)[..., None]
    pixels = decode(written(tmp_path / "x", GREY_FILES[file](values)), H, 1)[0]
    centre = slice((W - H) // 2, (W + H) // 2)
    assert np.abs(pixels - values[:, centre, 0] / 257).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("file", COLOUR_FILES)
def test_a_narrow_range_keeps_its_levels_and_hues_in_files_of_colour(
    file: str, tmp_path: Path
) -> None:
    """12 bits in 16, of which Pillow reads the upper 8: 16 levels a channel."""
    values = np.rint(4095 * np.stack([RAMP, RAMP[:, ::-1], 0.5 * RAMP], -1))
    pixels = decode(written(tmp_path / "x", COLOUR_FILES[file](values)), H, 3)
    assert all(len(np.unique(channel)) >= 0.95 * H for channel in pixels[:2])
    centre = slice((W - H) // 2, (W + H) // 2)
    assert np.abs(pixels - 255 / 4095 * values[:, centre].transpose(2, 0, 1)).max() <= 2


@pytest.mark.parametrize("file", COLOUR_FILES)
def test_a_wide_range_of_colour_is_what_pillow_reads(file: str, tmp_path: Path) -> None:
    values = np.rint(65535 * np.stack([RAMP, RAMP[:, ::-1], 0.5 * RAMP], -1))
    path = written(tmp_path / "x", COLOUR_FILES[file](values))
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB").crop(((W - H) // 2, 0, (W + H) // 2, H)))
    assert (decode(path, H, 3) == expected.transpose(2, 0, 1)).all()


def test_a_narrow_grey_with_alpha_of_sixteen_bits(tmp_path: Path) -> None:
    values = np.rint(1000 + 200 * RAMP)
    path = written(tmp_path / "x", png(np.dstack([values, np.full((H, W), 65535)])))
    assert len(np.unique(decode(path, H, 1))) >= 0.95 * H


def test_a_transparent_value_of_sixteen_bits_lies_on_the_background(tmp_path: Path) -> None:
    values = np.rint(65535 * RAMP)
    values[:8] = 77
    path = written(tmp_path / "x", png(values[..., None], struct.pack(">H", 77)))
    pixels = decode(path, H, 1)[0]
    assert (pixels[:8] == 255).all() and pixels[8:, 0].max() < 60


@pytest.mark.parametrize("most", [1023, 4095])
def test_a_declared_scale_is_kept(most: int, tmp_path: Path) -> None:
    """Half of what is declared is used: scaled by what is declared, not stretched to white."""
    values = np.rint(most / 2 * RAMP)[..., None]
    pixels = decode(written(tmp_path / "x", tiff(values, most=most)), H, 1)[0]
    centre = slice((W - H) // 2, (W + H) // 2)
    assert np.abs(pixels - 255 / most * values[:, centre, 0]).max() <= 0.5 + 1e-3


def test_hot_pixels_do_not_decide_the_range(tmp_path: Path) -> None:
    values = np.rint(500 + 100 * RAMP)
    values[5, 20], values[6, 30] = 65535, 0
    pixels = decode(written(tmp_path / "x", png(values[..., None])), H, 1)[0]
    assert len(np.unique(pixels)) >= 0.9 * H


@pytest.mark.parametrize("value", [0, 7, 30000, 65535])
def test_one_value_throughout_is_one_grey_level_by_the_full_scale(
    value: int, tmp_path: Path
) -> None:
    path = written(tmp_path / "x", png(np.full((H, W, 1), value)))
    assert np.unique(decode(path, H, 1)).tolist() == [round(value / 257)]


def test_a_few_bright_points_on_black_are_seen(tmp_path: Path) -> None:
    values = np.zeros((H, W, 1))
    values[20, 30] = 900
    assert decode(written(tmp_path / "x", png(values)), H, 1).max() == 255


def test_the_same_file_gives_the_same_pixels_and_its_hash_is_of_the_file(tmp_path: Path) -> None:
    values = np.rint(4095 * np.stack([RAMP, RAMP[:, ::-1], 0.5 * RAMP], -1))
    path = written(tmp_path / "x", png(values))
    first, second = decode_file(path, H, 3), decode_file(path, H, 3, hashing=True)
    assert (first.pixels == second.pixels).all() and len(second.sha256) == 32


def test_eight_bits_are_left_alone_in_files_of_sixteen_too(tmp_path: Path) -> None:
    dull = np.rint(100 + 20 * RAMP).astype(np.uint8)
    Image.fromarray(dull).save(tmp_path / "x.png")
    centre = slice((W - H) // 2, (W + H) // 2)
    assert (decode(tmp_path / "x.png", H, 1)[0] == dull[:, centre]).all()
    for step in (256, 257):
        path = written(tmp_path / "y", png(dull[..., None].astype(int) * step))
        assert np.abs(decode(path, H, 1)[0].astype(int) - dull[:, centre]).max() <= 1
    colours = np.stack([dull, dull[:, ::-1], dull // 2], -1)
    path = written(tmp_path / "z", png(colours.astype(int) * 257))
    assert (decode(path, H, 3) == colours[:, centre].transpose(2, 0, 1)).all()


@pytest.mark.parametrize("full", [1.0, 255.0, 4095.0, 65535.0])
def test_scaling_by_the_closed_form(full: float) -> None:
    random = np.random.default_rng(0)
    wide = full * random.random((40, 50))
    np.testing.assert_array_equal(scaled(wide, full), np.rint(255 * wide / full))
    narrow = full * (0.4 + 0.1 * random.random((40, 50)))
    low, high = np.percentile(narrow, (0.1, 99.9))
    np.testing.assert_array_equal(
        scaled(narrow, full), np.rint(255 * np.clip((narrow - low) / (high - low), 0, 1))
    )
