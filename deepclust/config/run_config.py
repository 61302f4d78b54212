"""A checked configuration: what it holds, its name and folder, and how two of them differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepclust.config import settings
from deepclust.config.defaults import with_all_defaults
from deepclust.errors import show
from deepclust.runtime.files import choose_path

NO_EFFECT = ("trainer.num_workers", "trainer.log_every_steps")
"""Keys of a stage that change how long or how chattily it runs, not what comes out."""
_ABSENT = object()


@dataclass(frozen=True)
class Stage:
    """One training of the backbone with one head; `head` is a `_target_` node, `augment` {size,
    views}.
    """

    name: str
    head: dict[str, Any]
    optim: settings.OptimSettings
    trainer: settings.TrainerSettings
    augment: dict[str, Any]


@dataclass(frozen=True)
class RunConfig:
    """A checked configuration. `tree` is what was asked for, as plain containers; the rest is read
    from it.
    """

    tree: dict[str, Any]
    choices: dict[str, str]
    picked: tuple[str, ...]
    seed: int
    num_clusters: int | None
    resume: str
    trust: list[str]
    run: settings.RunSettings
    checkpoint: settings.CheckpointSettings
    distributed: settings.DistributedSettings
    eval: settings.EvalSettings
    data: dict[str, Any]
    backbone: dict[str, Any]
    logger: dict[str, Any]
    stages: dict[str, Stage]

    def text(self) -> str:
        """The tree as YAML, for config.yaml."""
        import yaml

        return yaml.safe_dump(self.tree, sort_keys=False)

    def name(self) -> str:
        """`run.name`, else experiment-recipe-heads-data-kN-seed, of which only recipe, data and
        seed are always there.

        Heads are named where the command line chose them, N where `num_clusters` was given.
        """
        if self.run.name is not None:
            return self.run.name
        heads = [
            self.choices[key]
            for key in self.picked
            if key.partition("@")[0] == "head" and key in self.choices
        ]
        clusters = [] if self.num_clusters is None else [f"k{self.num_clusters}"]
        parts = [
            self.choices.get("experiment"),
            self.choices.get("recipe"),
            *heads,
            self.choices.get("data"),
            *clusters,
        ]
        return "-".join(str(part) for part in [*parts, self.seed] if part is not None)

    def folder(self) -> Path:
        """Where the run lives: `run.dir`, else `run.root` / name. Raises UserError for what is no
        path.
        """
        return choose_path(self.run.root, self.name(), self.run.dir)


def differences(old_text: str, new: RunConfig) -> list[str]:
    """Keys that change results and differ between a run folder's config.yaml and a new
    configuration.

    One line each, "key: old -> new". Where and how often things are written, shown or resumed does
    not count.
    """
    import yaml

    try:
        old = _effective(with_all_defaults(yaml.safe_load(old_text), trust=new.trust))
    except (yaml.YAMLError, AttributeError, TypeError):
        return ["config.yaml of the run folder cannot be read"]
    return list(_changes(old, _effective(new.tree), ""))


def _changes(old: Any, new: Any, path: str) -> Iterator[str]:
    """What differs, at the highest key that only one of the two has."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*new, *(key for key in old if key not in new)]:
            yield from _changes(
                old.get(key, _ABSENT), new.get(key, _ABSENT), f"{path}.{key}" if path else str(key)
            )
    elif old != new:
        yield f"{path}: {_side(old)} -> {_side(new)}"


def _side(value: Any) -> str:
    return (
        "absent" if value is _ABSENT else "present" if isinstance(value, Mapping) else show(value)
    )


def _effective(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the results: seed, clusters, data, backbone and each stage with what it falls
    back to.
    """
    stages = {name: _stage_sections(tree, name) for name in tree.get("stages") or {}}
    for stage in stages.values():
        stage["trainer"] = {
            key: value
            for key, value in stage["trainer"].items()
            if f"trainer.{key}" not in NO_EFFECT
        }
    sync = (tree.get("distributed") or {}).get("sync_batchnorm")
    alone = {key: tree.get(key) for key in ("seed", "num_clusters", "data", "backbone")}
    return {**alone, "distributed.sync_batchnorm": sync, "stages": stages}


def _stage_sections(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """head, optim, augment and trainer of a stage; what it does not say comes from the top-level
    groups.
    """
    own = (tree.get("stages") or {}).get(name) or {}
    merged = {key: _merge(tree.get(key), own.get(key)) for key in ("optim", "augment", "trainer")}
    head = own.get("head")
    if not isinstance(head, Mapping) or "_target_" not in head:
        head = _merge(tree.get("head"), head)
    return {"head": head, **merged}


def _merge(base: Any, over: Any) -> Any:
    if not isinstance(base, Mapping) or not isinstance(over, Mapping):
        return base if over is None else over
    return {**base, **{key: _merge(base.get(key), value) for key, value in over.items()}}
