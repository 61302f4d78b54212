"""The map of a report: what is packed into the page comes out again, here and in a browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deepclust.report import write_report
from deepclust.report.map import GRID, Legend, Thumbs, map_section, quantised, spread
from deepclust.report.palette import DEUTAN, FIRST, NOISE_COLOUR, PROTAN, _lab, _linear, palette

EVIL = "</script><b>shoes"
LEGEND = [
    Legend(4, EVIL, "#2a6fc4", 3),
    Legend(1, "hats", "#e6841a", 1),
    Legend(-1, "noise", "#8d9499", 1),
]
PATHS = ["a/IMG_1.jpg", "a/IMG_2.jpg", "b/c d/IMG_2.jpg", "x<y.png", "a/ü.png"]
POSITION = np.array([[0.0, 0.0], [4.0, 2.0], [2.0, 1.0], [np.nan, 0.0], [1.0, 0.5]])
CLUSTER = np.array([4, 1, 4, -1, 4])


def page(folder: Path, **changes: Any) -> str:
    tiles = [np.full((3, 8, 8), value, dtype=np.uint8) for value in (10, 200)]
    given = {
        "confidence": np.array([0, 0.5, 1, np.nan, 0.2]),
        "thumbs": Thumbs([3, 0], tiles),
        **changes,
    }
    section = map_section(POSITION, CLUSTER, paths=PATHS, legend=LEGEND, **given)
    write_report(folder / "report.html", title="t", summary={}, above=[section])
    return (folder / "report.html").read_text(encoding="utf-8")


def unpacked(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="map-data">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


def numbers(text: str, kind: str) -> list[int]:
    return np.frombuffer(base64.b64decode(text), dtype=kind).tolist()


def names(data: dict[str, Any]) -> list[str]:
    """Paths as the page's script reads them."""
    folders = [
        data["folders"][f] for f, n in zip(data["runs"][::2], data["runs"][1::2]) for _ in range(n)
    ]
    found, before = [], ""
    for folder, text in zip(folders, data["names"].split("/"), strict=True):
        before = before[: int(text[0], 36)] + text[1:]
        found.append(f"{folder}/{before}" if folder else before)
    return found


def test_points_paths_and_thumbnails_come_out_again(tmp_path: Path) -> None:
    text = page(tmp_path)
    data = unpacked(text)
    assert names(data) == PATHS and data["count"] == 5
    assert numbers(data["x"], "<u2") == [0, GRID, 32768, 32768, 16384]
    assert numbers(data["y"], "<u2")[:3] == [49151, 16384, 32768]
    assert numbers(data["cluster"], "<u2") == [0, 1, 0, 2, 0]
    assert numbers(data["confidence"], "u1") == [0, 128, 255, 0, 51]
    assert data["legend"][0][:4] == [4, EVIL, EVIL, "#2a6fc4"]
    assert numbers(data["thumbs"]["places"], "<u4") == [3, 0]
    sheet = np.asarray(
        Image.open(io.BytesIO(base64.b64decode(data["thumbs"]["image"].split(",")[1])))
    )
    assert (
        sheet.shape == (8, 16, 3)
        and abs(int(sheet[4, 4, 0]) - 10) < 4
        and abs(int(sheet[4, 12, 0]) - 200) < 4
    )
    assert "<b>shoes" not in text and text.count("</script>") == 2
    assert not re.search(r"https?:|@import|url\((?!data:)", text)
    assert unpacked(page(tmp_path, thumbs=Thumbs([], [])))["thumbs"] is None


def test_positions_keep_their_shape() -> None:
    random = np.random.default_rng(0)
    position = random.normal(size=(500, 2)) * [3, 1]
    place = quantised(position).astype(np.float64)
    scale = GRID / np.ptp(position, axis=0).max()
    np.testing.assert_allclose(np.diff(place[:, 0]), scale * np.diff(position[:, 0]), atol=1.01)
    np.testing.assert_allclose(np.diff(place[:, 1]), -scale * np.diff(position[:, 1]), atol=1.01)
    assert (quantised(np.full((3, 2), np.nan)) == 32768).all() and (
        quantised(np.ones((3, 2))) == 32768
    ).all()


def test_thumbnails_are_spread_over_map_and_clusters() -> None:
    random = np.random.default_rng(0)
    position, cluster = random.random((5000, 2)), random.integers(0, 5, 5000)
    position[:4000] = position[:4000] * 0.01
    last = random.random(5000) < 0.3
    order = spread(position, cluster, last)
    assert sorted(order) == list(range(5000)) and not last[order[: int((~last).sum())]].any()
    cells = {tuple(each) for each in (position[order[:600]] * 8).astype(int)}
    assert len(cells) == 64 and set(cluster[order[:600]]) == set(range(5))
    assert (position[order[:600]].max(1) > 0.01).mean() > 0.9


def test_colours_differ_for_every_eye() -> None:
    colours = palette(40)
    assert len(set(colours)) == 40 and colours[:10] == FIRST and palette(3) == FIRST[:3]
    codes = np.array(
        [[int(each[i : i + 2], 16) for i in (1, 3, 5)] for each in (*FIRST, NOISE_COLOUR)]
    )
    for eye, least in ((np.eye(3), 0.07), (DEUTAN, 0.03), (PROTAN, 0.03)):
        lab = _lab(np.clip(_linear(codes) @ eye.T, 0, 1))
        apart = np.linalg.norm(lab[:, None] - lab[None], axis=2)[np.triu_indices(len(lab), 1)]
        assert apart.min() > least


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_opens_the_point_that_the_address_names(tmp_path: Path) -> None:
    page(tmp_path)
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--v=0",
    ]
    command += [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=3000",
        "--dump-dom",
    ]
    address = f"{(tmp_path / 'report.html').as_uri()}#image=3"
    done = subprocess.run([*command, address], capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr, done.stderr
    card = re.search(r'id="map-card".*?>(.*?)</div>', done.stdout, re.S)
    assert card and "x&lt;y.png" in card[1] and "noise" in card[1] and "<canvas" in card[1]
