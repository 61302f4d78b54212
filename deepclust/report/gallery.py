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
"""Most clusters that a page shows."""
PIXEL_BUDGET = 12_000_000
"""Pixels of all galleries together; thumbnails shrink to keep within, for a page below 10 MB."""
LOSSLESS_BUDGET = 2_000_000
"""Up to as many pixels are stored as PNG, beyond them as JPEG."""
SIDES = (96, 64, 48, 32)
"""Sides of thumbnails in pixels; the largest that keeps within the budget is taken."""
STRIP_SIDE = SIDES[1]
"""Side of the thumbnails of a line of tiles by itself."""
TILE = 56
"""Small images are enlarged by a whole factor to about this many CSS pixels."""
# Usual for photographs; its losses are hardly visible at the size of thumbnails.
JPEG_QUALITY = 85


class Gallery(NamedTuple):
    """The images of one cluster that a page shows."""

    cluster: int
    size: int
    """Number of images in the cluster."""
    confidence: float | None
    """Their mean confidence in [0, 1], None where it is not known."""
    images: Sequence[np.ndarray]
    """uint8 (C, H, W) each."""
    captions: Sequence[str]
    """One for each image."""
    num_typical: int | None = None
    """The first so many images are typical of the cluster, the others uncertain; None: all are."""
    parts: Sequence[tuple[str, int]] = ()
    """(title, number of images) in order, in place of typical and uncertain ones."""
    title: str = ""
    """Name for people; `Cluster 3` by default."""
    note: str = ""
    """What else stands beside the title."""
    colour: str = ""
    """Of the dot before the title, as CSS has it."""
    links: Sequence[str] = ()
    """Where each image leads."""


def choose(confidence: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """Which members of a cluster to show.

    Two thirds of `count` are the surest from the surest down, the others the least certain from the
    least certain up; none comes twice.

    confidence: (n,) of the members.
    count: most images to show.

    Returns:
        Positions among the members, at most `count`, and how many of them are typical.
    """
    # stable: equal confidences keep the order of the images, on every machine
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
    """A gallery for each cluster, an empty one for a cluster without images.

    Only images that are shown are read, and those of no more clusters than a page shows.

    clusters, confidence: (N,) of the images.
    num_clusters: K; cluster ids are 0 to K - 1.
    count: most images shown per cluster.
    read: index of an image to uint8 (C, H, W).
    caption: index of an image to its text.
    """
    galleries = []
    for cluster in range(num_clusters):
        members = np.flatnonzero(clusters == cluster)
        # further galleries are not shown, but counted by the line that says how many are left out
        shown = count if cluster < MAX_GALLERIES else 0
        chosen, num_typical = choose(confidence[members], shown)
        rows = [int(row) for row in members[chosen]]
        mean = float(confidence[members].mean()) if len(members) else None
        images = [read(row) for row in rows]
        captions = [caption(row) for row in rows]
        galleries.append(Gallery(cluster, len(members), mean, images, captions, num_typical))
    return galleries


def galleries_html(galleries: Sequence[Gallery]) -> str:
    """HTML of one section per cluster.

    Raises:
        ValueError: a gallery's captions are not as many as its images.
    """
    shown = galleries[:MAX_GALLERIES]
    # one side for all galleries, so that images can be compared across clusters
    total = sum(len(gallery.images) for gallery in shown)
    side = next((side for side in SIDES if total * side**2 <= PIXEL_BUDGET), SIDES[-1])
    # small images are not enlarged in the file, so they may be fewer pixels than their tiles
    pixels = sum(image.shape[-2] * image.shape[-1] for gallery in shown for image in gallery.images)
    lossless = min(pixels, total * side**2) <= LOSSLESS_BUDGET
    sections = [_section(gallery, side, lossless) for gallery in shown]
    if len(galleries) > len(shown):
        sections.append(f"<p>The first {len(shown)} of {len(galleries):,} clusters are shown.</p>")
    return "\n".join(sections)


def _section(gallery: Gallery, side: int, lossless: bool) -> str:
    """Heading and parts; the picture that all tiles show a part of is a property of the section."""
    if len(gallery.captions) != len(gallery.images):
        raise ValueError(
            f"cluster {gallery.cluster}: {len(gallery.captions)} captions for {len(gallery.images)}"
            " images"
        )
    title = gallery.title or f"Cluster {gallery.cluster}"
    head = _heading(gallery, title)
    name = f"cluster-{gallery.cluster}"
    if not gallery.images:
        return f'<section class="cluster" id="{name}">{head}</section>'
    tiles, style, pixelated = _tiles(
        gallery.images, gallery.captions, side, lossless, title, gallery.links
    )
    body = ""
    start = 0
    for part, count in _parts(gallery):
        body += _part(part, tiles[start : start + count])
        start += count
    return (
        f'<section class="cluster{pixelated}" id="{name}" style="{style}">{head}'
        f'<div class="parts">{body}</div></section>'
    )


def _heading(gallery: Gallery, title: str) -> str:
    """Colour, title and facts of a cluster."""
    facts = f"{gallery.size:,} image"
    if gallery.size != 1:
        facts += "s"
    if gallery.confidence is not None and np.isfinite(gallery.confidence):
        facts += f" · mean confidence {100 * gallery.confidence:.1f} %"
    if gallery.note:
        facts += f" · {gallery.note}"
    dot = ""
    if gallery.colour:
        dot = f'<i class="dot" style="background:{gallery.colour}"></i>'
    return f'<h3>{dot}{escape(title)} <span class="facts">{escape(facts)}</span></h3>'


def _parts(gallery: Gallery) -> Sequence[tuple[str, int]]:
    """(title, number of images) of the parts of a gallery."""
    if gallery.parts:
        return gallery.parts
    typical = len(gallery.images)
    if gallery.num_typical is not None:
        typical = gallery.num_typical
    return (("Most typical", typical), ("Least certain", len(gallery.images) - typical))


def strip_html(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    title: str,
    links: Sequence[str] = (),
) -> str:
    """HTML of a line of tiles by itself.

    images: uint8 (C, H, W) each.
    captions: one for each image.
    title: what the images are, for screen readers.
    links: where each image leads.
    """
    tiles, style, pixelated = _tiles(images, captions, STRIP_SIDE, False, title, links)
    return f'<ul class="tiles{pixelated}" style="{style}">{"".join(tiles)}</ul>'


def _tiles(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    side: int,
    lossless: bool,
    title: str,
    links: Sequence[str],
) -> tuple[list[str], str, str]:
    """Tiles, the style of their container (with their common picture), its class if enlarged."""
    width, height = _tile_size(images[0], side)
    # a whole factor, so that each pixel of a small image becomes a square of equal size
    factor = max(1, round(TILE / max(width, height)))
    picture = sprite(images, (width, height), lossless)
    style = (
        f"--sprite:url({picture});--w:{width * factor}px;"
        f"--h:{height * factor}px;--strip:{width * factor * len(images)}px"
    )
    addresses = links or [""] * len(captions)
    tiles = [
        _tile(position, width * factor, caption, address, title)
        for position, (caption, address) in enumerate(zip(captions, addresses))
    ]
    return tiles, style, " pixelated" if factor > 1 else ""


def _part(title: str, tiles: list[str]) -> str:
    """A titled list of tiles; empty without any."""
    if not tiles:
        return ""
    return f'<div><h4>{title}</h4><ul class="tiles">{"".join(tiles)}</ul></div>'


def _tile(position: int, width: int, caption: str, link: str, title: str) -> str:
    """One image: a window onto the common picture at its position."""
    text = escape(caption, quote=True)
    style = f"background-position:-{position * width}px 0"
    words = f'aria-label="Image in {escape(title, quote=True)}: {text}" title="{text}"'
    if link:
        return f'<li style="{style}"><a href="{escape(link, quote=True)}" {words}></a></li>'
    return f'<li role="img" {words} style="{style}"></li>'


def _tile_size(image: np.ndarray, side: int) -> tuple[int, int]:
    """(width, height) of a thumbnail: its longer side is at most `side`; images never grow."""
    height, width = image.shape[-2:]
    shrink = min(1.0, side / max(height, width))
    return max(1, round(width * shrink)), max(1, round(height * shrink))


def sprite(images: Sequence[np.ndarray], size: tuple[int, int], lossless: bool) -> str:
    """All images side by side in one picture, as a data address.

    images: uint8 (C, H, W) each.
    size: (width, height) in pixels of each in the picture.
    lossless: PNG instead of JPEG.
    """
    pictures = [to_picture(image) for image in images]
    # one channel where all images are grey: fewer bytes than three equal ones
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
        strip.save(buffer, "JPEG", quality=JPEG_QUALITY)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def to_picture(image: Any) -> Image.Image:
    """A uint8 (C, H, W) array as a picture.

    The first three channels are its colours; of fewer than three the first is its grey.

    Raises:
        ValueError: another dtype or number of axes.
    """
    array = np.asarray(image)
    if array.ndim != 3 or array.dtype != np.uint8:
        raise ValueError(
            f"an image of a gallery must be uint8 (C, H, W), it is {array.dtype} {array.shape}"
        )
    if array.shape[0] < 3:
        return Image.fromarray(np.ascontiguousarray(array[0]))
    return Image.fromarray(np.ascontiguousarray(array[:3].transpose(1, 2, 0)))
