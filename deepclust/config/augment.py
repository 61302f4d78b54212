"""The operations a view may be made of, by name, and the check of a description. Importing this
file imports no torch.

An operation is a public class of `views/geometry`, `color`, `pixels`, `mix` or
`features`; its name in a description is the class name in snake_case, its parameters are those
of the constructor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deepclust.config.signature import check_arguments, signature
from deepclust.config.sources import definitions, source
from deepclust.config.targets import load_name
from deepclust.errors import UserError, unknown_key

if TYPE_CHECKING:
    from deepclust.data.views.base import Op

_HOMES = ("geometry", "color", "pixels", "mix", "features")


def op_targets() -> dict[str, str]:
    """Name of every operation to the full name of its class."""
    targets = {}
    for home in (f"deepclust.data.views.{name}" for name in _HOMES):
        path = source(home)
        for name in definitions(path) if path else ():
            if name[0].isupper():
                targets[re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()] = f"{home}.{name}"
    return targets


def check_ops(
    description: Any, where: str, problems: list[str]
) -> list[tuple[str, dict[str, Any]]]:
    """The targets and arguments of a list of operations; what is wrong with it is added to
    `problems`.

    description: [{name: {parameter: value, ...} or null}, ...]. where: its key, for the messages.
    """
    if not isinstance(description, Sequence) or isinstance(description, str):
        problems.append(
            f"{where}={description}: must be a list of operations, such as [{{horizontal_flip: {{p:"
            " 0.5}}]"
        )
        return []
    targets, found = op_targets(), []
    for place, entry in enumerate(description):
        spot = f"{where}[{place}]"
        if not isinstance(entry, Mapping) or len(entry) != 1:
            problems.append(
                f"{spot}={entry}: must be one operation with its parameters, such as {{resize:"
                " {}}"
            )
            continue
        name, values = next(iter(entry.items()))
        if name not in targets:
            problems.append(unknown_key(spot, str(name), values, targets))
        elif not isinstance(values or {}, Mapping):
            problems.append(f"{spot}.{name}={values}: must be a mapping of parameters")
        else:
            arguments = check_arguments(
                signature(targets[name]), values or {}, f"{spot}.{name}", problems
            )
            if "ops" in arguments:
                check_ops(arguments["ops"], f"{spot}.{name}.ops", problems)
            found.append((targets[name], arguments))
    return found


def check_augment(augment: Mapping[str, Any], where: str = "augment") -> list[str]:
    """Everything wrong with an `augment` section: unknown keys, views, operations, parameters,
    types and ranges.
    """
    problems = [
        unknown_key(where, str(key), augment[key], ("size", "views"))
        for key in augment
        if key not in ("size", "views")
    ]
    size, views = augment.get("size"), augment.get("views")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        problems.append(
            f"{where}.size={size}: must be an integer >= 1, or null for the size of the images"
        )
    if not isinstance(views, Mapping) or not views:
        problems.append(
            f"{where}.views={views}: must be a mapping from names of views to lists of operations"
        )
        return problems
    for name, description in views.items():
        spot = f"{where}.views.{name}"
        if isinstance(description, Mapping):
            _check_sized(description, spot, problems)
        else:
            check_ops(description, spot, problems)
    return problems


def _check_sized(description: Mapping[str, Any], where: str, problems: list[str]) -> None:
    """A view with a size of its own: {size: pixels or share, ops: [...]}."""
    keys = ("size", "ops")
    problems += [
        unknown_key(where, str(key), value, keys)
        for key, value in description.items()
        if key not in keys
    ]
    size = description.get("size")
    share = isinstance(size, float) and 0 < size <= 1
    if (
        size is not None
        and not share
        and (not isinstance(size, int) or isinstance(size, bool) or size < 1)
    ):
        problems.append(
            f"{where}.size={size}: must be pixels (an integer >= 1), a share of augment.size above"
            " 0 and up to 1.0, or null for augment.size"
        )
    check_ops(description.get("ops"), f"{where}.ops", problems)


def split_view(description: Any, size: tuple[int, int]) -> tuple[Any, tuple[int, int]]:
    """Operations of a view and its size in pixels (height, width), given the `size` of views that
    say none.

    description: a list of operations, or {size, ops} where size is in pixels (int), or a share of
    `size` (float).
    """
    if not isinstance(description, Mapping):
        return description, size
    own = description.get("size")
    if own is None:
        return description["ops"], size
    if isinstance(own, float):
        return description["ops"], (max(1, round(own * size[0])), max(1, round(own * size[1])))
    return description["ops"], (own, own)


def make_ops(description: Any, where: str = "ops") -> list[Op]:
    """The operations of a description. Raises UserError with everything that is wrong with it."""
    problems: list[str] = []
    found = check_ops(description, where, problems)
    ops = []
    for place, (target, arguments) in enumerate([] if problems else found):
        try:
            ops.append(load_name(target)(**arguments))
        except ValueError as error:
            problems.append(f"{where}[{place}].{error}")
    if problems:
        raise UserError("\n".join(problems))
    return ops
