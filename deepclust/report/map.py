"""The map of a report: every image as a point on a canvas, small enough to travel inside the page."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from deepclust.report.gallery import to_picture
from deepclust.report.page import Section

GRID = 65535
"""Positions are whole numbers from 0 to this, the same scale for both axes."""
SPRITE_COLUMNS = 40
SPRITE_QUALITY = 72
CELLS = 32
"""Cells along an axis over which thumbnails are spread."""
PREFIX = "0123456789abcdefghijklmnopqrstuvwxyz"


class Legend(NamedTuple):
    """A cluster of the map: its id, its name for people, a colour as CSS has it, how many images, a name on the map."""

    cluster: int
    title: str
    colour: str
    size: int
    label: str = ""


class Thumbs(NamedTuple):
    """places: of the points that have a thumbnail, the ones to draw first in front. images: uint8 (3, S, S) each."""

    places: Sequence[int]
    images: Sequence[np.ndarray]


def map_section(
    position: np.ndarray,
    cluster: np.ndarray,
    confidence: np.ndarray,
    paths: Sequence[str],
    legend: Sequence[Legend],
    thumbs: Thumbs,
    root: str = "",
) -> Section:
    """The section `Map`: a canvas to zoom and pan with mouse, fingers or keys, a card for the point in view, a legend.

    position: (n, 2), where not finite in the middle. cluster: (n,) ids, each in `legend`. confidence: (n,) from 0 to 1,
    NaN where it is not known. paths: n texts, `/` between their parts. root: address of the folder they are below, as
    `file:///...`; a page that is opened as a file shows the image of a point without thumbnail from there. Empty where
    there is no point.
    """
    if not len(position):
        return Section("Map", "")
    data = json.dumps(
        {
            **_points(position, cluster, confidence, legend),
            **_pack_paths(paths),
            "root": root,
            "thumbs": _sprite(thumbs),
        },
        ensure_ascii=False,
        separators=(",", ":"),
    ).replace("<", "\\u003c")
    package = files("deepclust.report")
    markup, style, *code = (
        package.joinpath(name).read_text(encoding="utf-8") for name in ("map.html", "map.css", "map.js", "map_input.js")
    )
    items = "".join(_legend_item(number, entry) for number, entry in enumerate(legend))
    body = markup.replace("{count}", f"{len(position):,}").replace("{legend}", items)
    body += f'<script type="application/json" id="map-data">{data}</script>\n'
    return Section("Map", f'{body}<script type="module">\n{"".join(code)}</script>', style=style)


def link_to(place: int) -> str:
    """An address within the page that opens a point of the map, by its place among them."""
    return f"#image={place}"


def _legend_item(number: int, entry: Legend) -> str:
    title = escape(entry.title, quote=True)
    return (
        f'<li><button type="button" data-cluster="{number}" aria-pressed="true" title="Show or hide {title}">'
        f'<i class="dot" style="background:{entry.colour}"></i><span>{title}</span> <small>{entry.size:,}</small>'
        "</button></li>"
    )


def _points(
    position: np.ndarray, cluster: np.ndarray, confidence: np.ndarray, legend: Sequence[Legend]
) -> dict[str, Any]:
    """Columns of the points, little endian in base64, and the legend with where its label stands."""
    place = quantised(position)
    ids = np.array([entry.cluster for entry in legend])
    order = np.argsort(ids)
    index = order[np.searchsorted(ids[order], cluster)]
    labels = []
    for number, entry in enumerate(legend):
        members = place[index == number].astype(np.int64)
        if len(members):  # the member in the midst, so that the label lies on the cluster whatever its shape
            middle = members[np.square(members - np.median(members, axis=0)).sum(1).argmin()].tolist()
        else:
            middle = [GRID // 2, GRID // 2]
        labels.append([entry.cluster, entry.title, entry.label or entry.title, entry.colour, *middle])
    known = np.isfinite(confidence).any()
    sure = np.rint(255 * np.clip(np.nan_to_num(confidence), 0, 1)).astype(np.uint8)
    return {
        "count": len(position),
        "x": _base64(place[:, 0]),
        "y": _base64(place[:, 1]),
        "cluster": _base64(index.astype("<u2")),
        "confidence": _base64(sure) if known else None,
        "legend": labels,
    }


def quantised(position: np.ndarray) -> np.ndarray:
    """(n, 2) uint16: the positions scaled alike along both axes to fill 0..GRID along the longer one, y downwards."""
    place = np.asarray(position, dtype=np.float64).copy()
    finite = np.isfinite(place).all(1)
    low, high = (place[finite].min(0), place[finite].max(0)) if finite.any() else (np.zeros(2), np.ones(2))
    place[~finite] = (low + high) / 2
    span = max(float((high - low).max()), 1e-12)
    place = (place - (low + high) / 2) / span + 0.5
    place[:, 1] = 1 - place[:, 1]
    return np.rint(GRID * np.clip(place, 0, 1)).astype("<u2")


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")


def _pack_paths(paths: Sequence[str]) -> dict[str, Any]:
    """`folders`, `runs` (which folder, for how many points, again and again), and `names` between slashes.

    A name begins with a digit of base 36: how many of its first characters are those of the name before it.
    """
    folders: dict[str, int] = {}
    runs: list[int] = []
    names: list[str] = []
    before = ""
    for path in paths:
        folder, _, name = path.rpartition("/")
        number = folders.setdefault(folder, len(folders))
        if runs and runs[-2] == number:
            runs[-1] += 1
        else:
            runs += [number, 1]
        shared, most = 0, min(len(before), len(name), len(PREFIX) - 1)
        while shared < most and before[shared] == name[shared]:
            shared += 1
        names.append(PREFIX[shared] + name[shared:])
        before = name
    return {"folders": list(folders), "runs": runs, "names": "/".join(names)}


def _sprite(thumbs: Thumbs) -> dict[str, Any] | None:
    """All thumbnails in one picture, rows of SPRITE_COLUMNS."""
    if not len(thumbs.places):
        return None
    side = thumbs.images[0].shape[-1]
    rows = -(-len(thumbs.images) // SPRITE_COLUMNS)
    sheet = Image.new("RGB", (side * min(SPRITE_COLUMNS, len(thumbs.images)), side * rows))
    for number, image in enumerate(thumbs.images):
        sheet.paste(to_picture(image), (number % SPRITE_COLUMNS * side, number // SPRITE_COLUMNS * side))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=SPRITE_QUALITY, optimize=True)
    return {
        "places": _base64(np.asarray(thumbs.places, dtype="<u4")),
        "side": side,
        "columns": SPRITE_COLUMNS,
        "image": f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}",
    }


def spread(position: np.ndarray, cluster: np.ndarray, last: np.ndarray) -> np.ndarray:
    """(n,) places in an order that begins all over the map and in every cluster. last: (n,) bool, those to come last.

    One of each cluster in each cell of a grid comes first, then a second one of each, and so on, at random within.
    """
    random = np.random.default_rng(0).permutation(len(position))
    cell = quantised(position)[random].astype(np.int64) * CELLS // (GRID + 1)
    key = np.stack([last[random], cluster[random], cell[:, 0], cell[:, 1]])
    order = np.lexsort(key[::-1])
    found = key[:, order]
    first = np.flatnonzero(np.concatenate([[True], (found[:, 1:] != found[:, :-1]).any(0)]))
    turn = np.empty(len(order), dtype=np.int64)
    turn[order] = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
    return random[np.lexsort((np.arange(len(order)), turn, last[random]))]
