"""What an augmentation is: kinds of operations, each drawing its parameters once for both engines.

An operation turns uniforms into parameters (`draw`). The batch engine applies them to many images
at once, the sample engine to one image. Batches are float32 (B, C, H, W) in [0, 1], single images
uint8 (C, H, W); C is 1 or 3.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.types import Fraction

Params = dict[str, Tensor]
"""Name to (B,) float32 on the CPU: one value per image."""
Size = tuple[int, int]
"""Height and width in pixels."""
Fill = Literal["zeros", "border"]
"""What lies outside an image: black, or the nearest pixel of its border."""

# An image is halved so often that its bilinear step shrinks it by 0.75 to 1.5. Bilinear sampling
# reads 2 x 2 pixels: where it shrinks by much more it skips pixels (aliasing), and after one
# halving too many it would have to enlarge, which blurs.
_LEAST_SHRINK = 0.75


class Op:
    """Base of all operations.

    A class defines `draw`, `sample` and what its kind below asks for.
    """

    draws: int = 0
    """Number of uniforms that `draw` reads."""
    p: float = 1.0
    """Probability that an image gets the operation."""

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        """Parameters from (B, draws) float32 uniforms for images of this size."""
        return {}

    def out_size(self, size: Size, target: Size) -> Size:
        """Size after the operation.

        size: of the images before it.
        target: size that the whole view is to have.
        """
        return size

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        """A uint8 (C, h, w) image from one uint8 (C, H, W) image.

        params: values of shape (1,).
        target: size that the whole view is to have.
        """
        raise NotImplementedError


class Geometric(Op):
    """Moves pixels by a matrix from output to input coordinates.

    The matrices of consecutive operations are multiplied, so that together they are one
    interpolation: every further one would blur the image.
    """

    fill: Fill | None = "zeros"
    """What lies outside the image; None where the operation never looks there."""
    alone: bool = False
    """Whether the batch engine applies it by its `batch`, as its interpolation is another one."""

    def batch(self, images: Tensor, target: Size) -> Tensor:
        """(B, C, H, W) in [0, 1] to (B, C, h, w), of an operation that is applied alone."""
        raise NotImplementedError

    def matrix(self, params: Params, size: Size, target: Size) -> Tensor:
        """(B or 1, 3, 3) float32 maps of coordinates (x, y, 1) of the output to those of the input.

        In both, the image is [-1, 1] x [-1, 1].

        params: what `draw` gave.
        size: of the images before the operation.
        target: size that the whole view is to have.
        """
        raise NotImplementedError

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        size = (image.shape[-2], image.shape[-1])
        matrix = self.matrix(params, size, target)
        out_size = self.out_size(size, target)
        warped = warp(image[None].float(), matrix, out_size, self.fill or "zeros")
        return warped[0].round_().to(torch.uint8)


class Color(Op):
    """Mixes channels by an affine map per image.

    The maps of consecutive operations are multiplied, and the pixels clamped once at the end.
    """

    def matrix(self, params: Params, means: Tensor) -> Tensor:
        """(B or 1, C+1, C+1) maps of a pixel's values (channels, 1).

        params: what `draw` gave, on the device of `means`.
        means: (B, C) channel means of the images that the operation gets.
        """
        raise NotImplementedError


class Pixel(Op):
    """Anything else. The batch engine hands over only those images that get the operation."""

    def batch(self, images: Tensor, params: Params) -> Tensor:
        """(n, C, H, W) images in [0, 1] after the operation; the input may be overwritten.

        params: (n,) values on the images' device.
        """
        raise NotImplementedError


class Feature(Pixel):
    """Acts on feature vectors (n, D, 1, 1) of any values, and on no image; both engines are one."""

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return self.batch(image[None], params)[0]


class Erase(Op):
    """Paints a rectangle with 0, the mean, after normalisation.

    `draw` gives `top`, `left`, `height` and `width` in pixels.
    """

    def batch(self, images: Tensor, params: Params) -> Tensor:
        """Paints (n, C, H, W) normalised images in place and returns them.

        params: (n,) values on the images' device.
        """
        height, width = images.shape[2:]
        rows = _inside(params["top"], params["height"], height)
        columns = _inside(params["left"], params["width"], width)
        kept = ~(rows[:, None, :, None] & columns[:, None, None, :])
        return images.mul_(kept.to(images.dtype))  # several times faster than masked_fill_


def _inside(start: Tensor, extent: Tensor, length: int) -> Tensor:
    """(n, length) bool: which pixels of a line lie in [start, start + extent)."""
    pixel = torch.arange(length, device=start.device)
    first = start[:, None]
    return (pixel >= first) & (pixel < first + extent[:, None])


def between(uniform: Tensor, low: float, high: float) -> Tensor:
    """Uniforms in [0, 1) spread over [low, high)."""
    return low + (high - low) * uniform


def integers(uniform: Tensor, count: Tensor | int) -> Tensor:
    """Whole numbers 0 .. count-1, as float32, from uniforms in [0, 1)."""
    # the product of a float32 just under 1 may round up to `count`
    most = torch.as_tensor(count - 1, dtype=uniform.dtype)
    return torch.minimum(torch.floor(uniform * count), most)


def ordered(
    name: str,
    pair: tuple[float, float],
    low: float,
    high: float = math.inf,
) -> tuple[float, float]:
    """The pair as floats.

    Raises:
        ValueError: not low <= pair[0] <= pair[1] <= high; the text begins with the `name`.
    """
    if not low <= pair[0] <= pair[1] <= high:
        raise ValueError(
            f"{name}={list(pair)}: two numbers, the smaller one first, within {low:g} to {high:g}"
        )
    return (float(pair[0]), float(pair[1]))


class SignedAmount(Geometric):
    """Base of operations with one amount, uniform in [-limit, limit]."""

    draws = 1

    def __init__(self, limit: Fraction = 0.1, p: Fraction = 1.0) -> None:
        self.limit = limit
        self.p = p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        return {"amount": self.limit * (2 * uniforms[:, 0] - 1)}


class Factor(Color):
    """Base of operations with one factor, uniform in the range `factor`; 1 changes nothing."""

    draws = 1

    def __init__(self, factor: tuple[float, float] = (0.05, 0.95), p: Fraction = 1.0) -> None:
        self.factor = ordered("factor", factor, 0.0)
        self.p = p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        return {"factor": between(uniforms[:, 0], *self.factor)}


def affine(
    a: Tensor | float,
    b: Tensor | float,
    tx: Tensor | float,
    c: Tensor | float,
    d: Tensor | float,
    ty: Tensor | float,
) -> Tensor:
    """(B, 3, 3) maps x_in = a x + b y + tx, y_in = c x + d y + ty; entries are numbers or (B,)."""
    tensors = [torch.as_tensor(entry, dtype=torch.float32) for entry in (a, b, tx, c, d, ty)]
    entries = torch.broadcast_tensors(*tensors)
    flat = torch.stack([entry.reshape(-1) for entry in entries], dim=1)
    last_row = flat.new_tensor((0.0, 0.0, 1.0)).expand(flat.shape[0], 3)
    return torch.cat([flat, last_row], dim=1).reshape(-1, 3, 3)


def centred(
    size: Size,
    a: Tensor | float,
    b: Tensor | float,
    tx: Tensor | float,
    c: Tensor | float,
    d: Tensor | float,
    ty: Tensor | float,
) -> Tensor:
    """`affine` of a map in pixels from the image's centre, for images that keep their size."""
    height, width = size
    # one unit of x is width / 2 pixels, one of y height / 2: without the ratios, a rotation of an
    # image that is not square would shear it
    return affine(
        a, b * (height / width), tx * (2 / width), c * (width / height), d, ty * (2 / height)
    )


def crop_matrix(
    size: Size,
    top: Tensor | float,
    left: Tensor | float,
    height: Tensor | float,
    width: Tensor | float,
) -> Tensor:
    """(B, 3, 3) maps of a crop that fills the output, whatever the output's size.

    size: of the image, in pixels.
    top, left, height, width: the crop, in pixels; numbers or (B,).
    """
    x_scale = width / size[1]
    y_scale = height / size[0]
    # so that the output's left edge, x = -1, is at -1 + 2 * left / size[1] in the input
    x_offset = 2 * left / size[1] + x_scale - 1
    y_offset = 2 * top / size[0] + y_scale - 1
    return affine(x_scale, 0.0, x_offset, 0.0, y_scale, y_offset)


def warp(images: Tensor, matrix: Tensor, size: Size, fill: Fill) -> Tensor:
    """(B, C, *size) images seen through affine maps, interpolated bilinearly without aliasing.

    An image that shrinks by 1.5 or more is first averaged over 2 x 2, 4 x 4, ... pixels, so that
    its bilinear step shrinks it by 0.75 to 1.5: a mip map (Williams 1983) with one level per image.

    images: (B, C, H, W) float32; may be overwritten.
    matrix: (B, 3, 3) on the CPU: normalised coordinates of the output to those of the input.
    size: height and width of the output.
    fill: what lies outside the images.
    """
    # maps to an image itself are left out: they are frequent (an op with p < 1), and interpolation
    # costs time and rounding
    unmoved = (matrix == torch.eye(3)).all(dim=2).all(dim=1) & (size == tuple(images.shape[2:]))
    same = unmoved.nonzero()[:, 0].to(images.device)
    rows = (~unmoved).nonzero()[:, 0]
    if len(rows) == 0:
        return images
    # copying most rows out and back would cost more than interpolating all of them
    if len(rows) <= len(same):
        moved = rows.to(images.device)
        images[moved] = _interpolate(images[moved], matrix[rows], size, fill)
        return images
    out = _interpolate(images, matrix, size, fill)
    if len(same):
        out[same] = images[same]
    return out


def _interpolate(images: Tensor, matrix: Tensor, size: Size, fill: Fill) -> Tensor:
    """`warp` without the short cut for maps to the image itself."""
    levels = _mip_levels(matrix, (images.shape[2], images.shape[3]), size)
    if not bool(levels.any()):
        return _bilinear(images, matrix, size, fill)
    out = images.new_empty(*images.shape[:2], *size)
    for level in levels.unique().tolist():
        rows = (levels == level).nonzero()[:, 0]
        on_level = rows.to(images.device)
        shrunk = (max(1, images.shape[2] >> level), max(1, images.shape[3] >> level))
        pooled = F.adaptive_avg_pool2d(images[on_level], shrunk)
        # coordinates are relative to the image's size, so the same matrix fits the smaller image
        out[on_level] = _bilinear(pooled, matrix[rows], size, fill)
    return out


def _mip_levels(matrix: Tensor, source: Size, size: Size) -> Tensor:
    """(B,) int64: how often each image is to be halved before its bilinear step."""
    # the determinant is the ratio of areas in relative units; its root is the mean shrinkage of a
    # side, which is all that one level for both axes can follow
    area = (matrix[:, 0, 0] * matrix[:, 1, 1] - matrix[:, 0, 1] * matrix[:, 1, 0]).abs()
    shrink = torch.sqrt(area * (source[0] * source[1] / (size[0] * size[1])))
    deepest = int(math.log2(min(source)))
    halvings = torch.log2((shrink / _LEAST_SHRINK).clamp(min=1.0)).floor()
    return halvings.clamp(max=deepest).to(torch.int64)


def _bilinear(images: Tensor, matrix: Tensor, size: Size, fill: Fill) -> Tensor:
    """(B, C, *size) images at the places that the maps give, between pixels by bilinear weights."""
    maps = matrix.to(images.device, non_blocking=True)
    # centres of the output's pixels; the outer edges are at -1 and 1, hence align_corners=False
    x = (torch.arange(size[1], device=images.device) * 2 + 1) / size[1] - 1
    y = (torch.arange(size[0], device=images.device) * 2 + 1) / size[0] - 1
    grid = images.new_empty(images.shape[0], *size, 2)
    for axis in (0, 1):  # a sum of a row and a column per image: cheaper than affine_grid's product
        row = maps[:, axis, 0, None] * x
        column = maps[:, axis, 1, None] * y + maps[:, axis, 2, None]
        torch.add(row[:, None, :], column[:, :, None], out=grid[..., axis])
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=fill, align_corners=False)
