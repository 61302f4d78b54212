"""Objects from `_target_` nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepclust.config.signature import check_node, checked_signature
from deepclust.config.targets import resolve
from deepclust.errors import ConfigError, show


def build(
    node: Mapping[str, Any],
    *,
    section: str | None = None,
    trust: Sequence[str] = (),
    **injected: Any,
) -> Any:
    """The object that a `_target_` node describes.

    The whole tree is checked before anything of it is imported or built. section: what it must be,
    `data`, `backbone` or `head`; None for any. injected: arguments that the program knows (`dim`,
    `num_clusters`, ...); each goes where a signature names it and the node does not. Raises
    ConfigError with all that is wrong.
    """
    problems: list[str] = []
    checked = check_node(node, section or "", problems, section=section, trust=trust)
    if problems:
        raise ConfigError([f"{show(node.get('_target_'))}: {line}" for line in problems])
    return _build(checked, trust, injected)


def _build(node: Mapping[str, Any], trust: Sequence[str], injected: Mapping[str, Any]) -> Any:
    """The object of a node that was checked, nested ones first."""
    target = resolve(node["_target_"], trust)
    names = checked_signature(node["_target_"], None, trust).parameters
    values = {key: value for key, value in injected.items() if key in names}
    for key, value in node.items():
        if key != "_target_":
            nested = isinstance(value, Mapping) and "_target_" in value
            values[key] = _build(value, trust, injected) if nested else value
    return target(**values)
