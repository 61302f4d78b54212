"""Views: both engines against torchvision, closed forms, distributions, and independence of the cut into batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from scipy import stats
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms.v2 import functional as TF

from deepclust.data import view_color, view_geometry, view_pixels
from deepclust.data.random import sample_keys, uniforms
from deepclust.data.view_base import warp
from deepclust.data.view_ops import op_targets
from deepclust.data.views import ViewTransform, build_views
from deepclust.errors import UserError

CONF = Path(__file__).resolve().parents[2] / "conf" / "augment"
SETS = sorted(path.stem for path in CONF.glob("*.yaml"))
BILINEAR = T.InterpolationMode.BILINEAR


def keys(count: int, slot: int = 0) -> Tensor:
    return sample_keys(0, 0, 0, torch.arange(count), slot)


def smooth_images(count: int, channels: int, height: int = 32, width: int = 32) -> Tensor:
    """(count, channels, height, width) uint8 without fine detail."""
    coarse = torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(1))
    fine = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return (fine.clamp(0, 1) * 255).to(torch.uint8)


def raw_view(description: list[dict[str, Any]], size: int | tuple[int, int] = 32, channels: int = 3) -> ViewTransform:
    """A view whose normalisation changes nothing."""
    return ViewTransform(description, size, (0.0,) * channels, (1.0,) * channels)


def augment_of(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))


def facts(channels: int, size: int = 24) -> SimpleNamespace:
    return SimpleNamespace(size=(size, size), mean=(0.4, 0.5, 0.6)[:channels], std=(0.2, 0.25, 0.3)[:channels])


# --- the sets that come with the program


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", SETS)
def test_every_set_makes_its_views_with_both_engines(name: str, channels: int):
    augment = augment_of(name) | {"size": 24}
    assert {"clean", "weak", "strong", "simclr"} <= set(augment["views"])
    images = smooth_images(6, channels, 40, 40)
    for view in build_views(augment, facts(channels), list(augment["views"])).values():
        batch = view.batch(images, keys(6))
        samples = torch.stack([view.sample(image, int(key)) for image, key in zip(images, keys(6))])
        for views in (batch, samples):
            assert views.shape == (6, channels, 24, 24) and views.dtype == torch.float32
            assert torch.isfinite(views).all()


@pytest.mark.parametrize("name", SETS)
def test_clean_leaves_pixels_of_images_that_have_the_size(name: str):
    images = torch.randint(0, 256, (5, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
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
        parts = torch.cat([view.batch(images[rows], keys(20)[rows]) for rows in (slice(0, 7), slice(7, 8), slice(8, 20))])
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
        torch.testing.assert_close(view.batch(images[order], keys(20)[order]), whole[order], atol=1e-5, rtol=0)
        sample = view.sample(images[3], int(keys(20)[3]))
        assert torch.equal(sample, view.sample(images[3], int(keys(20)[3])))
        assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("name", SETS)
def test_views_of_one_image_differ_by_slot(name: str):
    images, view = smooth_images(8, 3, 24, 24), build_views(augment_of(name) | {"size": 24}, facts(3), ["simclr"])["simclr"]
    first, second = view.batch(images, keys(8)), view.batch(images, keys(8, slot=1))
    assert ((first - second).abs().flatten(1).amax(dim=1) > 0.01).all()


# --- each operation: the two engines, given the same key, look alike

TOLERANCE = {"equalize": 0.03, "color_jitter": 0.04, "random_resized_crop": 0.01, "resize": 0.01, "auto_contrast": 0.01}


def needed(name: str) -> Mapping[str, Any]:
    if name == "random_ops":
        return {"count": 2, "ops": [{"rotate": {}}, {"posterize": {}}, {"contrast": {}}]}
    return {"size": 24} if name in ("resize", "random_resized_crop") else {}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", sorted(op_targets()))
def test_engines_agree(name: str, channels: int):
    images = smooth_images(16, channels)
    view = raw_view([{name: needed(name)}], 28 if "crop" in name else 32, channels)
    batch = view.batch(images, keys(16))
    samples = torch.stack([view.sample(image, int(key)) for image, key in zip(images, keys(16))])
    assert batch.shape == samples.shape
    assert (batch - samples).abs().mean() < TOLERANCE.get(name, 0.004)


@pytest.mark.parametrize("name", sorted(op_targets()))
def test_values_stay_in_range(name: str):
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views = raw_view([{name: needed(name)}]).batch(images, keys(12))
    assert views.min() >= -1e-6 and views.max() <= 1 + 1e-6


# --- geometry against torchvision and closed forms


def through(op: Any, params: dict[str, float], images: Tensor, target: tuple[int, int] | None = None) -> Tensor:
    """Float images under a geometric op with given parameters."""
    size = (images.shape[2], images.shape[3])
    values = {name: torch.tensor([value]) for name, value in params.items()}
    matrix = op.matrix(values, size, target or size).expand(len(images), 3, 3)
    return warp(images.clone(), matrix, op.out_size(size, target or size), op.fill or "zeros")


@pytest.fixture
def floats() -> Tensor:
    return smooth_images(3, 3, 24, 36) / 255


def test_quarter_turns_and_mirrors_are_exact():
    square = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    for quarters in (1, 2, 3):
        turned = through(view_geometry.Rotate(), {"degrees": 90.0 * quarters}, square)
        torch.testing.assert_close(turned, torch.rot90(square, quarters, (2, 3)), atol=2e-5, rtol=0)
    torch.testing.assert_close(through(view_geometry.HorizontalFlip(), {}, square), square.flip(3), atol=2e-5, rtol=0)


@pytest.mark.parametrize("degrees", [-30.0, 10.0, 45.0])
def test_rotation_is_torchvisions(floats: Tensor, degrees: float):
    ours = through(view_geometry.Rotate(), {"degrees": degrees}, floats)
    torch.testing.assert_close(ours, TF.rotate(floats, degrees, BILINEAR), atol=1e-3, rtol=0)


def test_shear_and_translation_are_torchvisions(floats: Tensor):
    height, width = floats.shape[2:]

    def theirs(x: float = 0, y: float = 0, shear: tuple[float, float] = (0.0, 0.0)) -> Tensor:
        return TF.affine(floats, 0.0, [x, y], 1.0, list(shear), BILINEAR, center=[0, 0])

    slope = math.degrees(math.atan(0.1))
    amount = {"amount": 0.1}
    shears = (through(view_geometry.ShearX(), amount, floats), through(view_geometry.ShearY(), amount, floats))
    torch.testing.assert_close(shears[0], theirs(shear=(slope, 0.0)), atol=1e-3, rtol=0)
    torch.testing.assert_close(shears[1], theirs(shear=(0.0, slope)), atol=1e-3, rtol=0)
    shift = {"amount": 0.25}
    torch.testing.assert_close(through(view_geometry.TranslateX(), shift, floats), theirs(x=-width / 4), atol=1e-4, rtol=0)
    torch.testing.assert_close(through(view_geometry.TranslateY(), shift, floats), theirs(y=-height / 4), atol=1e-4, rtol=0)


def test_random_affine_zooms_and_turns_as_torchvision(floats: Tensor):
    params = {"degrees": 20.0, "shear": 0.0, "x": 0.0, "y": 0.0, "scale": 1.2, "aspect": 0.0}
    theirs = TF.affine(floats, -20.0, [0, 0], 1.2, [0.0, 0.0], BILINEAR)
    torch.testing.assert_close(through(view_geometry.RandomAffine(), params, floats), theirs, atol=1e-3, rtol=0)


def test_crops_are_torchvisions(floats: Tensor):
    box = {"top": 3.0, "left": 5.0, "height": 16.0, "width": 20.0}
    ours = through(view_geometry.RandomResizedCrop(), box, floats, (16, 20))
    torch.testing.assert_close(ours, floats[:, :, 3:19, 5:25], atol=1e-5, rtol=0)
    enlarged = through(view_geometry.RandomResizedCrop(), box, floats, (32, 40))
    theirs = TF.resized_crop(floats, 3, 5, 16, 20, [32, 40], antialias=True)
    torch.testing.assert_close(enlarged, theirs, atol=2e-2, rtol=0)  # at the crop's border ours sees the image beyond it
    torch.testing.assert_close(enlarged[:, :, 1:-1, 1:-1], theirs[:, :, 1:-1, 1:-1], atol=1e-4, rtol=0)
    centre = through(view_geometry.CenterCrop(), {}, floats, (15, 21))
    torch.testing.assert_close(centre, TF.center_crop(floats, [15, 21]), atol=1e-5, rtol=0)


def test_shrinking_does_not_alias():
    board = torch.zeros(1, 1, 64, 64)
    board[:, :, ::2, ::2] = board[:, :, 1::2, 1::2] = 1
    small = through(view_geometry.Resize(), {}, board, (16, 16))
    torch.testing.assert_close(small, torch.full((1, 1, 16, 16), 0.5))
    noise = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    for side in (20, 32, 48, 60):
        ours = through(view_geometry.Resize(), {}, noise, (side, side))
        theirs = TF.resize(noise, [side, side], antialias=True)
        assert (ours - theirs).abs().mean() < 0.4 * (noise[:, :, :side, :side] - 0.5).abs().mean()
        assert ours.std() < 1.6 * theirs.std()


def test_consecutive_geometric_operations_are_one_interpolation():
    view = raw_view([{"random_resized_crop": {}}, {"horizontal_flip": {}}, {"color_jitter": {}}, {"grayscale": {}}])
    assert len(view.groups) == 2


def test_a_crop_may_have_its_own_size():
    images = smooth_images(2, 3)
    view = raw_view([{"random_resized_crop": {"size": 12}}, {"horizontal_flip": {}}])
    assert view.batch(images, keys(2)).shape == (2, 3, 12, 12)
    assert view.sample(images[0], 3).shape == (3, 12, 12)


# --- colours against torchvision


def recolored(op: Any, params: dict[str, float], images: Tensor) -> Tensor:
    """Float images under a colour op with given parameters, not clamped."""
    values = {name: torch.full((len(images),), value) for name, value in params.items()}
    matrix = op.matrix(values, images.mean(dim=(2, 3)))
    return (matrix[:, :-1, :-1] @ images.flatten(2) + matrix[:, :-1, -1:]).view_as(images)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.2])
def test_colour_factors_are_torchvisions(channels: int, factor: float):
    images = 0.3 + 0.3 * smooth_images(3, channels) / 255  # far from 0 and 1, where torchvision clamps
    pairs = (
        (view_color.Brightness(), TF.adjust_brightness),
        (view_color.Contrast(), TF.adjust_contrast),
        (view_color.Saturation(), TF.adjust_saturation),
    )
    for op, theirs in pairs:
        torch.testing.assert_close(recolored(op, {"factor": factor}, images), theirs(images, factor), atol=2e-4, rtol=0)
    grey = TF.rgb_to_grayscale(images, num_output_channels=channels)
    torch.testing.assert_close(recolored(view_color.Grayscale(), {}, images), grey)


def hue_shifted(images: Tensor, turn: float) -> Tensor:
    matrix = view_color.hue_matrix(torch.tensor([turn]), images.mean(dim=(2, 3)))
    return (matrix[:, :-1, :-1] @ images.flatten(2)).view_as(images)


def test_hue_is_torchvisions_at_thirds_and_near_it_between():
    images = smooth_images(8, 3) / 255
    for turn in (-1 / 3, 0.0, 1 / 3):
        torch.testing.assert_close(hue_shifted(images, turn), TF.adjust_hue(images, turn), atol=1e-4, rtol=0)
    for turn in (-0.1, 0.05, 0.1):
        ours, theirs = hue_shifted(images, turn).clamp(0, 1) - images, TF.adjust_hue(images, turn) - images
        assert 0.8 < ours.abs().mean() / theirs.abs().mean() < 1.3
        assert F.cosine_similarity(ours.flatten(1), theirs.flatten(1)).mean() > 0.7


def test_jitter_is_its_four_parts_in_order():
    images = 0.4 + 0.2 * smooth_images(4, 3) / 255
    params = {"brightness": 1.1, "contrast": 0.8, "saturation": 1.3, "hue": 1 / 3}
    theirs = TF.adjust_contrast(TF.adjust_brightness(images, 1.1), 0.8)
    theirs = TF.adjust_hue(TF.adjust_saturation(theirs, 1.3), 1 / 3)
    torch.testing.assert_close(recolored(view_color.ColorJitter(), params, images), theirs, atol=5e-4, rtol=0)


# --- other operations against torchvision


@pytest.fixture
def bytes_() -> Tensor:
    return torch.cat([smooth_images(4, 3), torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)])


def pixelwise(op: Any, params: dict[str, float], images: Tensor) -> Tensor:
    values = {name: torch.full((len(images),), value) for name, value in params.items()}
    return op.batch((images / 255).clone(), values)


def test_equalise_and_posterise_are_torchvisions_to_the_bit(bytes_: Tensor):
    assert torch.equal(view_pixels.as_bytes(pixelwise(view_pixels.Equalize(), {}, bytes_)), TF.equalize(bytes_))
    for bits in (1, 4, 7, 8):
        ours = view_pixels.as_bytes(pixelwise(view_pixels.Posterize(), {"bits": float(bits)}, bytes_))
        assert torch.equal(ours, TF.posterize(bytes_, bits))


def test_pixel_operations_are_torchvisions(bytes_: Tensor):
    values = bytes_ / 255
    ours = pixelwise(view_pixels.AutoContrast(), {}, bytes_)
    torch.testing.assert_close(ours, TF.autocontrast(values))
    ours = pixelwise(view_pixels.Solarize(), {"threshold": 100.0}, bytes_)
    torch.testing.assert_close(ours, TF.solarize(bytes_, 100.0) / 255)
    ours = pixelwise(view_pixels.Gamma(), {"power": 1.7}, bytes_)
    torch.testing.assert_close(ours, TF.adjust_gamma(values, 1.7))
    for factor in (0.05, 0.6, 1.5):
        ours = pixelwise(view_pixels.Sharpness(), {"factor": factor}, bytes_)
        torch.testing.assert_close(ours, TF.adjust_sharpness(values, factor), atol=1e-5, rtol=0)
    for sigma in (0.3, 1.0, 2.0):
        ours = pixelwise(view_pixels.GaussianBlur(kernel=7), {"sigma": sigma}, bytes_)
        torch.testing.assert_close(ours, TF.gaussian_blur(values, [7, 7], [sigma, sigma]), atol=1e-5, rtol=0)


def test_some_operations_done_twice_are_done_once(bytes_: Tensor):
    for op, params in (
        (view_pixels.Posterize(), {"bits": 5.0}),
        (view_pixels.AutoContrast(), {}),
        (view_pixels.Identity(), {}),
    ):
        once = pixelwise(op, params, bytes_)
        torch.testing.assert_close(op.batch(once.clone(), {k: torch.full((5,), v) for k, v in params.items()}), once)
    grey = recolored(view_color.Grayscale(), {}, bytes_ / 255)
    torch.testing.assert_close(recolored(view_color.Grayscale(), {}, grey), grey, atol=2e-4, rtol=0)


def test_noise_is_normal_and_new_for_each_image():
    grey = torch.full((400, 1, 8, 8), 128, dtype=torch.uint8)
    noise = raw_view([{"pixel_noise": {"std": 0.05}}], 8, 1).batch(grey, keys(400)) - 128 / 255
    assert stats.kstest((noise / 0.05).flatten().numpy()[::7], "norm").pvalue > 1e-4
    assert abs(float(noise.std()) - 0.05) < 0.002
    assert np.abs(np.corrcoef(noise[:60].flatten(1).numpy()) - np.eye(60)).max() < 0.75


# --- distributions against torchvision's own draws


def draws(op: Any, count: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    drawn = op.draw(uniforms(keys(count), op.draws), size)
    return {name: value.double().numpy() for name, value in drawn.items()}


def same_distribution(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool(stats.ks_2samp(ours, theirs).pvalue > 1e-4)


@pytest.mark.parametrize(("size", "scale"), [((32, 32), (0.2, 1.0)), ((40, 24), (0.08, 1.0)), ((10, 100), (0.6, 1.0))])
def test_random_resized_crops_fall_as_torchvisions(size: tuple[int, int], scale: tuple[float, float]):
    torch.manual_seed(0)
    image = torch.zeros(3, *size)
    theirs = np.array([T.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(2000)], float)
    ours = draws(view_geometry.RandomResizedCrop(scale), 2000, size)
    assert (ours["top"] >= 0).all() and (ours["top"] + ours["height"] <= size[0]).all()
    assert (ours["left"] >= 0).all() and (ours["left"] + ours["width"] <= size[1]).all()
    for column, name in enumerate(("top", "left", "height", "width")):
        assert same_distribution(ours[name], theirs[:, column]), name
    assert same_distribution(ours["height"] * ours["width"], theirs[:, 2] * theirs[:, 3])
    assert same_distribution(ours["width"] / ours["height"], theirs[:, 3] / theirs[:, 2])


def test_random_erasing_falls_as_torchvisions():
    torch.manual_seed(0)
    image = torch.zeros(3, 32, 32)
    theirs = [T.RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(2000)]
    ours = draws(view_pixels.RandomErasing(), 2000, (32, 32))
    for column, name in enumerate(("top", "left", "height", "width")):
        assert same_distribution(ours[name], np.array(theirs, float)[:, column]), name


def test_jitter_factors_fall_as_torchvisions():
    torch.manual_seed(0)
    theirs = [T.ColorJitter.get_params([0.6, 1.4], [0.6, 1.4], [0.6, 1.4], [-0.1, 0.1])[1:] for _ in range(2000)]
    ours = draws(view_color.ColorJitter(), 2000, (8, 8))
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        assert same_distribution(ours[name], np.array(theirs, float)[:, column]), name
    assert draws(view_color.ColorJitter(brightness=1.5), 500, (8, 8))["brightness"].min() >= 0


def test_an_operation_happens_with_its_probability():
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(4000, 1, 8, 8)
    flipped = raw_view([{"horizontal_flip": {"p": 0.3}}], 8, 1).batch(images, keys(4000))[:, 0, 0, 0] > 0.01
    assert stats.binomtest(int(flipped.sum()), 4000, 0.3).pvalue > 1e-4


def test_random_ops_draws_with_replacement():
    white = torch.full((4000, 1, 4, 4), 255, dtype=torch.uint8)
    half = {"brightness": {"factor": [0.5, 0.5]}}
    description = [{"random_ops": {"count": 4, "ops": [{"identity": {}}, half, {"identity": {}}, {"identity": {}}]}}]
    halvings = -torch.log2(raw_view(description, 4, 1).batch(white, keys(4000))[:, 0, 0, 0])
    counts = torch.bincount(halvings.round().long(), minlength=5).numpy()
    expected = 4000 * stats.binom(4, 0.25).pmf(range(5))
    assert stats.chisquare(counts, expected).pvalue > 1e-4


def test_translations_take_both_signs_and_the_whole_range():
    amounts = draws(view_geometry.TranslateX(limit=0.1), 3000, (32, 32))["amount"]
    assert stats.kstest(amounts, "uniform", args=(-0.1, 0.2)).pvalue > 1e-4


def test_cutout_paints_the_mean_over_one_square():
    images = torch.full((2000, 3, 32, 32), 255, dtype=torch.uint8)
    view = ViewTransform([{"cutout": {"fraction": 0.5}}], 32, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2))
    holes = view.batch(images, keys(2000)) == 0
    assert torch.equal(holes[:, 0], holes[:, 1]) and torch.equal(holes[:, 0], holes[:, 2])
    height, width = holes[:, 0].any(dim=2).sum(dim=1), holes[:, 0].any(dim=1).sum(dim=1)
    assert torch.equal(height * width, holes[:, 0].sum(dim=(1, 2)))
    assert int(height.max()) == 16 and int(height.min()) == 1
    sides = draws(view_pixels.Cutout(0.5), 3000, (32, 32))["height"]
    assert stats.chisquare(np.bincount(sides.astype(int), minlength=17)[1:]).pvalue > 1e-4
    places = draws(view_pixels.Cutout(0.5), 3000, (32, 32))
    assert stats.chisquare(np.bincount((places["top"] + sides // 2).astype(int), minlength=32)).pvalue > 1e-4


def test_random_crop_falls_evenly_with_black_padding():
    images = torch.full((3000, 1, 8, 8), 255, dtype=torch.uint8)
    views = raw_view([{"random_crop": {"padding": 2}}], 8, 1).batch(images, keys(3000))[:, 0]
    missing_above = (views.amax(dim=2) < 0.5).int().cumprod(dim=1).sum(dim=1)
    missing_below = (views.amax(dim=2) < 0.5).int().flip(1).cumprod(dim=1).sum(dim=1)
    offsets = (missing_below - missing_above + 2).numpy()
    assert stats.chisquare(np.bincount(offsets, minlength=5)).pvalue > 1e-4


# --- errors in words


def message(augment: dict[str, Any], names: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        build_views(augment, facts(3), names)
    return str(caught.value)


def test_unknown_names_get_the_nearest_one():
    augment = augment_of("cifar")
    assert "did you mean simclr?" in message(augment, ["simcrl"])
    wrong = {"views": {"weak": [{"horizontal_flop": {}}, {"color_jitter": {"brightnes": 1}}, {"cutout": {"fraction": 2}}]}}
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
    assert "at the end" in message({"views": {"weak": [{"cutout": {}}, {"horizontal_flip": {}}]}}, ["weak"])


def test_wrong_sections_are_refused():
    assert "size" in message({"size": 0, "views": {"weak": []}}, ["weak"])
    assert "sizes" in message({"sizes": 3, "views": {"weak": []}}, ["weak"])
    assert "views" in message({"size": 3}, ["weak"])
