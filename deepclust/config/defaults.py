"""Defaults filled in: a default stands in one place, the signature of a constructor or dataclass.

The files of conf/ say only what differs. Composing fills in the rest, so that `--cfg`, config.yaml
and the difference that is shown on resume have every value that is used.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from deepclust.config.settings import SECTIONS
from deepclust.config.signature import (
    COMPUTED,
    INJECTED,
    REQUIRED,
    Node,
    Section,
    Signature,
    checked_signature,
    signature,
)
from deepclust.config.values import Either, Kind
from deepclust.errors import UserError

NODES = ("data", "backbone", "head")
"""Sections with a `_target_`; `targets.SECTIONS` says what it may name, unless the user trusts
more.
"""
STAGE_CHOICE = re.compile(r"(\w+)@stages\.([^.]+)\.\1")
"""The key of an option that was chosen for one stage, as in `optim@stages.scan.optim=sgd`."""


def with_all_defaults(
    tree: Mapping[str, Any],
    choices: Mapping[str, str] | None = None,
    trust: Sequence[str] = (),
) -> dict[str, Any]:
    """The tree with every value that will be used: constructors' defaults fill what no file says.

    What a stage's section leaves out comes from the top-level one, so it stays as it is; unless an
    option was chosen for it (`optim@stages.scan.optim=sgd`), which comes with its own defaults.

    choices: group, or group@place, to option. trust: modules that `_target_` may name besides ours.
    """
    filled = dict(tree)
    for key, target in SECTIONS.items():
        values = filled.get(key, {})
        if isinstance(values, Mapping):
            filled[key] = with_defaults(signature(target), values)
    for key in NODES:
        filled[key] = node_with_defaults(filled.get(key), key, trust)
    stages = filled.get("stages")
    if isinstance(stages, Mapping):
        chosen = {match.groups() for key in choices or () if (match := STAGE_CHOICE.fullmatch(key))}
        filled["stages"] = {
            name: _stage_with_defaults(name, stage, chosen, trust) for name, stage in stages.items()
        }
    return filled


def _stage_with_defaults(
    name: str, stage: Any, chosen: set[tuple[str, ...]], trust: Sequence[str]
) -> Any:
    """One stage's sections. chosen: pairs of group and stage for which an option was chosen."""
    if not isinstance(stage, Mapping):
        return stage
    filled = dict(stage)
    if "head" in stage:
        filled["head"] = node_with_defaults(stage["head"], "head", trust)
    for key, target in SECTIONS.items():
        if (key, name) in chosen and isinstance(stage.get(key), Mapping):
            filled[key] = with_defaults(signature(target), stage[key])
    return filled


def with_defaults(
    known: Signature, values: Mapping[str, Any], trust: Sequence[str] = ()
) -> dict[str, Any]:
    """`values` with the default of everything that they leave out, in the signature's order.

    What the program fills in itself (INJECTED) stays out, and so does what must be given. Unknown
    keys come last, as they are: the check names them.
    """
    filled: dict[str, Any] = {}
    for name, parameter in known.parameters.items():
        if name in values:
            filled[name] = _filled(parameter.kind, values[name], trust)
        elif name not in INJECTED and parameter.default not in (REQUIRED, COMPUTED):
            filled[name] = _filled(parameter.kind, copy.deepcopy(parameter.default), trust)
    return {**filled, **{name: value for name, value in values.items() if name not in filled}}


def node_with_defaults(node: Any, section: str | None = None, trust: Sequence[str] = ()) -> Any:
    """The same for a node with a `_target_`; one that may not be built stays as it is."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        return node
    try:
        known = checked_signature(node["_target_"], section, trust)
    except UserError:
        return node
    values = {name: value for name, value in node.items() if name != "_target_"}
    return {"_target_": node["_target_"], **with_defaults(known, values, trust)}


def _filled(kind: Kind, value: Any, trust: Sequence[str]) -> Any:
    """A value with the defaults of the nested object or section that it is."""
    if not isinstance(value, Mapping):
        return value
    for option in kind.options if isinstance(kind, Either) else [kind]:
        if isinstance(option, Node):
            return node_with_defaults(value, option.section, trust)
        if isinstance(option, Section):
            return with_defaults(option.signature, value, trust)
    return value
