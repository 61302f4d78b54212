"""The section of the report on confidences: a reliability diagram for each variant, and the table beside them."""

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
SCORES = {"ece": "ECE", "adaptive_ece": "adaptive", "brier": "Brier", "nll": "NLL", "auroc": "AUROC", "aurc": "AURC"}
SHARES = ("ece", "adaptive_ece", "auroc", "aurc")
"""Scores that are shown in %."""

SIDE, STRIP = 300, 60
NOT_DRAWN = ("constant",)


def reliability_section(calibration: Mapping[str, Any] | None) -> str:
    """Diagrams, table and words for a stage's `calibration` of summary.json; nothing where there is none."""
    if not calibration:
        return ""
    labelled = bool(calibration["scores"])
    drawn = {name: bins for name, bins in calibration["reliability"].items() if name not in NOT_DRAWN}
    axis = "share correct" if labelled else "agreement with independent clusterings"
    figures = "".join(_diagram(name, bins, calibration["scores"].get(name), axis) for name, bins in drawn.items())
    how = (
        f"A bar is the {axis} of the images whose confidence lies there; calibrated confidences end on the diagonal. "
        "The grey part is the gap to their mean confidence. Below: how many images have such a confidence."
    )
    words = [how, trust_words(calibration)]
    if labelled:
        words.append(
            "Temperature scaling and the constant use that estimate, no labels. However low its ECE, a constant "
            "confidence tells no image from another (AUROC 50 %): a low ECE alone proves nothing."
        )
    table = _table(calibration) if labelled else ""
    return f'<div class="curves">{figures}</div>{"".join(f"<p>{escape(text)}</p>" for text in words)}{table}'


def _diagram(name: str, bins: Sequence[Mapping[str, float]], scores: Mapping[str, Any] | None, axis: str) -> str:
    """Bars over confidence from 0 to 1 against the diagonal, and a strip of counts below."""
    largest = max((part["count"] for part in bins), default=1)
    bars, strip = [], []
    for part in bins:
        left, width = SIDE * part["lower"], SIDE * (part["upper"] - part["lower"]) - 1
        low, high = sorted((part["acc"], part["confidence"]))
        words = f"confidence {part['confidence']:.2f}: {axis} {part['acc']:.2f}, {part['count']:,.0f} images"
        bars.append(
            f'<g><title>{escape(words)}</title><rect class="share" x="{left:.1f}" y="{SIDE * (1 - part["acc"]):.1f}" '
            f'width="{width:.1f}" height="{SIDE * part["acc"]:.1f}"/><rect class="gap" x="{left:.1f}" '
            f'y="{SIDE * (1 - high):.1f}" width="{width:.1f}" height="{SIDE * (high - low):.1f}"/></g>'
        )
        tall = STRIP * part["count"] / largest
        strip.append(
            f'<rect class="share" x="{left:.1f}" y="{STRIP - tall:.1f}" width="{width:.1f}" height="{tall:.1f}"/>'
        )
    figure = "" if scores is None else f' <span class="facts">ECE {100 * scores["ece"]:.1f} %</span>'
    words = f"{VARIANTS[name]}: {axis} over confidence" + ("" if scores is None else f", ECE {scores['ece']:.3f}")
    diagonal = f'<line x1="0" y1="{SIDE}" x2="{SIDE}" y2="0" vector-effect="non-scaling-stroke"/>'
    return (
        f'<figure class="curve reliability"><figcaption>{escape(VARIANTS[name])}{figure}</figcaption>'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="{escape(words, quote=True)}">{"".join(bars)}'
        f'{diagonal}</svg><svg class="strip" viewBox="0 0 {SIDE} {STRIP}" aria-hidden="true">{"".join(strip)}</svg>'
        '<div class="steps"><span>0</span><span>confidence</span><span>1</span></div></figure>'
    )


def _table(calibration: Mapping[str, Any]) -> str:
    columns, rows = trust_table(calibration)
    heads = "".join(f'<th scope="col" role="columnheader">{escape(name)}</th>' for name in columns[1:])
    body = ""
    for name, *cells in rows:
        row = "".join(
            f'<td role="cell" data-label="{escape(label, quote=True)}">{cell or "–"}</td>'
            for label, cell in zip(SCORES.values(), cells)
        )
        body += f'<tr role="row"><th scope="row" role="rowheader">{escape(name)}</th>{row}</tr>'
    head = f'<thead role="rowgroup"><tr role="row"><th scope="col" role="columnheader">Confidences</th>{heads}</tr>'
    remark = "ECE, adaptive ECE, AUROC and AURC (area under the risk-coverage curve; lower is better) in %."
    table = f'<table role="table" class="scores">{head}</thead><tbody role="rowgroup">{body}</tbody></table>'
    return f"{table}<p><small>{remark}</small></p>"


def trust_table(calibration: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the printed table, one line for each variant."""
    rows = []
    for name, scores in calibration["scores"].items():
        cells = [_cell(key, scores[key]) for key in SCORES]
        rows.append([VARIANTS[name], *cells])
    return ["", *SCORES.values()], rows


def _cell(key: str, value: float | None) -> str | None:
    if value is None:
        return None
    return f"{100 * value:.1f}" if key in SHARES else f"{value:.3f}"


def trust_words(calibration: Mapping[str, Any]) -> str:
    """One sentence on what can be said without labels, and how right it is where there are some."""
    estimate, predicted = calibration["estimate"], calibration["scores"].get("predicted")
    parts = []
    for key, word, truth in (("accuracy", "accuracy", "acc"), ("ece", "calibration error", "ece")):
        known = "" if predicted is None else f" (it is {100 * predicted[truth]:.1f} %)"
        parts.append(f"{word} {100 * estimate[key]:.1f} %{known}")
    return f"Estimated without labels, from agreement with independent clusterings: {', '.join(parts)}."
