"""How a run begins: what its folder holds already, whether it may go on from there, and from which
checkpoint.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from deepclust.config.run_config import RunConfig, differences
from deepclust.data.image_set import ImageData
from deepclust.errors import UserError
from deepclust.loggers.base import Loggers
from deepclust.runtime import checkpoint
from deepclust.runtime.distributed import World
from deepclust.training import results
from deepclust.training.run_folder import RunFolder


def nothing_to_do(config: RunConfig, folder: RunFolder, world: World, fingerprint: str) -> bool:
    """Shows a finished run's table again, and changes nothing. Rank 0 decides.

    fingerprint: of the images. Raises UserError for a folder of another configuration, of one that
    nothing tells, or of other images; a run that failed before it saved anything is nothing to
    protect.
    """
    finished, fault = False, ""
    worth_keeping = folder.finished or bool(checkpoint.listing(folder.checkpoints))
    if world.is_main and worth_keeping:
        before = folder.previous_config or _recorded(folder.checkpoints)
        if before is None:
            fault = _unknown_settings(folder)
        else:
            changed = differences(before, config)
            fault = (
                _other_settings(folder, changed) if changed else _other_images(folder, fingerprint)
            )
        finished = folder.finished and not fault
    finished, fault = world.broadcast((finished, fault))
    if fault:
        raise UserError(fault)
    if finished and world.is_main and config.logger["console"]:
        from deepclust.loggers.console import ConsoleLogger

        loggers = Loggers([ConsoleLogger()])
        loggers.message("This run is finished; run.new=true starts it over.")
        results.show(loggers, folder, json.loads((folder.path / "summary.json").read_text()))
    return finished


def _recorded(checkpoints: Path) -> str | None:
    """The configuration that the newest readable checkpoint was saved with; None where none
    tells."""
    for path in reversed(checkpoint.listing(checkpoints)):
        try:
            return checkpoint.manifest(path)["meta"].get("config")
        except checkpoint.CheckpointError:
            continue
    return None


def _unknown_settings(folder: RunFolder) -> str:
    return (
        f"run.dir={folder.path} holds a run whose config.yaml is gone, and its checkpoints do not"
        " tell with which settings it was trained. Bring config.yaml back, start over there with"
        " run.new=true, or choose run.name=NAME"
    )


def _other_settings(folder: RunFolder, changed: list[str]) -> str:
    lines = "\n  ".join(changed)
    return (
        f"run.dir={folder.path} holds a run with other settings:\n  {lines}\n"
        "Start over there with run.new=true, or keep both with run.name=NAME"
    )


def _other_images(folder: RunFolder, fingerprint: str) -> str:
    """What to say if the newest readable checkpoint was trained on other images; nothing where
    there is none.
    """
    for path in reversed(checkpoint.listing(folder.checkpoints)):
        try:
            trained_on = checkpoint.manifest(path)["meta"]["fingerprint"]
        except checkpoint.CheckpointError:
            continue
        return "" if trained_on == fingerprint else _changed_images(path)
    return ""


def _changed_images(path: Path) -> str:
    return (
        f"the images are not those that {path} was trained on; bring them back, or start over with"
        " run.new=true"
    )


def newest(
    config: RunConfig, world: World, folder: RunFolder, fingerprint: str
) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """The newest whole checkpoint, as rank 0 sees it, and what is to be said about broken ones.

    Raises UserError if it was trained on other images, or if `resume` names no checkpoint.
    """
    if world.is_main:
        notes = _import_checkpoints(config, folder)
        found, more = checkpoint.newest(folder.checkpoints)
        notes += more
        world.broadcast((None if found is None else found.path, notes))
    else:
        path, notes = world.broadcast(None)
        found = None if path is None else checkpoint.load(path)
    if found is not None and found.meta["fingerprint"] != fingerprint:
        raise UserError(_changed_images(found.path))
    return found, notes


def _import_checkpoints(config: RunConfig, folder: RunFolder) -> list[str]:
    """With resume=PATH (a run folder, or one of its checkpoints): copies what was done there into
    this new folder.
    """
    if config.resume in ("auto", "never") or checkpoint.listing(folder.checkpoints):
        return []
    source = Path(config.resume).expanduser()
    root = (
        source.parent.parent if (source / checkpoint.MANIFEST).exists() else source / "checkpoints"
    )
    there = checkpoint.listing(root)
    if not there or (root == source.parent.parent and source not in there):
        advice = "Give a run folder or one of its checkpoints, or auto or never"
        raise UserError(f"resume={config.resume}: no checkpoint is there. {advice}")
    last = source if source in there else there[-1]
    for path in there[: there.index(last) + 1]:
        problems = checkpoint.verify(path)
        if problems:
            raise UserError(f"resume={config.resume}: {path}: {problems[0]}")
        shutil.copytree(path, folder.checkpoints / path.relative_to(root))
    old = root.parent / "config.yaml"
    before = old.read_text() if old.exists() else _recorded(root)
    changed = [] if before is None else differences(before, config)
    return [f"Continues {last}.", *(f"Changed since then: {line}" for line in changed)]


def stage_end(folder: RunFolder, number: int, name: str) -> checkpoint.Checkpoint:
    """The checkpoint that a finished stage ended with. Raises UserError naming what is broken in
    it.
    """
    place = folder.checkpoints / f"{number:02d}-{name}"
    faults = [f"{place} has none"]
    for path in reversed(checkpoint.listing(folder.checkpoints)):
        if path.parent == place:
            try:
                found = checkpoint.load(path)
            except checkpoint.CheckpointError as error:
                faults.append(str(error))
                continue
            if found.meta["finished"]:
                return found
    raise UserError(
        f"The last checkpoint of the stage {name} is needed: {faults[-1]}\n"
        "Bring it back from a copy, or start over with run.new=true"
    )


def number_of_clusters(config: RunConfig, data: ImageData) -> int:
    """As configured, else the number of classes. Raises UserError where neither says, or there are
    too few images.
    """
    num = config.num_clusters or data.num_classes
    if num is None:
        raise UserError(
            f"num_clusters is needed: {data.name} has no labels to count. Say num_clusters=10, for"
            " example"
        )
    if num > len(data.train):
        most = f"the {len(data.train)} images of {data.name}"
        raise UserError(f"num_clusters={num} is more than {most}; give at most as many")
    return num


def check_extra_images(config: RunConfig, data: ImageData) -> None:
    """Raises UserError where a stage wants extra images that the data does not hold, or holds any
    that none wants.
    """
    wanting = [name for name, stage in config.stages.items() if stage.trainer.extra_images]
    if wanting and data.extra is None:
        advice = (
            "data=stl10 has some with data.extra=true"
            if data.name != "stl10"
            else "say data.extra=true"
        )
        raise UserError(
            f"stages.{wanting[0]}.trainer.extra_images=true: {data.name} holds no extra images;"
            f" {advice}"
        )
    if data.extra is not None and not wanting:
        place = f"stages.{next(iter(config.stages))}.trainer.extra_images=true"
        raise UserError(
            f"data.extra=true would do nothing: no stage trains on the extra images; say {place}"
        )
