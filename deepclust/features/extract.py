"""`deepclust features`: features of a folder of images, made once and kept in a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from deepclust.data.folders import Listing, list_folder, printable
from deepclust.data.images import num_decoders
from deepclust.data.store import BLOCK, MANIFEST, FeatureStore, StoredBackbone
from deepclust.data.store_writer import Changes, Fact, StoreWriter
from deepclust.errors import UserError
from deepclust.features.decode_ahead import Batch, Job, decode_ahead
from deepclust.loggers.console import ConsoleLogger
from deepclust.loggers.progress_bar import Progress

if TYPE_CHECKING:
    from deepclust.features.encoder import Encoder

DEFAULT_BACKBONE = "vit_small_patch16_224.dino"
"""Trained on images without their labels (Caron et al. 2021)."""
SIMCLR = (
    "recipe=single",
    "head=simclr",
    "head.hidden_dim=512",
    "head.embedding_dim=128",
    "head.temperature=0.5",
    "head.neighbors_from=0.5",
    "data=image_folder",
    "data.labels=none",
    "augment=photo",
    "optim.lr=1e-3",
    "optim.warmup_steps=20",
    "trainer.num_images=80000",
    "num_clusters=2",
    "eval.baselines=none",
)
"""The pretext of the recipe scan_photo as a run of its own, whose clusters nobody asks for."""
NAMED = 5
FINISHED, STOPPED = 0, 143


@dataclass
class Asked:
    """What the command line asks for. None: a default that the docstrings of its parts tell."""

    folder: Path
    store: Path | None = None
    backbones: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    size: int | None = None
    dtype: str = "float16"
    batch_size: int | None = None
    workers: int | None = None
    hashing: bool = True
    train: bool = False


@dataclass
class Task:
    """One encoder, what the store calls it, the rows (N,) bool that it has to compute, and in which
    batches.
    """

    encoder: Encoder
    stored: StoredBackbone
    stale: np.ndarray
    batch_size: int


class Filled(NamedTuple):
    """store: to be read. backbones: names in it of those asked for. stopped: with Ctrl-C, before
    all was done.
    """

    store: FeatureStore
    backbones: list[str]
    stopped: bool


def extract(asked: Asked, console: ConsoleLogger | None = None) -> int:
    """Brings a store up to date with its folder and the backbones asked for. Returns 0, or 143
    where it was stopped.

    Raises UserError: nothing to read, no such backbone, weights that cannot be had, a store that
    cannot be used.
    """
    return STOPPED if fill(asked, console or ConsoleLogger()).stopped else FINISHED


def fill(
    asked: Asked,
    console: ConsoleLogger,
    rest: Callable[[int], float] | None = None,
    listing: Listing | None = None,
) -> Filled:
    """The same for those that go on with the store, who need no network where all features are
    there.

    rest: seconds that this will take for so many images. listing: of the folder, where it was made
    just now.
    """
    listing = listing or list_folder(str(asked.folder), key="")
    path = asked.store or default_store(listing.root)
    begun = rest is not None and (path / MANIFEST).is_file()
    encoders, missing = ([], "") if begun else _encoders(asked)
    names: list[str] = []
    with StoreWriter.create(path, listing.root) as store:
        try:
            if missing:
                encoders.append(_trained(store, listing.root, missing, console))
            changes = store.update(listing, asked.hashing)
            _introduce(store, changes, listing.num_ignored, console)
            names = _known(store, asked) if begun else []
            if begun and not (names and all(_complete(store, name) for name in names)):
                encoders, missing = _encoders(asked)
                if missing:
                    encoders.append(_trained(store, listing.root, missing, console))
            tasks = [_task(store, encoder, asked, console) for encoder in encoders]
            names = [task.stored.name for task in tasks] or names
            behind = 0.0 if rest is None else rest(int((store.status != "deleted").sum()))
            _compute(store, tasks, asked, console, behind)
        except KeyboardInterrupt:
            console.finish("stopped")
            done = [
                f"{store.computed(name).sum():,} of {len(store):,} images by {name}"
                for name in store.backbones
            ]
            there = "; ".join(done) or "no features yet"
            console.message(
                f"Stopped. In {store.path}: {there}. The same command goes on from there.",
                "warning",
            )
            return Filled(store, names, True)
        _conclude(store, tasks, console, hint=rest is None)
        if not store.valid.any():
            raise UserError(f"{store.root}: none of the images can be read")
    return Filled(store, names, False)


def _known(store: FeatureStore, asked: Asked) -> list[str]:
    """Names in the store of all backbones asked for, if it has them all and no network is needed to
    say so.
    """
    if asked.weights:
        return []
    found = [
        store.known_as(name, asked.size, asked.dtype)
        for name in asked.backbones or [DEFAULT_BACKBONE]
    ]
    if not asked.backbones:
        found = [found[0] or store.trained_here(asked.dtype)]
    return [] if None in found else [name for name in found if name]


def _complete(store: FeatureStore, name: str) -> bool:
    return bool(store.computed(name).all()) and not store.damaged(name)


def default_store(root: Path) -> Path:
    """Where the features of a folder go if nothing else is said."""
    return Path("outputs") / f"features-{root.resolve().name or 'images'}"


def _encoders(asked: Asked) -> tuple[list[Encoder], str]:
    """The encoders that can be had, and why another one has to be trained ("" if none has to)."""
    from deepclust.features.encoder import NoWeights, find_encoder

    names = asked.backbones or ([] if asked.weights else [DEFAULT_BACKBONE])
    if asked.weights and len(asked.weights) != len(names):
        raise UserError(
            f"--weights is given {len(asked.weights)} time(s) and --backbone {len(names)}: give one"
            " file for each backbone, in the same order"
        )
    found, missing = [], []
    for name, weights in zip(names, asked.weights or [None] * len(names)):
        try:
            found.append(find_encoder(name, weights, asked.size))
        except NoWeights as error:
            missing.append(str(error))
    if missing and asked.backbones and not asked.train:
        ways = (
            "Ways out: --weights FILE gives a local file (.safetensors, .pt); --backbone RUN takes"
            " a model that deepclust trained; --train trains one on these images first; or run this"
            " where there is a network"
        )
        raise NoWeights("\n".join([*missing, ways]))
    return found, "\n".join(missing)


def _trained(store: StoreWriter, root: Path, missing: str, console: ConsoleLogger) -> Encoder:
    """The backbone of a SimCLR stage on the images themselves, trained now unless it was before."""
    from deepclust.features.encoder import find_encoder

    folder = store.path / "simclr"
    model = folder / "model.safetensors"
    if model.is_file():
        text = f"{missing}\nThe backbone that was trained on these images is used instead: {folder}"
        console.message(text, "warning")
        return find_encoder(str(folder))
    console.message(
        f"{missing}\nA small backbone is trained on these images first, without labels: SimCLR, the"
        f" first stage of the recipe scan_photo, in {folder}. It takes minutes to an hour and says"
        " how long; its features are weaker than those of a large pretrained network: --backbone"
        " NAME --weights FILE takes one from a local file.",
        "warning",
    )
    train_simclr(root, folder)
    return find_encoder(str(folder))


def train_simclr(root: Path, folder: Path) -> None:
    """The pretext stage of the recipe for photos as a run of its own. Raises KeyboardInterrupt
    where it was stopped.
    """
    from deepclust.config.load import load
    from deepclust.estimator import quoted
    from deepclust.training.recipe import train

    places = [f"data.root={quoted(str(root.resolve()))}", f"run.dir={quoted(str(folder))}"]
    if train(load([*SIMCLR, *places])):
        raise KeyboardInterrupt


def _introduce(
    store: StoreWriter, changes: Changes, num_ignored: int, console: ConsoleLogger
) -> None:
    """What is in the folder and what changed."""
    there = int((store.status != "deleted").sum())
    parts = [f"{there:,} images in {printable(str(store.root))}"]
    parts += [f"{num_ignored:,} files of other kinds left out"] if num_ignored else []
    known = [("new", changes.new if changes.new < len(store) else 0), ("changed", changes.changed)]
    known += [("deleted", changes.deleted), ("back again", changes.returned)]
    parts += [f"{count:,} {what}" for what, count in known if count]
    console.message("; ".join(parts))


def _task(store: StoreWriter, encoder: Encoder, asked: Asked, console: ConsoleLogger) -> Task:
    """Gives an encoder its place in the store, and says what it is."""
    from deepclust.features.encoder import precision_of

    stored = encoder.stored(asked.dtype)
    known = store.backbones.get(stored.name)
    usual = 256 if encoder.device.type == "cuda" else 32
    made = (
        known.identity
        if known
        else {"precision": precision_of(encoder), "batch_size": asked.batch_size or usual}
    )
    stored = replace(
        stored,
        identity={**stored.identity, **{key: made[key] for key in ("precision", "batch_size")}},
    )
    size = len(store) * stored.dim * np.dtype(stored.dtype).itemsize / 1e6
    labels = {True: "trained with labels (supervised)", False: "trained without labels", None: ""}
    told = (
        labels[encoder.identity.get("trained_with_labels")]
        or "whether its training saw labels is not known"
    )
    console.message(
        f"{encoder.model}: {stored.dim:,} features of images of {encoder.side} px, {stored.dtype},"
        f" {size:,.1f} MB on disk, computed in {made['precision']} on {encoder.device}; {told}"
    )
    if encoder.note:
        console.message(encoder.note)
    damaged = store.add_backbone(stored)
    if damaged:
        rows = ", ".join(
            f"{block * BLOCK:,}-{min((block + 1) * BLOCK, len(store)) - 1:,}"
            for block in damaged[:NAMED]
        )
        more = f" and {len(damaged) - NAMED} more blocks" if len(damaged) > NAMED else ""
        file = store.file(stored.name)
        console.message(
            f"{file}: rows {rows}{more} were changed on disk (SHA-256); computed again", "warning"
        )
    encoder.begin(made["precision"])
    stale = ~store.computed(stored.name)
    return Task(encoder, stored, stale, min(BLOCK, asked.batch_size or made["batch_size"]))


def _compute(
    store: StoreWriter,
    tasks: Sequence[Task],
    asked: Asked,
    console: ConsoleLogger,
    rest: float = 0.0,
) -> None:
    """All that is out of date. Encoders that are fed alike share the decoding. rest: seconds of
    what comes behind.
    """
    tasks = [task for task in tasks if task.stale.any()]
    groups: dict[tuple[int, int, int], list[Task]] = {}
    for task in tasks:
        groups.setdefault((task.encoder.side, task.encoder.channels, task.batch_size), []).append(
            task
        )
    plans = [(key, group, _jobs(store, group, key[2])) for key, group in groups.items()]
    progress = Progress(
        console, sum(len(job.rows) for _, _, jobs in plans for job in jobs), rest=rest
    )
    for (side, channels, _), group, jobs in plans:
        workers = asked.workers or num_decoders()
        batches = decode_ahead(
            jobs, store.root, store.paths, side, channels, asked.hashing, workers
        )
        try:
            _pass(store, group, batches, progress)
        finally:
            batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    progress.finish()
    if tasks:
        store.refresh()


def _jobs(store: StoreWriter, group: Sequence[Task], batch_size: int) -> list[Job]:
    """Batches of the blocks in which something is out of date.

    A row has its place in its batch, and batches their size, whatever else has to be computed: so
    its features do not depend on where an earlier pass was stopped or on which images came first.
    """
    stale = np.logical_or.reduce([task.stale for task in group])
    wanted = stale & np.isin(store.status, ("new", "ok"))
    jobs = []
    for block in np.unique(np.flatnonzero(stale) // BLOCK).tolist():
        first, end = block * BLOCK, (block + 1) * BLOCK
        parts = []
        for start in range(first, end, batch_size):
            size = min(batch_size, end - start)
            rows = start + np.flatnonzero(wanted[start : start + size])
            if len(rows):
                parts.append(Job(block, start, size, rows, False))
        parts = parts or [Job(block, first, 0, np.empty(0, dtype=np.int64), False)]
        jobs += [*parts[:-1], parts[-1]._replace(last=True)]
    return jobs


def _pass(store: StoreWriter, group: Sequence[Task], batches: Any, progress: Progress) -> None:
    """Computes batch after batch and seals block after block."""
    found = {
        task.stored.name: np.zeros((BLOCK, task.stored.dim), task.stored.dtype) for task in group
    }
    facts: list[Fact] = []
    for batch in batches:
        facts += batch.facts
        _feed(store, group, batch, found)
        progress.step(len(batch.job.rows))
        if batch.job.last:
            first = batch.job.block * BLOCK
            sealed = {}
            for task in group:
                rows = first + np.flatnonzero(task.stale[first : first + BLOCK])
                if len(rows):
                    sealed[task.stored.name] = (rows, found[task.stored.name][rows - first])
            store.seal(batch.job.block, sealed, facts)
            facts = []
            for values in found.values():
                values[:] = 0


def _feed(
    store: StoreWriter, group: Sequence[Task], batch: Batch, found: dict[str, np.ndarray]
) -> None:
    """One batch through the encoders that need it; rows that could not be read stay 0."""
    rows = np.array([fact.row for fact in batch.facts if fact.status == "ok"], dtype=np.int64)
    for task in group:
        own = rows[task.stale[rows]] if len(rows) else rows
        if not len(own):
            continue
        values = task.encoder(torch.from_numpy(batch.pixels))[
            torch.from_numpy(own - batch.job.start)
        ].numpy()
        target = found[task.stored.name]
        with np.errstate(over="ignore"):
            target[own % BLOCK] = values
        bad = own[~np.isfinite(target[own % BLOCK]).all(axis=1)]
        if len(bad):
            finite = bool(np.isfinite(values).all())
            why = (
                "do not fit float16; use --dtype float32"
                if finite
                else "are not finite; use other --weights"
            )
            raise UserError(
                f"the features of {store.paths[int(bad[0])]} by {task.encoder.model} {why}"
            )


def _conclude(
    store: StoreWriter, tasks: Sequence[Task], console: ConsoleLogger, hint: bool
) -> None:
    """What could not be read, what there is, and with `hint` what it is good for."""
    bad = np.flatnonzero(store.status == "unreadable").tolist()
    if bad:
        lines = [
            f"\n  {printable(store.paths[row])}: {store.reasons.get(row)}" for row in bad[:NAMED]
        ]
        more = f"\n  and {len(bad) - NAMED:,} more" if len(bad) > NAMED else ""
        console.message(
            f"{len(bad):,} unreadable image(s) left out:{''.join(lines)}{more}", "warning"
        )
    for task in tasks if hint else ():
        usable = len(store.rows(task.stored.name))
        choice = f" data.backbone={task.stored.name}" if len(store.backbones) > 1 else ""
        console.message(
            f"{usable:,} images by {task.stored.name}: data=features data.file={store.path}{choice}"
        )
