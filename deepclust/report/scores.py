"""The table of results of a report: methods against figures, and figures as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from deepclust.eval.metrics import BY_CLASS, LONG_TAILED

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
LABELS = {**SHARES, "clusters_used": "Clusters in use", "seconds": "Time"}
"""Names of figures for people."""
SCORES = ("acc", "nmi", "ari")
LABEL_FREE = ("neighbor_agreement", "mean_confidence")
REMARKS = {
    "neighbor_agreement": (
        "Agreement: neighbours in the first stage's features that share a cluster, above chance."
    ),
    "acc": (
        "Labels were read for such scores alone: they took no part in training or in any choice."
    ),
    "tail_acc": (
        "Macro: means over classes. Head, medium, tail: mean recall of the 30 % most "
        "frequent classes of the training set, the next 40 % and the 30 % rarest."
    ),
}
"""What stands below the results where they have a column of this figure."""


def is_long_tailed(summary: Mapping[str, Any]) -> bool:
    """Whether scores by class are shown as well: plain accuracy hides the small classes."""
    return (summary.get("imbalance") or 0) >= LONG_TAILED


def figure_text(key: str, value: Any) -> str:
    """A figure as HTML; empty where there is none.

    key: name of the figure, which decides its unit.
    value: a number; anything else, and NaN, is none.
    """
    # bool is an int to Python, and no figure here
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return ""
    if key in SHARES:
        return f"{100 * value:.1f}<small> %</small>"
    if key == "seconds":
        if value < 100:
            return f"{value:.1f}<small> s</small>"
        return f"{value / 60:.1f}<small> min</small>"
    if key == "peak_memory_mb":
        if value < 1000:
            return f"{value:.0f}<small> MB</small>"
        return f"{value / 1000:.1f}<small> GB</small>"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}"


class Row(NamedTuple):
    """A line of the results table."""

    name: str
    figures: Mapping[str, Any]
    note: str = ""
    """What the name leaves open."""
    kept: bool = False
    """Whether it is the one that was chosen."""
    failed: str = ""
    """Why there are no figures."""


def _stage_rows(summary: Mapping[str, Any]) -> list[Row]:
    """Stages in the order of training, each followed by its figures on held-out images."""
    rows = []
    for name, figures in (summary.get("stages") or {}).items():
        kept = name == summary.get("kept_stage")
        rows.append(Row(name, figures, str(figures.get("reads", "")), kept))
        if figures.get("test"):
            rows.append(Row(name, figures["test"], "held-out images"))
        if figures.get("kmeans"):
            rows.append(Row(name, figures["kmeans"], "k-means on its features"))
    return rows


def _baseline_rows(summary: Mapping[str, Any]) -> list[Row]:
    """Baselines, with the size of the sample where it was not everything."""
    rows = []
    for name, figures in (summary.get("baselines") or {}).items():
        figures = figures or {"failed": "not available"}
        samples = figures.get("samples")
        note = ""
        if samples is not None and samples != summary.get("num_images"):
            note = f"{samples:,} images"
        # a baseline that failed keeps its row, so that nobody takes it for forgotten
        failed = str(figures.get("failed", ""))
        rows.append(Row(BASELINES.get(name) or name, figures, note, failed=failed))
    return rows


def results_html(summary: Mapping[str, Any]) -> str:
    """HTML of stages beside baselines, why a stage was kept, and every other figure.

    summary: as for `write_report`; without figures the result is empty.
    """
    stages = _stage_rows(summary)
    baselines = _baseline_rows(summary)
    by_class = BY_CLASS if is_long_tailed(summary) else ()
    main = (*SCORES, *by_class, *LABEL_FREE, "clusters_used", "seconds")
    rows = [*stages, *baselines]
    # a column only where some row has its figure: without labels there are no scores
    columns = [key for key in main if any(figure_text(key, row.figures.get(key)) for row in rows)]
    if not columns:
        return ""
    texts = [str(summary.get("why", ""))]
    texts += [text for key, text in REMARKS.items() if key in columns]
    body = _group("Stages", stages, columns)
    body += _group("Baselines on the first stage's features", baselines, columns)
    paragraphs = "".join(f"<p>{escape(text)}</p>" for text in texts if text)
    return _table(columns, body) + paragraphs + _other_figures(stages, columns)


def figure_label(key: str) -> str:
    """What a figure is called at the head of its column."""
    return LABELS.get(key) or key.replace("_", " ")


def _table(columns: Sequence[str], body: str) -> str:
    """A table of scores with one column for each figure."""
    # roles, because narrow screens show the table as a list, which would end its being a table
    heads = "".join(
        f'<th scope="col" role="columnheader">{escape(figure_label(key))}</th>' for key in columns
    )
    head = (
        '<thead role="rowgroup"><tr role="row"><th scope="col"'
        f' role="columnheader">Method</th>{heads}</tr></thead>'
    )
    return f'<table role="table" class="scores">{head}{body}</table>'


def scores_table(rows: Sequence[Row], columns: Sequence[str], mark: str = "kept") -> str:
    """HTML table of methods against figures.

    rows: the methods.
    columns: names of the figures.
    mark: what the row that was kept is called.
    """
    return _table(columns, _group("", rows, columns, mark))


def _group(title: str, rows: Sequence[Row], columns: Sequence[str], mark: str = "kept") -> str:
    """Rows under a title, or without one; empty without rows."""
    if not rows:
        return ""
    head = ""
    if title:
        # more columns than any table has: the title spans the whole row
        head = (
            '<tr role="row" class="group"><th colspan="99" scope="rowgroup"'
            f' role="rowheader">{title}</th></tr>'
        )
    body = "".join(_row(row, columns, mark) for row in rows)
    return f'<tbody role="rowgroup">{head}{body}</tbody>'


def _row(row: Row, columns: Sequence[str], mark: str) -> str:
    """One method. A method without figures says why across the row."""
    name = escape(row.name) + _note(row)
    if row.kept:
        name += f' <span class="kept">{mark}</span>'
    if row.failed:
        failed = escape(row.failed)
        cells = f'<td role="cell" class="failed" colspan="{len(columns)}">{failed}</td>'
    else:
        cells = "".join(
            _cell(figure_label(key), figure_text(key, row.figures.get(key))) for key in columns
        )
    kind = ' class="is-kept"' if row.kept else ""
    return f'<tr role="row"{kind}><th scope="row" role="rowheader">{name}</th>{cells}</tr>'


def _note(row: Row) -> str:
    """What the name of a row leaves open, to stand behind it."""
    if not row.note:
        return ""
    return f' <span class="facts">{escape(row.note)}</span>'


def _cell(label: str, text: str) -> str:
    """A figure, or a dash where there is none."""
    # data-label: narrow screens hide the table's head and show this instead
    kind = "" if text else ' class="none"'
    return f'<td role="cell"{kind} data-label="{escape(label, quote=True)}">{text or "–"}</td>'


def _other_figures(stages: Sequence[Row], columns: Sequence[str]) -> str:
    """Every figure of the stages that the table has no room for, folded away."""
    blocks = []
    for row in stages:
        items = ""
        for key, value in row.figures.items():
            text = figure_text(key, value)
            if text and key not in columns:
                items += f"<div><dt>{escape(figure_label(key))}</dt><dd>{text}</dd></div>"
        # the one figure that is no number but one for each class
        recall = row.figures.get("class_recall")
        if isinstance(recall, Mapping):
            parts = ", ".join(f"{escape(str(key))}: {100 * r:.1f} %" for key, r in recall.items())
            items += f'<div class="wide"><dt>Recall by class</dt><dd>{parts}</dd></div>'
        if items:
            blocks.append(f"<h3>{escape(row.name)}{_note(row)}</h3><dl>{items}</dl>")
    if not blocks:
        return ""
    return f"<details><summary>All figures</summary>{''.join(blocks)}</details>"
