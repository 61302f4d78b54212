"""A run: the stages of a recipe one after another, in one folder, with one resume.

Finished stages stand in the folder as checkpoints. A run that goes on loads them, continues the one
that was stopped, and evaluates anew what is cheap to evaluate, so that nothing but checkpoints
carries state.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from deepclust.config.build import build
from deepclust.config.run_config import RunConfig, Stage
from deepclust.data.image_set import ImageData, ImageSet
from deepclust.data.random import Stream, seed_for
from deepclust.data.views.transform import build_views
from deepclust.errors import UserError
from deepclust.eval.collapse import CollapseAlarm
from deepclust.heads.base import Bank, Progress
from deepclust.heads.readout import KMeansHead
from deepclust.loggers.base import Loggers
from deepclust.loggers.build import build_loggers
from deepclust.model import Clusterer, Network, build_network, feeding, view_size
from deepclust.ops.precision import autocast_dtype
from deepclust.runtime import checkpoint, distributed
from deepclust.runtime.distributed import World
from deepclust.runtime.signals import StopRequest, StopRequested, die_with_parent
from deepclust.training import results, resume
from deepclust.training.results import StageResult
from deepclust.training.run_folder import RunFolder
from deepclust.training.trainer import Hooks, Stopped, Trainer

FINISHED, PREEMPTED = 0, 143
KMEANS_NODE = {"_target_": "deepclust.heads.readout.KMeansHead"}


@dataclass
class Run:
    """What all stages of a run share."""

    config: RunConfig
    data: ImageData
    fingerprint: str
    num_clusters: int
    world: World
    folder: RunFolder
    loggers: Loggers
    stop: StopRequest
    began: float
    global_step: int = 0
    saved: tuple[int, int] = (0, 0)  # epoch and step of the last checkpoint of this process
    done: list[StageResult] = field(default_factory=list)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Where a stop raises: at any moment in a single process; several ranks stop together, on
        entering.
        """
        if self.world.group is not None:
            if self.world.any(self.stop.requested):
                raise StopRequested(self.stop.reason)
            yield
            return
        with self.stop.interruptible():
            yield

    def tell(self, text: str, level: Any = "info") -> None:
        """A line for people, and for log.txt."""
        self.loggers.message(text, level)


def train(config: RunConfig, data: ImageData | None = None) -> int:
    """Runs a recipe from start, or from where it stands, to its report. Returns the exit code: 0,
    or 143 if stopped.

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
        data = data or build(config.data, section="data", trust=config.trust)
        assert data is not None
        num_clusters = resume.number_of_clusters(config, data)
        with RunFolder.open(
            config.folder(), new=config.run.new or config.resume == "never", rank=world.rank
        ) as folder:
            resume.check_extra_images(config, data)
            fingerprint = data.fingerprint()
            if resume.nothing_to_do(config, folder, world, fingerprint):
                return FINISHED
            found, notes = resume.newest(config, world, folder, fingerprint)
            step = 0 if found is None else int(found.meta["global_step"])
            loggers = build_loggers(config.logger, folder.path, world.rank, step)
            stop = StopRequest(quiet=not world.is_main)
            return _run(
                Run(config, data, fingerprint, num_clusters, world, folder, loggers, stop, began),
                found,
                notes,
            )
    finally:
        distributed.stop()


def _run(run: Run, found: checkpoint.Checkpoint | None, notes: list[str]) -> int:
    """Introduces the run, goes through its stages and says how it ended, whatever happens."""
    state = "failed"
    try:
        with run.stop, run.loggers.advice():
            machine = {
                "device": str(run.world.device),
                "threads": torch.get_num_threads(),
                "ranks": run.world.size,
            }
            run.folder.describe(run.config.text(), **machine)
            _introduce(run, found, notes)
            state = _stages(run, found)
    finally:
        if state == "failed":
            run.folder.status("failed", reason=_reason(sys.exc_info()[1]))
        run.loggers.finish(state)
    return FINISHED if state == "finished" else PREEMPTED


def _stages(run: Run, found: checkpoint.Checkpoint | None) -> str:
    """All stages, then the evaluation; gives the state that the run ends in."""
    name = ""
    try:
        previous: Network | None = None
        for number, stage in enumerate(run.config.stages.values()):
            name = stage.name
            previous = _stage(run, number, stage, previous, found)
        _finish(run)
    except (Stopped, StopRequested):
        run.folder.status("preempted", name, *run.saved, reason=run.stop.reason)
        anew = (
            "run.new=true"
            if run.config.run.new
            else "resume=never"
            if run.config.resume == "never"
            else ""
        )
        command = f"the same command without {anew}" if anew else "the same command"
        run.tell(f"Stopped. What was done is saved: {command} goes on from there.", "warning")
        return "preempted"
    run.folder.status("finished")
    return "finished"


# ----------------------------------------------------------------------------------------------


def _stage(
    run: Run,
    number: int,
    stage: Stage,
    previous: Network | None,
    found: checkpoint.Checkpoint | None,
) -> Network:
    """Trains one stage or loads what it had become, then evaluates it. Gives the network for the
    next one.
    """
    at = -1 if found is None else int(found.meta["number"])
    state = found
    if number < at:
        state = resume.stage_end(run.folder, number, stage.name)
    trainer = _trainer(run, number, stage, previous)
    started, before = time.perf_counter(), 0.0
    if state is not None and number <= at:
        trainer.load_state_dict(state.state)
        before = float(state.meta["seconds"])

    def save(parts: dict[str, Any], progress: Progress, finished: bool = False) -> None:
        run.folder.status("saving", stage.name, progress.epoch, progress.step)
        run.saved = (progress.epoch, progress.step)
        meta = {
            "stage": stage.name,
            "number": number,
            "step": progress.step,
            "global_step": run.global_step + progress.step,
            "finished": finished,
            "permanent": finished,
            "fingerprint": run.fingerprint,
            "config": run.config.text(),
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
    with run.interruptible():
        _evaluate(run, stage, trainer, seconds)
    return trainer.eval_network


def _fit(run: Run, stage: Stage, trainer: Trainer, save: Any) -> None:
    """Trains. A stop inside a refresh saves the state before it."""
    try:
        trainer.fit()
    except StopRequested:
        if trainer.step > 0:
            save(trainer.state_dict(), trainer.progress())
        raise
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"stages.{stage.name}.trainer: a micro batch of one image has no batch statistics; use"
            " at least two images per process and micro batch"
            f" (batch_size={stage.trainer.batch_size}, micro_batches={stage.trainer.micro_batches},"
            f" {run.world.size} process(es), {len(trainer.images)} images)"
        ) from error


def _trainer(run: Run, number: int, stage: Stage, previous: Network | None) -> Trainer:
    """Backbone and head as configured; weights of the previous stage where there is one."""
    config, images = run.config, run.data.training_images(stage.trainer.extra_images)
    torch.manual_seed(seed_for(config.seed, number, 0, Stream.NETWORK))
    network = build_network(
        config.backbone,
        stage.head,
        _sizes(run, stage),
        num_samples=len(images),
        pretrained=previous is None,
        trust=config.trust,
    )
    note = getattr(network.backbone, "note", "")
    if previous is None and note:
        run.tell(note)
    if previous is not None:
        network.backbone.load_state_dict(previous.backbone.state_dict())
        network.head.init_from(previous.head)
    if run.world.size > 1 and run.world.device.type == "cuda" and config.distributed.sync_batchnorm:
        network.backbone = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network.backbone)
    names = dict.fromkeys(["clean", *(view.augment for view in network.head.views)])
    fed = feeding(network.backbone, stage.augment, run.data.train)
    seen = dataclasses.replace(
        run.data.train, size=view_size(network.backbone, stage.augment, run.data.train.size)
    )
    seen = dataclasses.replace(seen, mean=tuple(fed["mean"]), std=tuple(fed["std"]))
    return Trainer(
        network.backbone,
        network.head,
        images,
        build_views({**stage.augment, "size": None}, seen, list(names)),
        settings=stage.trainer,
        optim=stage.optim,
        seed=config.seed,
        stage_index=number,
        world=run.world,
        hooks=_hooks(run, stage, images),
    )


def _sizes(run: Run, stage: Stage) -> dict[str, Any]:
    """What a network's constructors are told."""
    images = run.data.train
    size = stage.augment["size"] or images.size[0]
    return {"channels": images.channels, "size": size, "num_clusters": run.num_clusters}


def _hooks(run: Run, stage: Stage, images: ImageSet) -> Hooks:
    alarm = CollapseAlarm(stage.name)

    def log(metrics: dict[str, float], progress: Progress) -> None:
        position = {
            "stage_step": progress.step,
            "stage_steps": progress.num_steps,
            "epoch": progress.epoch,
        }
        run.loggers.log({**metrics, **position}, run.global_step + progress.step, stage.name)
        sizes, loss = metrics.get("entropy"), metrics.get("cross_entropy")
        among = math.exp(metrics["ln_k"]) if "ln_k" in metrics else run.num_clusters
        for line in alarm.check(progress.step, among, assignment_entropy=sizes, cross_entropy=loss):
            run.tell(line, "warning")

    def status(state: Any, progress: Progress) -> None:
        run.folder.status(state, stage.name, progress.epoch, progress.step)

    def failure(sample: int, reason: str) -> None:
        run.tell(
            f"{images.paths[sample]} could not be read and is left out of this batch: {reason}",
            "warning",
        )

    return Hooks(
        log=log,
        status=status,
        failure=failure,
        warn=_warn(run),
        stop_requested=lambda: run.world.any(run.stop.requested),
        interruptible=run.interruptible,
        save_every_steps=run.config.checkpoint.every_steps,
    )


# ----------------------------------------------------------------------------------------------


def _evaluate(run: Run, stage: Stage, trainer: Trainer, seconds: float) -> None:
    """Clusters of all images by this stage; a pretext's are read by k-means from its features."""
    run.folder.status("evaluating", stage.name, step=trainer.step)
    network, head_node, reads = trainer.eval_network, stage.head, None
    features, rows = trainer.features(run.data.train)
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
        results.score_stage(
            result, first, before, run.data, run.num_clusters, run.config.eval, _warn(run)
        )
        if reads:
            result.scores["reads"] = reads
        alarm = CollapseAlarm(stage.name)
        for line in alarm.check(
            trainer.step,
            run.num_clusters,
            clusters_used=result.scores["clusters_used"],
            mean_confidence=result.scores["mean_confidence"],
            evaluated=True,
        ):
            run.tell(line, "warning")
    run.done.append(result)


def _warn(run: Run) -> Callable[[str], None]:
    return lambda text: run.tell(text, "warning")


def _finish(run: Run) -> None:
    """Baselines, the kept stage, and every file of the run folder. Rank 0 alone."""
    if not run.world.is_main:
        return
    run.folder.status("evaluating", "baselines")
    with run.stop.interruptible():
        first = run.done[0]
        scores = results.run_baselines(
            first, run.data, run.num_clusters, run.config.eval, run.config.seed
        )
        results.compare_with_kmeans(
            run.done, run.data, run.num_clusters, run.config.eval, run.config.seed
        )
        kept, why = results.keep_best(run.done)
        clusterer = Clusterer(kept.network, _spec(run, kept), run.world.device)
        clusterer.save(run.folder.path / "model.safetensors")
        run.folder.write("clusters.csv", results.clusters_csv(kept, run.data))
        summary = {
            "data": run.data.name,
            "protocol": run.data.protocol,
            "num_images": len(run.data.train),
            "num_clusters": run.num_clusters,
            "imbalance": results.imbalance_of(run.data.train),
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
    results.show(run.loggers, run.folder, summary)


def _spec(run: Run, kept: StageResult) -> dict[str, Any]:
    """What `Clusterer` is rebuilt from."""
    stage = run.config.stages[kept.name]
    nodes = {"backbone": run.config.backbone, "head": dict(kept.head)}
    return {
        **nodes,
        **_sizes(run, stage),
        **feeding(kept.network.backbone, stage.augment, run.data.train),
    }


# ----------------------------------------------------------------------------------------------


def _introduce(run: Run, found: checkpoint.Checkpoint | None, notes: list[str]) -> None:
    """Says what is about to happen, on what, and where."""
    config, images = run.config, run.data.train
    run.loggers.start(
        {"name": config.name(), "folder": str(run.folder.path), "config": config.tree}
    )
    what = "feature vectors" if images.is_features else "images"
    labels = "(labels are read by the evaluation alone)"
    if images.classes is None:
        labels = "without labels"
    kind = f"{what} {labels}"
    shape = f"{images.channels} x {images.size[0]} x {images.size[1]}"
    run.tell(f"{len(images)} {kind}, {shape}; {run.num_clusters} clusters")
    dtype = autocast_dtype(next(iter(config.stages.values())).trainer.precision, run.world.device)
    precision = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    run.tell(
        f"{run.world.device}, {precision}, {torch.get_num_threads()} threads, {run.world.size}"
        " process(es)"
    )
    for line in notes:
        run.tell(line, "warning")
    if images.skipped:
        first = "".join(f"\n  {skipped.path}: {skipped.reason}" for skipped in images.skipped[:5])
        more = (
            f"\n  and {len(images.skipped) - 5} more, see clusters.csv"
            if len(images.skipped) > 5
            else ""
        )
        run.tell(f"{len(images.skipped)} unreadable image(s) left out:{first}{more}", "warning")
    if images.num_ignored:
        run.tell(f"{images.num_ignored} file(s) of other kinds left out.")
    if found is not None:
        run.tell(f"Going on from step {found.meta['step']} of the stage {found.meta['stage']}.")
        if found.meta["ranks"] != run.world.size:
            run.tell(
                f"It was saved by {found.meta['ranks']} process(es) and goes on with"
                f" {run.world.size}: the order of images and their views stay the same, sums are"
                " rounded differently and dropout draws anew.",
                "warning",
            )


def _reason(error: BaseException | None) -> str:
    return "" if error is None else (str(error).strip() or type(error).__name__).splitlines()[0]
