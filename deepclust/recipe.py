"""A run: the stages of a recipe one after another, in one folder, with one resume.

Finished stages stand in the folder as checkpoints. A run that goes on loads them, continues the one that was stopped,
and evaluates anew what is cheap to evaluate, so that nothing but checkpoints carries state.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deepclust import checkpoint, distributed, results
from deepclust.config import RunConfig, Stage, build, differences
from deepclust.data.image_set import ImageData
from deepclust.data.random import sample_keys
from deepclust.data.views import build_views
from deepclust.distributed import World
from deepclust.errors import UserError
from deepclust.eval.collapse import CollapseAlarm
from deepclust.heads.base import Bank, Progress
from deepclust.heads.kmeans import KMeansHead
from deepclust.loggers import Loggers, build_loggers
from deepclust.model import Clusterer, Network, build_network
from deepclust.precision import autocast_dtype
from deepclust.results import StageResult
from deepclust.run_folder import RunFolder
from deepclust.signals import StopRequest, StopRequested, die_with_parent
from deepclust.trainer import Hooks, Stopped, Trainer

FINISHED, PREEMPTED = 0, 143
KMEANS_NODE = {"_target_": "deepclust.heads.kmeans.KMeansHead"}


@dataclass
class Run:
    """What all stages of a run share."""

    config: RunConfig
    data: ImageData
    num_clusters: int
    world: World
    folder: RunFolder
    loggers: Loggers
    stop: StopRequest
    began: float
    global_step: int = 0
    done: list[StageResult] = field(default_factory=list)

    def tell(self, text: str, level: Any = "info") -> None:
        """A line for people, and for log.txt."""
        self.loggers.message(text, level)


def train(config: RunConfig, data: ImageData | None = None) -> int:
    """Runs a recipe from start, or from where it stands, to its report. Returns the exit code: 0, or 143 if stopped.

    data: images that are at hand already, instead of those that the configuration names.
    """
    began = time.perf_counter()
    settings = next(iter(config.stages.values())).trainer
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    if settings.deterministic:
        torch.use_deterministic_algorithms(True)
    world = distributed.start(settings.device, config.distributed.timeout_seconds)
    if world.group is not None:
        die_with_parent()
    try:
        data = data or build(config.data, trust=config.trust)
        assert data is not None
        num_clusters = _num_clusters(config, data)
        with RunFolder.open(config.folder(), new=config.run.new or config.resume == "never", rank=world.rank) as folder:
            if _nothing_to_do(config, folder, world):
                return FINISHED
            return _run(config, data, num_clusters, world, folder, began)
    finally:
        distributed.stop()


def _run(config: RunConfig, data: ImageData, num_clusters: int, world: World, folder: RunFolder, began: float) -> int:
    found, notes = _newest(config, world, folder)
    _refuse_changed_images(found, data)
    step = 0 if found is None else int(found.meta["global_step"])
    loggers = build_loggers(config.logger, folder.path, world.rank, step)
    run = Run(config, data, num_clusters, world, folder, loggers, StopRequest(quiet=not world.is_main), began)
    state = "failed"
    try:
        with run.stop:
            folder.describe(config.text(), device=str(world.device), threads=torch.get_num_threads(), ranks=world.size)
            _introduce(run, found, notes)
            state = _stages(run, found)
    finally:
        if state == "failed":
            folder.status("failed", reason=_reason(sys.exc_info()[1]))
        loggers.finish(state)
    return FINISHED if state == "finished" else PREEMPTED


def _stages(run: Run, found: checkpoint.Checkpoint | None) -> str:
    """All stages, then the evaluation; gives the state that the run ends in."""
    number, name = 0, ""
    try:
        previous: Network | None = None
        for number, (name, stage) in enumerate(run.config.stages.items()):
            previous = _stage(run, number, stage, previous, found)
        _finish(run)
    except (Stopped, StopRequested):
        run.folder.status("preempted", name, reason=run.stop.reason)
        run.tell("Stopped. What was done is saved: the same command goes on from there.", "warning")
        return "preempted"
    run.folder.status("finished")
    return "finished"


# -------------------------------------------------------------------------------------------------- one stage


def _stage(run: Run, number: int, stage: Stage, previous: Network | None, found: checkpoint.Checkpoint | None) -> Network:
    """Trains one stage or loads what it had become, then evaluates it. Gives the network that the next one begins with."""
    at = -1 if found is None else int(found.meta["number"])
    state = found
    if number < at:
        state = _stage_end(run, number, stage.name)
    trainer = _trainer(run, number, stage, previous)
    started, before = time.perf_counter(), 0.0
    if state is not None and number <= at:
        trainer.load_state_dict(state.state)
        before = float(state.meta["seconds"])

    def save(parts: dict[str, Any], progress: Progress, finished: bool = False) -> None:
        run.folder.status("saving", stage.name, progress.epoch, progress.step)
        meta = {
            "stage": stage.name,
            "number": number,
            "step": progress.step,
            "global_step": run.global_step + progress.step,
            "finished": finished,
            "permanent": finished,
            "fingerprint": run.data.train.fingerprint(),
            "ranks": run.world.size,
            "seconds": before + time.perf_counter() - started,
        }
        if run.world.is_main:
            place = f"{number:02d}-{stage.name}/step-{progress.step:08d}"
            checkpoint.save(run.folder.checkpoints, place, parts, meta)
            checkpoint.rotate(run.folder.checkpoints, run.config.checkpoint.keep)
        run.folder.status("running", stage.name, progress.epoch, progress.step)

    finished = state is not None and number <= at and bool(state.meta["finished"])
    if not finished:
        trainer.hooks.save = save
        _fit(run, stage, trainer, save)
        save(trainer.state_dict(), trainer.progress(), finished=True)
    elif number == at:
        run.tell(f"{stage.name} is done; going on behind it")
    run.global_step += trainer.step
    seconds = before if finished else before + time.perf_counter() - started
    _evaluate(run, stage, trainer, seconds)
    return trainer.evaluated


def _fit(run: Run, stage: Stage, trainer: Trainer, save: Any) -> None:
    """Trains. A stop inside a refresh saves the state before it."""
    try:
        trainer.fit()
    except StopRequested:
        if trainer.step > 0:
            save(trainer.state_dict(), trainer.progress())
        raise


def _trainer(run: Run, number: int, stage: Stage, previous: Network | None) -> Trainer:
    """Backbone and head as configured; weights of the previous stage where there is one."""
    config, images = run.config, run.data.train
    torch.manual_seed(int(sample_keys(config.seed, number, 0, torch.zeros(1).long(), -3)) % 2**63)
    network = build_network(
        config.backbone, stage.head, _sizes(run, stage), num_samples=len(images), pretrained=previous is None, trust=config.trust
    )
    if previous is not None:
        network.backbone.load_state_dict(previous.backbone.state_dict())
        network.head.init_from(previous.head)
    if run.world.size > 1 and run.world.device.type == "cuda" and config.distributed.sync_batchnorm:
        network.backbone = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network.backbone)
    names = dict.fromkeys(["clean", *(view.augment for view in network.head.views)])
    view = _view(run, stage, network)
    size = view["view_size"] if isinstance(view["view_size"], list) else [view["view_size"]] * 2
    seen = dataclasses.replace(images, size=tuple(size), mean=tuple(view["mean"]), std=tuple(view["std"]))
    return Trainer(
        network.backbone,
        network.head,
        images,
        build_views({**stage.augment, "size": None}, seen, list(names)),
        settings=stage.trainer,
        optim=stage.optim,
        seed=config.seed,
        stage=number,
        world=run.world,
        hooks=_hooks(run, stage),
    )


def _sizes(run: Run, stage: Stage) -> dict[str, Any]:
    """What a network's constructors are told."""
    images = run.data.train
    return {"channels": images.channels, "size": stage.augment["size"] or images.size[0], "num_clusters": run.num_clusters}


def _view(run: Run, stage: Stage, network: Network) -> dict[str, Any]:
    """How images are fed: a pretrained network's own size and statistics, unless the configuration gives a size."""
    images, own = run.data.train, getattr(network.backbone, "preprocess", None)
    return {
        "clean": stage.augment["views"]["clean"],
        "view_size": stage.augment["size"] or (own.size if own else None) or list(images.size),
        "image_size": list(images.size),
        "mean": list(own.mean if own else images.mean),
        "std": list(own.std if own else images.std),
    }


def _hooks(run: Run, stage: Stage) -> Hooks:
    alarm = CollapseAlarm(stage.name)

    def log(metrics: dict[str, float], progress: Progress) -> None:
        position = {"stage_step": progress.step, "stage_steps": progress.num_steps, "epoch": progress.epoch}
        run.loggers.log({**metrics, **position}, run.global_step + progress.step, stage.name)
        entropies = {"assignment_entropy": metrics.get("entropy"), "cross_entropy": metrics.get("cross_entropy")}
        for line in alarm.check(progress.step, run.num_clusters, **entropies):
            run.tell(line, "warning")

    def status(state: Any, progress: Progress) -> None:
        run.folder.status(state, stage.name, progress.epoch, progress.step)

    def failure(sample: int, reason: str) -> None:
        run.tell(f"{run.data.train.paths[sample]} could not be read and is left out of this batch: {reason}", "warning")

    alone = run.world.group is None
    return Hooks(
        log=log,
        status=status,
        failure=failure,
        stop_requested=lambda: run.world.any(run.stop.requested),
        interruptible=run.stop.interruptible if alone else nullcontext,
        save_every_steps=run.config.checkpoint.every_steps,
    )


def _stage_end(run: Run, number: int, name: str) -> checkpoint.Checkpoint:
    """The last checkpoint of an earlier stage."""
    ends = [path for path in checkpoint.listing(run.folder.checkpoints) if path.parent.name == f"{number:02d}-{name}"]
    if not ends:
        raise UserError(f"{run.folder.path} has no checkpoint of the stage {name}; start over with run.new=true")
    return checkpoint.load(ends[-1])


# -------------------------------------------------------------------------------------------------- results


def _evaluate(run: Run, stage: Stage, trainer: Trainer, seconds: float) -> None:
    """Clusters of all images by this stage; a pretext's are read by k-means from its features."""
    run.folder.status("evaluating", stage.name, step=trainer.step)
    network, head_node, reads = trainer.evaluated, stage.head, None
    features, rows = trainer.features()
    if not network.head.clusters:
        head_node, reads = KMEANS_NODE, "k-means"
        head = KMeansHead(features.shape[1], run.num_clusters)
        head.init_prototypes(Bank(features, rows, len(features)))
        network = Network(network.backbone, head.to(run.world.device))
    train = results.predict_split(network, features, rows)
    test = None
    if run.data.test is not None:
        test = results.predict_split(network, *trainer.features(run.data.test))
    result = StageResult(stage.name, network, head_node, train, test, seconds)
    before = run.done[-1] if run.done else None
    first = run.done[0] if run.done else result
    if run.world.is_main:
        graph = results.neighbor_graph(first.train.features, run.config.eval.graph_neighbors)
        results.score_stage(result, run.data, run.num_clusters, graph, before, run.config.eval)
        if reads:
            result.scores["reads"] = reads
        alarm = CollapseAlarm(stage.name)
        used, confidence = result.scores["clusters_used"], result.scores["mean_confidence"]
        for line in alarm.check(trainer.step, run.num_clusters, clusters_used=used, mean_confidence=confidence, evaluated=True):
            run.tell(line, "warning")
    run.done.append(result)


def _finish(run: Run) -> None:
    """Baselines, the kept stage, and every file of the run folder. Rank 0 alone."""
    if not run.world.is_main:
        return
    run.folder.status("evaluating", "baselines")
    with run.stop.interruptible():
        first = run.done[0]
        scores = results.run_baselines(first, run.data, run.num_clusters, run.config.eval, run.config.seed)
        kept, why = results.keep_best(run.done)
        clusterer = Clusterer(kept.network, _spec(run, kept), run.world.device)
        clusterer.save(run.folder.path / "model.safetensors")
        run.folder.write("clusters.csv", results.clusters_csv(kept, run.data))
        summary = {
            "data": run.data.name,
            "protocol": run.data.protocol,
            "num_images": len(run.data.train),
            "num_clusters": run.num_clusters,
            "seed": run.config.seed,
            "stages": {result.name: result.scores for result in run.done},
            "baselines": scores,
            "kept_stage": kept.name,
            "why": why,
            "skipped": len(run.data.train.skipped),
            "seconds": time.perf_counter() - run.began,
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        results.write_page(run.folder, kept, run.data, summary, run.config.eval.gallery_images)
        results.write_summary(run.folder, summary)
    _show(run.loggers, run.folder, summary)


def _spec(run: Run, kept: StageResult) -> dict[str, Any]:
    """What `Clusterer` is rebuilt from."""
    stage = run.config.stages[kept.name]
    return {"backbone": run.config.backbone, "head": dict(kept.head), **_sizes(run, stage), **_view(run, stage, kept.network)}


def _show(loggers: Loggers, folder: RunFolder, summary: Mapping[str, Any]) -> None:
    """The table, and where to look."""
    columns, rows = results.table_rows(summary)
    title = f"{summary['data']}: {summary['num_images']} images, {summary['num_clusters']} clusters, {summary['seconds']:.0f} s"
    loggers.table(title, columns, rows)
    loggers.message(summary["why"])
    files = (("clusters", "clusters.csv"), ("report", "report.html"), ("model", "model.safetensors"))
    loggers.message("\n".join(f"{word + ':':<10}{folder.path / name}" for word, name in files))


# -------------------------------------------------------------------------------------------------- before a run


def _num_clusters(config: RunConfig, data: ImageData) -> int:
    num = config.num_clusters or data.num_classes
    if num is None:
        raise UserError(f"num_clusters is needed: {data.name} has no labels to count classes from. Say num_clusters=10, for example")
    if num > len(data.train):
        raise UserError(f"num_clusters={num} is more than the {len(data.train)} images of {data.name}; at most {len(data.train)} are possible")
    return num


def _nothing_to_do(config: RunConfig, folder: RunFolder, world: World) -> bool:
    """Refuses a folder of another configuration; shows a finished run's table again. Rank 0 decides."""
    finished, changed = False, []
    if world.is_main and folder.previous_config is not None and folder.previous_status is not None:
        changed = differences(folder.previous_config, config)
        finished = folder.finished and not changed
    finished, changed = world.broadcast((finished, changed))
    if changed:
        lines = "\n  ".join(changed)
        raise UserError(
            f"run.dir={folder.path} holds a run with other settings:\n  {lines}\n"
            "Start over there with run.new=true, or keep both with run.name=NAME"
        )
    if finished and world.is_main:
        summary = json.loads((folder.path / "summary.json").read_text())
        loggers = build_loggers({**config.logger, "wandb": "disabled"}, folder.path, resumed_step=sys.maxsize)
        loggers.message("This run is finished; run.new=true starts it over.")
        _show(loggers, folder, summary)
        loggers.finish("finished")
    return finished


def _newest(config: RunConfig, world: World, folder: RunFolder) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """The newest whole checkpoint, as rank 0 sees it, and what is to be said about broken ones."""
    if world.is_main:
        notes = _import_checkpoints(config, folder)
        found, more = checkpoint.newest(folder.checkpoints)
        world.broadcast((None if found is None else found.path, [*notes, *more]))
        return found, [*notes, *more]
    path, notes = world.broadcast(None)
    return (None if path is None else checkpoint.load(path)), notes


def _import_checkpoints(config: RunConfig, folder: RunFolder) -> list[str]:
    """With resume=PATH (a run folder, or one of its checkpoints): copies what was done there into this new folder."""
    if config.resume in ("auto", "never") or checkpoint.listing(folder.checkpoints):
        return []
    source = Path(config.resume).expanduser()
    root = source.parent.parent if (source / checkpoint.MANIFEST).exists() else source / "checkpoints"
    there = checkpoint.listing(root)
    if not there:
        raise UserError(f"resume={config.resume}: no checkpoint is there. Give a run folder or one of its checkpoints, or auto or never")
    last = source if (source / checkpoint.MANIFEST).exists() else there[-1]
    for path in there[: [path.resolve() for path in there].index(last.resolve()) + 1]:
        problems = checkpoint.verify(path)
        if problems:
            raise UserError(f"resume={config.resume}: {problems[0]}")
        shutil.copytree(path, folder.checkpoints / path.relative_to(root))
    old = root.parent / "config.yaml"
    changed = differences(old.read_text(), config) if old.exists() else []
    return [f"Continues {last}.", *(f"Changed since then: {line}" for line in changed)]


def _refuse_changed_images(found: checkpoint.Checkpoint | None, data: ImageData) -> None:
    if found is not None and found.meta["fingerprint"] != data.train.fingerprint():
        raise UserError(
            f"the images of {data.name} are not those that {found.path} was trained on; "
            "bring them back, or start over with run.new=true"
        )


def _introduce(run: Run, found: checkpoint.Checkpoint | None, notes: list[str]) -> None:
    """Says what is about to happen, on what, and where."""
    config, images = run.config, run.data.train
    run.loggers.start({"name": config.name(), "folder": str(run.folder.path), "config": config.tree})
    kind = "images without labels" if images.classes is None else "images (labels are read by the evaluation alone)"
    run.tell(f"{len(images)} {kind}, {images.channels} x {images.size[0]} x {images.size[1]}; {run.num_clusters} clusters")
    dtype = autocast_dtype(next(iter(config.stages.values())).trainer.precision, run.world.device)
    precision = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    run.tell(f"{run.world.device}, {precision}, {torch.get_num_threads()} threads, {run.world.size} process(es)")
    for line in notes:
        run.tell(line, "warning")
    if images.skipped:
        first = "; ".join(f"{skipped.path}: {skipped.reason}" for skipped in images.skipped[:5])
        more = f"; and {len(images.skipped) - 5} more, see clusters.csv" if len(images.skipped) > 5 else ""
        run.tell(f"{len(images.skipped)} unreadable image(s) left out: {first}{more}", "warning")
    if found is not None:
        run.tell(f"Going on from step {found.meta['step']} of the stage {found.meta['stage']}.")
        if found.meta["ranks"] != run.world.size:
            run.tell(
                f"It was saved by {found.meta['ranks']} process(es) and goes on with {run.world.size}: the order of images and "
                "their views stay the same, sums are rounded differently and dropout draws anew.",
                "warning",
            )


def _reason(error: BaseException | None) -> str:
    return "" if error is None else (str(error).strip() or type(error).__name__).splitlines()[0]
