"""Views: both engines against torchvision, closed forms, distributions, and independence of the cut
into batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms.v2 import functional as TF

from deepclust.config.augment import op_targets
from deepclust.data.random import sample_keys
from deepclust.data.views.transform import ViewTransform, build_views
from deepclust.errors import UserError

CONF = Path(__file__).resolve().parents[3] / "conf" / "augment"
SETS = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "features")
IMAGE_OPS = sorted(
    name for name, target in op_targets().items() if ".views.features." not in target
)
BILINEAR = T.InterpolationMode.BILINEAR


def keys(count: int, slot: int = 0) -> Tensor:
    return sample_keys(0, 0, 0, torch.arange(count), slot)


def smooth_images(count: int, channels: int, height: int = 32, width: int = 32) -> Tensor:
    """(count, channels, height, width) uint8 without fine detail."""
    coarse = torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(1))
    fine = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return (fine.clamp(0, 1) * 255).to(torch.uint8)


def raw_view(
    description: list[dict[str, Any]], size: int | tuple[int, int] = 32, channels: int = 3
) -> ViewTransform:
    """A view whose normalisation changes nothing."""
    return ViewTransform(description, size, (0.0,) * channels, (1.0,) * channels)


def augment_of(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))


def facts(channels: int, size: int = 24) -> SimpleNamespace:
    return SimpleNamespace(
        size=(size, size), mean=(0.4, 0.5, 0.6)[:channels], std=(0.2, 0.25, 0.3)[:channels]
    )


# --- the sets that come with the program


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", SETS)
def test_every_set_makes_its_views_with_both_engines(name: str, channels: int):
    augment = augment_of(name) | {"size": 24}
    assert {"clean", "weak", "strong", "simclr"} <= set(augment["views"])
    images = smooth_images(6, channels, 40, 56)
    for name, view in build_views(augment, facts(channels), list(augment["views"])).items():
        size = view.size
        assert size == ((24, 24) if name != "local" else size) and (
            name != "local" or size != (24, 24)
        )
        batch = view.batch(images, keys(6))
        samples = torch.stack([view.sample(image, int(key)) for image, key in zip(images, keys(6))])
        for views in (batch, samples):
            assert views.shape == (6, channels, *size) and views.dtype == torch.float32
            assert torch.isfinite(views).all()


@pytest.mark.parametrize("name", SETS)
def test_clean_leaves_pixels_of_images_that_have_the_size(name: str):
    images = torch.randint(
        0, 256, (5, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    augment = {"size": None, "views": {"clean": [{"resize": {}}, {"center_crop": {}}]}}
    clean = build_views(augment, facts(3), ["clean"])["clean"]
    expected = TF.normalize(images / 255, list(facts(3).mean), list(facts(3).std))
    torch.testing.assert_close(clean.batch(images, keys(5)), expected)
    torch.testing.assert_close(clean.sample(images[0], 1), expected[0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", SETS)
def test_a_view_depends_on_its_image_and_key_only(name: str, channels: int):
    images, augment = smooth_images(20, channels, 24, 24), augment_of(name) | {"size": 24}
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    for view in build_views(augment, facts(channels), ["strong", "simclr"]).values():
        before = images.clone(), torch.get_rng_state()
        whole = view.batch(images, keys(20))
        assert torch.equal(images, before[0]) and torch.equal(torch.get_rng_state(), before[1])
        parts = torch.cat(
            [
                view.batch(images[rows], keys(20)[rows])
                for rows in (slice(0, 7), slice(7, 8), slice(8, 20))
            ]
        )
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            view.batch(images[order], keys(20)[order]), whole[order], atol=1e-5, rtol=0
        )
        sample = view.sample(images[3], int(keys(20)[3]))
        assert torch.equal(sample, view.sample(images[3], int(keys(20)[3])))
        assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("name", SETS)
def test_views_of_one_image_differ_by_slot(name: str):
    images, view = (
        smooth_images(8, 3, 24, 24),
        build_views(augment_of(name) | {"size": 24}, facts(3), ["simclr"])["simclr"],
    )
    first, second = view.batch(images, keys(8)), view.batch(images, keys(8, slot=1))
    assert ((first - second).abs().flatten(1).amax(dim=1) > 0.01).all()


# --- each operation: the two engines, given the same key, look alike

TOLERANCE = {
    "equalize": 0.03,
    "color_jitter": 0.04,
    "random_resized_crop": 0.01,
    "resize": 0.01,
    "auto_contrast": 0.01,
}


def needed(name: str) -> Mapping[str, Any]:
    if name == "random_ops":
        return {"count": 2, "ops": [{"rotate": {}}, {"posterize": {}}, {"contrast": {}}]}
    return {"size": 24} if name in ("resize", "random_resized_crop") else {}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", IMAGE_OPS)
def test_engines_agree(name: str, channels: int):
    images = smooth_images(16, channels)
    view = raw_view([{name: needed(name)}], 28 if "crop" in name else 32, channels)
    batch = view.batch(images, keys(16))
    samples = torch.stack([view.sample(image, int(key)) for image, key in zip(images, keys(16))])
    assert batch.shape == samples.shape
    assert (batch - samples).abs().mean() < TOLERANCE.get(name, 0.004)


@pytest.mark.parametrize("name", IMAGE_OPS)
def test_values_stay_in_range(name: str):
    images = torch.randint(
        0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    views = raw_view([{name: needed(name)}]).batch(images, keys(12))
    assert views.min() >= -1e-6 and views.max() <= 1 + 1e-6


CHAINS = {
    "crop, mirror": [
        {"random_resized_crop": {"scale": [0.3, 0.6]}},
        {"horizontal_flip": {"p": 1.0}},
    ],
    "mirror, crop": [
        {"horizontal_flip": {"p": 1.0}},
        {"random_resized_crop": {"scale": [0.3, 0.6]}},
    ],
    "turn, shift, shear": [
        {"rotate": {}},
        {"translate_x": {"limit": 0.2}},
        {"shear_y": {"limit": 0.2}},
    ],
    "shift, crop, posterise": [{"translate_y": {}}, {"random_resized_crop": {}}, {"posterize": {}}],
    "some of them": [
        {"horizontal_flip": {}},
        {"contrast": {"p": 0.3}},
        {"gamma": {"p": 0.6}},
        {"cutout": {"p": 0.5}},
    ],
}


@pytest.mark.parametrize("description", CHAINS.values(), ids=CHAINS.keys())
def test_engines_agree_on_chains(description: list[dict[str, Any]]):
    images, view = smooth_images(16, 3), raw_view(description)
    samples = torch.stack([view.sample(image, int(key)) for image, key in zip(images, keys(16))])
    # nearer the border, one interpolation may show what the first of several would have moved out
    # of the image
    assert (view.batch(images, keys(16)) - samples)[:, :, 10:-10, 10:-10].abs().mean() < 0.012


def test_colour_operations_of_a_group_follow_each_other():
    images = smooth_images(6, 3)
    fixed = [{"brightness": {"factor": [0.6, 0.6]}}, {"contrast": {"factor": [0.5, 0.5]}}]
    theirs = TF.adjust_contrast(TF.adjust_brightness(images / 255, 0.6), 0.5)
    torch.testing.assert_close(raw_view(fixed).batch(images, keys(6)), theirs, atol=2e-4, rtol=0)
    turned_grey = [
        {"grayscale": {"p": 1.0}},
        {"color_jitter": {"brightness": 0, "contrast": 0, "hue": 0.5, "p": 1.0}},
    ]
    theirs = TF.rgb_to_grayscale(images / 255, num_output_channels=3)
    torch.testing.assert_close(
        raw_view(turned_grey).batch(images, keys(6)), theirs, atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("name", ["horizontal_flip", "contrast", "gamma"])
@pytest.mark.parametrize("p", [0.1, 0.9])
def test_images_that_an_operation_passes_by_keep_their_values(name: str, p: float):
    images = smooth_images(40, 3, 23, 23)
    views = raw_view([{name: {"p": p}}], 23).batch(images, keys(40))
    passed = ((views - images / 255).abs().flatten(1).amax(dim=1) < 1e-4).nonzero()[:, 0]
    assert 0 < len(passed) < 40
    assert torch.equal(views[passed], images[passed].float().mul(1 / 255))


# --- errors in words


def message(augment: dict[str, Any], names: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        build_views(augment, facts(3), names)
    return str(caught.value)


def test_unknown_names_get_the_nearest_one():
    augment = augment_of("cifar")
    assert "did you mean simclr?" in message(augment, ["simcrl"])
    wrong = {
        "views": {
            "weak": [
                {"horizontal_flop": {}},
                {"color_jitter": {"brightnes": 1}},
                {"cutout": {"fraction": 2}},
            ]
        }
    }
    lines = message(wrong, ["weak"]).splitlines()
    assert len(lines) == 3
    assert "views.weak[0]" in lines[0] and "horizontal_flip" in lines[0]
    assert "views.weak[1].color_jitter.brightnes" in lines[1] and "brightness" in lines[1]
    assert "fraction" in lines[2] and "<= 1" in lines[2]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("horizontal_flip", "must be one operation"),
        ({"horizontal_flip": {}, "grayscale": {}}, "must be one operation"),
        ({"random_resized_crop": {"scale": [0.9, 0.2]}}, "the smaller one first"),
        ({"random_resized_crop": {"scale": 0.2}}, "must be a list of 2"),
        ({"color_jitter": {"hue": 0.7}}, "0.5"),
        ({"gaussian_blur": {"kernel": 4}}, "odd"),
        ({"random_ops": {"count": 2, "ops": [{"cutout": {}}]}}, "keep the image's size"),
        ({"random_ops": {"count": 2, "ops": [{"rotat": {}}]}}, "rotate"),
        ({"random_ops": {"count": 2}}, "ops"),
    ],
)
def test_wrong_descriptions_are_refused_in_words(entry: Any, words: str):
    assert words in message({"views": {"weak": [entry]}}, ["weak"])


def test_painting_comes_last():
    assert "at the end" in message(
        {"views": {"weak": [{"cutout": {}}, {"horizontal_flip": {}}]}}, ["weak"]
    )


def test_wrong_sections_are_refused():
    assert "size" in message({"size": 0, "views": {"weak": []}}, ["weak"])
    assert "sizes" in message({"sizes": 3, "views": {"weak": []}}, ["weak"])
    assert "views" in message({"size": 3}, ["weak"])


# --- sizes of their own


def test_a_view_may_have_a_size_of_its_own():
    """In pixels, whatever the section's size, or as a share of it; the crop fills it."""
    crop = [{"random_resized_crop": {}}]
    views = {
        "plain": crop,
        "pixels": {"size": 10, "ops": crop},
        "share": {"size": 0.5, "ops": crop},
    }
    views |= {
        "null": {"size": None, "ops": crop},
        "whole": {"size": 1.0, "ops": crop},
        "two": {"size": 2, "ops": crop},
    }
    for size, sides in ((None, (24, 10, 12, 24, 24, 2)), (20, (20, 10, 10, 20, 20, 2))):
        built = build_views({"size": size, "views": views}, facts(3), list(views))
        assert [view.size[0] for view in built.values()] == list(sides)
        for view in built.values():
            assert view.batch(smooth_images(3, 3), keys(3)).shape[2:] == view.size
    wide = SimpleNamespace(size=(10, 30), mean=(0.5,), std=(0.2,))
    assert build_views({"views": views}, wide, ["share"])["share"].size == (5, 15)


@pytest.mark.parametrize(
    ("view", "words"),
    [
        ({"size": 0, "ops": []}, "views.weak.size=0"),
        ({"size": 1.5, "ops": []}, "share of augment.size"),
        ({"size": True, "ops": []}, "pixels"),
        ({"sise": 8, "ops": []}, "did you mean size?"),
        ({"size": 8}, "views.weak.ops"),
        ({"size": 8, "ops": [{"horizontal_flop": {}}]}, "views.weak.ops[0]"),
    ],
)
def test_wrong_sizes_of_views_are_refused_in_words(view: Any, words: str):
    assert words in message({"views": {"weak": view}}, ["weak"])
