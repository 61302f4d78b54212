"""Random views of images: one description, two engines.

`ViewTransform.batch` makes the views of a whole batch at once on the images' device, with fresh
parameters for each image. `ViewTransform.sample` makes one view with torchvision, for loader
workers. Both draw the same parameters from the same key. In a batch, consecutive geometric
operations are one interpolation, and consecutive colour operations one matrix per image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from deepclust.config.augment import check_augment, make_ops, split_view
from deepclust.data.random import uniforms
from deepclust.data.views.base import (
    Color,
    Erase,
    Feature,
    Geometric,
    Op,
    Params,
    Pixel,
    Size,
    integers,
    warp,
)
from deepclust.data.views.mix import RandomOps
from deepclust.data.views.pixels import Identity
from deepclust.errors import UserError, near


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

    description: operations in order, [{name: {parameter: value}}, ...]; those that paint over parts
        come last.
    size: of the view in pixels, (height, width) or one number for both; for crops and resizes
        without a size of their own.
    mean, std: of the image set, one value per channel, for pixels scaled to [0, 1].
    where: what messages call the description.

    Raises:
        UserError: an operation or a parameter does not exist, has a wrong value, or paints too
            early.
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
        # False sorts before True: any other order has an operation behind one that paints
        if painting != sorted(painting):
            raise UserError(
                f"{where}: cutout and random_erasing paint over the finished view; put them at"
                " the end"
            )
        self.groups = _group(self.planned)
        # (x - mean) / std as one product and one sum
        self._scale = 1 / torch.tensor(std, dtype=torch.float32)[:, None, None]
        self._shift = -torch.tensor(mean, dtype=torch.float32)[:, None, None] * self._scale

    def batch(self, images: Tensor, keys: Tensor) -> Tensor:
        """(B, C, h, w) float32 views on the images' device.

        Parameters are drawn on the CPU, whatever the device: they are few, and then they are equal
        on every device.

        images: (B, C, H, W) uint8, or float features (B, D, 1, 1), which are not scaled by 1/255.
        keys: (B,) int64 random keys.
        """
        u = uniforms(keys.cpu(), self.num_uniforms)
        views = _floats(images)
        for group in self.groups:
            if not isinstance(group[0].op, Erase):
                views = _apply(views, group, u, self.size)
        views = self._normalise(views)
        # painting comes after normalisation, where 0 is the mean
        for group in self.groups:
            if isinstance(group[0].op, Erase):
                views = _apply(views, group, u, self.size)
        return views

    def sample(self, image: Tensor, key: int) -> Tensor:
        """One (C, h, w) float32 view, with the parameters that `batch` draws from the same key.

        image: (C, H, W) uint8, or (D, 1, 1) float32 features.
        key: random key.
        """
        u = uniforms(torch.tensor([key]), self.num_uniforms)
        row = u[0].tolist()
        drawn = [item for item in self.planned if item.chosen(row)]
        for item in drawn:
            if not isinstance(item.op, Erase):
                params = item.draw(u, (image.shape[1], image.shape[2]))
                image = item.op.sample(image, params, self.size)
        view = self._normalise(_floats(image[None]))
        for item in drawn:
            if isinstance(item.op, Erase):
                view = item.op.batch(view, item.draw(u, (view.shape[2], view.shape[3])))
        return view[0]

    def _normalise(self, views: Tensor) -> Tensor:
        """The views with mean 0 and deviation 1 over the image set; in place."""
        return views.mul_(self._scale.to(views.device)).add_(self._shift.to(views.device))


def _floats(images: Tensor) -> Tensor:
    """A float32 copy: bytes as numbers in [0, 1], features as they are."""
    # always a copy, as operations overwrite what they get and the data set stays in memory
    copy = images.to(torch.float32, copy=True)
    if images.is_floating_point():
        return copy
    return copy.mul_(1 / 255)


def build_views(
    augment: Mapping[str, Any],
    image_set: Images,
    names: Sequence[str],
) -> dict[str, ViewTransform]:
    """The named views of an `augment` section for a set of images.

    augment: `views`, a mapping from names to descriptions, which may have a size of their own; and
        `size`, of the others, by default that of the images.
    image_set: for its size, mean and std.
    names: of the views to build.

    Raises:
        UserError: a view, an operation or a parameter does not exist; the message has the nearest
            valid name. Or operations are for images and the set has features, or the reverse.
    """
    if problems := check_augment(augment):
        raise UserError("\n".join(problems))
    views = augment["views"]
    built = {}
    for name in dict.fromkeys(names):
        if name not in views:
            nearest = near(name, views)
            advice = f"did you mean {nearest}?" if nearest else f"there are: {', '.join(views)}"
            raise UserError(f"augment.views has no view {name!r}; {advice}")
        side = augment.get("size")
        default_size = (side, side) if side else image_set.size
        ops, size = split_view(views[name], default_size)
        where = f"augment.views.{name}"
        built[name] = ViewTransform(ops, size, image_set.mean, image_set.std, where)
        _refuse_other_kind(built[name], where)
    return built


def _refuse_other_kind(view: ViewTransform, where: str) -> None:
    """Raises UserError for operations on images with a set of features, or the reverse."""
    # features are stored as images of 1 x 1 pixels
    features = view.size == (1, 1)
    for item in view.planned:
        name = type(item.op).__name__
        if features and not isinstance(item.op, Feature):
            raise UserError(
                f"{where}: {name} is for images, the data are features; choose augment=features"
            )
        if not features and isinstance(item.op, Feature):
            raise UserError(
                f"{where}: {name} is for features, the data are images; choose another augment"
            )


class _Choice(NamedTuple):
    """Which of several operations an image gets, by one uniform.

    It holds if the uniform in `column`, cut into `parts` equal parts, lies in part `number`.
    """

    column: int
    number: int
    parts: int


@dataclass(frozen=True)
class _Planned:
    """An operation and the uniforms that it reads, which are columns of an image's row of them.

    The first column decides whether an image gets the operation; the next ones are for parameters.
    """

    op: Op
    column: int
    choice: _Choice | None = None
    """For operations of `RandomOps`: when they are the one that was drawn."""

    def gate(self, u: Tensor) -> Tensor:
        """(B,) bool: which images get the operation, from (B, n) uniforms."""
        on = u[:, self.column] < self.op.p
        if self.choice is None:
            return on
        drawn = integers(u[:, self.choice.column], self.choice.parts)
        return on & (drawn == self.choice.number)

    def chosen(self, row: list[float]) -> bool:
        """`gate` for the uniforms of one image."""
        if self.choice is not None:
            drawn = int(row[self.choice.column] * self.choice.parts)
            if drawn != self.choice.number:
                return False
        return row[self.column] < self.op.p

    def draw(self, u: Tensor, size: Size) -> Params:
        """The operation's parameters for images of this size."""
        first = self.column + 1
        return self.op.draw(u[:, first : first + self.op.draws], size)


def _plan(ops: Sequence[Op]) -> tuple[list[_Planned], int]:
    """Every operation with its columns of uniforms, and the number of uniforms per image."""
    planned: list[_Planned] = []
    column = 0
    for op in ops:
        if not isinstance(op, RandomOps):
            planned.append(_Planned(op, column))
            column += 1 + op.draws
            continue
        # A draw becomes all its operations, of which an image gets one. So their order is free, and
        # sorted by kind those that can be applied as one stand side by side.
        numbered = sorted(enumerate(op.ops), key=lambda item: _kind_order(item[1]))
        for _ in range(op.count):
            for number, candidate in numbered:
                if not isinstance(candidate, Identity):
                    choice = _Choice(column, number, len(op.ops))
                    planned.append(_Planned(candidate, column + 1, choice))
            # one uniform for the choice, one for p, and the parameters, which all candidates share,
            # as at most one of them reads them
            column += 2 + max(candidate.draws for candidate in op.ops)
    return planned, column


def _kind_order(op: Op) -> tuple[bool, bool]:
    """Sort key: geometric operations, then those on pixels, then colours."""
    return isinstance(op, Color), isinstance(op, Pixel)


def _group(planned: Sequence[_Planned]) -> list[list[_Planned]]:
    """Runs of neighbours that the batch engine applies as one operation."""
    groups: list[list[_Planned]] = []
    for item in planned:
        if groups and all(_joins(other.op, item.op) for other in groups[-1]):
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _joins(first: Op, second: Op) -> bool:
    """Whether two operations can be one: colours, or geometric ones that agree on their fill."""
    if isinstance(first, Geometric) and isinstance(second, Geometric):
        if first.alone or second.alone:
            return False
        return first.fill is None or second.fill is None or first.fill == second.fill
    return isinstance(first, Color) and isinstance(second, Color)


def _apply(images: Tensor, group: Sequence[_Planned], u: Tensor, target: Size) -> Tensor:
    """(B, C, H, W) float32 images, which may be overwritten, after a group of operations."""
    if isinstance(group[0].op, Geometric):
        return (
            group[0].op.batch(images, target)
            if group[0].op.alone
            else _move(images, group, u, target)
        )
    if isinstance(group[0].op, Color):
        return _recolor(images, group, u)
    item = group[0]
    op = cast(Pixel | Erase, item.op)
    size = (images.shape[2], images.shape[3])
    rows = item.gate(u).nonzero()[:, 0]
    # all images: without picking them out and putting them back
    if len(rows) == len(images):
        return op.batch(images, _on_device(item.draw(u, size), images))
    if len(rows):
        chosen = rows.to(images.device)
        params = _on_device(item.draw(u[rows], size), images)
        images[chosen] = op.batch(images[chosen], params)
    return images


def _on_device(params: Params, images: Tensor) -> Params:
    """The parameters on the images' device."""
    return {name: value.to(images.device, non_blocking=True) for name, value in params.items()}


def _move(images: Tensor, group: Sequence[_Planned], u: Tensor, target: Size) -> Tensor:
    """One interpolation for all geometric operations of a group."""
    size = (images.shape[2], images.shape[3])
    total = torch.eye(3)[None]
    identity = torch.eye(3)
    fill = "zeros"
    for item in group:
        op = cast(Geometric, item.op)
        matrix = op.matrix(item.draw(u, size), size, target)
        # maps lead from output to input, so the map of a later operation stands to the right
        total = total @ torch.where(item.gate(u)[:, None, None], matrix, identity)
        size = op.out_size(size, target)
        fill = op.fill or fill
    return warp(images, total, size, fill)


def _recolor(images: Tensor, group: Sequence[_Planned], u: Tensor) -> Tensor:
    """One affine map of the channels per image for all colour operations of a group."""
    gates = torch.stack([item.gate(u) for item in group])
    rows = gates.any(dim=0).nonzero()[:, 0]
    # picking out a few images is cheaper than an identity map of all
    if len(rows) <= len(images) // 2:
        if len(rows):
            chosen = rows.to(images.device)
            images[chosen] = _recolor(images[chosen], group, u[rows])
        return images
    size = (images.shape[2], images.shape[3])
    channels = images.shape[1]
    pixels = images.flatten(2)
    means = pixels.mean(dim=2)
    identity = torch.eye(channels + 1, device=images.device)
    total = identity
    for item, on in zip(group, gates.to(images.device)):
        op = cast(Color, item.op)
        matrix = op.matrix(_on_device(item.draw(u, size), images), means)
        matrix = torch.where(on[:, None, None], matrix, identity)
        total = matrix @ total
        # the next operation turns about the mean of the image that it gets, which this map moved
        means = (matrix[:, :-1, :-1] @ means[:, :, None])[:, :, 0] + matrix[:, :-1, -1]
    offset = total[:, :-1, -1:]
    linear = total[:, :-1, :-1]
    # clamped only here: values that leave [0, 1] on the way may come back
    return torch.baddbmm(offset, linear, pixels).clamp_(0, 1).view_as(images)
