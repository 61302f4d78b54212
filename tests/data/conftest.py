"""Small image folders made for a test."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def colours(seed: int, height: int = 12, width: int = 12) -> np.ndarray:
    """(height, width, 3) uint8 of random colours."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[[Iterable[str]], Path]:
    """Writes a different small PNG under each of the given relative paths of one folder."""

    def make(paths: Iterable[str]) -> Path:
        root = tmp_path / "photos"
        for seed, path in enumerate(paths):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(colours(seed)).save(root / path, format="PNG")
        return root

    return make
