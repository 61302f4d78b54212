"""Near-duplicates: made on purpose, by the hundred, in chains, and without the hashes that tell
them.
"""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from deepclust.collection import duplicates
from deepclust.collection.duplicates import near_duplicates
from deepclust.data.perceptual import perceptual_hash
from tests.data.test_perceptual import scene

DIM = 24


class Folder:
    """What a store knows of some images: features near those of what they show, hashes, sizes."""

    def __init__(self) -> None:
        self.images: list[Image.Image] = []
        self.hashes: list[bytes | None] = []
        self.features: list[np.ndarray] = []
        self.sizes: list[tuple[int, int]] = []

    def add(
        self,
        image: Image.Image,
        shows: int,
        noise: float = 0.0,
        size: int = 160,
        content: bool = True,
    ) -> int:
        """Features point in a direction that `shows` chooses; `noise` turns them away."""
        direction, away = (
            np.random.default_rng(shows),
            np.random.default_rng(len(self.images) + 1000),
        )
        feature = direction.standard_normal(DIM) + noise * away.standard_normal(DIM)
        self.images.append(image)
        self.features.append(feature.astype(np.float32))
        self.hashes.append(
            hashlib.sha256(image.tobytes() + bytes([size % 256])).digest() if content else None
        )
        self.sizes.append((size, size))
        return len(self.images) - 1

    def groups(self, known: np.ndarray | None = None, **more: float) -> np.ndarray:
        perceptual = [
            perceptual_hash(np.asarray(image).transpose(2, 0, 1)) for image in self.images
        ]
        known = np.ones(len(perceptual), dtype=bool) if known is None else known
        found = np.where(known, np.array(perceptual, dtype=np.uint64), np.uint64(0))
        sizes, features = np.array(self.sizes), np.stack(self.features)
        return near_duplicates(features, self.hashes, found, known, sizes, **more)  # pyright: ignore[reportArgumentType]


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def test_altered_copies_join_the_largest_and_others_stay_alone() -> None:
    folder = Folder()
    for seed in range(6):
        image = scene(seed)
        folder.add(jpeg(image, 40), seed, 0.1, size=80)
        folder.add(image, seed, size=160)
        folder.add(ImageEnhance.Brightness(image).enhance(0.9), seed, 0.1, size=160)
        folder.add(scene(seed + 100), seed, 0.1)  # features of the same thing, another picture
        folder.add(
            image, seed + 100, size=70
        )  # the same picture to the hash, features of another thing
    expected = np.full(30, -1)
    for seed in range(6):
        expected[[5 * seed, 5 * seed + 2]] = 5 * seed + 1
    assert folder.groups().tolist() == expected.tolist()
    assert (folder.groups(similarity=1.0)[1::5] == -1).all() and (
        folder.groups(differing=64)[3::5] >= 0
    ).all()


def test_the_same_file_is_the_same_whatever_else_is_said() -> None:
    folder = Folder()
    first, second = folder.add(scene(0), 0), folder.add(scene(0), 1)
    assert folder.groups().tolist() == [-1, first]
    folder.hashes = [b"a", b"b"]
    assert folder.groups().tolist() == [-1, -1]
    folder.sizes[second] = (200, 200)
    folder.hashes = [b"a", b"a"]
    assert folder.groups().tolist() == [second, -1]


@pytest.mark.parametrize("content", [True, False])
def test_a_hundred_copies_of_each_are_found(content: bool) -> None:
    """More than any number of neighbours would reach, and each of them a little off, as bfloat16
    leaves it.
    """
    folder = Folder()
    for _ in range(100):
        for seed in range(4):
            folder.add(scene(seed), seed, 0.002, content=content)
    found = folder.groups()
    assert (found[:4] == -1).all() and np.array_equal(found[4:], np.tile(np.arange(4), 99))


def test_chains_end_where_the_picture_is_another_one() -> None:
    """Each image is close to the next; members of a group are all close to the one that represents
    it.
    """
    folder, first, last = Folder(), scene(0), scene(1)
    for step in range(40):
        folder.add(Image.blend(first, last, step / 39), 0)
    found = folder.groups()
    hashes = [perceptual_hash(np.asarray(image).transpose(2, 0, 1)) for image in folder.images]
    steps = [(hashes[i] ^ hashes[i + 1]).bit_count() for i in range(39)]
    assert max(steps) <= 6 < 12 < (hashes[0] ^ hashes[39]).bit_count(), (
        "a chain that components would follow"
    )
    copies = np.flatnonzero(found >= 0)
    assert all((hashes[i] ^ hashes[found[i]]).bit_count() <= 12 for i in copies)
    assert 3 <= (found < 0).sum() < 20 and (found[found[copies]] == -1).all()


def test_without_perceptual_hashes_only_equal_files_and_equal_features_count() -> None:
    folder = Folder()
    for seed in (0, 0, 1, 1, 2, 2):
        folder.add(scene(seed), seed, 0.05 * (seed == 1), content=seed == 2)
    folder.add(jpeg(scene(2), 60), 2, 0.01)
    nobody = np.zeros(7, dtype=bool)
    assert folder.groups(nobody).tolist() == [-1, 0, -1, -1, -1, 4, -1]
    some = np.array([True, True, True, True, True, False, True])
    assert folder.groups(some).tolist() == [-1, 0, -1, 2, -1, 4, 4]


def test_flat_images_of_several_colours_are_told_apart_by_their_features() -> None:
    folder = Folder()
    for number in range(60):
        folder.add(Image.new("RGB", (16, 16), (4 * number, 9, 9)), number % 30, content=False)
    found = folder.groups()
    assert (found[:30] == -1).all() and np.array_equal(found[30:], np.arange(30))
    folder.features = [np.zeros(DIM, dtype=np.float32)] * 60
    assert (folder.groups() == -1).all(), "features that say nothing"


def test_order_and_size_decide_who_represents_and_nothing_else_does() -> None:
    folder = Folder()
    for seed in range(20):
        folder.add(jpeg(scene(seed // 2), 30 + seed), seed // 2, 0.05, size=100 + seed)
    found = folder.groups()
    assert np.array_equal(found[::2], np.arange(1, 20, 2)) and (found[1::2] == -1).all()


@pytest.mark.parametrize("at_once", [10, 2000, 10**6])
def test_groups_are_those_of_comparing_each_with_each(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pair after the other, in float64, on hashes and features around a few centres."""
    monkeypatch.setattr(duplicates, "AT_ONCE", at_once)
    monkeypatch.setattr(duplicates, "CHUNK", 16)
    random = np.random.default_rng(0)
    bits = random.integers(0, 2, (12, 64))[random.integers(0, 12, 200)] ^ (
        random.random((200, 64)) < 0.07
    )
    perceptual = np.packbits(bits.astype(np.uint8), axis=1).view(">u8").ravel().astype(np.uint64)
    features = random.standard_normal((2, DIM))[
        random.integers(0, 2, 200)
    ] + 0.2 * random.standard_normal((200, DIM))
    sizes = random.integers(1, 4, (200, 2))
    nobody: list[bytes | None] = [None] * 200
    monkeypatch.setattr(duplicates, "_strictness", lambda *given: 1.0)
    found = near_duplicates(
        features.astype(np.float32), nobody, perceptual, np.ones(200, dtype=bool), sizes
    )
    cosines = _cosines(features)
    differing = (bits[:, None] != bits).sum(2)
    expected = np.full(200, -1)
    for one in sorted(range(200), key=lambda place: (-sizes[place].prod(), place)):
        if expected[one] < 0:
            close = (
                (differing[one] <= 12)
                & (cosines[one] >= 0.85 + 0.0075 * differing[one])
                & (expected < 0)
            )
            represents = np.isin(np.arange(200), expected)
            expected[np.flatnonzero(close & ~represents & (np.arange(200) != one))] = one
    assert (found >= 0).sum() > 40 and np.array_equal(found, expected)


def _cosines(rows: np.ndarray) -> np.ndarray:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit @ unit.T


def test_where_unlike_pictures_have_close_features_closer_ones_are_asked_for() -> None:
    """A backbone whose features all point one way: its cosines alone would join what only looks a
    little alike.
    """
    folder = Folder()
    for seed in range(60):
        folder.add(scene(seed), seed)
    first = folder.add(jpeg(scene(0), 60), 0, 0.02)
    second = folder.add(Image.blend(scene(1), scene(200), 0.2), 200)
    assert folder.groups()[[first, second]].tolist() == [0, -1]
    folder.features = [feature + 20 for feature in folder.features]
    rows = np.stack(folder.features) / np.linalg.norm(folder.features, axis=1, keepdims=True)
    assert (rows @ rows.T).min() > 0.98
    assert folder.groups()[[first, second]].tolist() == [0, -1]


def test_nothing_and_one_image_and_what_does_not_fit() -> None:
    nothing = near_duplicates(
        np.empty((0, 3)),
        [],
        np.empty(0, dtype=np.uint64),
        np.empty(0, dtype=bool),
        np.empty((0, 2), dtype=np.int64),
    )
    assert nothing.shape == (0,) and nothing.dtype == np.int64
    folder = Folder()
    folder.add(scene(0), 0)
    assert folder.groups().tolist() == [-1]
    with pytest.raises(ValueError, match=r"differing=65 must be from 0 to 64"):
        folder.groups(differing=65)
    folder.hashes.append(None)
    with pytest.raises(ValueError, match=r"hashes is of 2 images and features of 1"):
        folder.groups()


def test_float16_features_of_any_length_count_by_direction() -> None:
    folder = Folder()
    folder.add(scene(0), 0, content=False)
    folder.add(jpeg(scene(0), 50), 0, content=False)
    folder.features[1] = folder.features[1] * 7
    folder.features = [feature.astype(np.float16) for feature in folder.features]
    assert folder.groups().tolist() == [-1, 0]
