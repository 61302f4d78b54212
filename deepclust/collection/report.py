"""report.html of a folder's clusters: the map, galleries, duplicates, and how the clusters came
about.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from deepclust.collection.history import NOISE, State
from deepclust.collection.representatives import Closeness, choose, closeness, duplicate_groups
from deepclust.collection.run import FolderRun
from deepclust.data.folders import printable
from deepclust.data.images import UnreadableImage, decode, in_threads
from deepclust.report.gallery import MAX_GALLERIES, Gallery, strip_html
from deepclust.report.map import Legend, Thumbs, link_to, map_section, spread
from deepclust.report.page import Section, write_report
from deepclust.report.palette import NOISE_COLOUR, palette
from deepclust.report.plots import Bar, curve
from deepclust.report.scores import Row, figure_label, scores_table

TILES, MOST, FEWEST = 480, 20, 3
"""Images of all galleries together, and the most and fewest of one."""
GROUPS, COPIES = 50, 3
"""Groups of near-duplicates that are shown, and images of each."""
SIDE, SMALL = 96, 48
"""Pixels along the sides of a thumbnail in a gallery, and on the map."""
ON_MAP = 1200
"""Thumbnails of the map at most."""
GALLERY_SECONDS, MAP_SECONDS = 6.0, 2.0
"""About how long decoding may take on one core; of large photos fewer are shown."""
FILE_SECONDS, BYTE_SECONDS = 0.6e-3, 1e-8
"""What decoding a small image of a file takes, and each of its bytes (JPEG)."""
PARTS = ("Most typical", "Borderline", "Outliers")
NOISE_PARTS = ("Nearest to a cluster", "Least certain", "Farthest from every cluster")


class Thumbnails:
    """Small images of rows of a store, each decoded once; grey where the file cannot be read any
    more.
    """

    def __init__(self, run: FolderRun) -> None:
        self.root, self.paths = run.root, run.store.paths
        self.images: dict[int, np.ndarray] = {}

    def read(self, rows: Iterable[int]) -> None:
        """Decodes what is not there yet."""
        wanted = [row for row in dict.fromkeys(rows) if row not in self.images]
        self.images.update(zip(wanted, self._decode(wanted, SIDE)))

    def small(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Images for the map; what is there in the size of a gallery is made smaller."""
        wanted = [row for row in rows if row not in self.images]
        found = dict(zip(wanted, self._decode(wanted, SMALL)))
        factor = SIDE // SMALL
        for row in set(rows) - set(wanted):
            blocks = self.images[row].reshape(3, SMALL, factor, SMALL, factor)
            found[row] = np.rint(blocks.mean((2, 4))).astype(np.uint8)
        return [found[row] for row in rows]

    def _decode(self, rows: Sequence[int], side: int) -> list[np.ndarray]:
        """uint8 (3, side, side) of each row, on several threads."""

        def one(place: int) -> np.ndarray:
            try:
                return decode(self.root / self.paths[rows[place]], side, 3)
            except UnreadableImage:
                return np.full((3, side, side), 200, dtype=np.uint8)

        return in_threads(one, len(rows))


def write_page(run: FolderRun, state: State) -> None:
    """Writes `<run>/report.html`, one page that needs no other file. Images are decoded only where
    they are shown.

    Raises FolderError where it cannot be written.
    """
    thumbnails = Thumbnails(run)
    near = closeness(run, state)
    legend = _legend(state)
    galleries = _galleries(run, state, near, thumbnails, legend)
    title = f"{run.root.resolve().name}: {len(state.ids)} clusters of {len(state.kept):,} images"
    write_report(
        run.path / "report.html",
        title=title,
        summary={
            "num_images": len(state.kept),
            "num_clusters": len(state.ids),
            "seconds": sum((run.facts.get("seconds") or {}).values()) or None,
        },
        cards=_cards(run, state),
        notes=[f"{name} is missing: {reason}" for name, reason in run.missing.items()],
        lead=_lead(run),
        bars=[Bar(each.cluster, each.size, each.title, each.label, each.colour) for each in legend],
        galleries=galleries,
        above=[_map(run, state, thumbnails, legend)],
        below=[
            Section("Near-duplicates", _duplicates(run, state, thumbnails)),
            Section("Number of clusters", _number(run.facts.get("number"))),
            Section("Clusterers compared", _choice(run.facts)),
            Section("How the clusters came about", _edits(run.history.verbs)),
        ],
        skipped=_left_out(run, state),
        commands=_commands(run, state),
    )


def _clusters(state: State) -> np.ndarray:
    return state.cluster[~state.excluded]


def _legend(state: State) -> list[Legend]:
    """Clusters from the largest down, noise last. A cluster keeps its colour as long as it has its
    id.
    """
    ids, sizes = np.unique(_clusters(state), return_counts=True)
    colours = palette(max(state.next_id, int(ids.max(initial=0)) + 1))
    found = []
    for place in np.argsort(np.where(ids == NOISE, 1, -sizes), kind="stable"):
        cluster = int(ids[place])
        colour = NOISE_COLOUR if cluster == NOISE else colours[cluster]
        label = state.names.get(cluster) or ("noise" if cluster == NOISE else str(cluster))
        found.append(Legend(cluster, _title(state, cluster), colour, int(sizes[place]), label))
    return found


def _map(run: FolderRun, state: State, thumbnails: Thumbnails, legend: Sequence[Legend]) -> Section:
    """All images; those with a thumbnail lie all over the map. Near-duplicates get one last, large
    files cost more.
    """
    kept = state.kept
    rows, position, cluster = state.rows[kept], state.position[kept], state.cluster[kept]
    if not np.isfinite(position).any():
        return Section("Map", "")
    order = spread(position, cluster, state.copy_of[kept] >= 0)[:ON_MAP]
    places = order[np.cumsum(_seconds(run, rows[order])) <= MAP_SECONDS]
    return map_section(
        position,
        cluster,
        run.confidence(state)[kept],
        [printable(run.store.paths[row]) for row in rows.tolist()],
        legend,
        Thumbs(places.tolist(), thumbnails.small(rows[places].tolist())),
        run.root.resolve().as_uri(),
    )


def _title(state: State, cluster: int) -> str:
    """`cluster 3` with a capital; a name as it was given."""
    title = state.title(cluster)
    return title if cluster in state.names else title.capitalize()


def _cards(run: FolderRun, state: State) -> dict[str, str]:
    """Figures of the headline beside images, clusters and time."""
    counts = {
        "Noise": int((_clusters(state) == NOISE).sum()),
        "Duplicates": int((state.copy_of[~state.excluded] >= 0).sum()),
        "Left out": len(_left_out(run, state)),
    }
    shown = {key: f"{count:,}" for key, count in counts.items() if count or key != "Noise"}
    return {**shown, "Clusterer": str(run.facts["clusterer"])}


def _lead(run: FolderRun) -> list[str]:
    """Where the images are, and whose features they were clustered by."""
    backbone = run.store.backbone(run.facts["backbone"])
    words = {True: "trained with labels (supervised)", False: "trained without labels", None: ""}
    labels = (
        words[backbone.identity.get("trained_with_labels")]
        or "whether its training saw labels is not known"
    )
    model = backbone.identity.get("model", backbone.name)
    return [f"Images in {printable(str(run.root))}. Features: {model}, {labels}."]


def _seconds(run: FolderRun, rows: np.ndarray) -> np.ndarray:
    """About how long each image takes to decode."""
    return FILE_SECONDS + BYTE_SECONDS * run.store.file_bytes[rows]


def _galleries(
    run: FolderRun, state: State, near: Closeness, thumbnails: Thumbnails, legend: Sequence[Legend]
) -> list[Gallery]:
    """A gallery for each cluster; near-duplicates are shown once."""
    order = [each.cluster for each in legend]
    shown = order[:MAX_GALLERIES]
    seconds = _seconds(run, state.rows[state.kept])
    tiles = min(TILES, GALLERY_SECONDS / seconds.mean()) if len(seconds) else 0
    count = int(np.clip(tiles // max(len(shown), 1), FEWEST, MOST))
    members = {
        cluster: np.flatnonzero((state.cluster == cluster) & ~state.excluded) for cluster in order
    }
    chosen: dict[int, list[np.ndarray]] = {}
    for cluster in shown:
        single = members[cluster][state.copy_of[members[cluster]] < 0]
        single = single if len(single) else members[cluster]
        chosen[cluster] = [
            single[part] for part in choose(state.confidence[single], near.own[single], count)
        ]
    thumbnails.read(
        int(state.rows[place]) for parts in chosen.values() for part in parts for place in part
    )
    confidence = run.confidence(state)

    def caption(place: int, part: int) -> str:
        known = state.cluster[place] != NOISE and np.isfinite(confidence[place])
        words = [f"{confidence[place]:.0%}"] if known else []
        if near.second[place] != NOISE and (part > 0 or state.cluster[place] == NOISE):
            words.append(f"nearest other: {state.title(int(near.second[place]))}")
        path = printable(run.store.paths[state.rows[place]])
        return f"{path} ({', '.join(words)})" if words else path

    galleries = []
    for cluster, title, colour, size, _ in legend:
        parts = chosen.get(cluster, [])
        names = NOISE_PARTS if cluster == NOISE else PARTS
        galleries.append(
            Gallery(
                cluster,
                size,
                None if cluster == NOISE else float(confidence[members[cluster]].mean()),
                [thumbnails.images[int(state.rows[place])] for part in parts for place in part],
                [
                    caption(int(place), number)
                    for number, part in enumerate(parts)
                    for place in part
                ],
                links=[
                    link_to(place)
                    for place in np.searchsorted(state.kept, np.concatenate(parts or [[]]))
                ],
                parts=[(name, len(part)) for name, part in zip(names, parts)],
                title=title,
                note=f"cluster {cluster}" if cluster in state.names else "",
                colour=colour,
            )
        )
    return galleries


def _duplicates(run: FolderRun, state: State, thumbnails: Thumbnails) -> str:
    """The largest groups of near-duplicates, a few images of each."""
    groups = duplicate_groups(state)
    if not groups:
        return ""
    thumbnails.read(int(row) for group in groups[:GROUPS] for row in group[:COPIES])
    total = sum(len(group) for group in groups)
    parts = [
        f"<p>{len(groups):,} group{'' if len(groups) == 1 else 's'} of {total:,} images. ",
        "</p>",
    ]
    parts[0] += "A group counts once where the clusters are made, and stays together."
    cards = []
    for group in groups[:GROUPS]:
        rows = [int(row) for row in group[:COPIES]]
        names = [printable(run.store.paths[row]) for row in rows]
        links = [link_to(place) for place in np.searchsorted(state.rows[state.kept], rows)]
        strip = strip_html(
            [thumbnails.images[row] for row in rows],
            names,
            "a group of near-duplicates",
            links=links,
        )
        cards.append(f"<li>{strip}<small>{len(group):,} images: {escape(names[0])}</small></li>")
    parts.append(f'<ol class="groups">{"".join(cards)}</ol>')
    if len(groups) > GROUPS:
        parts.append(
            f"<p>The {GROUPS} largest are shown; the column duplicate_of of clusters.csv has"
            " all.</p>"
        )
    return "".join(parts)


def _number(number: Mapping[str, Any] | None) -> str:
    """How sure the number of clusters is, and the criteria's curves over it."""
    if not number:
        return ""
    k, votes = number["k"], number.get("votes") or {}
    drawn = "".join(
        curve(_words(name), ks, values, "k", votes.get(name, k))
        for name, (ks, values) in (number.get("curves") or {}).items()
    )
    told = ", ".join(f"{escape(_words(name))} {vote}" for name, vote in votes.items())
    words = f"<p>{escape(str(number.get('statement') or f'{k} clusters.'))}</p>"
    return (
        words
        + (f"<p>Best k by criterion: {told}.</p>" if told else "")
        + f'<div class="curves">{drawn}</div>'
    )


def _choice(facts: Mapping[str, Any]) -> str:
    """The clusterers that were tried, the one that was chosen marked."""
    choice: Mapping[str, Mapping[str, Any]] = facts.get("choice") or {}
    if not choice:
        return ""
    keys = dict.fromkeys(key for figures in choice.values() for key in figures)
    columns = [*(key for key in keys if key != "seconds"), "seconds"]
    rows = [
        Row(
            _words(name),
            figures,
            kept=name == facts["clusterer"],
            failed=str(figures.get("failed") or ""),
        )
        for name, figures in choice.items()
    ]
    criterion = facts.get("criterion")
    why = (
        f"<p>Chosen without labels, by {escape(figure_label(str(criterion)).lower())}.</p>"
        if criterion
        else ""
    )
    return scores_table(rows, [key for key in columns if key != "failed"], "chosen") + why


def _words(name: str) -> str:
    return name.replace("_", " ")


def _edits(verbs: Sequence[str]) -> str:
    """Every step since the clusters were made."""
    if len(verbs) < 2:
        return ""
    items = "".join(f"<li>{escape(verb)}</li>" for verb in verbs)
    return f"<ol>{items}</ol>"


def _left_out(run: FolderRun, state: State) -> list[str]:
    """A line for each image that could not be read or was taken out."""
    paths = run.store.paths
    lines = [
        f"{printable(paths[row])}: {reason}" for row, reason in sorted(run.store.reasons.items())
    ]
    return lines + [
        f"{printable(paths[row])}: excluded by hand" for row in state.rows[state.excluded]
    ]


def _commands(run: FolderRun, state: State) -> list[tuple[str, str]]:
    """What to do next, with this run's own path and clusters."""
    path = shlex.quote(str(run.path))
    first, second = (*state.ids, 0, 1)[:2]
    edits = ["merge {0} {1}", "split {0}", 'rename {0} "NAME"', "exclude IMAGE", "undo"]
    return [
        ("Find the clusters of other images", f"deepclust predict {path} IMAGES -o clusters.csv"),
        ("Take in images that came into the folder since", run.append_command()),
        (
            "Correct the clusters",
            "\n".join(f"deepclust edit {path} {edit.format(first, second)}" for edit in edits),
        ),
    ]
