"""Files of arrays (.npy, .npz), read so that whatever is wrong with one comes as a single kind of
error.

A damaged file makes NumPy, `zipfile` and `zlib` raise errors of a dozen kinds. Pickled objects,
which could run code, are never loaded. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Unreadable(Exception):
    """An array file that cannot be used; the text says why, as what follows the file's name in a
    sentence.
    """


class Column(NamedTuple):
    """What an array must be. kinds: letters of NumPy's `dtype.kind`. shape: numbers, and letters
    for sizes that agree.

    In `("n", 2)` and `("n",)` of two arrays of one file n is the same.
    """

    kinds: str
    shape: tuple[str | int, ...]


def read_arrays(
    path: Path, choose: Callable[[list[str]], Iterable[str]], mapped: bool = False
) -> dict[str, np.ndarray]:
    """Arrays of a file by name. choose: given the names there are, says which are wanted; a .npy
    file's is "".

    mapped: the array of a .npy file stays on disk, read-only. Raises Unreadable.
    """
    try:
        content = np.load(path, "r" if mapped else None, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return dict.fromkeys(choose([""]), content)
        with content:
            return {name: content[name] for name in choose(content.files)}
    except FileNotFoundError:
        raise Unreadable("is not there") from None
    except Unreadable:
        raise
    # OSError, ValueError, KeyError, EOFError, BadZipFile, zlib's, struct's, MemoryError …
    except Exception as error:
        raise Unreadable(_why(error)) from error


def _why(error: Exception) -> str:
    if "Object arrays" in str(error):
        return "holds Python objects, which are never loaded"
    if "pickle" in str(error):  # what NumPy takes all files for that are none of its own
        return "cannot be read (it is no NumPy file; Python objects are never loaded)"
    return f"cannot be read ({' '.join(str(error).split()) or type(error).__name__})"


def read_columns(
    path: Path, wanted: Mapping[str, Column], optional: Mapping[str, Column] | None = None
) -> dict[str, np.ndarray]:
    """The wanted arrays of a .npz file, and the optional ones that are there, each as it must be.
    Raises Unreadable.
    """
    every = {**wanted, **(optional or {})}
    found = read_arrays(path, lambda names: [name for name in every if name in names])
    sizes: dict[str, int] = {}
    for name, column in every.items():
        if name not in found:
            if name in wanted:
                raise Unreadable(f"lacks {name}")
            continue
        values = found[name]
        fits = values.dtype.kind in column.kinds and len(values.shape) == len(column.shape)
        for size, place in zip(values.shape, column.shape):
            fits = fits and size == (
                place if isinstance(place, int) else sizes.setdefault(place, size)
            )
        if not fits:
            raise Unreadable(
                f"holds {name} of shape {values.shape} and type {values.dtype}, which does not fit"
            )
    return found
