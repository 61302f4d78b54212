"""`deepclust edit`: clusters merged, split, named, taken out, and all of it taken back.

Every edit adds a state to the run's history and writes the run's files anew. An id keeps its
meaning: merged clusters go into the first, the largest part of a split one keeps its id, and an id
that was given up is not given again.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from deepclust.collection.history import NOISE, State, relabelled
from deepclust.collection.outputs import up_to_date, write_all
from deepclust.collection.run import FolderRun
from deepclust.data.folders import printable
from deepclust.errors import UserError, near
from deepclust.runtime.files import NotWritten, release_lock, take_lock

SPECTRAL = range(100, 4001)
"""Numbers of images that are split by spectral clustering, which told two classes of clothes apart
(eight pairs, mean ARI) at 0.79 where k-means did at 0.73. Of fewer its graph has too much of
everything; of more it takes long."""
LISTED = 200
"""Ids that a message names at most."""

Edit = Callable[[FolderRun, State, Sequence[str]], tuple[State, str]]
"""A run, its state and words to the state after and what changed in words."""


def edit(path: Path, verb: str | None, words: Sequence[str], num_parts: int = 2) -> None:
    """Carries out one edit of the run at `path` and prints what changed; without a verb, lists
    clusters and history.

    verb: `merge`, `split`, `rename`, `exclude` or `undo`. Files that an edit before left unwritten,
    because it was stopped, are written first. Raises UserError: no such run, one in use, words that
    do not fit it.
    """
    run = FolderRun.open(path)
    try:
        lock = take_lock(run.path, "")
    except OSError as error:
        raise NotWritten(run.path, error, "--out DIR of deepclust cluster") from error
    try:
        if verb != "undo" and not up_to_date(run):
            _write(run, run.state())
        if verb is None:
            print("\n".join(listing(run)))
            return
        _check_landmarks(run)
        if verb == "undo":
            if words:
                raise UserError(
                    f"undo takes nothing with it, and not {' '.join(words)}; it takes back the last"
                    " edit"
                )
            text = f"took back: {run.pop()}"
            state = run.state()
        else:
            edits: dict[str, Edit] = {"merge": merge, "rename": rename, "exclude": exclude}
            edits["split"] = lambda run, state, words: split(run, state, words, num_parts)
            state, text = edits[verb](run, run.state(), words)
            run.push(verb, state)
        print(f"{text}; now {len(state.ids)} clusters of {len(state.kept):,} images")
        _write(run, state)
    except NotWritten as error:
        raise NotWritten(error.path, error.error, "--out DIR of deepclust cluster") from error
    finally:
        release_lock(run.path, lock)


def _check_landmarks(run: FolderRun) -> None:
    """Raises UserError where the landmarks cannot be read: no file could be written behind an
    edit."""
    from deepclust.collection.landmarks import Landmarks

    Landmarks.load(run)


def _command(run: FolderRun) -> str:
    """This command, as a shell takes it."""
    return f"deepclust edit {shlex.quote(str(run.path))}"


def _write(run: FolderRun, state: State) -> None:
    begun = time.monotonic()
    write_all(run, state)
    seconds = time.monotonic() - begun
    if seconds > 2:
        print(f"files written in {seconds:.1f} s")


def listing(run: FolderRun) -> list[str]:
    """Lines: id, images, mean confidence and name of each cluster, then the edits so far."""
    state = run.state()
    kept = state.kept
    lines = ["   id  images  confidence  name"]
    unknown = "confidence" in run.missing
    for cluster in [*state.ids, *([NOISE] if (state.cluster[kept] == NOISE).any() else [])]:
        own = kept[state.cluster[kept] == cluster]
        name = "noise" if cluster == NOISE else state.names.get(cluster, "")
        sure = "unknown" if unknown else f"{state.confidence[own].mean():.2f}"
        lines.append(f"{cluster:5d} {len(own):7,d} {sure:>11}  {name}".rstrip())
    if state.excluded.any():
        lines.append(f"{int(state.excluded.sum()):,} image(s) taken out")
    return [*lines, f"history: {', '.join(run.history.verbs)}"]


def merge(run: FolderRun, state: State, words: Sequence[str]) -> tuple[State, str]:
    """Clusters into the first one named, whose id stays, and whose name; without one it gets the
    first of theirs.
    """
    ids = list(dict.fromkeys(find(state, word) for word in words))
    if len(ids) < 2:
        raise UserError(f"merge takes two clusters or more, as in: {_command(run)} merge 3 7")
    into, others = ids[0], ids[1:]
    if into == NOISE:
        raise UserError(
            f"merge goes into the first cluster, and noise is none: merge {ids[1]} noise"
        )
    moved = np.isin(state.cluster, others)
    names = dict(state.names)
    given = [names.pop(each) for each in others if each in names]
    if given and into not in names:
        names[into] = given[0]
    text = f"merged {_called(state, others)} into {_called(state, [into])}"
    after = relabelled(state, np.where(moved, into, state.cluster), names=names)
    return _sure(run, after, [into]), text


def split(
    run: FolderRun, state: State, words: Sequence[str], num_parts: int = 2
) -> tuple[State, str]:
    """One cluster into parts by its images' features; near-duplicates stay together, the largest
    part keeps the id.
    """
    if len(words) != 1:
        raise UserError(f"split takes one cluster, as in: {_command(run)} split 3 -n 2")
    cluster = find(state, words[0])
    if cluster == NOISE:
        raise UserError(f"noise is no cluster, and cannot be split; clusters are {_known(state)}")
    members = state.kept[state.cluster[state.kept] == cluster]
    groups = np.where(state.copy_of[members] < 0, state.rows[members], state.copy_of[members])
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    parts = _parts(run, state.rows[members[first]], num_parts, state.title(cluster))[group]
    sizes = np.bincount(parts, minlength=num_parts)
    order = np.argsort(-sizes, kind="stable")
    ids = np.empty(num_parts, dtype=np.int64)
    ids[order] = [cluster, *range(state.next_id, state.next_id + num_parts - 1)]
    labels = state.cluster.copy()
    labels[members] = ids[parts]
    text = (
        f"split {_called(state, [cluster])} into"
        f" {', '.join(f'{ids[part]} of {sizes[part]:,}' for part in order)}"
    )
    return _sure(run, relabelled(state, labels), ids.tolist()), text


def _parts(run: FolderRun, rows: np.ndarray, num_parts: int, title: str) -> np.ndarray:
    """(n,) int64: the part of each of these rows, none of them empty."""
    from deepclust.clustering.methods import cluster

    most = len(rows) - 1
    if not 2 <= num_parts <= most:
        valid = f"-n may be from 2 to {most}" if most >= 2 else "which is too few to split"
        raise UserError(
            f"-n {num_parts}: {title} has {len(rows):,} images that are no near-duplicates; {valid}"
        )
    method = "spectral" if len(rows) in SPECTRAL else "kmeans"
    try:
        labels = cluster(
            method, run.features(rows), num_parts, seed=run.facts["asked"].get("seed", 0)
        ).labels
    except ValueError as error:
        raise UserError(f"{title} cannot be split: {error}") from error
    found, parts = np.unique(labels, return_inverse=True)
    if len(found) < num_parts:
        raise UserError(f"-n {num_parts}: {title} has {len(found)} different parts at most")
    return parts


def rename(run: FolderRun, state: State, words: Sequence[str]) -> tuple[State, str]:
    """A name for a cluster, or none (""). Names are unique, and nothing that could be an id."""
    if len(words) != 2:
        raise UserError(
            f'rename takes a cluster and its name, as in: {_command(run)} rename 3 "red shoes"'
        )
    cluster, name = find(state, words[0]), " ".join(printable(words[1]).split())
    if cluster == NOISE:
        raise UserError(f"noise is no cluster, and has no other name; clusters are {_known(state)}")
    if _number(name) is not None or name.casefold() == "noise":
        raise UserError(
            f"name {name!r}: a name must be no number and not noise, which stand for clusters; add"
            " a word"
        )
    owner = next(
        (key for key, other in state.names.items() if other.casefold() == name.casefold()), cluster
    )
    if owner != cluster:
        raise UserError(
            f"name {name!r}: cluster {owner} has it. Choose another name, or merge {owner}"
            f" {cluster}"
        )
    names = {**state.names, cluster: name}
    if not name:
        del names[cluster]
    text = f"cluster {cluster} is called {name!r}" if name else f"cluster {cluster} has no name"
    return replace(state, names=names), text


def exclude(run: FolderRun, state: State, words: Sequence[str]) -> tuple[State, str]:
    """Takes clusters, or images by their path, out of the tables, the report and the model."""
    if not words:
        raise UserError(
            f"exclude takes clusters or paths of images, as in: {_command(run)} exclude 5"
        )
    paths: dict[str, int] = {}
    out = np.zeros(len(state.rows), dtype=bool)
    for word in words:
        try:
            out |= (state.cluster == find(state, word)) & ~state.excluded
        except UserError as error:
            paths = paths or _paths(run, state)
            place = next(
                (paths[each] for each in (word, os.path.abspath(word)) if each in paths), None
            )
            if place is None:
                raise UserError(_no_image(run, word, str(error))) from None
            if state.excluded[place]:
                raise UserError(
                    f"{word} is taken out already; {_command(run)} undo takes it back"
                ) from None
            out[place] = True
    excluded = state.excluded | out
    after = replace(state, excluded=excluded)
    if not after.ids:
        raise UserError(f"{' '.join(words)}: no cluster would be left in {run.path}")
    names = {key: name for key, name in state.names.items() if key in after.ids}
    return replace(after, names=names), f"took out {int(out.sum()):,} image(s), see left_out.csv"


def find(state: State, word: str) -> int:
    """The cluster of this id or name, -1 for `noise` or -1. Raises UserError naming those there
    are.
    """
    there = set(state.cluster[state.kept].tolist())
    named = {name.casefold(): key for key, name in state.names.items()}
    if NOISE in there:
        named["noise"] = NOISE
    number = _number(word)
    found = number if number is not None else named.get(word.casefold())
    if found is not None and found in there:
        return found
    close = near(word.casefold(), named) if number is None else None
    meant = f"did you mean {close}? " if close else ""
    raise UserError(
        f"{printable(word)}: there is no such cluster; {meant}clusters are {_known(state)}"
    )


def _sure(run: FolderRun, state: State, clusters: Sequence[int]) -> State:
    """Confidences of these clusters' images by the vote of the landmarks as they are assigned
    now."""
    from deepclust.collection.landmarks import clusterer_of

    places = state.kept[np.isin(state.cluster[state.kept], clusters)]
    model = clusterer_of(run, state)
    confidence = state.confidence.copy()
    for start in range(0, len(places), 8192):
        part = places[start : start + 8192]
        found = np.asarray(model.predict_proba(run.features(state.rows[part])))
        confidence[part] = found[np.arange(len(part)), state.cluster[part]]
    return replace(state, confidence=confidence)


def _number(word: str) -> int | None:
    try:
        return int(word)
    except ValueError:
        return None


def _called(state: State, ids: Sequence[int]) -> str:
    """Ids with their names, for messages."""
    words = [
        f"{each} ({state.names[each]})" if each in state.names else f"{each}"
        for each in ids[:LISTED]
    ]
    words = ["noise" if each == NOISE else word for each, word in zip(ids, words)]
    return ", ".join(words) + (f" and {len(ids) - LISTED} more" if len(ids) > LISTED else "")


def _known(state: State) -> str:
    return _called(state, state.ids)


def _paths(run: FolderRun, state: State) -> dict[str, int]:
    """Places of images by their path, absolute and below the root."""
    found: dict[str, int] = {}
    for place, row in enumerate(state.rows.tolist()):
        path = run.store.paths[row]
        found[path] = found[os.path.join(run.root, path)] = place
    return found


def _no_image(run: FolderRun, word: str, no_cluster: str) -> str:
    """What a word is that is neither."""
    if os.sep not in word and "." not in word:
        return no_cluster
    close = near(word, run.store.paths)
    meant = (
        f"did you mean {printable(close)}?"
        if close
        else f"paths are those of {run.path / 'clusters.csv'}"
    )
    return f"{printable(word)}: there is no such image in the clusters; {meant}"
