"""The report as a browser's parser sees it: self-contained, well formed, escaped, and small."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deepclust.report import gallery, write_report
from deepclust.report.gallery import Gallery, choose, make_galleries, sprite
from deepclust.report.plots import curve, metric_curves

VOID = {"meta", "link", "polyline", "input"}
EVIL = "<script>alert(1)</script>\"'&"
SUMMARY: dict[str, Any] = {
    "stages": {
        "pretext": {
            "seconds": 31.2,
            "reads": "k-means on its features",
            "acc": 0.9,
            "clusters_used": 10,
        },
        "scan": {
            "acc": 0.9512,
            "nmi": 0.918,
            "ari": 0.886,
            "neighbor_agreement": 0.859,
            "seconds": 18.0,
        }
        | {"kmeans": {"acc": 0.912, "samples": 5000}},
        "selflabel": {
            "acc": 0.983,
            "nmi": 0.964,
            "ari": 0.96,
            "neighbor_agreement": 0.92,
            "silhouette": None,
        }
        | {"class_recall": {"0": 0.5}, "test": {"acc": 0.777, "nmi": math.nan}},
    },
    "baselines": {
        "kmeans": {"acc": 0.7, "samples": 5000},
        "gmm": {"failed": "too few images"},
        "spectral": None,
    },
    "kept_stage": "selflabel",
    "why": "selflabel is kept: it agrees best.",
    "seconds": 93.4,
    "peak_memory_mb": 812.0,
    "num_images": 12345,
    "num_clusters": 10,
}


class Page(HTMLParser):
    """Elements with attributes, text by element, and whether every tag was closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["script"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def images(count: int, side: int = 8, channels: int = 1) -> list[np.ndarray]:
    return list(
        np.random.default_rng(0).integers(0, 256, (count, channels, side, side), dtype=np.uint8)
    )


def written(folder: Path, **changes: Any) -> tuple[str, Page]:
    write_report(folder / "report.html", **{"title": "a run", "summary": SUMMARY, **changes})
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_the_table_holds_every_method_and_says_what_was_kept(tmp_path: Path) -> None:
    text, page = written(tmp_path)
    for words in (
        "98.3 %",
        "95.1 %",
        "77.7 %",
        "held-out images",
        "k-means on its features",
        "5,000 images",
    ):
        assert words in page.text
    for words in (
        "12,345",
        "93.4 s",
        "812 MB",
        "too few images",
        "selflabel is kept: it agrees best.",
    ):
        assert words in page.text
    assert "nan" not in page.text.lower()
    kept = re.search(r'<tr role="row" class="is-kept">(.*?)</tr>', text)
    assert (
        kept
        and "selflabel" in kept[1]
        and text.count("is-kept") == 1 + text.split("</style>")[0].count("is-kept")
    )


def test_without_labels_or_anything_the_page_still_stands(tmp_path: Path) -> None:
    stages = {"scan": {"neighbor_agreement": 0.5, "clusters_used": 3}}
    _, page = written(tmp_path, summary={"stages": stages, "kept_stage": "scan"})
    assert "ACC" not in page.text and "50.0 %" in page.text
    _, page = written(tmp_path, summary={})
    assert "Results" not in page.text and "Clusterer.load" in page.text


def test_nothing_is_fetched_and_nothing_runs(tmp_path: Path) -> None:
    galleries = [(0, 4, 0.9, images(4), list("abcd"))]
    text, page = written(
        tmp_path, galleries=galleries, curves={"scan: loss": ([1, 2, 3], [3.0, 2.0, 1.0])}
    )
    assert not {"script", "iframe", "img", "form"} & {tag for tag, _ in page.elements}
    addresses = [
        v for _, attrs in page.elements for k, v in attrs.items() if k in ("href", "src", "action")
    ]
    assert addresses and all(
        address and address.startswith(("#", "data:")) for address in addresses
    )
    assert not re.search(r"https?:|@import|url\((?!data:)", text)
    assert all(not name.startswith("on") for _, attrs in page.elements for name in attrs)


def test_every_string_is_escaped(tmp_path: Path) -> None:
    text, page = written(
        tmp_path,
        title=EVIL,
        summary={
            "stages": {EVIL: {"acc": 0.5, "reads": EVIL, EVIL: 0.1, "class_recall": {EVIL: 0.5}}},
            "baselines": {EVIL: {"failed": EVIL}},
            "why": EVIL,
        },
        galleries=[(0, 1, 0.9, images(1), [EVIL])],
        curves={EVIL: ([1, 2], [1.0, 2.0])},
        skipped=[EVIL],
        commands=[(EVIL, EVIL)],
    )
    assert "<script" not in text
    assert page.text.count("<script>alert(1)</script>") >= 10
    assert any(EVIL in (attrs.get("title") or "") for _, attrs in page.elements)


def test_ids_are_unique_and_links_lead_somewhere(tmp_path: Path) -> None:
    galleries = [(c, 3, None, images(3), list("abc")) for c in range(4)] + [(4, 0, None, [], [])]
    _, page = written(tmp_path, galleries=galleries, skipped=["a.png: broken"])
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = [(attrs["href"] or "")[1:] for tag, attrs in page.elements if tag == "a"]
    assert len(targets) == 5 and set(targets) <= set(ids)
    labelled = [attrs.get("aria-labelledby") for tag, attrs in page.elements if tag == "section"]
    assert {name for name in labelled if name} <= set(ids)
    assert all(attrs.get("aria-label") for _, attrs in page.elements if attrs.get("role") == "img")


@pytest.mark.parametrize(("channels", "lossless"), [(1, True), (3, True), (4, True), (3, False)])
def test_a_sprite_holds_the_images_side_by_side(channels: int, lossless: bool) -> None:
    tiles = images(5, 16, channels)
    head, data = sprite(tiles, (16, 16), lossless).split(",")
    assert head == f"data:image/{'png' if lossless else 'jpeg'};base64"
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert strip.shape[:2] == (16, 80)
    if lossless:
        expected = np.concatenate([tile[:3].transpose(1, 2, 0) for tile in tiles], axis=1)
        assert (strip.reshape(expected.shape) == expected).all()


def test_tiles_are_cut_where_the_images_lie(tmp_path: Path) -> None:
    text, page = written(tmp_path, galleries=[Gallery(0, 9, 0.9, images(6), list("abcdef"), 4)])
    styles = [
        attrs["style"] for tag, attrs in page.elements if tag == "li" and attrs.get("role") == "img"
    ]
    assert styles == [f"background-position:-{56 * i}px 0" for i in range(6)]
    assert "--w:56px;--h:56px;--strip:336px" in text and 'class="cluster pixelated"' in text
    assert page.text.index("Most typical") < page.text.index("Least certain")


def test_many_large_images_stay_within_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundredth of the galleries and pixels must stay within a hundredth of ten megabytes."""
    monkeypatch.setattr(gallery, "MAX_GALLERIES", 2)
    monkeypatch.setattr(gallery, "PIXEL_BUDGET", gallery.PIXEL_BUDGET // 100)
    monkeypatch.setattr(gallery, "LOSSLESS_BUDGET", gallery.LOSSLESS_BUDGET // 100)
    galleries = [(cluster, 24, 0.5, images(24, 96, 3), ["x"] * 24) for cluster in range(3)]
    text, page = written(tmp_path, galleries=galleries)
    assert len(text) < 10e6 / 100
    assert "The first 2 of 3 clusters" in page.text


def test_choose_shows_the_surest_and_the_least_sure_once() -> None:
    confidence = np.random.default_rng(0).random(50)
    chosen, num_typical = choose(confidence, 9)
    order = np.argsort(-confidence)
    assert num_typical == 6 and list(chosen) == [*order[:6], *order[:-4:-1]]
    few, typical = choose(confidence[:5], 9)
    assert typical == 5 and sorted(few) == list(range(5))


def test_galleries_read_only_what_they_show() -> None:
    clusters, confidence = np.arange(40) % 4, np.linspace(0, 1, 40)
    read: list[int] = []
    tile = images(1)[0]
    made = make_galleries(clusters, confidence, 5, 6, lambda row: read.append(row) or tile, str)
    assert [len(one.images) for one in made] == [6, 6, 6, 6, 0]
    assert [one.size for one in made] == [10, 10, 10, 10, 0] and made[4].confidence is None
    assert len(read) == 24 and all(
        clusters[int(text)] == one.cluster for one in made for text in one.captions
    )
    assert made[0].captions[0] == "36" and made[0].captions[-1] == "4"


def test_a_caption_for_each_image(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        write_report(
            tmp_path / "r.html", title="t", summary={}, galleries=[(0, 2, 0.5, images(2), ["a"])]
        )
    assert list(tmp_path.iterdir()) == []


def test_curves_span_their_box_and_skip_what_is_not_finite() -> None:
    text = curve("loss", range(1000), [math.nan, *np.linspace(3, 1, 999)])
    points = [
        tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', text)[1].split()
    ]
    assert len(points) <= 301 and points[0] == (0, 0) and points[-1] == (1000, 300)
    assert curve("loss", [1], [2.0]) == curve("loss", [1, 2], [math.nan, math.inf]) == ""
    flat = re.search(r'points="([^"]+)"', curve("loss", [1, 2], [5.0, 5.0]))[1]
    assert flat == "0,150 1000,150"


def test_metrics_become_curves() -> None:
    rows = [
        {"step": 1, "stage": "scan", "epoch": 0, "loss": 2.0},
        {"step": 2, "stage": "scan", "loss": None, "lr": 0.1},
    ]
    assert metric_curves(rows) == {"scan: loss": ([1], [2.0]), "scan: lr": ([2], [0.1])}


def test_a_long_tail_is_told_class_by_class(tmp_path: Path) -> None:
    from deepclust.training.results import table_rows

    by_class = {
        "macro_acc": 0.5,
        "macro_f1": 0.4,
        "head_acc": 0.9,
        "medium_acc": 0.45,
        "tail_acc": 0.155,
    }
    figures = {"acc": 0.8, "nmi": 0.7, "ari": 0.6, **by_class, "clusters_used": 3, "seconds": 1.0}
    entries = {
        "kmeans": {"acc": 0.1, "nmi": 0.1, "ari": 0.1, "samples": 9, "seconds": 1.0, **by_class}
    }
    summary = {
        "stages": {"main": {**figures, "test": figures}},
        "baselines": entries,
        "num_images": 9,
    }
    for imbalance, shown in ((50.0, True), (1.2, False), (None, False)):
        columns, rows = table_rows({**summary, "imbalance": imbalance, "kept_stage": "main"})
        assert ("head/med/tail" in columns) == shown and all(
            len(row) == len(columns) for row in rows
        )
        page, _ = written(
            tmp_path, summary={**summary, "imbalance": imbalance, "kept_stage": "main"}
        )
        assert ("30 % rarest" in page) == shown
        head = page[page.index("<thead") : page.index("</thead>")]
        assert ("Macro ACC" in head and "Tail" in head) == shown
        if shown:
            assert [row[columns.index("head/med/tail")] for row in rows] == ["90/45/16"] * 3
            assert [row[columns.index("macro")] for row in rows] == ["50.0"] * 3
