"""Images as people hold them in Python: paths, pictures or arrays, in whatever they are
gathered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from torch import Tensor

from deepclust.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

Given: TypeAlias = "list[str] | list[Image.Image] | np.ndarray | Tensor"
KINDS = "paths, Pillow images, or arrays of one shape"


def gathered(images: Any) -> Given:
    """A list of paths, a list of Pillow images, or one array: whichever it is that was given.

    images: an array or tensor; one Pillow image; a path, or paths, images or arrays of one shape in
    a list, a tuple, an array, a column of a table or a generator. Arrays (H, W) of a list become
    (N, 1, H, W). Raises UserError for a set, whose order means nothing, for nothing at all, and for
    a mixture.
    """
    from PIL import Image

    if isinstance(images, Tensor) or (
        isinstance(images, np.ndarray) and images.dtype.kind not in "OUS"
    ):
        return images
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, str | Path):
        return [str(images)]
    if isinstance(images, Set | Mapping):
        kind = type(images).__name__
        raise UserError(
            f"images: a {kind} has no order, so clusters could not be told whose they are; give a"
            " list."
        )
    if not isinstance(images, Iterable):
        raise UserError(f"images: {type(images).__name__}; expected {KINDS}.")
    items = list(images)
    if not items:
        raise UserError(f"images: an empty {type(images).__name__}; expected {KINDS}.")
    if all(isinstance(item, str | Path) for item in items):
        return [str(item) for item in items]
    if all(isinstance(item, Image.Image) for item in items):
        return items
    return _stacked(items)


def _stacked(items: Sequence[Any]) -> np.ndarray:
    """Arrays of one shape, or nested numbers, as one array."""
    kinds = sorted({type(item).__name__ for item in items})
    if isinstance(items[0], str | Path) or len(kinds) > 1:
        raise UserError(f"images: a mixture of {', '.join(kinds)}; expected {KINDS}.")
    parts = [item.detach().cpu().numpy() if isinstance(item, Tensor) else item for item in items]
    shapes = list(dict.fromkeys(np.shape(part) for part in parts if isinstance(part, np.ndarray)))
    if len(shapes) > 1:
        raise UserError(
            f"images: arrays of different shapes, {shapes[0]} and {shapes[1]}; resize them to one,"
            " or give paths or Pillow images, which are resized here."
        )
    try:
        stack = np.asarray(parts)
    except ValueError as error:  # ragged lists
        raise UserError(f"images: {kinds[0]}s of different lengths; expected {KINDS}.") from error
    if stack.dtype.kind in "OUS":
        raise UserError(f"images: of type {kinds[0]}; expected {KINDS}.")
    return stack[:, None] if shapes and stack.ndim == 3 else stack
