"""Random views of images: one description, two engines.

`ViewTransform.batch` makes the views of a whole batch at once on the images' device, with fresh parameters for each
image; `ViewTransform.sample` makes one view with torchvision, for loader workers. Both draw the same parameters from
the same key. In a batch, consecutive geometric operations are one interpolation, consecutive colour operations one
matrix per image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from deepclust.data.random import uniforms
from deepclust.data.view_base import Color, Erase, Feature, Geometric, Op, Params, Pixel, Size, integers, warp
from deepclust.data.view_mix import RandomOps
from deepclust.data.view_ops import check_augment, make_ops, split_view
from deepclust.data.view_pixels import Identity
from deepclust.errors import UserError
from deepclust.signatures import near


class Images(Protocol):
    """What views must know of a set of images."""

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...


class ViewTransform:
    """Turns images into normalised views.

    description: operations in order, [{name: {parameter: value}}, ...]; those that paint over parts come last.
    size: of the view in pixels, (height, width) or one number for both, for crops and resizes without a size of their
    own. mean, std: of the image set, one value per channel, for pixels scaled to [0, 1].
    where: what messages call the description. Raises UserError for an operation or a parameter that does not exist.
    """

    def __init__(
        self,
        description: Sequence[Mapping[str, Any]],
        size: int | tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        where: str = "view",
    ) -> None:
        ops = make_ops(description, where)
        self.size: Size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.planned, self.num_uniforms = _plan(ops)
        painting = [isinstance(item.op, Erase) for item in self.planned]
        if painting != sorted(painting):
            raise UserError(f"{where}: cutout and random_erasing paint over the finished view; put them at the end")
        self.groups = _group(self.planned)
        self._scale = 1 / torch.tensor(std, dtype=torch.float32)[:, None, None]
        self._shift = -torch.tensor(mean, dtype=torch.float32)[:, None, None] * self._scale

    def batch(self, images: Tensor, keys: Tensor) -> Tensor:
        """(B, C, H, W) uint8 images and (B,) int64 keys to (B, C, h, w) float32 views on the images' device.

        Float input is features (B, D, 1, 1), which are not scaled.

        Parameters are drawn on the CPU, whatever the device: they are few, and equal everywhere.
        """
        u = uniforms(keys.cpu(), self.num_uniforms)
        views = _floats(images)
        for group in self.groups:
            if not isinstance(group[0].op, Erase):
                views = _apply(views, group, u, self.size)
        views = self._normalise(views)
        for group in self.groups:
            if isinstance(group[0].op, Erase):
                views = _apply(views, group, u, self.size)
        return views

    def sample(self, image: Tensor, key: int) -> Tensor:
        """One (C, H, W) uint8 image, or (D, 1, 1) float32 features, to a (C, h, w) float32 view."""
        u = uniforms(torch.tensor([key]), self.num_uniforms)
        row = u[0].tolist()
        drawn = [item for item in self.planned if item.chosen(row)]
        for item in drawn:
            if not isinstance(item.op, Erase):
                image = item.op.sample(image, item.draw(u, (image.shape[1], image.shape[2])), self.size)
        view = self._normalise(_floats(image[None]))
        for item in drawn:
            if isinstance(item.op, Erase):
                view = item.op.batch(view, item.draw(u, (view.shape[2], view.shape[3])))
        return view[0]

    def _normalise(self, views: Tensor) -> Tensor:
        return views.mul_(self._scale.to(views.device)).add_(self._shift.to(views.device))


def _floats(images: Tensor) -> Tensor:
    """A float32 copy: bytes as numbers in [0, 1], features as they are."""
    copy = images.to(torch.float32, copy=True)
    return copy if images.is_floating_point() else copy.mul_(1 / 255)


def build_views(augment: Mapping[str, Any], image_set: Images, names: Sequence[str]) -> dict[str, ViewTransform]:
    """The named views of an `augment` section for a set of images; each may have a size of its own.

    Raises UserError, with the nearest valid name, for a view, an operation or a parameter that does not exist.
    """
    if problems := check_augment(augment):
        raise UserError("\n".join(problems))
    views, built = augment["views"], {}
    for name in dict.fromkeys(names):
        if name not in views:
            nearest = near(name, views)
            advice = f"did you mean {nearest}?" if nearest else f"there are: {', '.join(views)}"
            raise UserError(f"augment.views has no view {name!r}; {advice}")
        side = augment.get("size")
        ops, size = split_view(views[name], (side, side) if side else image_set.size)
        built[name] = ViewTransform(ops, size, image_set.mean, image_set.std, f"augment.views.{name}")
        _refuse_other_kind(built[name], f"augment.views.{name}")
    return built


def _refuse_other_kind(view: ViewTransform, where: str) -> None:
    """UserError where operations on images are asked for a set of features, whose size is 1 x 1, or the reverse."""
    features = view.size == (1, 1)
    for item in view.planned:
        if isinstance(item.op, Feature) != features:
            kinds = ("features", "images") if features else ("images", "features")
            advice = "choose augment=features" if features else "choose another augment"
            raise UserError(f"{where}: {type(item.op).__name__} is for {kinds[1]}, the data are {kinds[0]}; {advice}")


class _Choice(NamedTuple):
    """Holds if the uniform in `column`, cut into `parts` equal parts, lies in part `number`."""

    column: int
    number: int
    parts: int


@dataclass(frozen=True)
class _Planned:
    """An op and its columns of uniforms: the first says whether an image gets the op, the others are for parameters."""

    op: Op
    column: int
    choice: _Choice | None = None

    def gate(self, u: Tensor) -> Tensor:
        """(B, n) uniforms to (B,) bool: which images get the op."""
        on = u[:, self.column] < self.op.p
        if self.choice is None:
            return on
        return on & (integers(u[:, self.choice.column], self.choice.parts) == self.choice.number)

    def chosen(self, row: list[float]) -> bool:
        """The same for the uniforms of one image."""
        if self.choice is not None and int(row[self.choice.column] * self.choice.parts) != self.choice.number:
            return False
        return row[self.column] < self.op.p

    def draw(self, u: Tensor, size: Size) -> Params:
        """The op's parameters for images of this size."""
        return self.op.draw(u[:, self.column + 1 : self.column + 1 + self.op.draws], size)


def _plan(ops: Sequence[Op]) -> tuple[list[_Planned], int]:
    """Every op with its columns of uniforms, and the number of uniforms an image needs.

    One draw of `random_ops` becomes all its ops, of which an image gets one; so their order is free, and those that can
    be applied as one stand side by side.
    """
    planned: list[_Planned] = []
    column = 0
    for op in ops:
        if not isinstance(op, RandomOps):
            planned.append(_Planned(op, column))
            column += 1 + op.draws
            continue
        numbered = sorted(enumerate(op.ops), key=lambda item: (isinstance(item[1], Color), isinstance(item[1], Pixel)))
        for _ in range(op.count):
            for number, each in numbered:
                if not isinstance(each, Identity):
                    planned.append(_Planned(each, column + 1, _Choice(column, number, len(op.ops))))
            column += 2 + max(each.draws for each in op.ops)
    return planned, column


def _group(planned: Sequence[_Planned]) -> list[list[_Planned]]:
    """Neighbours that the batch engine applies as one: colour operations, and geometric ones with the same fill."""
    groups: list[list[_Planned]] = []
    for item in planned:
        if groups and all(_joins(other.op, item.op) for other in groups[-1]):
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _joins(first: Op, second: Op) -> bool:
    if isinstance(first, Geometric) and isinstance(second, Geometric):
        if first.alone or second.alone:
            return False
        return first.fill is None or second.fill is None or first.fill == second.fill
    return isinstance(first, Color) and isinstance(second, Color)


def _apply(images: Tensor, group: Sequence[_Planned], u: Tensor, target: Size) -> Tensor:
    """(B, C, H, W) float32 images, which may be overwritten, after a group of operations."""
    if isinstance(group[0].op, Geometric):
        return group[0].op.batch(images, target) if group[0].op.alone else _move(images, group, u, target)
    if isinstance(group[0].op, Color):
        return _recolor(images, group, u)
    item, op = group[0], cast(Pixel | Erase, group[0].op)
    size, rows = (images.shape[2], images.shape[3]), item.gate(u).nonzero()[:, 0]
    if len(rows) == len(images):
        return op.batch(images, _on_device(item.draw(u, size), images))
    if len(rows):
        some = rows.to(images.device)
        images[some] = op.batch(images[some], _on_device(item.draw(u[rows], size), images))
    return images


def _on_device(params: Params, images: Tensor) -> Params:
    return {name: value.to(images.device, non_blocking=True) for name, value in params.items()}


def _move(images: Tensor, group: Sequence[_Planned], u: Tensor, target: Size) -> Tensor:
    """One interpolation for all geometric operations of a group."""
    size = (images.shape[2], images.shape[3])
    total, same = torch.eye(3)[None], torch.eye(3)
    fill = "zeros"
    for item in group:
        op = cast(Geometric, item.op)
        matrix = op.matrix(item.draw(u, size), size, target)
        total = total @ torch.where(item.gate(u)[:, None, None], matrix, same)
        size, fill = op.out_size(size, target), op.fill or fill
    return warp(images, total, size, fill)


def _recolor(images: Tensor, group: Sequence[_Planned], u: Tensor) -> Tensor:
    """One affine map of the channels per image for all colour operations of a group, clamped at the end."""
    gates = torch.stack([item.gate(u) for item in group])
    rows = gates.any(dim=0).nonzero()[:, 0]
    if len(rows) <= len(images) // 2:
        if len(rows):
            some = rows.to(images.device)
            images[some] = _recolor(images[some], group, u[rows])
        return images
    size, channels = (images.shape[2], images.shape[3]), images.shape[1]
    pixels = images.flatten(2)
    means = pixels.mean(dim=2)
    total = same = torch.eye(channels + 1, device=images.device)
    for item, on in zip(group, gates.to(images.device)):
        matrix = cast(Color, item.op).matrix(_on_device(item.draw(u, size), images), means)
        matrix = torch.where(on[:, None, None], matrix, same)
        total = matrix @ total
        means = (matrix[:, :-1, :-1] @ means[:, :, None])[:, :, 0] + matrix[:, :-1, -1]
    return torch.baddbmm(total[:, :-1, -1:], total[:, :-1, :-1], pixels).clamp_(0, 1).view_as(images)
