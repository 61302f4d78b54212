"""Decoding, held against Pillow, torchvision and hand-made files."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from deepclust.data import images as module
from deepclust.data.images import (
    UnreadableImage,
    all_grey,
    decode,
    decode_all,
    in_threads,
    readable_now,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([RAMP, RAMP.T, 255 - RAMP], -1)
ALPHA = np.where(np.arange(16)[:, None] < 8, 255, 0).astype(np.uint8) * np.ones((1, 16), np.uint8)
ON_WHITE = np.where(ALPHA[..., None] > 0, COLOURS, 255).transpose(2, 0, 1)


def rgb(path: Path, size: int = 16) -> np.ndarray:
    return decode(path, size, 3).astype(int)


def as_rgb(grey: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.asarray(grey, dtype=int), (3, *grey.shape))


MODES: dict[str, tuple[str, Image.Image, np.ndarray, int]] = {
    # name: (extension, image, expected (3, 16, 16), allowed difference)
    "1": ("png", Image.fromarray(RAMP > 127), as_rgb(np.where(RAMP > 127, 255, 0)), 0),
    "L": ("png", Image.fromarray(RAMP), as_rgb(RAMP), 0),
    "LA": (
        "png",
        Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(ALPHA)]),
        as_rgb(np.where(ALPHA, RAMP, 255)),
        0,
    ),
    "P": ("png", Image.fromarray(RAMP).convert("P"), as_rgb(RAMP), 0),
    "PA": (
        "tif",
        Image.fromarray(np.dstack([COLOURS, ALPHA])).quantize(256).convert("PA"),
        ON_WHITE,
        12,
    ),
    "RGB": ("png", Image.fromarray(COLOURS), COLOURS.transpose(2, 0, 1), 0),
    "RGBA": ("png", Image.fromarray(np.dstack([COLOURS, ALPHA])), ON_WHITE, 0),
    "RGBX": ("tif", Image.fromarray(COLOURS).convert("RGBX"), COLOURS.transpose(2, 0, 1), 0),
    "CMYK": ("tif", Image.fromarray(COLOURS).convert("CMYK"), COLOURS.transpose(2, 0, 1), 0),
    "YCbCr": ("tif", Image.fromarray(COLOURS).convert("YCbCr"), COLOURS.transpose(2, 0, 1), 4),
    "I;16": ("png", Image.fromarray(RAMP.astype(np.uint16) * 257), as_rgb(RAMP), 0),
    "I;16 tif": ("tif", Image.fromarray(RAMP.astype(np.uint16) * 257), as_rgb(RAMP), 0),
    "I small": ("tif", Image.fromarray(RAMP.astype(np.int32)), as_rgb(RAMP), 0),
    "I large": ("tif", Image.fromarray(RAMP.astype(np.int32) * 257), as_rgb(RAMP), 0),
    "F unit": ("tif", Image.fromarray(RAMP.astype(np.float32) / 255), as_rgb(RAMP), 0),
    "F bytes": ("tif", Image.fromarray(RAMP.astype(np.float32)), as_rgb(RAMP), 0),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_an_image_comes_out_right(mode: str, tmp_path: Path) -> None:
    extension, image, expected, allowed = MODES[mode]
    path = tmp_path / f"x.{extension}"
    image.save(path)
    assert np.abs(rgb(path) - expected).max() <= allowed
    grey = decode(path, 16, 1)
    by_pillow = np.asarray(
        Image.fromarray(rgb(path).astype(np.uint8).transpose(1, 2, 0)).convert("L")
    )
    assert grey.shape == (1, 16, 16) and np.abs(grey[0].astype(int) - by_pillow).max() <= 1


@pytest.mark.parametrize("kind", ["index", "bytes", "colour"])
def test_transparent_colours_of_a_png_lie_on_white(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    if kind == "colour":
        Image.fromarray(COLOURS).save(path, transparency=tuple(COLOURS[3, 3].tolist()))
        hidden = np.equal(COLOURS, COLOURS[3, 3]).all(-1)
    else:
        opacity = bytes(0 if value == 7 else 255 for value in range(256))
        Image.fromarray(RAMP).convert("P").save(
            path, transparency=7 if kind == "index" else opacity
        )
        hidden = RAMP == 7
    pixels = rgb(path)
    assert hidden.sum() == 1 and (pixels[:, hidden] == 255).all()
    shown = COLOURS.transpose(2, 0, 1) if kind == "colour" else as_rgb(RAMP)
    assert (pixels[:, ~hidden] == shown[:, ~hidden]).all()


def test_half_transparent_pixels_mix_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 100, 200, 51)).save(tmp_path / "x.png")
    assert np.abs(rgb(tmp_path / "x.png", 4)[:, 0, 0] - [204, 224, 244]).max() <= 1


def test_a_sixteen_bit_gradient_is_not_saturated(tmp_path: Path) -> None:
    gradient = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(gradient).save(tmp_path / "x.png")
    pixels = decode(tmp_path / "x.png", 64, 1)[0]
    assert np.abs(pixels - gradient / 257).max() <= 0.5
    assert len(np.unique(pixels)) == 256


def test_sixteen_bit_colour_png_keeps_its_range(tmp_path: Path) -> None:
    """Pillow cannot write these, so the file is put together by hand (PNG specification, colour
    type 2, depth 16).
    """
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in COLOURS)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    content = b"".join(
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks
    )
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert (rgb(tmp_path / "x.png") == COLOURS.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("extension", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_as_pillow_does(
    orientation: int, extension: str, tmp_path: Path
) -> None:
    path = tmp_path / f"x.{extension}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOURS).save(path, exif=exif)
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
    expected = np.asarray(upright.convert("RGB")).transpose(2, 0, 1)
    assert (rgb(path) == expected).all()
    if extension == "png":
        assert (orientation == 1) == (expected == COLOURS.transpose(2, 0, 1)).all()


def test_exif_orientation_six_is_a_camera_held_upright(tmp_path: Path) -> None:
    """EXIF 2.32, tag 0x0112 = 6: the stored first row is the picture's right side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.new("L", (8, 8), 0)
    stored.paste(255, (0, 0, 8, 4))
    stored.save(tmp_path / "x.png", exif=exif)
    pixels = rgb(tmp_path / "x.png", 8)
    assert (pixels[:, :, 4:] == 255).all() and (pixels[:, :, :4] == 0).all()


def test_broken_exif_does_not_lose_the_image(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "x.png", exif=b"Exif\0\0not exif at all")
    assert (rgb(tmp_path / "x.png") == COLOURS.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("shape", [(40, 40), (60, 40), (32, 100), (16, 16), (10, 20)])
def test_resizing_is_torchvisions_resize_and_centre_crop(
    shape: tuple[int, int], tmp_path: Path
) -> None:
    grid = np.mgrid[: shape[0], : shape[1]]
    smooth = np.stack(
        [128 + 100 * np.sin(grid[0] / 9), 128 + 100 * np.cos(grid[1] / 7), grid.sum(0) % 250], -1
    )
    smooth[..., 2] = 128 + 60 * np.sin(grid.sum(0) / 11)
    pixels = torch.from_numpy(smooth.astype(np.uint8)).permute(2, 0, 1)
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "x.png")
    expected = functional.resize(pixels, [16], InterpolationMode.BICUBIC, antialias=True)
    expected = functional.center_crop(expected, [16, 16]).int()
    difference = (torch.from_numpy(rgb(tmp_path / "x.png")) - expected).abs().float()
    assert difference[:, 2:-2, 2:-2].max() <= 1
    assert difference.max() <= 1 or shape[0] != shape[1], (
        "only at the crop's edge may pixels beyond it play a part"
    )


def test_large_jpegs_decode_at_reduced_scale_to_the_same_picture(tmp_path: Path) -> None:
    grid = np.mgrid[:512, :512]
    smooth = (128 + 100 * np.sin(grid[0] / 40) * np.cos(grid[1] / 30)).astype(np.uint8)
    image = Image.fromarray(np.stack([smooth, smooth.T, 255 - smooth], -1))
    image.save(tmp_path / "x.jpg", quality=95)
    image.save(tmp_path / "x.png")
    assert np.abs(rgb(tmp_path / "x.jpg", 32) - rgb(tmp_path / "x.png", 32)).mean() < 2


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:], duration=50)
    assert (rgb(tmp_path / "x.gif", 8)[:, 0, 0] == [255, 0, 0]).all()


def broken(kind: str, folder: Path) -> Path:
    path = folder / "x.jpg"
    Image.fromarray(np.tile(COLOURS, (8, 8, 1))).save(path, quality=95)
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is a letter, not a picture")
    elif kind == "postscript":
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    elif kind == "dangling":
        path.unlink()
        path.symlink_to(folder / "gone.jpg")
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif kind == "bomb":
        content = (folder / "x.png", Image.new("1", (8, 8)).save(folder / "x.png"))[0].read_bytes()
        header = struct.pack(">IIBBBBB", 60000, 60000, 1, 0, 0, 0, 0)
        header = (
            struct.pack(">I", 13)
            + b"IHDR"
            + header
            + struct.pack(">I", zlib.crc32(b"IHDR" + header))
        )
        path.write_bytes(content[:8] + header + content[8 + len(header) :])
    elif kind == "nan":
        path = folder / "x.tif"
        Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(path)
    elif kind == "range":
        path = folder / "x.tif"
        Image.fromarray(np.full((4, 4), -3, np.int32)).save(path)
    return path


REASONS = {
    "truncated": "truncated",
    "empty": "empty file",
    "text": "not an image",
    "postscript": "not an image",
    "dangling": "no such file",
    "folder": "a folder",
    "pipe": "not a regular file",
    "bomb": "decompression bomb",
    "nan": "NaN",
    "range": "-3",
}


@pytest.mark.parametrize("kind", REASONS)
def test_broken_files_are_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    path = broken(kind, tmp_path)
    with pytest.raises(UnreadableImage) as caught:
        decode(path, 16, 3)
    assert REASONS[kind] in caught.value.reason and "\n" not in caught.value.reason
    assert str(path) in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason, (
        "loader workers send it on"
    )


@pytest.mark.parametrize("extension", ["jpg", "png", "gif", "bmp", "tif", "webp", "ppm"])
def test_no_damage_to_a_file_raises_anything_else(extension: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{extension}"
    Image.fromarray(COLOURS).save(path)
    content = path.read_bytes()
    random = np.random.default_rng(0)
    for trial in range(60):
        damaged = bytearray(content[: random.integers(1, len(content) + 1)])
        for position in random.integers(0, len(damaged), trial % 5):
            damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        try:
            assert decode(path, 8, 3).shape == (3, 8, 8)
        except UnreadableImage as error:
            assert error.reason


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder that everybody may enter, and no root rights while the test runs."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        is_root = os.geteuid() == 0
        yield Path(folder)
        if is_root:
            os.seteuid(0)


def test_a_file_without_permission_is_named(unprivileged: Path) -> None:
    path = unprivileged / "x.png"
    Image.fromarray(COLOURS).save(path)
    path.chmod(0)
    if os.geteuid() == 0:
        os.seteuid(65534)
    with pytest.raises(UnreadableImage, match="no permission"):
        decode(path, 16, 3)


def test_a_link_to_itself_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").symlink_to("x.png")
    with pytest.raises(UnreadableImage, match="a link that leads to itself"):
        rgb(tmp_path / "x.png")


def test_the_pool_keeps_order_and_says_what_failed(tmp_path: Path) -> None:
    files = []
    for value in range(20):
        files.append(str(tmp_path / f"{value}.png"))
        Image.new("L", (5, 5), value).save(files[-1])
    (tmp_path / "7.png").write_bytes(b"")
    images, reasons = decode_all(files, 4, 1, in_memory=True)
    assert images is not None and images.dtype == torch.uint8
    assert [row for row, reason in enumerate(reasons) if reason] == [7]
    assert images[:, 0, 2, 2].tolist() == [0 if value == 7 else value for value in range(20)]
    assert decode_all(files, 4, 1, in_memory=False) == (None, reasons)


def test_grey_throughout_is_noticed(tmp_path: Path) -> None:
    files = [str(tmp_path / f"{name}.png") for name in ("a", "b", "c")]
    for file in files:
        Image.fromarray(RAMP).convert("RGB").save(file)
    Path(files[1]).write_bytes(b"")
    assert all_grey(files)
    Image.fromarray(COLOURS).save(files[2])
    assert not all_grey(files)
    assert not all_grey(files[1:2]), "nothing readable says nothing"


def heif(path: Path, **options: bytes) -> np.ndarray:
    """Writes a HEIC file of 24 x 16 large pixels; gives them as (16, 24, 3)."""
    pillow_heif = pytest.importorskip("pillow_heif")
    pixels = (
        np.random.default_rng(0)
        .integers(0, 256, (2, 3, 3), dtype=np.uint8)
        .repeat(8, 0)
        .repeat(8, 1)
    )
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(path, quality=-1, **options)
    return pixels


@pytest.mark.parametrize("name", ["x.HEIC", "x.heif", "a phone's.jpg"])
def test_heic_is_known_by_its_content_and_opened_in_every_thread(name: str, tmp_path: Path) -> None:
    expected = heif(tmp_path / name)[:, 4:20]
    module._register_heif.cache_clear()
    for pixels in in_threads(lambda _: rgb(tmp_path / name), 8):
        assert np.abs(pixels - expected.transpose(2, 0, 1)).mean() < 3
    decoded = module.decode_file(tmp_path / name, 16, 3, hashing=True)
    assert decoded.size == (24, 16) and np.array_equal(decoded.pixels, rgb(tmp_path / name))


def test_heic_is_turned_once(tmp_path: Path) -> None:
    """By a box of the file (ISO/IEC 23008-12, `irot`), which the decoder obeys; EXIF says it again."""
    exif = Image.Exif()
    exif[module.EXIF_ORIENTATION] = 6
    upright = np.rot90(heif(tmp_path / "x.heic", exif=exif.tobytes()), -1)
    assert module.decode_file(tmp_path / "x.heic", 16, 3).size == (16, 24)
    assert np.abs(rgb(tmp_path / "x.heic") - upright[4:20].transpose(2, 0, 1)).mean() < 3


def test_avif_is_read_where_pillow_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not module._reads_avif():
        pytest.skip("this Pillow reads no AVIF")
    Image.fromarray(COLOURS).save(tmp_path / "x.avif", quality=100)
    assert np.abs(rgb(tmp_path / "x.avif") - COLOURS.transpose(2, 0, 1)).mean() < 6
    for turn in (3, 6, 8):
        exif = Image.Exif()
        exif[module.EXIF_ORIENTATION] = turn
        Image.fromarray(COLOURS).save(tmp_path / "turned.avif", quality=100, exif=exif)
        by_pillow = np.asarray(
            ImageOps.exif_transpose(Image.open(tmp_path / "turned.avif"))
        ).transpose(2, 0, 1)
        assert np.abs(rgb(tmp_path / "turned.avif") - by_pillow).max() <= 1


@pytest.mark.parametrize(
    ("brand", "advice"), [(b"heic", module.INSTALL_HEIF), (b"avif", module.INSTALL_AVIF)]
)
def test_without_a_reader_the_advice_is_the_reason(
    brand: bytes, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.jpg").write_bytes(b"\0\0\0\x1cftyp" + brand + bytes(100))
    monkeypatch.setattr(module, "_reads_heif", lambda: False)
    monkeypatch.setattr(module, "_reads_avif", lambda: False)
    with pytest.raises(UnreadableImage) as caught:
        rgb(tmp_path / "x.jpg")
    assert caught.value.reason == advice and not readable_now(advice)
    monkeypatch.setattr(module, f"_reads_{'heif' if brand == b'heic' else 'avif'}", lambda: True)
    assert readable_now(advice) and not readable_now("truncated")
    monkeypatch.undo()
    with pytest.raises(UnreadableImage):
        rgb(tmp_path / "x.jpg")  # no more than a beginning


def test_nothing_is_imported_for_heic_before_such_a_file_comes(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "x.png")
    (tmp_path / "x.jpg").write_bytes(b"no image, but long enough to be one")
    code = f"""
import sys
from deepclust.data.images import decode_all
decode_all([{str(tmp_path / "x.png")!r}, {str(tmp_path / "x.jpg")!r}], 8, 3, True)
assert "pillow_heif" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
