"""The description in a model file: anybody may have written it, so all of it is checked first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn.modules import module as registry

from deepclust.config.signature import check_node, check_value, signature
from deepclust.errors import UserError, unknown_key
from deepclust.types import Positive, Range

MAX_SIDE = 8192
Side = Annotated[int, Range(ge=1, le=8192)]
Channels = Annotated[int, Range(ge=1, le=1048576)]
Clusters = Annotated[int, Range(ge=1, le=1000000)]
MAX_UNSAVED = 2**32
"""Bytes of queues and memories that a file leaves out: no preset has a tenth of it."""


@dataclass(frozen=True)
class Sizes:
    """The plain numbers of a description; see `Clusterer` for what they mean."""

    size: Side
    channels: Channels
    num_clusters: Clusters
    image_size: tuple[Side, Side]
    view_size: Side | tuple[Side, Side]
    mean: list[float]
    std: list[Positive]


def check_spec(
    spec: Mapping[str, Any], trust: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The nodes of backbone and head. Raises UserError, in one line, with all that is wrong.

    Nothing that the description names is imported or built.
    """
    problems: list[str] = []
    known = signature(f"{__name__}.Sizes").parameters
    valid = ("backbone", "head", "clean", *known)
    problems += [unknown_key("", key, spec[key], valid) for key in spec if key not in valid]
    sizes = {
        key: check_value(item.kind, spec.get(key), key, problems) for key, item in known.items()
    }
    nodes = []
    for key in ("backbone", "head"):
        node = spec.get(key)
        if isinstance(node, Mapping):
            nodes.append(check_node(node, key, problems, section=key, trust=trust))
        else:
            problems.append(f"{key} must be a mapping with its own _target_")
    if not problems and len(sizes["mean"]) != len(sizes["std"]):
        problems.append("mean and std must have as many values as one another")
    if not problems and len(sizes["mean"]) not in (1, sizes["channels"]):
        problems.append(f"mean must have one value for each of {sizes['channels']} channels")
    if not problems:
        problems += _check_view(spec.get("clean"), sizes)
    if problems:
        raise UserError("; ".join(problems))
    backbone, head = nodes
    return backbone, head


def _check_view(clean: Any, sizes: Mapping[str, Any]) -> list[str]:
    """What is wrong with the operations that make the clean view."""
    from deepclust.data.views.transform import ViewTransform

    if _largest(clean) > MAX_SIDE:
        return [f"clean must not hold numbers above {MAX_SIDE}"]
    try:
        view = ViewTransform(clean, sizes["view_size"], sizes["mean"], sizes["std"], "clean")
    except UserError as error:
        return str(error).splitlines()
    size = sizes["image_size"]
    for item in view.planned:
        size = item.op.out_size(size, view.size)
        if max(size) > MAX_SIDE:
            return [f"clean makes images of {max(size)} px, more than {MAX_SIDE}"]
    return []


def _largest(value: Any) -> float:
    """The largest number inside a value."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return max(map(_largest, value), default=0.0)
    return abs(value) if isinstance(value, int | float) else 0.0


def check_size(make: Callable[[], Any], weights: Mapping[str, Tensor]) -> None:
    """Raises UserError where a network would not have the tensors of the file, or is too large.

    make: builds the network. It is built without memory, so that what a description says of sizes
    costs nothing before it is known to be true.
    """
    with torch.device("meta"), _at_most(2 * len(weights) + 1000):
        network = make()
    if fault := mismatch(network, weights):
        raise UserError(fault)
    unsaved = [tensor for name, tensor in network.named_buffers() if name not in weights]
    size = sum(tensor.numel() * tensor.element_size() for tensor in unsaved)
    if size > MAX_UNSAVED:
        raise UserError(f"its buffers for training alone take {size:,} bytes")


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Inside, networks of more parameters and buffers than that raise UserError: they never end."""
    made, own = 0, threading.get_ident()

    def counted(*_: Any) -> None:
        nonlocal made
        made += threading.get_ident() == own
        if made > count:
            raise UserError("it describes many more tensors than the file holds")

    handles = [
        registry.register_module_parameter_registration_hook(counted),
        registry.register_module_buffer_registration_hook(counted),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mismatch(network: Any, weights: Mapping[str, Tensor]) -> str:
    """What of a file's tensors does not fit a network, "" where all do.

    Buffers that only training needs may be left out of the file.
    """
    expected = network.state_dict()
    training = {f"head.{name}" for name in getattr(network.head, "training_buffers", ())}
    missing = sorted(set(expected) - set(weights) - training)
    unexpected = sorted(set(weights) - set(expected))
    if missing or unexpected:
        return f"missing {_few(missing)}, unexpected {_few(unexpected)}"
    wrong = [name for name in weights if weights[name].shape != expected[name].shape]
    if wrong:
        found, wanted = tuple(weights[wrong[0]].shape), tuple(expected[wrong[0]].shape)
        return f"{wrong[0]} has the shape {found}, and {wanted} by the description"
    return ""


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "nothing") + more
