"""The report: one HTML page that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from deepclust.report.gallery import Gallery, galleries_html
from deepclust.report.plots import curve, size_bars
from deepclust.report.reliability import reliability_section
from deepclust.report.scores import (
    LABEL_FREE,
    SCORES,
    SHARES,
    figure_text,
    is_long_tailed,
    results_html,
)
from deepclust.runtime.files import write_atomic

SKIPPED_SHOWN = 200
"""Lines of images left out that are shown; a broken folder may have many thousands."""
COMPACT = 4
"""Galleries of at most so many images stand beside each other."""
LONG_TEXT = 7
"""A figure of the headline that has more letters is set smaller, if it is words."""


class Section(NamedTuple):
    """A section of the page."""

    title: str
    body: str
    """HTML; a section without any is left out."""
    kind: str = ""
    """A class of the style sheet."""
    style: str = ""
    """CSS that only this section needs."""


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: Mapping[str, Any],
    galleries: Sequence[tuple[Any, ...]] = (),
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    notes: Sequence[str] = (),
    skipped: Sequence[str] = (),
    commands: Sequence[tuple[str, str]] = (),
    lead: Sequence[str] = (),
    cards: Mapping[str, str] | None = None,
    bars: Sequence[tuple[Any, ...]] | None = None,
    above: Sequence[Section] = (),
    below: Sequence[Section] = (),
) -> None:
    """Writes the page to `path`, whole or not at all.

    Every text is escaped; bodies of sections are not.

    path: the file.
    title: of the page.
    summary: as in summary.json: `stages` and `baselines` {name: figures}, `kept_stage`, `why`,
        `num_images`, `num_clusters`, `seconds`, `peak_memory_mb`; what is missing is left out. A
        stage may say what its clusters are read by (`reads`) and hold the figures of held-out
        images (`test`). A baseline may be None, or say why it `failed` and on how many `samples` it
        was fitted.
    galleries: `Gallery`, or tuples of its first fields.
    curves: name to (steps, values).
    notes: what a reader has to know, such as an estimate that is missing and why.
    skipped: one line for each image left out.
    commands: (what it does, the command); by default how to load the model.
    lead: texts below the headline.
    cards: further figures of the headline, as text.
    bars: of the clusters' sizes: `Bar`, or tuples of its first fields; by default one for each
        gallery.
    above: further sections, ahead of the clusters' sizes.
    below: further sections, behind the galleries.

    Raises:
        FolderError: the page cannot be written.
    """
    path = Path(path)
    shown = [Gallery(*gallery) for gallery in galleries]
    if bars is None:
        bars = [(gallery.cluster, gallery.size) for gallery in shown]
    most_images = max((len(gallery.images) for gallery in shown), default=0)
    kind = "compact" if most_images <= COMPACT else ""
    lines = "".join(curve(name, *values) for name, values in (curves or {}).items())
    # the answer first, then how sure it is, then the images; what was done to get there comes last
    sections = [
        Section("Results", results_html(summary)),
        Section("Notes", _list(notes)),
        Section("Confidences", reliability_section(_kept(summary).get("calibration"))),
        *above,
        Section("Cluster sizes", size_bars(bars) if bars else ""),
        Section("Clusters", galleries_html(shown) if shown else "", kind),
        *below,
        Section("Training", lines, "curves"),
        Section("Images left out", _skipped(skipped)),
        Section("Use the model", _commands(commands or _default_commands(path.parent))),
    ]
    texts = "".join(f"<p>{escape(text)}</p>" for text in lead)
    header = f"<h1>{escape(title)}</h1>{_headline(summary, cards or {})}{texts}"
    write_atomic(path, _page(title, header, [section for section in sections if section.body]))


def _page(title: str, header: str, sections: Sequence[Section]) -> str:
    """The whole page, with its style sheet inside."""
    style = files("deepclust.report").joinpath("style.css").read_text(encoding="utf-8")
    style += "".join(section.style for section in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # an empty icon, as browsers would otherwise look for a file beside the page
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header>{header}</header>\n"
        f"<main>\n{''.join(map(_section, sections))}</main>\n"
        "<footer>Made by deepclust.</footer>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    """HTML of a titled section."""
    name = section.title.lower().replace(" ", "-")
    head = f'<section aria-labelledby="{name}"><h2 id="{name}">{section.title}</h2>'
    return f'{head}<div class="{section.kind}">{section.body}</div></section>\n'


def _kept(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """Figures of the stage that was kept; empty if there is none."""
    stages = summary.get("stages") or {}
    return stages.get(summary.get("kept_stage"), {})


def _headline(summary: Mapping[str, Any], further: Mapping[str, str]) -> str:
    """The figures to see first: those of the stage that was kept, then what the run took."""
    kept = _kept(summary)
    cards: list[tuple[str, str]] = []
    for label, key in (("Images", "num_images"), ("Clusters", "num_clusters")):
        if summary.get(key) is not None:
            cards.append((label, f"{summary[key]:,}"))
    scores = ("acc", "macro_acc", "nmi", "ari") if is_long_tailed(summary) else SCORES
    cards += [(SHARES[key], figure_text(key, kept.get(key))) for key in (*scores, *LABEL_FREE)]
    cards += [(escape(label), escape(text)) for label, text in further.items()]
    for label, key in (("Time", "seconds"), ("Memory", "peak_memory_mb")):
        cards.append((label, figure_text(key, summary.get(key))))
    items = "".join(_card(label, text) for label, text in cards if text)
    if not items:
        return ""
    return f'<dl class="headline">{items}</dl>'


def _card(label: str, text: str) -> str:
    """A figure of the headline; words in place of a figure are set smaller."""
    is_words = len(text) > LONG_TEXT and not text[0].isdecimal()
    kind = ' class="words"' if is_words else ""
    return f"<div><dt>{label}</dt><dd{kind}>{text}</dd></div>"


def _skipped(lines: Sequence[str]) -> str:
    """The images left out, the first ones by name; empty without any."""
    if not lines:
        return ""
    verb = "image was" if len(lines) == 1 else "images were"
    more = ""
    if len(lines) > SKIPPED_SHOWN:
        more = f"<p>… and {len(lines) - SKIPPED_SHOWN:,} more.</p>"
    return f"<p>{len(lines):,} {verb} left out.</p>{_list(lines[:SKIPPED_SHOWN])}{more}"


def _list(lines: Sequence[str]) -> str:
    """An item for each line; empty without any."""
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>"


def _default_commands(folder: Path) -> list[tuple[str, str]]:
    """How to load the model of a run folder."""
    # forward slashes: a backslash in a string of Python would begin an escape
    model = (folder / "model.safetensors").as_posix()
    code = (
        f'from deepclust import Clusterer\n\nmodel = Clusterer.load("{model}")\nclusters ='
        " model.predict(images)"
    )
    return [("Cluster new images", code)]


def _commands(commands: Sequence[tuple[str, str]]) -> str:
    """What each command does, and the command to copy."""
    return "".join(
        f"<p>{escape(purpose)}</p><pre><code>{escape(command)}</code></pre>"
        for purpose, command in commands
    )
