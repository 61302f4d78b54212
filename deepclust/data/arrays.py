"""Images and labels that come as arrays: checked, and brought to (N, C, H, W) uint8 and (N,) values."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepclust.errors import UserError
from deepclust.npz import Unreadable, read_arrays


def load_array(file: str, key: str, names: tuple[str, ...], mapped: bool = False) -> np.ndarray:
    """The array of a .npy file, or of a .npz file under one of `names` (or its only one). Pickled objects are refused.

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
        raise UserError(f"{key}={file}: holds {', '.join(there)}; expected an array called {' or '.join(names)}.")
    (array,) = content.values()
    return array


def as_images(images: np.ndarray | Tensor, least: int = 2) -> Tensor:
    """(N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3 and N >= least, to (N, C, H, W) uint8.

    Integers must lie in 0..255; floats in [0, 1] and booleans are multiplied by 255 and rounded.
    """
    values = _as_numpy(images)
    shape = values.shape
    if values.ndim == 3:
        values = values[:, None]
    elif values.ndim != 4 or (shape[1] not in (1, 3) and shape[3] not in (1, 3)):
        raise UserError(f"images: shape {shape}; expected (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3.")
    elif shape[1] not in (1, 3):
        values = values.transpose(0, 3, 1, 2)
    if 0 in shape[1:] or len(values) < least:
        raise UserError(f"images: shape {shape}; at least {least} image(s) of at least one pixel are needed.")
    return torch.from_numpy(np.array(_eight_bit(values), order="C"))


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
            f"images: values from {low.min()} to {high.max()}; {rule}. Rows outside: {bad.sum()}, first {_first(bad)}."
        )
    return values.astype(np.uint8) if is_integer else np.rint(values * 255.0).astype(np.uint8)


def _first(bad: np.ndarray) -> str:
    return ", ".join(str(row) for row in np.flatnonzero(bad)[:5])


def as_labels(labels: Sequence[Any] | np.ndarray | Tensor, num_images: int) -> list[Any]:
    """One whole number or string per image, as a list."""
    values = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    if values.shape != (num_images,):
        raise UserError(f"labels: shape {values.shape}; expected ({num_images},), one label per image.")
    if values.dtype.kind == "f":
        bad = np.flatnonzero(values != np.rint(values))
        if len(bad):
            raise UserError(f"labels: {values[bad[0]]} in row {bad[0]} is no whole number.")
        values = values.astype(np.int64)
    if values.dtype.kind not in "iubU":
        raise UserError(f"labels: of type {values.dtype}; expected whole numbers or strings.")
    return values.tolist()
