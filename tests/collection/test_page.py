"""The report of `deepclust cluster`, as a parser sees it and as numbers that were chosen."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from deepclust.cli.options import add_cluster_options
from deepclust.collection.history import State, relabelled
from deepclust.collection.report import write_page
from deepclust.collection.representatives import choose, closeness, duplicate_groups
from deepclust.collection.run import FolderRun
from tests.collection.toys import toy_run
from tests.report.test_page import Page

NUMBER = {
    "k": 3,
    "statement": "3 clusters; two of three criteria agree.",
    "curves": {"gap": [[2, 3, 4], [0.1, 0.3, 0.2]]},
    "votes": {"gap": 3},
}


def page_of(run: FolderRun, state: State | None = None) -> tuple[str, Page]:
    write_page(run, state or run.state())
    text = (run.path / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FolderRun:
    return toy_run(tmp_path_factory.mktemp("toy"), labels=True, number=NUMBER)


def test_the_page_tells_what_was_found(run: FolderRun) -> None:
    _, page = page_of(run)
    for words in (
        "3 clusters of 16 images",
        "trained with labels (supervised)",
        "two of three criteria agree",
        "k 2",
    ):
        assert words in page.text
    for words in (
        "1 group of 3 images",
        "red/broken.png: not an image",
        "chosen",
        "Chosen without labels, by agreement",
    ):
        assert words in page.text
    assert f"deepclust edit {run.path} merge 0 1" in page.text and "--append" in page.text
    assert page.text.index("Cluster 2 ") < page.text.index("Noise 1 image")
    for address in (
        v for _, attrs in page.elements for k, v in attrs.items() if k in ("href", "src")
    ):
        assert address and address.startswith(("#", "data:"))
    leads = {
        attrs["aria-label"]: attrs["href"]
        for _, attrs in page.elements
        if "image=" in (attrs.get("href") or "")
    }
    paths = [run.store.paths[row] for row in run.state().rows]
    assert len(leads) == 17 and all(
        paths[int(to.partition("=")[2])] in label for label, to in leads.items()
    )
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_edits_names_and_images_that_were_taken_out(run: FolderRun) -> None:
    state = run.state()
    excluded = state.excluded.copy()
    excluded[3] = True
    state = dataclasses.replace(state, excluded=excluded, names={2: "<b>fire</b>"})
    run.history.push("rename", state)
    text, page = page_of(run)
    assert (
        "<b>fire" not in text and "<b>fire</b> 6 images" in page.text and "cluster 2" in page.text
    )
    assert (
        f"{run.store.paths[state.rows[3]]}: excluded by hand" in page.text
        and "15 images" in page.text
    )
    assert [word for word in ("cluster", "rename") if f"<li>{word}" in text] == [
        "cluster",
        "rename",
    ]
    run.history.pop()


def test_the_command_that_appends_goes_on_with_this_run(run: FolderRun) -> None:
    text, _ = page_of(run)
    command = re.search(r"<code>(deepclust cluster .*?)</code>", text)
    parser = argparse.ArgumentParser()
    add_cluster_options(parser)
    asked = parser.parse_args(shlex.split(unescape(command[1]))[2:])
    assert (
        asked.append
        and asked.images == run.root
        and asked.out == run.path
        and asked.store == run.store.path
    )
    assert asked.backbone == [f"{run.path.parent / 'nets.py'}:colours"] and asked.weights == []


def test_a_file_that_is_gone_leaves_a_grey_tile(tmp_path: Path) -> None:
    run = toy_run(tmp_path)
    whole, page = page_of(run)
    (run.root / "red/002.png").unlink()
    text, again = page_of(run)
    assert text != whole and again.text == page.text


def test_noise_alone_and_one_cluster_make_a_page(run: FolderRun) -> None:
    state = run.state()
    for cluster in (np.full(len(state.rows), -1), np.zeros(len(state.rows), dtype=np.int64)):
        _, page = page_of(run, relabelled(state, cluster))
        assert "nearest other" not in page.text


def test_closeness_is_that_of_a_plain_computation(run: FolderRun) -> None:
    state = run.state()
    near = closeness(run, state)
    features = np.asarray(run.store.features(), dtype=np.float64)[state.rows]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    means = [
        features[(state.cluster == cluster) & (state.copy_of < 0)].mean(0) for cluster in state.ids
    ]
    values = features @ np.array([mean / np.linalg.norm(mean) for mean in means]).T
    own = np.where(
        state.cluster < 0,
        values.max(1),
        values[np.arange(len(values)), np.maximum(state.cluster, 0)],
    )
    np.testing.assert_allclose(near.own, own, atol=1e-5)
    values[state.cluster >= 0, state.cluster[state.cluster >= 0]] = -1
    assert (near.second == values.argmax(1)).all()


def test_chosen_images_are_typical_borderline_and_outlying() -> None:
    random = np.random.default_rng(0)
    confidence, own = random.random(100), random.random(100)
    typical, borderline, outliers = choose(confidence, own, 12)
    assert [len(part) for part in (typical, borderline, outliers)] == [6, 3, 3]
    assert len({*typical, *borderline, *outliers}) == 12
    assert confidence[typical].min() >= np.median(confidence) and own[typical].min() > 0.8
    assert set(borderline) == set(np.argsort(confidence)[:3])
    assert own[outliers].max() < 0.1
    assert [len(part) for part in choose(confidence[:5], own[:5], 12)] == [5, 0, 0]
    assert [len(part) for part in choose(confidence, own, 3)] == [1, 1, 1]


def test_groups_of_duplicates_come_largest_first(run: FolderRun) -> None:
    state = run.state()
    copy_of = np.full(len(state.rows), -1)
    copy_of[[4, 5]], copy_of[[7, 8, 9]] = state.rows[2], state.rows[6]
    excluded = np.isin(np.arange(len(state.rows)), (2, 8))
    groups = duplicate_groups(dataclasses.replace(state, copy_of=copy_of, excluded=excluded))
    assert [group.tolist() for group in groups] == [
        state.rows[[6, 7, 9]].tolist(),
        state.rows[[4, 5]].tolist(),
    ]
