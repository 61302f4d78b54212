"""From an image file to pixels: uint8 (C, size, size), or a refusal with the reason in words.

Conventions: transparent parts lie on white, or on grey where white would hide what is visible
(`data/transparency.py`); more than 8 bits become 8 by the file's full scale, or by the range that
it uses where that is narrow (`data/depth.py`); EXIF rotation is applied; animations give their
first frame; colour profiles are not applied. HEIC is read where pillow-heif is there, AVIF by a
Pillow that can.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from torch import Tensor

from deepclust.data.depth import colours_of, grey_of, is_deep_colour, is_deep_grey
from deepclust.data.transparency import has_alpha, opaque
from deepclust.errors import UserError

EXTENSIONS = (
    ".avif",
    ".bmp",
    ".gif",
    ".heic",
    ".heif",
    ".jfif",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pgm",
    ".png",
    ".pnm",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
# Named, because Pillow would hand a PostScript file called x.jpg to an outside program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
HEIF_BRANDS = (
    b"heic",
    b"heix",
    b"heim",
    b"heis",
    b"hevc",
    b"hevx",
    b"hevm",
    b"hevs",
    b"mif1",
    b"msf1",
)
AVIF_BRANDS = (b"avif", b"avis")
"""Major brands of ISO/IEC 23008-12 files, which begin with a box `ftyp`; `mif1` and `msf1` may hold
either.
"""
INSTALL_HEIF = "a HEIC image: pip install 'deepclust[heic]' lets it be read"
INSTALL_AVIF = "an AVIF image: Pillow 11.3 or later reads it (pip install -U pillow)"
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what brings the image upright."""
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""
EXIF_ORIENTATION = 0x0112
POOL_BATCH = 1024
LARGE = 40_000_000
"""Pixels beyond which images are decoded one at a time: eight threads with such images would take
gigabytes.
"""
_HEIF, _LARGE = threading.Lock(), threading.Lock()
Result = TypeVar("Result")

# Pillow warns about large images and odd metadata on stderr, once per worker; what matters comes
# back as a reason.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnreadableImage(UserError):
    """A file that is no usable image; `reason` says why, in words."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Decoded(NamedTuple):
    """pixels: uint8 (channels, size, size). size: (width, height) of the upright image as it is in
    the file.

    sha256: of the file's bytes, empty where it was not asked for.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    sha256: bytes


def decode(path: str | Path, size: int, channels: int) -> np.ndarray:
    """An image file as uint8 (channels, size, size): shorter side resized to `size` (antialiased
    bicubic), centre crop.

    Raises:
        UnreadableImage: whatever is wrong with the file.
    """
    return decode_file(path, size, channels).pixels


def decode_file(path: str | Path, size: int, channels: int, hashing: bool = False) -> Decoded:
    """The same with what else reading the file tells; it is read once, its hash included.

    Raises:
        UnreadableImage: whatever is wrong with the file.
    """
    try:
        _check_file(path)
        data = Path(path).read_bytes() if hashing else None
        with _open(path if data is None else io.BytesIO(data)) as image:
            whole = image.size
            if (
                image.format == "JPEG"
            ):  # decodes straight to 1/2, 1/4 or 1/8; twice the target is kept
                image.draft(None, (2 * size, 2 * size))
            with _LARGE if image.width * image.height > LARGE else nullcontext():
                pixels, orientation = _pixels(
                    image, size, channels, lambda: _open(path if data is None else io.BytesIO(data))
                )
    except (
        Exception
    ) as error:  # decoders raise anything from SyntaxError to struct.error on a broken file
        raise UnreadableImage(str(path), _reason(error)) from error
    seen = whole[::-1] if orientation in SIDEWAYS else whole
    return Decoded(pixels, seen, b"" if data is None else hashlib.sha256(data).digest())


def decode_picture(image: Image.Image, size: int | None, channels: int) -> np.ndarray:
    """A Pillow image as `decode` gives an image file; uint8 (channels, H, W), uncropped, where
    `size` is None.

    Raises:
        UnreadableImage: values that fit no scale, or a file that went bad since it was opened.
    """
    try:
        return _pixels(image, size, channels, None)[0]
    except Exception as error:  # as for files: a lazily opened one is read only now
        raise UnreadableImage(
            f"a Pillow image {getattr(image, 'filename', '')}".strip(), _reason(error)
        ) from error


def _pixels(
    image: Image.Image, size: int | None, channels: int, again: Callable[[], ImageFile] | None
) -> tuple[np.ndarray, int]:
    """uint8 (channels, size, size) of an opened image, and its EXIF orientation.

    again: opens its file once more; None for an image that has none.
    """
    deep = again if is_deep_colour(image) else None
    image.load()
    orientation = _orientation(image)
    if is_deep_grey(image):
        shown = grey_of(image)
    else:
        shown = image if deep is None else colours_of(image, deep)
    shown = opaque(shown) if has_alpha(shown) else shown
    turned = _upright(shown.convert("L" if channels == 1 else "RGB"), orientation)
    array = np.array(turned if size is None else _crop(turned, size))
    return array.reshape(*array.shape[:2], channels).transpose(2, 0, 1).copy(), orientation


def _open(file: str | Path | io.BytesIO) -> ImageFile:
    """The image of a file by its content, whatever its name; HEIC and AVIF where there is something
    that reads them.

    Raises UnidentifiedImageError for other kinds, ValueError where something has to be installed.
    """
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        head = _head(file)
        if head[4:8] != b"ftyp" or head[8:12] not in HEIF_BRANDS + AVIF_BRANDS:
            raise
    readers = (*(["AVIF"] if _reads_avif() else []), *(["HEIF"] if _reads_heif() else []))
    try:
        if readers:
            return Image.open(file, formats=readers)
    except UnidentifiedImageError:
        if len(readers) == 2:
            raise
    raise ValueError(INSTALL_AVIF if head[8:12] in AVIF_BRANDS else INSTALL_HEIF)


def _head(file: str | Path | io.BytesIO) -> bytes:
    """The first bytes of a file, which tell its kind."""
    if isinstance(file, io.BytesIO):
        file.seek(0)
        return file.getvalue()[:16]
    with open(file, "rb") as opened:
        return opened.read(16)


@cache
def _reads_avif() -> bool:
    from PIL import features

    return bool(features.check("avif"))


def _reads_heif() -> bool:
    """Whether pillow-heif is there; it is made known to Pillow once, when the first such file
    comes.
    """
    with _HEIF:
        return _register_heif()


@cache
def _register_heif() -> bool:
    try:
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    register_heif_opener()
    return True


def readable_now(reason: str) -> bool:
    """Whether what an image was refused for has been installed since."""
    return (reason == INSTALL_HEIF and _reads_heif()) or (reason == INSTALL_AVIF and _reads_avif())


def _check_file(path: str | Path) -> None:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # a pipe would block for ever
        raise ValueError(
            "a folder, not a file" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        )
    if status.st_size == 0:
        raise ValueError("empty file (0 bytes)")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # broken metadata says nothing about the pixels
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = UPRIGHT.get(orientation)
    return image if turn is None else image.transpose(turn)


def _crop(image: Image.Image, size: int) -> Image.Image:
    """The centred square, resized: the same as resizing the shorter side and cropping, without the
    pixels cut away.
    """
    short = min(image.size)
    left, top = (image.width - short) / 2, (image.height - short) / 2
    return image.resize(
        (size, size), Image.Resampling.BICUBIC, box=(left, top, left + short, top + short)
    )


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file (or a link that leads nowhere)"
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "a link that leads to itself"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a kind that can be read"
    if isinstance(error, Image.DecompressionBombError):
        return (
            f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels: may be a"
            " decompression bomb"
        )
    return " ".join(str(error).split()) or type(error).__name__


def decode_all(
    files: Sequence[str], size: int, channels: int, in_memory: bool
) -> tuple[Tensor | None, list[str | None]]:
    """Decodes every file in a pool of threads (Pillow releases the interpreter lock while it
    decodes).

    Returns:
        images (N, C, size, size) uint8 if `in_memory`, else None; and for each file None or why it
        cannot be read.
    """
    images = torch.zeros(len(files), channels, size, size, dtype=torch.uint8) if in_memory else None

    def read(row: int) -> str | None:
        try:
            pixels = decode(files[row], size, channels)
        except UnreadableImage as error:
            return error.reason
        if images is not None:
            images[row] = torch.from_numpy(pixels)
        return None

    return images, in_threads(read, len(files))


def all_grey(files: Sequence[str], num_samples: int = 256) -> bool:
    """Whether all readable ones of up to `num_samples` evenly spaced files are grey (three equal
    channels are, too).
    """
    rows = np.unique(np.linspace(0, len(files) - 1, num_samples).astype(int))

    def grey(sample: int) -> bool | None:
        try:
            pixels = decode(files[int(rows[sample])], 32, 3)
        except UnreadableImage:
            return None
        return bool((pixels[0] == pixels[1]).all() and (pixels[1] == pixels[2]).all())

    found = [answer for answer in in_threads(grey, len(rows)) if answer is not None]
    return bool(found) and all(found)


def num_decoders() -> int:
    """Threads to decode with: one for each core that this process may use, eight at most."""
    return min(
        8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )


def in_threads(work: Callable[[int], Result], count: int) -> list[Result]:
    """`work(row)` for every row, in order, a batch at a time so that Ctrl-C does not wait for all
    of them.
    """
    results: list[Result] = []
    with ThreadPoolExecutor(num_decoders()) as pool:
        for start in range(0, count, POOL_BATCH):
            results += pool.map(work, range(start, min(start + POOL_BATCH, count)))
    return results
