"""The map of a report: every image as a point on a canvas, small enough to be part of the page."""

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
# Makes the picture of the 1,200 thumbnails of a full map about square.
SPRITE_COLUMNS = 40
# Below the galleries' quality: these thumbnails are smaller, and there are many more of them.
SPRITE_QUALITY = 72
CELLS = 32
"""Cells along an axis over which thumbnails are spread."""
PREFIX = "0123456789abcdefghijklmnopqrstuvwxyz"
"""Digits of base 36, which `parseInt(digit, 36)` reads in the page."""


class Legend(NamedTuple):
    """A cluster of the map."""

    cluster: int
    """Its id."""
    title: str
    """Its name for people."""
    colour: str
    """As CSS has it."""
    size: int
    """Number of its images."""
    label: str = ""
    """Its name on the map; the title by default."""


class Thumbs(NamedTuple):
    """The points of the map that are drawn as thumbnails."""

    places: Sequence[int]
    """Their indices among the points; of thumbnails that would overlap, the first is drawn."""
    images: Sequence[np.ndarray]
    """uint8 (3, S, S) each."""


def map_section(
    position: np.ndarray,
    cluster: np.ndarray,
    confidence: np.ndarray,
    paths: Sequence[str],
    legend: Sequence[Legend],
    thumbs: Thumbs,
    root: str = "",
) -> Section:
    """The section `Map` of a report; empty without points.

    It has a canvas to zoom and pan with mouse, fingers or keys, a card for the point in view, and a
    legend.

    position: (n, 2) of the points; those that are not finite are drawn in the middle.
    cluster: (n,) ids, each of which is in `legend`.
    confidence: (n,) from 0 to 1, NaN where it is not known.
    paths: n texts, with `/` between their parts.
    legend: the clusters.
    thumbs: the points that are drawn as thumbnails.
    root: address of the folder that the paths are relative to, as `file:///...`. A page that is
        opened as a file shows points without a thumbnail from there.
    """
    if not len(position):
        return Section("Map", "")
    content = {
        **_points(position, cluster, confidence, legend),
        **_pack_paths(paths),
        "root": root,
        "thumbs": _sprite(thumbs),
    }
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    # a path may hold "</script>", which would end the element in the middle of the data
    data = data.replace("<", "\\u003c")
    items = "".join(_legend_item(number, entry) for number, entry in enumerate(legend))
    body = _asset("map.html").replace("{count}", f"{len(position):,}").replace("{legend}", items)
    body += f'<script type="application/json" id="map-data">{data}</script>\n'
    code = _asset("map.js") + _asset("map_input.js")
    return Section("Map", f'{body}<script type="module">\n{code}</script>', style=_asset("map.css"))


def _asset(name: str) -> str:
    """Text of a file beside this one."""
    return files("deepclust.report").joinpath(name).read_text(encoding="utf-8")


def link_to(index: int) -> str:
    """Address within the page that opens a point of the map, by its index among the points."""
    return f"#image={index}"


def _legend_item(number: int, entry: Legend) -> str:
    """A button that shows or hides a cluster."""
    title = escape(entry.title, quote=True)
    return (
        f'<li><button type="button" data-cluster="{number}" aria-pressed="true" '
        f'title="Show or hide {title}">'
        f'<i class="dot" style="background:{entry.colour}"></i><span>{title}</span> '
        f"<small>{entry.size:,}</small></button></li>"
    )


def _points(
    position: np.ndarray,
    cluster: np.ndarray,
    confidence: np.ndarray,
    legend: Sequence[Legend],
) -> dict[str, Any]:
    """Columns of the points, and the legend with the position of each label.

    Columns are little-endian bytes in base64: a fraction of the size of numbers in JSON.
    """
    xy = quantised(position)
    # cluster ids to indices into the legend, which may have any order
    ids = np.array([entry.cluster for entry in legend])
    order = np.argsort(ids)
    index = order[np.searchsorted(ids[order], cluster)]
    labels = []
    for number, entry in enumerate(legend):
        x, y = _label_position(xy[index == number].astype(np.int64))
        label = entry.label or entry.title
        labels.append([entry.cluster, entry.title, label, entry.colour, x, y])
    known = np.isfinite(confidence).any()
    # a byte is enough, as the map shows confidences in whole percents
    levels = np.rint(255 * np.clip(np.nan_to_num(confidence), 0, 1)).astype(np.uint8)
    return {
        "count": len(position),
        "x": _base64(xy[:, 0]),
        "y": _base64(xy[:, 1]),
        "cluster": _base64(index.astype("<u2")),
        "confidence": _base64(levels) if known else None,
        "legend": labels,
    }


def _label_position(members: np.ndarray) -> list[int]:
    """Position of a cluster's label, given the (m, 2) positions of its members.

    It is that of the member nearest to their median, so that the label lies on the cluster whatever
    its shape.
    """
    if not len(members):
        return [GRID // 2, GRID // 2]
    distances = np.square(members - np.median(members, axis=0)).sum(1)
    return members[distances.argmin()].tolist()


def quantised(position: np.ndarray) -> np.ndarray:
    """(n, 2) uint16 positions from 0 to `GRID`, y downwards.

    Both axes are scaled by the same factor; the longer one fills the range.

    position: (n, 2) numbers; those that are not finite go to the middle.
    """
    xy = np.asarray(position, dtype=np.float64).copy()
    finite = np.isfinite(xy).all(1)
    low = np.zeros(2)
    high = np.ones(2)
    if finite.any():
        low = xy[finite].min(0)
        high = xy[finite].max(0)
    xy[~finite] = (low + high) / 2
    # points that all lie in one spot have no span to divide by
    span = max(float((high - low).max()), 1e-12)
    xy = (xy - (low + high) / 2) / span + 0.5
    # a screen's y points down
    xy[:, 1] = 1 - xy[:, 1]
    return np.rint(GRID * np.clip(xy, 0, 1)).astype("<u2")


def _base64(values: np.ndarray) -> str:
    """Bytes of the values in base64."""
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")


def _pack_paths(paths: Sequence[str]) -> dict[str, Any]:
    """Paths in a small form: `folders`, `runs` and `names`.

    runs: number of a folder and of points in it, again and again.
    names: file names between slashes. Each begins with a digit of base 36, the number of its first
        characters that are those of the name before it and are left out.
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
        # one digit counts up to 35 characters
        most = min(len(before), len(name), len(PREFIX) - 1)
        shared = 0
        while shared < most and before[shared] == name[shared]:
            shared += 1
        names.append(PREFIX[shared] + name[shared:])
        before = name
    return {"folders": list(folders), "runs": runs, "names": "/".join(names)}


def _sprite(thumbs: Thumbs) -> dict[str, Any] | None:
    """All thumbnails in one picture of `SPRITE_COLUMNS` columns; None without any."""
    if not len(thumbs.places):
        return None
    side = thumbs.images[0].shape[-1]
    columns = min(SPRITE_COLUMNS, len(thumbs.images))
    rows = -(-len(thumbs.images) // SPRITE_COLUMNS)
    sheet = Image.new("RGB", (side * columns, side * rows))
    for number, image in enumerate(thumbs.images):
        row, column = divmod(number, SPRITE_COLUMNS)
        sheet.paste(to_picture(image), (column * side, row * side))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=SPRITE_QUALITY, optimize=True)
    return {
        "places": _base64(np.asarray(thumbs.places, dtype="<u4")),
        "side": side,
        "columns": SPRITE_COLUMNS,
        "image": f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}",
    }


def spread(position: np.ndarray, cluster: np.ndarray, last: np.ndarray) -> np.ndarray:
    """(n,) indices of the points, in an order whose first ones lie all over the map.

    One point of each cluster in each cell of a grid comes first, then a second one of each, and so
    on, in random order among them.

    position: (n, 2) of the points.
    cluster: (n,) ids.
    last: (n,) bool, the points that come after all others.
    """
    # seed 0: the same map always shows the same thumbnails
    random = np.random.default_rng(0).permutation(len(position))
    cell = quantised(position)[random].astype(np.int64) * CELLS // (GRID + 1)
    key = np.stack([last[random], cluster[random], cell[:, 0], cell[:, 1]])
    # sorted by key, each group of points with one key is a run; a point's turn is its rank in it
    order = np.lexsort(key[::-1])
    in_order = key[:, order]
    starts_group = np.concatenate([[True], (in_order[:, 1:] != in_order[:, :-1]).any(0)])
    first = np.flatnonzero(starts_group)
    group_sizes = np.diff(first, append=len(order))
    turn = np.empty(len(order), dtype=np.int64)
    turn[order] = np.arange(len(order)) - np.repeat(first, group_sizes)
    # lexsort's last key counts most; the first one keeps the random order among equal turns
    return random[np.lexsort((np.arange(len(order)), turn, last[random]))]
