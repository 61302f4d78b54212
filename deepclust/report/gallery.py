"""Galleries of images per cluster, each packed into one picture so that a report stays small."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

MAX_GALLERIES = 200
PIXEL_BUDGET = 12_000_000
"""Pixels of all galleries together; thumbnails shrink to keep within, so that the page stays below 10 MB."""
LOSSLESS_BUDGET = 2_000_000
"""Up to as many pixels are stored as PNG, beyond them as JPEG."""
SIDES = (96, 64, 48, 32)
TILE = 56
"""Small images are enlarged by a whole factor to about this many CSS pixels."""


class Gallery(NamedTuple):
    """One cluster's images: uint8 (C, H, W) with a caption each, the first `num_typical` typical, the others uncertain.

    size: images in the cluster. confidence: their mean confidence in [0, 1], None where it is not known. parts: (title,
    how many images) in order, in place of typical and uncertain. title: its name for people, `Cluster 3` by default.
    note: a fact more. colour: of the dot before the title, as CSS has it. links: where each image leads.
    """

    cluster: int
    size: int
    confidence: float | None
    images: Sequence[np.ndarray]
    captions: Sequence[str]
    num_typical: int | None = None
    parts: Sequence[tuple[str, int]] = ()
    title: str = ""
    note: str = ""
    colour: str = ""
    links: Sequence[str] = ()


def choose(confidence: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """Which members of a cluster to show: two thirds of `count` from the surest down, then the least certain upwards.

    confidence: (n,) of the members. Returns positions (at most `count`) and how many of them are typical; none twice.
    """
    order = np.argsort(-np.asarray(confidence), kind="stable")
    if len(order) <= count:
        return order, len(order)
    typical = count - count // 3
    return np.concatenate([order[:typical], order[::-1][: count - typical]]), typical


def make_galleries(
    clusters: np.ndarray,
    confidence: np.ndarray,
    num_clusters: int,
    count: int,
    read: Callable[[int], np.ndarray],
    caption: Callable[[int], str],
) -> list[Gallery]:
    """A gallery for each of `num_clusters`, an empty one for a cluster without images.

    clusters, confidence: (N,). count: images shown per cluster. read: position to uint8 (C, H, W); caption: position to
    text. Only what is shown is read, and no more clusters than a page shows.
    """
    galleries = []
    for cluster in range(num_clusters):
        members = np.flatnonzero(clusters == cluster)
        chosen, num_typical = choose(confidence[members], count if cluster < MAX_GALLERIES else 0)
        rows = [int(row) for row in members[chosen]]
        mean = float(confidence[members].mean()) if len(members) else None
        images, captions = [read(row) for row in rows], [caption(row) for row in rows]
        galleries.append(Gallery(cluster, len(members), mean, images, captions, num_typical))
    return galleries


def galleries_html(galleries: Sequence[Gallery]) -> str:
    """One section per cluster. Raises ValueError if a gallery's captions are not as many as its images."""
    shown = galleries[:MAX_GALLERIES]
    total = sum(len(gallery.images) for gallery in shown)
    side = next((side for side in SIDES if total * side**2 <= PIXEL_BUDGET), SIDES[-1])
    small = sum(image.shape[-2] * image.shape[-1] for gallery in shown for image in gallery.images)
    lossless = min(small, total * side**2) <= LOSSLESS_BUDGET
    parts = [_section(gallery, side, lossless) for gallery in shown]
    if len(galleries) > len(shown):
        parts.append(f"<p>The first {len(shown)} of {len(galleries):,} clusters are shown.</p>")
    return "\n".join(parts)


def _section(gallery: Gallery, side: int, lossless: bool) -> str:
    """Heading, typical tiles, uncertain tiles; the picture they are all cut from is a property of the section."""
    if len(gallery.captions) != len(gallery.images):
        raise ValueError(
            f"cluster {gallery.cluster}: {len(gallery.captions)} captions for {len(gallery.images)} images"
        )
    facts = f"{gallery.size:,} image{'' if gallery.size == 1 else 's'}"
    if gallery.confidence is not None and np.isfinite(gallery.confidence):
        facts += f" · mean confidence {100 * gallery.confidence:.1f} %"
    facts += f" · {gallery.note}" if gallery.note else ""
    dot = f'<i class="dot" style="background:{gallery.colour}"></i>' if gallery.colour else ""
    title = gallery.title or f"Cluster {gallery.cluster}"
    head = f'<h3>{dot}{escape(title)} <span class="facts">{escape(facts)}</span></h3>'
    name = f"cluster-{gallery.cluster}"
    if not gallery.images:
        return f'<section class="cluster" id="{name}">{head}</section>'
    cut = len(gallery.images) if gallery.num_typical is None else gallery.num_typical
    parts = gallery.parts or (("Most typical", cut), ("Least certain", len(gallery.images) - cut))
    tiles, style, pixelated = _cut(gallery.images, gallery.captions, side, lossless, title, gallery.links)
    body, start = "", 0
    for part, count in parts:
        body += _tiles(part, tiles[start : start + count])
        start += count
    body = f'<div class="parts">{body}</div>'
    return f'<section class="cluster{pixelated}" id="{name}" style="{style}">{head}{body}</section>'


def strip_html(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    title: str,
    side: int = SIDES[1],
    links: Sequence[str] = (),
) -> str:
    """A line of tiles by itself. images: uint8 (C, H, W), a caption each. title: what they are, to be read aloud."""
    tiles, style, pixelated = _cut(images, captions, side, False, title, links)
    return f'<ul class="tiles{pixelated}" style="{style}">{"".join(tiles)}</ul>'


def _cut(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    side: int,
    lossless: bool,
    title: str,
    links: Sequence[str],
) -> tuple[list[str], str, str]:
    """Tiles, the properties of what holds them (the picture they are cut from), and whether they are enlarged."""
    width, height = _tile_size(images[0], side)
    factor = max(1, round(TILE / max(width, height)))
    style = (
        f"--sprite:url({sprite(images, (width, height), lossless)});--w:{width * factor}px;"
        f"--h:{height * factor}px;--strip:{width * factor * len(images)}px"
    )
    leads = links or [""] * len(captions)
    tiles = [_tile(i, width * factor, *tile, title) for i, tile in enumerate(zip(captions, leads))]
    return tiles, style, " pixelated" if factor > 1 else ""


def _tiles(title: str, tiles: list[str]) -> str:
    return f'<div><h4>{title}</h4><ul class="tiles">{"".join(tiles)}</ul></div>' if tiles else ""


def _tile(position: int, width: int, caption: str, link: str, title: str) -> str:
    text, style = escape(caption, quote=True), f"background-position:-{position * width}px 0"
    words = f'aria-label="Image in {escape(title, quote=True)}: {text}" title="{text}"'
    if link:
        return f'<li style="{style}"><a href="{escape(link, quote=True)}" {words}></a></li>'
    return f'<li role="img" {words} style="{style}"></li>'


def _tile_size(image: np.ndarray, side: int) -> tuple[int, int]:
    """(width, height) of a thumbnail whose longer side is at most `side`; never larger than the image."""
    height, width = image.shape[-2:]
    shrink = min(1.0, side / max(height, width))
    return max(1, round(width * shrink)), max(1, round(height * shrink))


def sprite(images: Sequence[np.ndarray], size: tuple[int, int], lossless: bool) -> str:
    """All images side by side in one picture, a data address. images: uint8 (C, H, W), size: (width, height) each."""
    pictures = [to_picture(image) for image in images]
    mode = "L" if all(picture.mode == "L" for picture in pictures) else "RGB"
    strip = Image.new(mode, (size[0] * len(pictures), size[1]))
    for position, picture in enumerate(pictures):
        if picture.size != size:
            picture = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
        strip.paste(picture.convert(mode), (position * size[0], 0))
    buffer = io.BytesIO()
    if lossless:
        strip.save(buffer, "PNG", optimize=True)
    else:
        strip.save(buffer, "JPEG", quality=85)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def to_picture(image: Any) -> Image.Image:
    """uint8 (C, H, W) to a grey picture (fewer than three channels: the first) or a colour one (the first three)."""
    array = np.asarray(image)
    if array.ndim != 3 or array.dtype != np.uint8:
        raise ValueError(f"an image of a gallery must be uint8 (C, H, W), it is {array.dtype} {array.shape}")
    if array.shape[0] < 3:
        return Image.fromarray(np.ascontiguousarray(array[0]))
    return Image.fromarray(np.ascontiguousarray(array[:3].transpose(1, 2, 0)))
