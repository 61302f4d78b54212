"""Images and labels that come as arrays: checked, and brought to (N, C, H, W) uint8 and (N,)
values.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepclust.errors import UserError
from deepclust.runtime.npz import Unreadable, read_arrays


def load_array(file: str, key: str, names: tuple[str, ...], mapped: bool = False) -> np.ndarray:
    """The array of a .npy file, or of a .npz file under one of `names` (or its only one). Pickled
    objects are refused.

    key: what the setting is called in messages. mapped: a .npy file stays on disk, read-only.
    """
    path = Path(os.path.expanduser(file))
    if not path.is_file():
        raise UserError(f"{key}={file}: there is no such file.")
    there: list[str] = []

    def choose(found: list[str]) -> list[str]:
        there.extend(found)
        known = [name for name in names if name in found]
        return known[:1] or (found if len(found) == 1 else [])

    try:
        content = read_arrays(path, choose, mapped)
    except Unreadable as error:
        raise UserError(f"{key}={file}: {error}.") from error
    if not content:
        raise UserError(
            f"{key}={file}: holds {', '.join(there)}; expected an array called"
            f" {' or '.join(names)}."
        )
    (array,) = content.values()
    return array


LAYOUTS = (
    "(N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3; one image may be (H, W, 3) or (H,"
    " W, 1)"
)


def as_images(images: np.ndarray | Tensor, least: int = 2, channels: int | None = None) -> Tensor:
    """(N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3 and N >= least, to (N, C, H, W)
    uint8.

    (H, W, 3) and (H, W, 1) are one image: grey images that are 3 or 1 pixels wide have to be given
    as (N, H, W, 1). (3, H, W) are three grey images; where `channels`, of what they are for, is 3
    it could as well be one image, and is refused. So are (H, W), which could be rows of features,
    and (H, W, 4), with an alpha channel. Integers must lie in 0..255; floats in [0, 1] and booleans
    are multiplied by 255 and rounded. Raises UserError for other shapes, types and ranges, and for
    what is not finite.
    """
    values = _with_four_axes(_as_numpy(images), channels)
    shape = values.shape
    if shape[1] not in (1, 3):
        values = values.transpose(0, 3, 1, 2)
    if 0 in shape[1:] or len(values) < least:
        given = "" if images.ndim == 4 else f", taken as {shape}"
        raise UserError(
            f"images: shape {tuple(images.shape)}{given}; at least {least} image(s) of at least one"
            " pixel are needed."
        )
    return torch.from_numpy(np.array(_eight_bit(values), order="C"))


def _with_four_axes(values: np.ndarray, channels: int | None) -> np.ndarray:
    """(N, H, W, C) or (N, C, H, W), where it is clear which of the axes are there. Raises
    UserError.
    """
    shape = values.shape
    text = "images: shape " + str(tuple(shape))
    if values.ndim == 2:
        raise UserError(
            f"{text}: one grey image is images[None], and rows of pixels are images.reshape(N, H,"
            f" W). Expected {LAYOUTS}."
        )
    if values.ndim == 3 and shape[2] == 4 and shape[1] != 4:
        raise UserError(
            f"{text}: one image with an alpha channel is images[..., :3]; grey images 4 pixels wide"
            f" are images[..., None]. Expected {LAYOUTS}."
        )
    if values.ndim == 3 and shape[2] == 3 == shape[1]:
        raise UserError(
            f"{text}: one colour image is images[None], grey images are images[..., None]."
        )
    if values.ndim == 3 and shape[0] == 3 and channels == 3 and shape[2] != 3:
        raise UserError(
            f"{text}: one colour image is images[None], and three grey images are images[:, None];"
            " which of them it is cannot be told."
        )
    if values.ndim == 3:
        return values[None] if shape[2] in (1, 3) and shape[1] > 1 else values[:, None]
    if values.ndim != 4 or (shape[1] not in (1, 3) and shape[3] not in (1, 3)):
        alpha = (
            " An alpha channel is left out by images[..., :3]."
            if values.ndim == 4 and shape[3] == 4
            else ""
        )
        raise UserError(f"{text}; expected {LAYOUTS}.{alpha}")
    return values


def _as_numpy(images: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(images, Tensor):
        images = images.detach().cpu()
        images = (images.float() if images.is_floating_point() else images).numpy()
    if images.dtype.kind not in "biuf":
        raise UserError(f"images: of type {images.dtype}; expected uint8, or floats in [0, 1].")
    return images


def _eight_bit(values: np.ndarray) -> np.ndarray:
    """(N, ...) numbers to uint8, by the rule of `as_images`."""
    if values.dtype == np.uint8:
        return values
    is_integer = values.dtype.kind in "iu"
    low, high = values.min(axis=(1, 2, 3)), values.max(axis=(1, 2, 3))
    bad = ~np.isfinite(low + high)
    if bad.any():
        raise UserError(f"images: NaN or infinite pixels in {bad.sum()} rows, first {_first(bad)}.")
    bad = (low < 0) | (high > (255 if is_integer else 1))
    if bad.any():
        rule = "integers must lie in 0..255" if is_integer else "floats must lie in [0, 1]"
        raise UserError(
            f"images: values from {low.min()} to {high.max()}; {rule}. Rows outside: {bad.sum()},"
            f" first {_first(bad)}."
        )
    return values.astype(np.uint8) if is_integer else np.rint(values * 255.0).astype(np.uint8)


def _first(bad: np.ndarray) -> str:
    return ", ".join(str(row) for row in np.flatnonzero(bad)[:5])


def as_labels(labels: Sequence[Any] | np.ndarray | Tensor, num_images: int) -> list[Any]:
    """One whole number or string per image, as a list."""
    values = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    if values.shape != (num_images,):
        raise UserError(
            f"labels: shape {values.shape}; expected ({num_images},), one label per image."
        )
    if values.dtype.kind == "f":
        bad = np.flatnonzero(values != np.rint(values))
        if len(bad):
            raise UserError(f"labels: {values[bad[0]]} in row {bad[0]} is no whole number.")
        values = values.astype(np.int64)
    if values.dtype.kind not in "iubU":
        raise UserError(f"labels: of type {values.dtype}; expected whole numbers or strings.")
    return values.tolist()
