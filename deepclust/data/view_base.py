"""What an augmentation is: five kinds of operations, each drawing its parameters once for both engines.

An op turns uniforms into parameters (`draw`); the batch engine applies them to many images at once, the sample engine
to one. Batches are float32 (B, C, H, W) in [0, 1], single images uint8 (C, H, W); C is 1 or 3.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.schema import Fraction

Params = dict[str, Tensor]
"""Name to (B,) float32 on the CPU: one value per image."""
Size = tuple[int, int]
"""Height and width in pixels."""
Fill = Literal["zeros", "border"]


class Op:
    """Base of all operations. `p` is the probability that an image gets it, `draws` how many uniforms `draw` reads."""

    draws: int = 0
    p: float = 1.0

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        """(B, draws) float32 uniforms and the size of the images to parameters."""
        return {}

    def out_size(self, size: Size, target: Size) -> Size:
        """Size after the operation; `target` is the size that the whole view is to have."""
        return size

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        """One uint8 (C, H, W) image and parameters of shape (1,) to a uint8 (C, h, w) image."""
        raise NotImplementedError


class Geometric(Op):
    """Moves pixels: a matrix from output to input coordinates, so that consecutive ones are one interpolation.

    fill: what lies outside the image; None where the op never looks there. alone: whether the batch engine applies the
    op by its `batch`, by itself, since its interpolation is another one.
    """

    fill: Fill | None = "zeros"
    alone: bool = False

    def batch(self, images: Tensor, target: Size) -> Tensor:
        """(B, C, H, W) in [0, 1] to (B, C, h, w), of an op that is applied alone."""
        raise NotImplementedError

    def matrix(self, params: Params, size: Size, target: Size) -> Tensor:
        """(B or 1, 3, 3): output to input in coordinates where the image is [-1, 1] x [-1, 1], x before y."""
        raise NotImplementedError

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        size = (image.shape[-2], image.shape[-1])
        matrix = self.matrix(params, size, target)
        warped = warp(image[None].float(), matrix, self.out_size(size, target), self.fill or "zeros")
        return warped[0].round_().to(torch.uint8)


class Color(Op):
    """Mixes channels by an affine map per image, so that consecutive ones are one product, clamped once at the end."""

    def matrix(self, params: Params, means: Tensor) -> Tensor:
        """(B, C) channel means of the images it will see to (B or 1, C+1, C+1) homogeneous maps of a pixel."""
        raise NotImplementedError


class Pixel(Op):
    """Anything else. The batch engine hands over just those images that get the op."""

    def batch(self, images: Tensor, params: Params) -> Tensor:
        """(n, C, H, W) in [0, 1] and parameters (n,) on the images' device to images of the same shape."""
        raise NotImplementedError


class Feature(Pixel):
    """Acts on feature vectors (n, D, 1, 1) of any values, and on no image; both engines are one."""

    def sample(self, image: Tensor, params: Params, target: Size) -> Tensor:
        return self.batch(image[None], params)[0]


class Erase(Op):
    """Paints a rectangle with 0, the mean, after normalisation. `draw` gives top, left, height and width in pixels."""

    def batch(self, images: Tensor, params: Params) -> Tensor:
        """Paints (n, C, H, W) normalised images in place."""
        inside = []
        for start, extent, length in (("top", "height", images.shape[2]), ("left", "width", images.shape[3])):
            place = torch.arange(length, device=images.device)
            first = params[start][:, None]
            inside.append((place >= first) & (place < first + params[extent][:, None]))
        kept = ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])
        return images.mul_(kept.to(images.dtype))  # several times faster than masked_fill_


def between(uniform: Tensor, low: float, high: float) -> Tensor:
    """Uniforms in [0, 1) spread over [low, high)."""
    return low + (high - low) * uniform


def integers(uniform: Tensor, count: Tensor | int) -> Tensor:
    """Uniforms in [0, 1) to whole numbers 0 .. count-1, as float32."""
    # the product of a float32 just under 1 may round up to `count`
    return torch.minimum(torch.floor(uniform * count), torch.as_tensor(count - 1, dtype=uniform.dtype))


def ordered(name: str, pair: tuple[float, float], low: float, high: float = math.inf) -> tuple[float, float]:
    """The pair itself if low <= pair[0] <= pair[1] <= high, else ValueError in words."""
    if not low <= pair[0] <= pair[1] <= high:
        raise ValueError(f"{name}={list(pair)}: two numbers, the smaller one first, within {low:g} to {high:g}")
    return (float(pair[0]), float(pair[1]))


class SignedAmount(Geometric):
    """One amount, uniform in [-limit, limit]."""

    draws = 1

    def __init__(self, limit: Fraction = 0.1, p: Fraction = 1.0) -> None:
        self.limit, self.p = limit, p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        return {"amount": self.limit * (2 * uniforms[:, 0] - 1)}


class Factor(Color):
    """One factor, uniform in the range `factor`; 1 changes nothing."""

    draws = 1

    def __init__(self, factor: tuple[float, float] = (0.05, 0.95), p: Fraction = 1.0) -> None:
        self.factor, self.p = ordered("factor", factor, 0.0), p

    def draw(self, uniforms: Tensor, size: Size) -> Params:
        return {"factor": between(uniforms[:, 0], *self.factor)}


def affine(
    a: Tensor | float, b: Tensor | float, tx: Tensor | float, c: Tensor | float, d: Tensor | float, ty: Tensor | float
) -> Tensor:
    """x_in = a x + b y + tx, y_in = c x + d y + ty as (B, 3, 3); each entry is a number or (B,)."""
    entries = torch.broadcast_tensors(*(torch.as_tensor(e, dtype=torch.float32) for e in (a, b, tx, c, d, ty)))
    flat = torch.stack([entry.reshape(-1) for entry in entries], dim=1)
    last = flat.new_tensor((0.0, 0.0, 1.0)).expand(flat.shape[0], 3)
    return torch.cat([flat, last], dim=1).reshape(-1, 3, 3)


def centred(
    size: Size,
    a: Tensor | float,
    b: Tensor | float,
    tx: Tensor | float,
    c: Tensor | float,
    d: Tensor | float,
    ty: Tensor | float,
) -> Tensor:
    """Like `affine` for a map given in pixels from the image's centre, for images that keep their size."""
    height, width = size
    return affine(a, b * (height / width), tx * (2 / width), c * (width / height), d, ty * (2 / height))


def crop_matrix(
    size: Size, top: Tensor | float, left: Tensor | float, height: Tensor | float, width: Tensor | float
) -> Tensor:
    """The map of a crop of `size` (pixels) that fills the output, whatever the output's size."""
    x_scale, y_scale = width / size[1], height / size[0]
    return affine(x_scale, 0.0, 2 * left / size[1] + x_scale - 1, 0.0, y_scale, 2 * top / size[0] + y_scale - 1)


def warp(images: Tensor, matrix: Tensor, size: Size, fill: Fill) -> Tensor:
    """Images seen through affine maps, interpolated bilinearly and without aliasing.

    images: (B, C, H, W) float32; may be overwritten. matrix: (B, 3, 3) on the CPU, normalised coordinates of the output
    to those of the input.
    Returns (B, C, *size). An image that shrinks by 1.5 or more is first averaged over 2x2, 4x4, ... pixels, so that
    its bilinear step shrinks it by 0.75 to 1.5: a mip map with one level per image.
    """
    kept = (matrix == torch.eye(3)).all(dim=2).all(dim=1) & (size == tuple(images.shape[2:]))
    same, rows = kept.nonzero()[:, 0].to(images.device), (~kept).nonzero()[:, 0]
    if len(rows) == 0:
        return images
    # copying most rows out and back would cost more than interpolating all of them
    if len(rows) <= len(same):
        some = rows.to(images.device)
        images[some] = _interpolate(images[some], matrix[rows], size, fill)
        return images
    out = _interpolate(images, matrix, size, fill)
    if len(same):
        out[same] = images[same]
    return out


def _interpolate(images: Tensor, matrix: Tensor, size: Size, fill: Fill) -> Tensor:
    levels = _mip_levels(matrix, (images.shape[2], images.shape[3]), size)
    if not bool(levels.any()):
        return _bilinear(images, matrix, size, fill)
    out = images.new_empty(*images.shape[:2], *size)
    for level in levels.unique().tolist():
        rows = (levels == level).nonzero()[:, 0]
        some = rows.to(images.device)
        shrunk = (max(1, images.shape[2] >> level), max(1, images.shape[3] >> level))
        out[some] = _bilinear(F.adaptive_avg_pool2d(images[some], shrunk), matrix[rows], size, fill)
    return out


def _mip_levels(matrix: Tensor, source: Size, size: Size) -> Tensor:
    """(B,) int64: how often each image is to be halved before its bilinear step."""
    area = (matrix[:, 0, 0] * matrix[:, 1, 1] - matrix[:, 0, 1] * matrix[:, 1, 0]).abs()
    shrink = torch.sqrt(area * (source[0] * source[1] / (size[0] * size[1])))
    deepest = int(math.log2(min(source)))
    return torch.log2((shrink / 0.75).clamp(min=1.0)).floor().clamp(max=deepest).to(torch.int64)


def _bilinear(images: Tensor, matrix: Tensor, size: Size, fill: Fill) -> Tensor:
    m = matrix.to(images.device, non_blocking=True)
    x = (torch.arange(size[1], device=images.device) * 2 + 1) / size[1] - 1
    y = (torch.arange(size[0], device=images.device) * 2 + 1) / size[0] - 1
    grid = images.new_empty(images.shape[0], *size, 2)
    for axis in (0, 1):  # a sum of a row and a column per image: cheaper than affine_grid's product
        column = m[:, axis, 1, None] * y + m[:, axis, 2, None]
        torch.add((m[:, axis, 0, None] * x)[:, None, :], column[:, :, None], out=grid[..., axis])
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=fill, align_corners=False)
