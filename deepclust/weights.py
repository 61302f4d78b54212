"""Weights of a file: where in it a timm network lies, and whether all of the network is there.

A file may hold several networks, below nested mappings and prefixes. Here they are one flat
mapping: `/` follows the name of a nested mapping, as in `teacher/backbone.blocks.0.norm1.weight`,
and a prefix says where a network begins.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepclust.errors import UserError

AVERAGED = {"ema", "teacher", "target", "averaged", "swa"}
"""Words in the name of a network that is the mean of another one over training: of several the one
to use.
"""
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What DistributedDataParallel, torch.compile and their like put between the parts of a name."""
ON_TOP = re.compile(
    r"fc\d*$|g$|mlp$|queue|mask_token$|last_layer|center$|.*(head|classif|proj|predict|prototype|decoder)"
)
"""What the parts beside a backbone are called in published checkpoints: projections, classifiers,
decoders.
"""
NOT_LIKE_IT = 10**9
"""The distance of what cannot even be compared."""
RENAMED_AT_MOST = 6
"""Parts of a file that are tried with timm's conversion of foreign names; each costs building the
network once.
"""


class Loaded(NamedTuple):
    """net: with the file's weights. note: what was loaded from where, for people."""

    net: nn.Module
    note: str


class Misfit(Exception):
    """A part of a file that is not the network, or not all of it. distance: tensors that are wrong,
    of all of them.
    """

    def __init__(self, text: str, distance: int) -> None:
        super().__init__(text)
        self.distance = distance


def load_from_file(file: str, name: str, create: Callable[..., nn.Module]) -> Loaded:
    """The network with weights from a file: all of them, or none.

    file: .safetensors, or what `torch.save` wrote, read with `weights_only=True`. name: of the
    network, for messages.
    create: gives the network; with `pretrained=True` and `pretrained_cfg_overlay={"state_dict":
    ...}` as timm loads it, that is with foreign names converted, position embeddings resized and
    the first layer fitted to the channels.

    The network is looked for at every prefix of the file. Of several the averaged one is taken
    (`ema`, `teacher`, `target`), else the first. Where none holds all its names, timm's conversion
    is tried on the likeliest parts. Raises UserError with what is missing, what is left over and
    what has another shape.
    """
    content = read_weights(file)
    tensors = flat(content)
    source = f"backbone.weights={file}"
    if not tensors:
        raise UserError(
            f"{source} could not be loaded (it holds no tensors by name); give a file of weights"
        )
    wanted = [key for key in create().state_dict() if not key.endswith("num_batches_tracked")]
    count = f"{len(wanted)} of {len(wanted)}"
    found = _prefixes(tensors, wanted)
    if len(wanted) not in found.values():
        unwrapped = {_unwrapped(key): value for key, value in tensors.items()}
        if len(wanted) in _prefixes(unwrapped, wanted).values():
            tensors, found = unwrapped, _prefixes(unwrapped, wanted)
    whole = _averaged_first([prefix for prefix, number in found.items() if number == len(wanted)])
    faults: list[Misfit] = []
    for prefix in whole:
        inner = tuple(other for other in whole if other != prefix and other.startswith(prefix))
        part = _below(tensors, prefix, inner)
        others = [_place(other) for other in whole if other != prefix]
        beside = f" (not used: the same {', '.join(others)})" if others else ""
        try:
            net, left = _loaded(create, part)
        except Misfit as misfit:
            faults.append(
                Misfit(f"{count} tensors found {_place(prefix)}; {misfit}", misfit.distance)
            )
            continue
        return Loaded(net, f"{source}: {count} tensors found {_place(prefix)}{beside}{left}")
    for prefix, part in [] if whole else _renamable(content, tensors, wanted):
        try:
            net, left = _loaded(create, part)
        except Misfit as misfit:
            faults.append(
                Misfit(f"{_place(prefix)} with names converted: {misfit}", misfit.distance)
            )
            continue
        return Loaded(
            net, f"{source}: {count} tensors found {_place(prefix)}, names converted{left}"
        )
    raise UserError(
        f"{source} could not be loaded: this is not {name}, or not all of it."
        f" {_nearest(tensors, found, wanted, faults)}. Give the backbone.name that these weights"
        " were trained with, or a file that holds its tensors alone"
    )


def read_weights(file: str) -> Mapping[str, Any]:
    """What a file of weights holds, nested as it is. UserError if it cannot be read: no code of a
    file is ever run.
    """
    path = Path(file).expanduser()
    source = f"backbone.weights={file}"
    try:
        with open(path, "rb") as opened:
            head = opened.read(9)
        if head[8:] == b"{":  # safetensors: the length of a JSON text in 8 bytes, then the text
            from safetensors.torch import load_file

            return load_file(path)
        # Checkpoints of training scripts keep their command line in a Namespace, which is plain
        # data.
        allowed = getattr(torch.serialization, "safe_globals", None)
        with allowed([argparse.Namespace]) if allowed else nullcontext():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle, safetensors and torch each have their own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if "weights_only" in str(error) and "GLOBAL" in str(error):
            what = re.search(r"GLOBAL (\S+)", str(error))
            lines[0] = (
                f"it holds Python objects{f', {what[1]}' if what else ''}, which are never loaded;"
                " where its origin is trusted, save its tensors alone with torch.save"
            )
        raise UserError(
            f"{source} could not be loaded ({lines[0]}); give a local file of tensors"
        ) from error
    return content if isinstance(content, Mapping) else {}


def flat(content: Mapping[Any, Any], above: str = "") -> dict[str, Tensor]:
    """All tensors of nested mappings by name, each nested mapping's name followed by `/`."""
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            tensors[f"{above}{key}"] = value
        elif isinstance(value, Mapping):
            tensors |= flat(value, f"{above}{key}/")
    return tensors


def _prefixes(tensors: Mapping[str, Tensor], wanted: list[str]) -> Counter[str]:
    """How many of the wanted names there are below each prefix, in the order of the file."""
    names, counts = set(wanted), Counter[str]()
    for key in tensors:
        starts = [0, *(found.end() for found in re.finditer("[./]", key))]
        counts.update(key[:start] for start in starts if key[start:] in names)
    return counts


def _below(
    tensors: Mapping[str, Tensor], prefix: str, without: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The tensors of the mapping in which a prefix ends, its names without it.

    Those of mappings nested in it, and those under prefixes in `without`, are no part of it.
    """
    keys = [key for key in tensors if key.startswith(prefix) and not key.startswith(without)]
    return {
        key.removeprefix(prefix): tensors[key]
        for key in keys
        if "/" not in key.removeprefix(prefix)
    }


def _place(prefix: str) -> str:
    return f"under {prefix}" if prefix else "at the top"


def _averaged_first(prefixes: list[str]) -> list[str]:
    """Prefixes that name an averaged network before the others, else in their order."""
    return sorted(
        prefixes, key=lambda prefix: not AVERAGED & set(re.split("[./_]", prefix.lower()))
    )


def _unwrapped(key: str) -> str:
    """A name without what wrappers put into it."""
    return "/".join(
        ".".join(p for p in part.split(".") if p not in WRAPPERS) for part in key.split("/")
    )


def _loaded(create: Callable[..., nn.Module], part: Mapping[str, Any]) -> tuple[nn.Module, str]:
    """The network with these tensors as timm loads them, and which were left out, in words. Raises
    Misfit.
    """
    left: list[str] = []

    def fitting(net: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        check_fit(net, tensors)
        own = net.state_dict()
        left[:] = sorted(
            key for key in tensors if key not in own and not key.endswith("num_batches_tracked")
        )
        return {key: value for key, value in tensors.items() if key in own}

    try:
        with watched_loading(fitting) as seen:
            net = create(pretrained=True, pretrained_cfg_overlay={"state_dict": dict(part)})
    except Misfit:
        raise
    except (
        Exception
    ) as error:  # a conversion that meets names for which it was not made raises anything
        raise Misfit(
            f"timm cannot load it ({type(error).__name__}: {error})", NOT_LIKE_IT
        ) from error
    if not seen:
        raise Misfit("timm loads nothing into this network", NOT_LIKE_IT)
    for config in (
        "pretrained_cfg",
        "default_cfg",
    ):  # else the file's tensors stay as long as the network
        setattr(net, config, {**getattr(net, config), "state_dict": None})
    return net, f"; left out: {' '.join(left)}" if left else ""


@contextmanager
def watched_loading(
    look: Callable[[nn.Module, Mapping[str, Any]], dict[str, Tensor] | None],
) -> Iterator[list[nn.Module]]:
    """Inside, `look` sees each network and what is about to be loaded into it; gives the networks
    it has seen.

    What it gives is loaded instead, strictly or not: it has looked. What it raises is raised.
    timm's conversions are its models' own and end in `load_state_dict`, mostly not strict: only
    there is to be seen what a network would be left without.
    """
    usual = nn.Module.load_state_dict
    seen: list[nn.Module] = []

    def load(
        module: nn.Module, state_dict: Mapping[str, Any], *arguments: Any, **options: Any
    ) -> Any:
        seen.append(module)
        chosen = look(module, state_dict)
        if chosen is None:
            return usual(module, state_dict, *arguments, **options)
        return usual(module, chosen, strict=False)

    nn.Module.load_state_dict = load  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield seen
    finally:
        nn.Module.load_state_dict = usual


def missing_in(net: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """What of a network a mapping lacks: it would stay as it was drawn."""
    return [
        key
        for key in net.state_dict()
        if key not in state and not key.endswith("num_batches_tracked")
    ]


def check_fit(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises Misfit unless a mapping holds all of a network, and besides only what lies on top of
    networks.
    """
    own = net.state_dict()
    missing = missing_in(net, state)
    both = [key for key in own if key in state and state[key].shape != own[key].shape]
    differ = [
        f"{key} {tuple(state[key].shape)} in the file and {tuple(own[key].shape)} in the network"
        for key in both
    ]
    classifier = getattr(net, "pretrained_cfg", {}).get("classifier") or ()
    tops = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    above = tuple(f"{top}." for top in tops)
    others = [key for key in state if key not in own and not key.startswith(above)]
    strange = [key for key in others if not ON_TOP.match(key.split(".")[0])]
    faults = [("missing", missing), ("of another shape", differ), ("not of this network", strange)]
    number = len(missing) + len(differ) + len(strange)
    if number:
        raise Misfit(
            "; ".join(f"{what}: {_some(names)}" for what, names in faults if names), number
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _renamable(
    content: Mapping[str, Any], tensors: Mapping[str, Tensor], wanted: list[str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Parts of a file that may be the network by other names: prefixes with at least half as many
    tensors.

    The whole comes first, nested as it is: some conversions look into it themselves.
    """
    yield "", content
    counts = Counter[str]()
    for key in tensors:
        counts.update(key[: found.end()] for found in re.finditer("[./]", key))
    parts = {part for key in wanted for part in key.split(".")}
    likely = [
        p
        for p, count in counts.items()
        if 2 * count >= len(wanted) and re.split("[./]", p)[-2] not in parts
    ]
    for prefix in _averaged_first(sorted(likely, key=lambda prefix: -counts[prefix]))[
        :RENAMED_AT_MOST
    ]:
        yield prefix, _below(tensors, prefix)


def _nearest(
    tensors: Mapping[str, Tensor], found: Counter[str], wanted: list[str], faults: list[Misfit]
) -> str:
    """What comes nearest to the network, in words."""
    prefix, number = found.most_common(1)[0] if found else ("", 0)
    fault = min(faults, key=lambda fault: fault.distance, default=None)
    if fault is not None and (number == len(wanted) or fault.distance < len(wanted) - number):
        return str(fault)
    if not number:
        return (
            f"None of its {len(wanted)} tensors ({_some(wanted)}) is there; the file holds"
            f" {_some(list(tensors))}"
        )
    part = _below(tensors, prefix)
    missing = [key for key in wanted if key not in part]
    left = [
        key for key in part if key not in set(wanted) and not key.endswith("num_batches_tracked")
    ]
    text = f"{number} of {len(wanted)} tensors found {_place(prefix)}; missing: {_some(missing)}"
    return text + (f"; left over: {_some(left)}" if left else "")
