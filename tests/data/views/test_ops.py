"""Single operations: parameters, matrices and pixels against torchvision's, closed forms and
distributions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms.v2 import functional as TF

from deepclust.data.random import uniforms
from deepclust.data.views import color as view_color
from deepclust.data.views import geometry as view_geometry
from deepclust.data.views import pixels as view_pixels
from deepclust.data.views.base import warp
from deepclust.data.views.transform import ViewTransform
from tests.data.views.test_views import keys, raw_view, smooth_images

BILINEAR = T.InterpolationMode.BILINEAR


# --- geometry against torchvision and closed forms


def through(
    op: Any, params: dict[str, float], images: Tensor, target: tuple[int, int] | None = None
) -> Tensor:
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
    torch.testing.assert_close(
        through(view_geometry.HorizontalFlip(), {}, square), square.flip(3), atol=2e-5, rtol=0
    )


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
    shears = (
        through(view_geometry.ShearX(), amount, floats),
        through(view_geometry.ShearY(), amount, floats),
    )
    torch.testing.assert_close(shears[0], theirs(shear=(slope, 0.0)), atol=1e-3, rtol=0)
    torch.testing.assert_close(shears[1], theirs(shear=(0.0, slope)), atol=1e-3, rtol=0)
    shift = {"amount": 0.25}
    torch.testing.assert_close(
        through(view_geometry.TranslateX(), shift, floats), theirs(x=-width / 4), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        through(view_geometry.TranslateY(), shift, floats), theirs(y=-height / 4), atol=1e-4, rtol=0
    )


def test_random_affine_zooms_and_turns_as_torchvision(floats: Tensor):
    params = {"degrees": 20.0, "shear": 0.0, "x": 0.0, "y": 0.0, "scale": 1.2, "aspect": 0.0}
    theirs = TF.affine(floats, -20.0, [0, 0], 1.2, [0.0, 0.0], BILINEAR)
    torch.testing.assert_close(
        through(view_geometry.RandomAffine(), params, floats), theirs, atol=1e-3, rtol=0
    )


def test_random_affine_shears_and_shifts_as_torchvision(floats: Tensor):
    params = {"degrees": 0.0, "shear": 0.2, "x": 0.0, "y": 0.0, "scale": 1.0, "aspect": 0.0}
    theirs = TF.affine(floats, 0.0, [0, 0], 1.0, [math.degrees(math.atan(0.2)), 0.0], BILINEAR)
    torch.testing.assert_close(
        through(view_geometry.RandomAffine(), params, floats), theirs, atol=1e-3, rtol=0
    )
    params |= {"shear": 0.0, "x": -3.0, "y": 2.0}
    theirs = TF.affine(floats, 0.0, [3, -2], 1.0, [0.0, 0.0], BILINEAR)
    torch.testing.assert_close(
        through(view_geometry.RandomAffine(), params, floats), theirs, atol=1e-3, rtol=0
    )


def test_aspect_makes_wider_and_lower():
    block = torch.zeros(1, 1, 32, 32)
    block[:, :, 12:20, 12:20] = 1
    params = {"degrees": 0.0, "shear": 0.0, "x": 0.0, "y": 0.0, "scale": 1.0, "aspect": math.log(2)}
    seen = through(view_geometry.RandomAffine(), params, block)[0, 0] > 0.5
    assert int(seen.any(dim=0).sum()) == 16 and int(seen.any(dim=1).sum()) == 4


def test_crops_are_torchvisions(floats: Tensor):
    box = {"top": 3.0, "left": 5.0, "height": 16.0, "width": 20.0}
    ours = through(view_geometry.RandomResizedCrop(), box, floats, (16, 20))
    torch.testing.assert_close(ours, floats[:, :, 3:19, 5:25], atol=1e-5, rtol=0)
    enlarged = through(view_geometry.RandomResizedCrop(), box, floats, (32, 40))
    theirs = TF.resized_crop(floats, 3, 5, 16, 20, [32, 40], antialias=True)
    # at the crop's border ours sees the image beyond it
    torch.testing.assert_close(
        enlarged[:, :, 1:-1, 1:-1], theirs[:, :, 1:-1, 1:-1], atol=1e-4, rtol=0
    )
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


@pytest.mark.parametrize("sides", [(32, 32), (24, 40), (100, 80)])
def test_bicubic_resizing_is_pillows_in_both_engines(sides: tuple[int, int]):
    """Pillow rounds after each of its two passes: half a level, times 1.25 of the second kernel's
    weights, and half.

    torchvision rounds bytes as often, in another order.
    """
    images = smooth_images(2, 3, *sides)
    op = view_geometry.Resize(1.5, interpolation="bicubic")
    size = op.out_size(sides, (40, 40))
    theirs = []
    for image in images:
        picture = Image.fromarray(image.permute(1, 2, 0).byte().numpy())
        resized = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
        theirs.append(torch.from_numpy(np.array(resized)).permute(2, 0, 1))
    batch = op.batch(images / 255, (40, 40))
    assert (255 * batch - torch.stack(theirs)).abs().max() <= 1.13
    for image, wanted in zip(images, theirs):
        assert (op.sample(image.byte(), {}, (40, 40)).int() - wanted.int()).abs().max() <= 2
    bilinear = through(view_geometry.Resize(1.5), {}, images / 255, (40, 40))
    assert (batch - bilinear).abs().max() > 0.002, "another interpolation, indeed"


def test_bicubic_resizing_stands_by_itself_and_both_engines_crop_it_alike():
    images = smooth_images(3, 3, 32, 32)
    ops = [
        {"resize": {"ratio": 8 / 7, "interpolation": "bicubic"}},
        {"random_crop": {}},
        {"horizontal_flip": {}},
    ]
    view = ViewTransform(ops, 56, [0.0] * 3, [1.0] * 3)
    assert [len(group) for group in view.groups] == [1, 2]
    together = view.batch(images, keys(3))
    assert together.shape == (3, 3, 56, 56)
    for image, key, other in zip(images, keys(3).tolist(), together):
        torch.testing.assert_close(view.sample(image, key), other, atol=1.13 / 255, rtol=0)


def test_consecutive_geometric_operations_are_one_interpolation():
    view = raw_view(
        [
            {"random_resized_crop": {}},
            {"horizontal_flip": {}},
            {"color_jitter": {}},
            {"grayscale": {}},
        ]
    )
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
    images = (
        0.3 + 0.3 * smooth_images(3, channels) / 255
    )  # far from 0 and 1, where torchvision clamps
    pairs = (
        (view_color.Brightness(), TF.adjust_brightness),
        (view_color.Contrast(), TF.adjust_contrast),
        (view_color.Saturation(), TF.adjust_saturation),
    )
    for op, theirs in pairs:
        torch.testing.assert_close(
            recolored(op, {"factor": factor}, images), theirs(images, factor), atol=2e-4, rtol=0
        )
    grey = TF.rgb_to_grayscale(images, num_output_channels=channels)
    torch.testing.assert_close(recolored(view_color.Grayscale(), {}, images), grey)


def hue_shifted(images: Tensor, turn: float) -> Tensor:
    matrix = view_color.hue_matrix(torch.tensor([turn]), images.mean(dim=(2, 3)))
    return (matrix[:, :-1, :-1] @ images.flatten(2)).view_as(images)


def test_hue_is_torchvisions_at_thirds_and_near_it_between():
    images = smooth_images(8, 3) / 255
    for turn in (-1 / 3, 0.0, 1 / 3):
        torch.testing.assert_close(
            hue_shifted(images, turn), TF.adjust_hue(images, turn), atol=1e-4, rtol=0
        )
    for turn in (-0.1, 0.05, 0.1):
        ours, theirs = (
            hue_shifted(images, turn).clamp(0, 1) - images,
            TF.adjust_hue(images, turn) - images,
        )
        assert 0.8 < ours.abs().mean() / theirs.abs().mean() < 1.3
        assert F.cosine_similarity(ours.flatten(1), theirs.flatten(1)).mean() > 0.7


def test_jitter_is_its_four_parts_in_order():
    images = 0.4 + 0.2 * smooth_images(4, 3) / 255
    params = {"brightness": 1.1, "contrast": 0.8, "saturation": 1.3, "hue": 1 / 3}
    theirs = TF.adjust_contrast(TF.adjust_brightness(images, 1.1), 0.8)
    theirs = TF.adjust_hue(TF.adjust_saturation(theirs, 1.3), 1 / 3)
    torch.testing.assert_close(
        recolored(view_color.ColorJitter(), params, images), theirs, atol=5e-4, rtol=0
    )


# --- other operations against torchvision


@pytest.fixture
def bytes_() -> Tensor:
    return torch.cat([smooth_images(4, 3), torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)])


def pixelwise(op: Any, params: dict[str, float], images: Tensor) -> Tensor:
    values = {name: torch.full((len(images),), value) for name, value in params.items()}
    return op.batch((images / 255).clone(), values)


def test_equalise_and_posterise_are_torchvisions_to_the_bit(bytes_: Tensor):
    assert torch.equal(
        view_pixels.as_bytes(pixelwise(view_pixels.Equalize(), {}, bytes_)), TF.equalize(bytes_)
    )
    for bits in (1, 4, 7, 8):
        ours = view_pixels.as_bytes(
            pixelwise(view_pixels.Posterize(), {"bits": float(bits)}, bytes_)
        )
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
        torch.testing.assert_close(
            ours, TF.gaussian_blur(values, [7, 7], [sigma, sigma]), atol=1e-5, rtol=0
        )


def test_some_operations_done_twice_are_done_once(bytes_: Tensor):
    for op, params in (
        (view_pixels.Posterize(), {"bits": 5.0}),
        (view_pixels.AutoContrast(), {}),
        (view_pixels.Identity(), {}),
    ):
        once = pixelwise(op, params, bytes_)
        torch.testing.assert_close(
            op.batch(once.clone(), {k: torch.full((5,), v) for k, v in params.items()}), once
        )
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


@pytest.mark.parametrize(
    ("size", "scale"), [((32, 32), (0.2, 1.0)), ((40, 24), (0.08, 1.0)), ((10, 100), (0.6, 1.0))]
)
def test_random_resized_crops_fall_as_torchvisions(
    size: tuple[int, int], scale: tuple[float, float]
):
    torch.manual_seed(0)
    image = torch.zeros(3, *size)
    theirs = np.array(
        [T.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(1200)],
        float,
    )
    ours = draws(view_geometry.RandomResizedCrop(scale), 1200, size)
    assert (ours["top"] >= 0).all() and (ours["top"] + ours["height"] <= size[0]).all()
    assert (ours["left"] >= 0).all() and (ours["left"] + ours["width"] <= size[1]).all()
    for column, name in enumerate(("top", "left", "height", "width")):
        assert same_distribution(ours[name], theirs[:, column]), name
    assert same_distribution(ours["height"] * ours["width"], theirs[:, 2] * theirs[:, 3])
    assert same_distribution(ours["width"] / ours["height"], theirs[:, 3] / theirs[:, 2])


def test_random_erasing_falls_as_torchvisions():
    torch.manual_seed(0)
    image = torch.zeros(3, 32, 32)
    theirs = [
        T.RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(1200)
    ]
    ours = draws(view_pixels.RandomErasing(), 1200, (32, 32))
    for column, name in enumerate(("top", "left", "height", "width")):
        assert same_distribution(ours[name], np.array(theirs, float)[:, column]), name


def test_jitter_factors_fall_as_torchvisions():
    torch.manual_seed(0)
    theirs = [
        T.ColorJitter.get_params([0.6, 1.4], [0.6, 1.4], [0.6, 1.4], [-0.1, 0.1])[1:]
        for _ in range(1200)
    ]
    ours = draws(view_color.ColorJitter(), 1200, (8, 8))
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        assert same_distribution(ours[name], np.array(theirs, float)[:, column]), name
    assert draws(view_color.ColorJitter(brightness=1.5), 500, (8, 8))["brightness"].min() >= 0


def test_an_operation_happens_with_its_probability():
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(4000, 1, 8, 8)
    flipped = (
        raw_view([{"horizontal_flip": {"p": 0.3}}], 8, 1).batch(images, keys(4000))[:, 0, 0, 0]
        > 0.01
    )
    assert stats.binomtest(int(flipped.sum()), 4000, 0.3).pvalue > 1e-4


def test_random_ops_draws_with_replacement():
    white = torch.full((4000, 1, 4, 4), 255, dtype=torch.uint8)
    half = {"brightness": {"factor": [0.5, 0.5]}}
    description = [
        {
            "random_ops": {
                "count": 4,
                "ops": [{"identity": {}}, half, {"identity": {}}, {"identity": {}}],
            }
        }
    ]
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
    assert (
        stats.chisquare(np.bincount((places["top"] + sides // 2).astype(int), minlength=32)).pvalue
        > 1e-4
    )


def test_random_crop_falls_evenly_with_black_padding():
    images = torch.full((3000, 1, 8, 8), 255, dtype=torch.uint8)
    views = raw_view([{"random_crop": {"padding": 2}}], 8, 1).batch(images, keys(3000))[:, 0]
    missing_above = (views.amax(dim=2) < 0.5).int().cumprod(dim=1).sum(dim=1)
    missing_below = (views.amax(dim=2) < 0.5).int().flip(1).cumprod(dim=1).sum(dim=1)
    offsets = (missing_below - missing_above + 2).numpy()
    assert stats.chisquare(np.bincount(offsets, minlength=5)).pvalue > 1e-4
