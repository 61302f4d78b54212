"""The section of the report on confidences: reliability diagrams and the table of their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

VARIANTS = {
    "predicted": "as predicted",
    "uncalibrated": "clustering head alone",
    "temperature": "temperature scaling",
    "constant": "constant confidence",
}
"""Ways to give confidences to the same clusters; see `deepclust.eval.confidence`."""
SCORES = {
    "ece": "ECE",
    "adaptive_ece": "adaptive",
    "brier": "Brier",
    "nll": "NLL",
    "auroc": "AUROC",
    "aurc": "AURC",
}
SHARES = ("ece", "adaptive_ece", "auroc", "aurc")
"""Scores that are shown in %."""
# The diagram's side and the height of the strip below it, in units that the page scales.
SIDE = 300
STRIP = 60
# One bar would be all there is to see of a constant confidence.
NOT_DRAWN = ("constant",)


def reliability_section(calibration: Mapping[str, Any] | None) -> str:
    """HTML of diagrams, words and table; empty without `calibration`.

    calibration: a stage's, as in summary.json. Without labels `scores` is empty, and the only
        diagram is of the agreement with independent clusterings in place of the accuracy.
    """
    if not calibration:
        return ""
    scores = calibration["scores"]
    labelled = bool(scores)
    axis = "share correct" if labelled else "agreement with independent clusterings"
    diagrams = "".join(
        _diagram(name, bins, scores.get(name), axis)
        for name, bins in calibration["reliability"].items()
        if name not in NOT_DRAWN
    )
    words = [
        (
            f"A bar is the {axis} of the images whose confidence lies there; "
            "calibrated confidences end on the diagonal. "
            "The grey part is the gap to their mean confidence. "
            "Below: how many images have such a confidence."
        ),
        trust_words(calibration),
    ]
    table = ""
    if labelled:
        words.append(
            "Temperature scaling and the constant use that estimate, no labels. "
            "However low its ECE, a constant confidence tells no image from another "
            "(AUROC 50 %): a low ECE alone proves nothing."
        )
        table = _table(calibration)
    paragraphs = "".join(f"<p>{escape(text)}</p>" for text in words)
    return f'<div class="curves">{diagrams}</div>{paragraphs}{table}'


def _diagram(
    name: str,
    bins: Sequence[Mapping[str, float]],
    scores: Mapping[str, Any] | None,
    axis: str,
) -> str:
    """Bars over confidence from 0 to 1 against the diagonal, and a strip of counts below."""
    largest = max((part["count"] for part in bins), default=1)
    bars = "".join(_bar(part, axis) for part in bins)
    strip = "".join(_strip_bar(part, largest) for part in bins)
    figure = ""
    words = f"{VARIANTS[name]}: {axis} over confidence"
    if scores is not None:
        figure = f' <span class="facts">ECE {100 * scores["ece"]:.1f} %</span>'
        words += f", ECE {scores['ece']:.3f}"
    # SVG's y points down, so perfect calibration runs from the lower left, y = SIDE, to y = 0
    diagonal = f'<line x1="0" y1="{SIDE}" x2="{SIDE}" y2="0" vector-effect="non-scaling-stroke"/>'
    return (
        '<figure class="curve reliability">'
        f"<figcaption>{escape(VARIANTS[name])}{figure}</figcaption>"
        f'<svg viewBox="0 0 {SIDE} {SIDE}" role="img" '
        f'aria-label="{escape(words, quote=True)}">{bars}{diagonal}</svg>'
        f'<svg class="strip" viewBox="0 0 {SIDE} {STRIP}" aria-hidden="true">{strip}</svg>'
        '<div class="steps"><span>0</span><span>confidence</span><span>1</span></div></figure>'
    )


def _bar(part: Mapping[str, float], axis: str) -> str:
    """A bin's accuracy as a bar, and the gap to its mean confidence."""
    left, width = _extent(part)
    low, high = sorted((part["acc"], part["confidence"]))
    words = f"confidence {part['confidence']:.2f}: {axis} {part['acc']:.2f}"
    words += f", {part['count']:,.0f} images"
    return (
        f"<g><title>{escape(words)}</title>"
        f'<rect class="share" x="{left:.1f}" y="{SIDE * (1 - part["acc"]):.1f}" '
        f'width="{width:.1f}" height="{SIDE * part["acc"]:.1f}"/>'
        f'<rect class="gap" x="{left:.1f}" y="{SIDE * (1 - high):.1f}" '
        f'width="{width:.1f}" height="{SIDE * (high - low):.1f}"/></g>'
    )


def _strip_bar(part: Mapping[str, float], largest: float) -> str:
    """A bin's number of images relative to the largest."""
    left, width = _extent(part)
    height = STRIP * part["count"] / largest
    return (
        f'<rect class="share" x="{left:.1f}" y="{STRIP - height:.1f}" width="{width:.1f}"'
        f' height="{height:.1f}"/>'
    )


def _extent(part: Mapping[str, float]) -> tuple[float, float]:
    """Left edge and width of a bin, with a gap of 1 to the next."""
    left = SIDE * part["lower"]
    width = SIDE * (part["upper"] - part["lower"]) - 1
    return left, width


def _table(calibration: Mapping[str, Any]) -> str:
    """HTML of the table of scores, one row for each variant."""
    columns, rows = trust_table(calibration)
    heads = "".join(
        f'<th scope="col" role="columnheader">{escape(name)}</th>' for name in columns[1:]
    )
    body = ""
    for name, *cells in rows:
        row = "".join(
            f'<td role="cell" data-label="{escape(label, quote=True)}">{cell or "–"}</td>'
            for label, cell in zip(SCORES.values(), cells)
        )
        title = f'<th scope="row" role="rowheader">{escape(name)}</th>'
        body += f'<tr role="row">{title}{row}</tr>'
    # roles, because narrow screens show the table as a list, which would end its being a table
    head = (
        '<thead role="rowgroup"><tr role="row"><th scope="col"'
        f' role="columnheader">Confidences</th>{heads}</tr>'
    )
    remark = (
        "ECE, adaptive ECE, AUROC and AURC (area under the risk-coverage curve; lower is better)"
        " in %."
    )
    table = (
        f'<table role="table" class="scores">{head}</thead><tbody'
        f' role="rowgroup">{body}</tbody></table>'
    )
    return f"{table}<p><small>{remark}</small></p>"


def trust_table(calibration: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the table of scores, one row for each variant; cells are text or None.

    calibration: a stage's, as in summary.json.
    """
    rows = []
    for name, scores in calibration["scores"].items():
        cells = [_cell(key, scores[key]) for key in SCORES]
        rows.append([VARIANTS[name], *cells])
    return ["", *SCORES.values()], rows


def _cell(key: str, value: float | None) -> str | None:
    """A score as text; None where it is not defined."""
    if value is None:
        return None
    if key in SHARES:
        return f"{100 * value:.1f}"
    return f"{value:.3f}"


def trust_words(calibration: Mapping[str, Any]) -> str:
    """One sentence: accuracy and calibration error estimated without labels.

    Where there are labels, the true figures stand beside the estimates.

    calibration: a stage's, as in summary.json.
    """
    estimate = calibration["estimate"]
    predicted = calibration["scores"].get("predicted")
    parts = []
    # key of the estimate, its name for people, key of the score that it estimates
    for key, word, truth in (("accuracy", "accuracy", "acc"), ("ece", "calibration error", "ece")):
        text = f"{word} {100 * estimate[key]:.1f} %"
        if predicted is not None:
            text += f" (it is {100 * predicted[truth]:.1f} %)"
        parts.append(text)
    return (
        "Estimated without labels, from agreement with independent clusterings:"
        f" {', '.join(parts)}."
    )
