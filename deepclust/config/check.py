"""Every key of a composed configuration checked against signatures, all faults at once. Imports no
torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from deepclust.config import settings
from deepclust.config.augment import check_augment
from deepclust.config.compose import Composed, options
from deepclust.config.defaults import NODES
from deepclust.config.run_config import RunConfig, Stage, _stage_sections
from deepclust.config.settings import SECTIONS, SETTINGS
from deepclust.config.signature import check_arguments, check_node, signature
from deepclust.errors import show, unknown_key

JOB = signature("deepclust.config.settings.JobSettings")
TOP = (*JOB.parameters, *SECTIONS, "augment", *NODES, "stages")
STAGE = ("head", "optim", "augment", "trainer")


# --- checking ---------------------------------------------------------------------------------


def _check(composed: Composed, overrides: Sequence[str], problems: list[str]) -> RunConfig | None:
    tree = composed.tree
    _check_top(tree, problems)
    job = check_arguments(
        JOB, {key: tree[key] for key in JOB.parameters if key in tree}, "", problems
    )
    trust = _trusted(job.get("trust"), overrides, problems)
    read = {key: _section(key, tree.get(key), key, problems) for key in SECTIONS}
    _check_views(tree.get("augment"), "augment", problems)
    nodes = {key: _node(tree.get(key), key, problems, trust) for key in NODES}
    stages = _check_stages(composed, problems, trust)
    _check_places(job, read, problems)
    if problems:
        return None
    _check_relations(stages, problems)
    _check_frozen(nodes["backbone"], stages, problems)
    _check_given_is_used(composed, problems)
    if problems:
        return None
    made = {key: SETTINGS[key](**read[key]) for key in ("run", "checkpoint", "distributed", "eval")}
    made |= {key: nodes[key] for key in ("data", "backbone")}
    picked = tuple(composed.picked)
    return RunConfig(
        tree, composed.choices, picked, **job, **made, logger=read["logger"], stages=stages
    )


def _check_top(tree: Mapping[str, Any], problems: list[str]) -> None:
    for key, value in tree.items():
        if key in TOP:
            continue
        deeper = [
            f"{section}.{key}"
            for section, target in SECTIONS.items()
            if key in signature(target).parameters
        ]
        if deeper:
            advice = f"did you mean {' or '.join(deeper)}?"
            problems.append(f"{key}={show(value)}: there is no key {key} at the top; {advice}")
        else:
            problems.append(unknown_key("", str(key), value, TOP))


def _section(key: str, values: Any, path: str, problems: list[str]) -> dict[str, Any]:
    """A section of plain values, read against its dataclass."""
    if not isinstance(values, Mapping):
        names = _names(key)
        advice = (
            f"choose one of {names}, or set its keys"
            if names
            else f"set its keys, as in {path}.KEY=VALUE"
        )
        problems.append(f"{path}={show(values)}: must be a mapping; {advice}")
        return {}
    return check_arguments(signature(SECTIONS[key]), values, path, problems)


def _node(value: Any, path: str, problems: list[str], trust: Sequence[str]) -> dict[str, Any]:
    if path == "head" and "_target_" not in (value or {}):
        return {}  # the stages say whether one is missing there
    group = path.rpartition(".")[2]
    if not isinstance(value, Mapping) or "_target_" not in value:
        keys = (
            ", ".join(f"{path}.{key}" for key in value)
            if isinstance(value, Mapping)
            else f"{path}={show(value)}"
        )
        choice = path if path == group else f"{group}@{path}"
        problems.append(
            f"{keys}: no {group} is chosen there; choose one with {choice}=NAME ({_names(group)})"
        )
        return {}
    return check_node(value, path, problems, section=group, trust=trust)


def _names(group: str) -> str:
    return ", ".join(name for name, _ in options(group))


def _trusted(trust: Any, overrides: Sequence[str], problems: list[str]) -> list[str]:
    """What the command line trusts. A file may not widen what it is allowed to build."""
    if not trust:
        return []
    if not _says_trust(overrides):
        problems.append(
            f"trust={show(trust)}: may only be given on the command line, not in a file"
        )
        return []
    return trust


def _says_trust(overrides: Sequence[str]) -> bool:
    return any(re.match(r"\+{0,2}trust=", word) for word in overrides)


def _check_stages(
    composed: Composed, problems: list[str], trust: Sequence[str]
) -> dict[str, Stage]:
    stages = composed.tree.get("stages")
    if not isinstance(stages, Mapping) or not stages:
        problems.append(
            f"stages: there are none; choose a recipe with recipe=NAME ({_names('recipe')})"
        )
        return {}
    read = {}
    for name, own in stages.items():
        if name not in composed.stages:
            problems.append(unknown_key("stages", str(name), own, composed.stages))
        elif not isinstance(own, Mapping | None):
            problems.append(f"stages.{name}={show(own)}: must be a mapping with {', '.join(STAGE)}")
        else:
            read[str(name)] = _check_stage(composed.tree, str(name), own or {}, problems, trust)
    if isinstance(composed.tree.get("head"), Mapping):
        _check_head_is_used(composed, stages, problems)
    return {name: stage for name, stage in read.items() if stage is not None}


def _check_stage(
    tree: Mapping[str, Any],
    name: str,
    own: Mapping[str, Any],
    problems: list[str],
    trust: Sequence[str],
) -> Stage | None:
    path, before = f"stages.{name}", len(problems)
    problems += [
        unknown_key(path, str(key), value, STAGE) for key, value in own.items() if key not in STAGE
    ]
    merged = _stage_sections(tree, name)
    if not merged["head"]:
        problems.append(f"{path} has no head; choose one with head=NAME ({_names('head')})")
    elif own.get("head"):
        _node(merged["head"], f"{path}.head", problems, trust)
    for key in ("optim", "trainer"):
        if own.get(key) is not None:
            _section(key, own[key], f"{path}.{key}", problems)
    if own.get("augment") is not None:
        _check_views(own["augment"], f"{path}.augment", problems)
    if len(problems) > before or not isinstance(merged["head"], Mapping):
        return None
    quiet: list[
        str
    ] = []  # the top-level sections report their own faults once, under their own names
    made = {key: _section(key, merged[key], f"{path}.{key}", quiet) for key in ("optim", "trainer")}
    head = check_node(merged["head"], f"{path}.head", quiet, section="head", trust=trust)
    if quiet:
        return None
    optim, trainer = (
        settings.OptimSettings(**made["optim"]),
        settings.TrainerSettings(**made["trainer"]),
    )
    return Stage(name, head, optim, trainer, merged["augment"])


def _check_head_is_used(composed: Composed, stages: Mapping[str, Any], problems: list[str]) -> None:
    """The top-level head must be chosen, and some stage must fall back to it."""
    head, recipe = composed.tree["head"], composed.choices.get("recipe")
    heads = {
        name: own["head"]
        for name, own in stages.items()
        if isinstance(own, Mapping) and own.get("head")
    }
    chosen = {
        name: own for name, own in heads.items() if isinstance(own, Mapping) and "_target_" in own
    }
    if "_target_" not in head:
        for key, value in head.items():
            found = " or ".join(
                f"stages.{name}.head.{key}" for name, own in chosen.items() if key in own
            )
            advice = (
                f"did you mean {found}?"
                if found
                else f"choose one with head=NAME ({_names('head')})"
            )
            problems.append(f"head.{key}={show(value)}: no head is chosen at the top; {advice}")
    elif len(chosen) == len(stages):
        places = ", ".join(f"head@stages.{name}.head=NAME" for name in stages)
        advice = f"choose {places}, or leave recipe={recipe} out"
        problems.append(f"head: recipe={recipe} gives each stage its own head; {advice}")


def _check_views(augment: Any, path: str, problems: list[str]) -> None:
    """An `augment` section; a stage's may leave out what it takes from the top-level one."""
    if isinstance(augment, Mapping):
        problems += check_augment(
            augment if path == "augment" else {"views": {"clean": []}, **augment}, path
        )
    else:
        problems.append(
            f"{path}={show(augment)}: must be a mapping with size and views; choose augment=NAME"
            f" ({_names('augment')})"
        )


def _check_places(
    job: Mapping[str, Any], read: Mapping[str, dict[str, Any]], problems: list[str]
) -> None:
    """Names and paths that the run will use."""
    name = read["run"].get("name")
    if name is not None and (
        not re.fullmatch(r"[A-Za-z0-9._-]{1,200}", name) or name in (".", "..")
    ):
        allowed = "letters, digits, dots, _ and -, at most 200 of them"
        problems.append(f"run.name={show(name)}: must be {allowed}; run.dir=PATH takes any folder")
    resume = job.get("resume")
    if (
        resume is not None
        and resume not in ("auto", "never")
        and not os.path.exists(os.path.expanduser(resume))
    ):
        problems.append(
            f"resume={show(resume)}: must be auto, never or the path of a checkpoint; there is no"
            " such file or folder"
        )


def _check_given_is_used(composed: Composed, problems: list[str]) -> None:
    """A top-level key on the command line that every stage sets for itself would do nothing."""
    stages = composed.tree["stages"]
    for key in composed.given:
        section, _, name = key.partition(".")
        if section in ("optim", "trainer") and all(
            name in ((own or {}).get(section) or {}) for own in stages.values()
        ):
            places = ", ".join(f"stages.{stage}.{key}" for stage in stages)
            problems.append(
                f"{key}: would do nothing, since each stage sets its own; give {places}"
            )
    for name, own in stages.items():
        path, merged = (
            f"stages.{name}.trainer",
            _stage_sections(composed.tree, name)["trainer"] or {},
        )
        budget, theirs = merged.get("num_images"), (own or {}).get("trainer") or {}
        given = [key for key in ("trainer.epochs", f"{path}.epochs") if key in composed.given]
        if (
            given
            and budget is not None
            and (given[-1] != "trainer.epochs" or "epochs" not in theirs)
        ):
            where = path if "num_images" in theirs else "trainer"
            problems.append(
                f"{given[-1]}={show(merged['epochs'])}: would do nothing, since"
                f" num_images={show(budget)} decides; give {where}.num_images, or add"
                f" {where}.num_images=null"
            )


def _check_frozen(
    backbone: Mapping[str, Any], stages: Mapping[str, Stage], problems: list[str]
) -> None:
    """A backbone that the first stage does not train must have been trained before."""
    name, first = next(iter(stages.items()))
    untrained = "weights" in backbone and not backbone["weights"] and not backbone.get("pretrained")
    if untrained and first.optim.backbone_lr == 0:
        problems.append(
            f"stages.{name}.optim.backbone_lr=0: the backbone would stay as it was drawn at random;"
            " give backbone.weights=FILE or backbone.pretrained=true"
        )


def _check_relations(stages: Mapping[str, Stage], problems: list[str]) -> None:
    """What two keys together must fulfil."""
    for name, stage in stages.items():
        path, trainer, optim = f"stages.{name}", stage.trainer, stage.optim
        if trainer.micro_batches > trainer.batch_size:
            most = f"must be at most batch_size ({trainer.batch_size})"
            problems.append(f"{path}.trainer.micro_batches={trainer.micro_batches}: {most}")
        if bool(optim.milestones) != (optim.schedule == "step"):
            problems.append(
                f"{path}.optim.milestones={show(optim.milestones)} with"
                f" {path}.optim.schedule={optim.schedule}: step needs milestones, as in [100,150]"
                " epochs or [0.6,0.8] of the stage, and only step has them"
            )
        if optim.nesterov and optim.momentum == 0:
            problems.append(f"{path}.optim.nesterov=true: needs optim.momentum above 0")
