"""The report: one HTML page that needs nothing beside itself and no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from deepclust.eval.metrics import BY_CLASS, LONG_TAILED
from deepclust.report.gallery import Gallery, galleries_html
from deepclust.report.plots import curve, size_bars
from deepclust.report.reliability import reliability_section
from deepclust.run_folder import write_atomic

BASELINES = {
    "kmeans": "k-means",
    "gmm": "Gaussian mixture",
    "spectral": "Spectral",
    "tsne_gmm": "t-SNE + mixture",
    "pixels": "k-means on pixels",
}
SHARES = {
    "acc": "ACC",
    "nmi": "NMI",
    "ari": "ARI",
    "macro_acc": "Macro ACC",
    "macro_f1": "Macro F1",
    "head_acc": "Head",
    "medium_acc": "Medium",
    "tail_acc": "Tail",
    "majority_acc": "Majority ACC",
    "neighbor_agreement": "Agreement",
    "mean_confidence": "Confidence",
    "silhouette": "Silhouette",
    "size_entropy": "Size entropy",
    "churn": "Churn",
    "knn_probe": "kNN probe",
    "linear_probe": "Linear probe",
    "consensus": "Consensus",
    "self_prediction": "Self-prediction",
    "mean_rank": "Mean rank",
}
"""Figures that are fractions, shown in %, in the order of the columns."""
MAIN = ("acc", "nmi", "ari", "neighbor_agreement", "mean_confidence", "clusters_used", "seconds")
SKIPPED_SHOWN = 200
COMPACT = 4
"""Galleries of so few images stand beside each other."""


class Section(NamedTuple):
    """A section of the page. body: HTML. kind: a class of the style sheet. style: CSS of its own."""

    title: str
    body: str
    kind: str = ""
    style: str = ""


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

    summary: as in summary.json: `stages` and `baselines` {name: figures}, `kept_stage`, `why`, `num_images`,
    `num_clusters`, `seconds`, `peak_memory_mb`; what is missing is left out. A stage may say what its clusters are read
    by (`reads`) and hold the figures of held-out images (`test`); a baseline may be None or say why it `failed`, and on
    how many `samples` it was fitted. galleries: `Gallery`, or tuples of its first five fields. curves: name to (steps,
    values). notes: what a reader has to know. skipped: a line for each image left out. commands: (what it does, the
    command); by default how to load the model. lead: what stands below the headline. cards: further figures of the
    headline, as text. bars: of the sizes, by default one for each gallery. above, below: further sections, ahead of the
    clusters' sizes and behind their galleries.
    Every text is escaped, bodies of sections are not. Raises FolderError where the page cannot be written.
    """
    path = Path(path)
    shown = [Gallery(*gallery) for gallery in galleries]
    bars = [(g.cluster, g.size) for g in shown] if bars is None else bars
    compact = max((len(gallery.images) for gallery in shown), default=0) <= COMPACT
    sections = [
        Section("Results", _results(summary)),
        Section("Notes", _list(notes)),
        Section("Confidences", reliability_section(_kept(summary).get("calibration"))),
        *above,
        Section("Cluster sizes", size_bars(bars) if bars else ""),
        Section("Clusters", galleries_html(shown) if shown else "", "compact" if compact else ""),
        *below,
        Section("Training", "".join(curve(name, *values) for name, values in (curves or {}).items()), "curves"),
        Section("Images left out", _skipped(skipped)),
        Section("Use the model", _commands(commands or _default_commands(path.parent))),
    ]
    words = "".join(f"<p>{escape(text)}</p>" for text in lead)
    style = files("deepclust.report").joinpath("style.css").read_text(encoding="utf-8")
    style += "".join(section.style for section in sections if section.body)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{_headline(summary, cards or {})}{words}</header>\n"
        f"<main>\n{''.join(map(_section, sections))}</main>\n<footer>Made by deepclust.</footer>\n</body>\n</html>\n"
    )
    write_atomic(path, page)


def _section(section: Section) -> str:
    """A titled section; nothing where there is nothing to show."""
    if not section.body:
        return ""
    name = section.title.lower().replace(" ", "-")
    head = f'<section aria-labelledby="{name}"><h2 id="{name}">{section.title}</h2>'
    return f'{head}<div class="{section.kind}">{section.body}</div></section>\n'


def _kept(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """Figures of the stage that was kept."""
    return (summary.get("stages") or {}).get(summary.get("kept_stage"), {})


def _headline(summary: Mapping[str, Any], further: Mapping[str, str]) -> str:
    """The figures to see first: those of the stage that was kept, then what the run took."""
    kept = _kept(summary)
    figures = [("Images", summary.get("num_images")), ("Clusters", summary.get("num_clusters"))]
    cards = [(label, f"{value:,}") for label, value in figures if value is not None]
    shown = ("acc", "macro_acc", "nmi", "ari") if _long_tailed(summary) else ("acc", "nmi", "ari")
    cards += [(SHARES[key], _figure(key, kept.get(key))) for key in shown]
    cards += [(SHARES[key], _figure(key, kept.get(key))) for key in ("neighbor_agreement", "mean_confidence")]
    cards += [(escape(label), escape(text)) for label, text in further.items()]
    cards += [("Time", _figure("seconds", summary.get("seconds")))]
    cards += [("Memory", _figure("peak_memory_mb", summary.get("peak_memory_mb")))]
    items = "".join(f"<div><dt>{label}</dt><dd{_long(value)}>{value}</dd></div>" for label, value in cards if value)
    return f'<dl class="headline">{items}</dl>' if items else ""


def _long(text: str) -> str:
    """Words in place of a figure are set smaller."""
    return ' class="words"' if len(text) > 7 and not text[0].isdecimal() else ""


def _long_tailed(summary: Mapping[str, Any]) -> bool:
    return (summary.get("imbalance") or 0) >= LONG_TAILED


def _figure(key: str, value: Any) -> str:
    """A figure as text; empty where there is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return ""
    if key in SHARES:
        return f"{100 * value:.1f}<small> %</small>"
    if key == "seconds":
        return f"{value:.1f}<small> s</small>" if value < 100 else f"{value / 60:.1f}<small> min</small>"
    if key == "peak_memory_mb":
        return f"{value:.0f}<small> MB</small>" if value < 1000 else f"{value / 1000:.1f}<small> GB</small>"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


class Row(NamedTuple):
    """A line of the results table. note: what the name leaves open. failed: why there are no figures."""

    name: str
    figures: Mapping[str, Any]
    note: str = ""
    kept: bool = False
    failed: str = ""


def _stage_rows(summary: Mapping[str, Any]) -> list[Row]:
    """Stages as they were trained, each followed by its figures on held-out images where there are any."""
    rows = []
    for name, figures in (summary.get("stages") or {}).items():
        rows.append(Row(name, figures, str(figures.get("reads", "")), name == summary.get("kept_stage")))
        if figures.get("test"):
            rows.append(Row(name, figures["test"], "held-out images"))
        if figures.get("kmeans"):
            rows.append(Row(name, figures["kmeans"], "k-means on its features"))
    return rows


def _baseline_rows(summary: Mapping[str, Any]) -> list[Row]:
    """Baselines, with the size of the sample where it was not everything."""
    rows, num_images = [], summary.get("num_images")
    for name, figures in (summary.get("baselines") or {}).items():
        figures = figures or {"failed": "not available"}
        samples = figures.get("samples")
        note = f"{samples:,} images" if samples is not None and samples != num_images else ""
        rows.append(Row(BASELINES.get(name) or name, figures, note, failed=str(figures.get("failed", ""))))
    return rows


def _results(summary: Mapping[str, Any]) -> str:
    """The table of stages beside baselines, why a stage was kept, and every other figure folded away."""
    stages, baselines = _stage_rows(summary), _baseline_rows(summary)
    main = (*MAIN[:3], *BY_CLASS, *MAIN[3:]) if _long_tailed(summary) else MAIN
    columns = [key for key in main if any(_figure(key, row.figures.get(key)) for row in [*stages, *baselines])]
    if not columns:
        return ""
    remarks = {
        "neighbor_agreement": "Agreement: neighbours in the first stage's features that share a cluster, above chance.",
        "acc": "Labels were read for such scores alone: they took no part in training or in any choice.",
        "tail_acc": "Macro: means over classes. Head, medium, tail: mean recall of the 30 % most frequent classes of "
        "the training set, the next 40 % and the 30 % rarest.",
    }
    words = [str(summary.get("why", "")), *(text for key, text in remarks.items() if key in columns)]
    body = _group("Stages", stages, columns) + _group("Baselines on the first stage's features", baselines, columns)
    return (
        _table(columns, body)
        + "".join(f"<p>{escape(text)}</p>" for text in words if text)
        + _other_figures(stages, columns)
    )


def figure_label(key: str) -> str:
    """What a figure is called at the head of its column."""
    return {"clusters_used": "Clusters in use", "seconds": "Time"}.get(key) or SHARES.get(key) or key.replace("_", " ")


def _table(columns: Sequence[str], body: str) -> str:
    heads = "".join(f'<th scope="col" role="columnheader">{escape(figure_label(key))}</th>' for key in columns)
    head = f'<thead role="rowgroup"><tr role="row"><th scope="col" role="columnheader">Method</th>{heads}</tr></thead>'
    return f'<table role="table" class="scores">{head}{body}</table>'


def scores_table(rows: Sequence[Row], columns: Sequence[str], mark: str = "kept") -> str:
    """Methods against figures by name. mark: what the row that was kept is called."""
    return _table(columns, _group("", rows, columns, mark))


def _group(title: str, rows: Sequence[Row], columns: Sequence[str], mark: str = "kept") -> str:
    if not rows:
        return ""
    head = f'<tr role="row" class="group"><th colspan="99" scope="rowgroup" role="rowheader">{title}</th></tr>'
    body = "".join(_row(row, columns, mark) for row in rows)
    return f'<tbody role="rowgroup">{head if title else ""}{body}</tbody>'


def _row(row: Row, columns: Sequence[str], mark: str) -> str:
    """One method. A method without figures says why across the row."""
    note = f' <span class="facts">{escape(row.note)}</span>' if row.note else ""
    note += f' <span class="kept">{mark}</span>' if row.kept else ""
    if row.failed:
        cells = f'<td role="cell" class="failed" colspan="{len(columns)}">{escape(row.failed)}</td>'
    else:
        cells = "".join(_cell(figure_label(key), _figure(key, row.figures.get(key))) for key in columns)
    kind = ' class="is-kept"' if row.kept else ""
    return f'<tr role="row"{kind}><th scope="row" role="rowheader">{escape(row.name)}{note}</th>{cells}</tr>'


def _cell(label: str, text: str) -> str:
    kind = "" if text else ' class="none"'
    return f'<td role="cell"{kind} data-label="{escape(label, quote=True)}">{text or "–"}</td>'


def _other_figures(stages: Sequence[Row], columns: Sequence[str]) -> str:
    """Every figure of the stages that the table has no room for."""
    blocks = []
    for row in stages:
        rest = {key: _figure(key, value) for key, value in row.figures.items() if key not in columns}
        items = "".join(
            f"<div><dt>{escape(figure_label(key))}</dt><dd>{text}</dd></div>" for key, text in rest.items() if text
        )
        recall = row.figures.get("class_recall")
        if isinstance(recall, Mapping):
            parts = ", ".join(f"{escape(str(key))}: {100 * value:.1f} %" for key, value in recall.items())
            items += f'<div class="wide"><dt>Recall by class</dt><dd>{parts}</dd></div>'
        note = f' <span class="facts">{escape(row.note)}</span>' if row.note else ""
        blocks += [f"<h3>{escape(row.name)}{note}</h3><dl>{items}</dl>"] if items else []
    return f"<details><summary>All figures</summary>{''.join(blocks)}</details>" if blocks else ""


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _skipped(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    count = f"<p>{len(lines):,} image{' was' if len(lines) == 1 else 's were'} left out.</p>"
    more = f"<p>… and {len(lines) - SKIPPED_SHOWN:,} more.</p>" if len(lines) > SKIPPED_SHOWN else ""
    return count + _list(lines[:SKIPPED_SHOWN]) + more


def _default_commands(folder: Path) -> list[tuple[str, str]]:
    model = (folder / "model.safetensors").as_posix()
    code = f'from deepclust import Clusterer\n\nmodel = Clusterer.load("{model}")\nclusters = model.predict(images)'
    return [("Cluster new images", code)]


def _commands(commands: Sequence[tuple[str, str]]) -> str:
    return "".join(f"<p>{escape(what)}</p><pre><code>{escape(command)}</code></pre>" for what, command in commands)
