"""The perceptual hash, held against another package's and against what it promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from deepclust.data.images import decode
from deepclust.data.perceptual import hash_bits, perceptual_hash


def scene(seed: int, side: int = 160) -> Image.Image:
    """Smooth random colours: what a photo is at low frequencies."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    return small.resize((side, side), Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


def distance(first: int, second: int) -> int:
    return (first ^ second).bit_count()


def test_each_bit_is_a_cosine_transform_against_its_median() -> None:
    from scipy.fft import dctn

    image = pixels(scene(0, 96))
    grey = np.einsum("c,chw->hw", [0.299, 0.587, 0.114], image.astype(np.float64))
    low = dctn(grey, norm="ortho")[:8, :8].ravel()
    expected = low > np.median(low[1:])
    found = np.array([bit == "1" for bit in f"{perceptual_hash(image):064b}"])
    sure = np.abs(low - np.median(low[1:])) > 10
    assert sure.sum() > 50 and (found == expected)[sure].all()
    assert np.array_equal(hash_bits(np.array([perceptual_hash(image)], dtype=np.uint64))[0], found)


def test_distances_behave_like_those_of_imagehash(tmp_path: Path) -> None:
    imagehash = pytest.importorskip("imagehash")
    images = [scene(seed) for seed in range(12)]
    altered = []
    for image in images:
        image.save(tmp_path / "x.jpg", quality=40)
        with Image.open(tmp_path / "x.jpg") as copy:
            altered += [
                copy.convert("RGB"),
                ImageEnhance.Brightness(image).enhance(0.8),
                image.resize((90, 90)),
            ]
        altered += [
            image.filter(ImageFilter.GaussianBlur(2)),
            image.crop((4, 4, 156, 156)),
            image.crop((20, 0, 160, 140)),
        ]
    every = images + altered
    ours = [perceptual_hash(pixels(image)) for image in every]
    theirs = [imagehash.phash(image) for image in every]
    pairs = [(i, j) for i in range(len(every)) for j in range(i)]
    mine = np.array([distance(ours[i], ours[j]) for i, j in pairs])
    other = np.array([theirs[i] - theirs[j] for i, j in pairs])
    assert np.corrcoef(mine, other)[0, 1] > 0.9
    assert np.abs(mine - other)[other <= 4].max() <= 6 and mine[other >= 20].min() > 10


@pytest.mark.parametrize("side", [8, 32, 64, 224, 300])
def test_the_side_hardly_matters(side: int) -> None:
    for seed in range(5):
        image = scene(seed, 640)
        whole, small = (
            perceptual_hash(pixels(image.resize((s, s), Image.Resampling.BICUBIC)))
            for s in (160, side)
        )
        assert distance(whole, small) <= (12 if side == 8 else 4)


def test_grey_is_the_same_as_its_three_channels_and_brightness_changes_little() -> None:
    image = scene(1).convert("L")
    grey = np.asarray(image)
    assert distance(perceptual_hash(grey[None]), perceptual_hash(np.stack([grey] * 3))) <= 1
    assert distance(perceptual_hash(grey[None]), perceptual_hash((grey // 2 + 20)[None])) <= 2


@pytest.mark.parametrize("side", [1, 2, 5, 8, 160])
def test_flat_and_tiny_images_have_a_hash_without_noise(side: int) -> None:
    flat = {
        perceptual_hash(np.full((3, side, side), value, dtype=np.uint8)) for value in (3, 77, 255)
    }
    assert flat == {1 << 63}
    assert perceptual_hash(np.zeros((3, side, side), dtype=np.uint8)) == 0
    random = np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8)
    assert perceptual_hash(random) == perceptual_hash(random.copy()) < 1 << 64


def test_sixteen_bit_grey_and_transparent_files_of_one_picture_hash_alike(tmp_path: Path) -> None:
    grey = np.asarray(scene(2).convert("L"))
    opaque = Image.fromarray(np.dstack([grey, grey, grey, np.full_like(grey, 255)]))
    files = {
        "deep.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "grey.png": Image.fromarray(grey),
    }
    for name, image in {
        **files,
        "alpha.png": opaque,
        "bilevel.png": Image.fromarray(grey > 127),
    }.items():
        image.save(tmp_path / name)
    found = {path.name: perceptual_hash(decode(path, 64, 3)) for path in tmp_path.iterdir()}
    assert found["deep.png"] == found["grey.png"] == found["alpha.png"]
    assert 0 < distance(found["bilevel.png"], found["grey.png"]) < 24
