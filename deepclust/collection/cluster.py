"""`deepclust cluster`: from a folder of images to clusters, a table, a map and a report."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from deepclust.collection.append import append, inherit
from deepclust.collection.derived import Derived
from deepclust.collection.estimate import seconds_for
from deepclust.collection.find import carry, find_clusters
from deepclust.collection.history import NOISE, History, State
from deepclust.collection.landmarks import (
    NEXT,
    DamagedLandmarks,
    Landmarks,
    landmarks_again,
    settle_landmarks,
)
from deepclust.collection.run import FACTS, FolderRun, NewerRun
from deepclust.data.folders import list_folder, printable
from deepclust.data.store import FeatureStore
from deepclust.errors import UserError
from deepclust.features.extract import FINISHED, STOPPED, Asked, default_store, fill
from deepclust.loggers.console import ConsoleLogger
from deepclust.loggers.progress_bar import clock_time
from deepclust.runtime.estimates import Estimates
from deepclust.runtime.files import NotWritten, release_lock, take_lock

CANDIDATES = ("diffusion", "spectral", "spherical_kmeans")
SHOWN = 20
SHORT = 3.0


@dataclass
class Wanted:
    """What the command line asks for. num_clusters: K, None for auto. out: the run's folder. sort:
    copy or symlink.
    """

    features: Asked
    num_clusters: int | None = None
    out: Path | None = None
    sort: str | None = None
    append: bool = False
    noise: bool = False
    new: bool = False
    clusterers: tuple[str, ...] = CANDIDATES
    seed: int = 0

    def told(self) -> dict[str, Any]:
        """What changes the clusters or the files, as run.json keeps it."""
        number = self.num_clusters or "auto"
        return {
            "num_clusters": number,
            "noise": self.noise,
            "sort": self.sort,
            "seed": self.seed,
        } | {"clusterers": list(self.clusterers)}


@dataclass
class Stopwatch:
    """Seconds of each part of a run."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - began


def cluster(wanted: Wanted, console: ConsoleLogger | None = None) -> int:
    """Clusters a folder. Returns 0, or 143 where it was stopped.

    Raises UserError: nothing to read, more clusters than images, a run of other images or one that
    was edited.
    """
    console, watch, began = console or ConsoleLogger(), Stopwatch(), time.monotonic()
    listing = list_folder(str(wanted.features.folder), key="")
    if len(listing.paths) < 3 or (wanted.num_clusters or 2) >= len(listing.paths):
        count = len(listing.paths)
        raise _not_so_many(
            wanted, f"{printable(str(listing.root))} holds {count:,} image(s)", count
        )
    out = wanted.out or default_run(listing.root, wanted.num_clusters)
    before = _existing(out, wanted, listing.root, console)
    console.message(_plan(wanted, listing.root, len(listing.paths), out, before))
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = take_lock(out, "--out ")
    except OSError as error:
        raise NotWritten(out, error, "--out DIR") from error

    def rest(count: int) -> float:
        return time.monotonic() - began + seconds_for(count, wanted.num_clusters)

    try:
        with watch("features"):
            filled = fill(wanted.features, console, rest, listing)
        if filled.stopped:
            return STOPPED
        return _cluster(wanted, filled.store, filled.backbones[0], out, before, watch, console)
    except KeyboardInterrupt:
        console.finish("stopped")
        console.message(
            "Stopped. The features are kept; the same command goes on from there.", "warning"
        )
        return STOPPED
    except NotWritten as error:
        raise NotWritten(error.path, error.error, "--out DIR") from error
    finally:
        release_lock(out, lock)


def default_run(root: Path, num_clusters: int | None) -> Path:
    """Where the clusters of a folder go if nothing else is said."""
    return Path("outputs") / f"clusters-{root.resolve().name or 'images'}-k{num_clusters or 'auto'}"


def _not_so_many(wanted: Wanted, what: str, count: int) -> UserError:
    """There are too few images, and what would be valid for that many."""
    advice = (
        f"choose from 2 to {count - 1:,}, or auto"
        if count > 2
        else "clustering needs three different ones"
    )
    return UserError(f"-k {wanted.num_clusters or 'auto'}: {what}; {advice}")


def _existing(out: Path, wanted: Wanted, root: Path, console: ConsoleLogger) -> FolderRun | None:
    """The run that is at this place, None where there is none, where it is to be forgotten or
    cannot be read.

    Raises UserError for a run that cannot be read and was edited: only --new may lose that.
    """
    history = History(out)
    if not (out / FACTS).exists() and not history.files():
        if wanted.append:
            raise UserError(
                f"--append: there are no clusters in {out} yet; leave it out, or give their folder"
                " with --out"
            )
        if out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
            raise UserError(f"--out {out} holds other files; choose another folder")
        return None
    if wanted.new:
        return None
    try:
        run = FolderRun.open(out)
        run.state()
    except NewerRun:
        raise
    except UserError as error:
        if wanted.append or len(history.files()) > 1:
            raise
        console.message(f"{error}. They are made anew now", "warning")
        return None
    store = (wanted.features.store or default_store(root)).resolve()
    if run.facts["store"] != str(store) and Path(run.facts["store"]).exists():
        raise _other_store(run, store)
    return run


def _other_store(run: FolderRun, store: Path) -> UserError:
    return UserError(
        f"--out {run.path} holds clusters of {printable(run.facts['root'])} by the store"
        f" {run.facts['store']}, and not by {store}; choose another --out or --store, or --new"
    )


def _plan(wanted: Wanted, root: Path, count: int, out: Path, before: FolderRun | None) -> str:
    """What will be done, in words."""
    store = wanted.features.store or default_store(root)
    number = (
        f"{wanted.num_clusters} clusters"
        if wanted.num_clusters
        else "as many clusters as the images tell"
    )
    if wanted.append:
        steps = [f"new images into the clusters of {out}"]
    else:
        steps = [
            "near-duplicates grouped, a map",
            f"{number}, by {', '.join(wanted.clusterers)}; the best is chosen without labels",
        ]
    steps.append(
        "clusters.csv, clusters.parquet,"
        f" report.html{f', sorted/ ({wanted.sort})' if wanted.sort else ''} in {out}"
    )
    there = (
        "kept and brought up to date" if (store / "store.sqlite").exists() else "made once and kept"
    )
    lines = [f"{count:,} images in {printable(str(root))}", f"  1  features, {there} in {store}"]
    lines += [f"  {place}  {step}" for place, step in enumerate(steps, 2)]
    if before is not None and not wanted.append:
        lines.append(
            "clusters that were found before keep their numbers where they are found again"
        )
        if before.facts["asked"].get("sort") and not wanted.sort:
            lines.append("sorted/, which --sort left, is cleared; give --sort again to keep it")
    return "\n".join(lines)


class Work(Enum):
    """What is left to do once the features are there."""

    KEEP = "keep"
    """The clusters that are there stay; their files are written anew."""
    APPEND = "append"
    """New images get a place in the clusters that are there."""
    CLUSTER = "cluster"
    """Clusters are found."""


@dataclass
class Job:
    """What the parts of a command share once the features are there."""

    wanted: Wanted
    derived: Derived
    out: Path
    before: FolderRun | None
    """The run that is at `out` already."""
    estimates: Estimates
    watch: Stopwatch
    console: ConsoleLogger

    @property
    def location(self) -> dict[str, str]:
        """Where images and store are now: both may have moved since the run was made."""
        store = self.derived.store
        return {"root": str(store.root), "store": str(store.path.resolve())}


def _cluster(
    wanted: Wanted,
    store: FeatureStore,
    backbone: str,
    out: Path,
    before: FolderRun | None,
    watch: Stopwatch,
    console: ConsoleLogger,
) -> int:
    """What comes after the features: decides what is to be done, and does it."""
    estimates = Estimates(lambda text: console.message(text, "warning"))
    derived = Derived(
        store, backbone, lambda what: console.message(f"{what} ...") if what else None, estimates
    )
    job = Job(wanted, derived, out, before, estimates, watch, console)
    work = _decide(wanted, before, derived, out)
    if before is not None and work is not Work.CLUSTER:
        _mend_landmarks(before, derived, estimates, console)
        run, state = _keep(job, before) if work is Work.KEEP else _append(job, before)
    else:
        run, state = _find(job, backbone)
    return _conclude(run, state, derived, watch, console)


def _decide(wanted: Wanted, before: FolderRun | None, derived: Derived, out: Path) -> Work:
    """What is to be done, given the run that is there.

    Raises UserError where it would cost somebody their edits, or is of other images.
    """
    if before is None:
        return Work.CLUSTER
    same_images = before.facts.get("digest") == derived.key
    store = derived.store.path.resolve()
    if before.facts["store"] != str(store) and not same_images:
        raise _other_store(before, store)
    edited = set(before.history.verbs) - {"cluster", "append"}
    if edited and not same_images and not wanted.append:
        raise UserError(
            f"{out} was edited ({', '.join(before.history.verbs[1:])}) and the images changed"
            " since: --append keeps the clusters and gives the new images a place; --new starts"
            " over"
        )
    if wanted.append:
        return Work.KEEP if same_images else Work.APPEND
    # How files are sorted does not change the clusters.
    same_request = {**before.facts["asked"], "sort": None} == {**wanted.told(), "sort": None}
    # An estimate that was missing is tried again, but not at the price of edits.
    complete = bool(edited) or not before.missing
    return Work.KEEP if same_images and same_request and complete else Work.CLUSTER


def _sorting(job: Job, before: FolderRun) -> str | None:
    """How files are to be sorted: as asked now; --append goes on as it was asked before."""
    if job.wanted.sort is None and job.wanted.append:
        return before.facts["asked"].get("sort")
    return job.wanted.sort


def _keep(job: Job, before: FolderRun) -> tuple[FolderRun, State]:
    """The run as it is."""
    asked = {**before.facts["asked"], "sort": _sorting(job, before)}
    run = FolderRun(job.out, {**before.facts, **job.location, "asked": asked})
    state = run.state()
    job.console.message("nothing changed since; the files are written anew")
    return run, state


def _append(job: Job, before: FolderRun) -> tuple[FolderRun, State]:
    """The run with a place for each new image."""
    derived = job.derived
    known = [*before.facts.get("appended", []), [before.facts["scan"], before.facts["digest"]]]
    now = {
        "asked": {**before.facts["asked"], "sort": _sorting(job, before)},
        "appended": known,
        "scan": derived.store.scan,
        "digest": derived.key,
        "seconds": {},
        "missing": {**before.missing, **job.estimates.missing},
    }
    run = FolderRun(job.out, {**before.facts, **job.location, **now})
    with job.watch("append"):
        state = append(before, derived)
    run.push("append", state)
    return run, state


def _find(job: Job, backbone: str) -> tuple[FolderRun, State]:
    """A run with clusters of its own."""
    wanted, derived, watch = job.wanted, job.derived, job.watch
    _check_number(wanted, derived)
    if watch.seconds["features"] < SHORT:  # too short for an estimate of its own
        left = seconds_for(len(derived), wanted.num_clusters, derived=derived.there)
        job.console.message(f"about {clock_time(left)} (h:mm:ss) from here to the report")
    with watch("neighbours and map"):
        _ = derived.map, derived.neighbors  # made now, whatever k
    x = derived.x[torch.from_numpy(derived.landmarks)].numpy()
    found = find_clusters(
        x,
        wanted.num_clusters,
        wanted.clusterers,
        wanted.seed,
        job.estimates,
        watch,
        job.console,
    )
    with watch("confidence"):
        landmarks, state = carry(derived, found.labels, wanted.noise, wanted.seed, job.estimates)
    if job.before is not None:
        state = inherit(job.before.state(), state)
    # The step of the history is the moment at which the new clusters count. A stop before it leaves
    # the old ones, with their landmarks; one behind it leaves what can be put in place by that
    # step: landmarks, run.json, the files.
    digest = landmarks.save(job.out / NEXT)
    facts = {
        **job.location,
        "backbone": backbone,
        "scan": derived.store.scan,
        "digest": derived.key,
        "asked": wanted.told(),
        "clusterer": found.method,
        "choice": found.choice,
        "criterion": found.criterion,
        "number": found.number,
        "missing": job.estimates.missing,
        "seconds": {},
        "landmarks": digest,
    }
    run = FolderRun(job.out, facts)
    run.history.begin(state, run.lasting)
    settle_landmarks(run)
    return run, state


def _mend_landmarks(
    run: FolderRun, derived: Derived, estimates: Estimates, console: ConsoleLogger
) -> None:
    """Makes the landmarks of a run anew where they cannot be read, or cannot tell the noise that
    was asked for.
    """
    try:
        landmarks = Landmarks.load(run)
    except DamagedLandmarks as error:
        console.message(f"{error}. That is done now", "warning")
        landmarks_again(run, derived, estimates)
        return
    if run.facts["asked"].get("noise") and landmarks.noise is None and derived.outliers is not None:
        console.message(
            "landmarks that tell noise of new images too are made; those of this run did not yet"
        )
        landmarks_again(run, derived, estimates)


def _check_number(wanted: Wanted, derived: Derived) -> None:
    """Refuses more clusters than there are different images."""
    count = len(derived.landmarks)
    if count < 3 or (wanted.num_clusters or 2) >= count:
        left = (
            f", {len(derived) - count:,} of them near-duplicates of others"
            if count < len(derived)
            else ""
        )
        raise _not_so_many(wanted, f"{len(derived):,} image(s) can be read{left}", count)


def _conclude(
    run: FolderRun, state: State, derived: Derived, watch: Stopwatch, console: ConsoleLogger
) -> int:
    """Writes the files and says what there is."""
    from deepclust.collection.outputs import write_all

    run.store, run.derived = derived.store, derived
    run.facts["seconds"] = {**watch.seconds, **run.facts.get("seconds", {})}
    run.save()
    with watch("files"):
        write_all(run, state)
    run.facts["seconds"]["files"] = watch.seconds["files"]
    run.save()
    kept = state.kept
    counts = {each: int((state.cluster[kept] == each).sum()) for each in [*state.ids, NOISE]}
    confidence = run.confidence(state)[kept]
    sure = {
        each: float(confidence[state.cluster[kept] == each].mean())
        for each in counts
        if counts[each]
    }
    order = sorted((each for each in counts if counts[each]), key=lambda each: -counts[each])
    rows = [[state.title(each), counts[each], round(100 * sure[each], 1)] for each in order[:SHOWN]]
    console.table(f"{len(state.ids)} clusters", ["", "images", "mean confidence %"], rows)
    if len(order) > SHOWN:
        console.message(f"and {len(order) - SHOWN} more")
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in watch.seconds.items())
    console.message(f"{clock_time(sum(watch.seconds.values()))} (h:mm:ss) in all; seconds: {parts}")
    files = (
        f"{run.path}/report.html  clusters.csv "
        f" clusters.parquet{'  left_out.csv' if run.store.reasons else ''}"
    )
    console.message(f"{files}\nnext: deepclust edit {shlex.quote(str(run.path))}")
    return FINISHED
