"""Landmarks that vote: against scikit-learn's neighbours, and through edits of the clusters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from sklearn.neighbors import KNeighborsClassifier

from deepclust import Clusterer
from deepclust.collection.derived import Derived, leading_directions, place
from deepclust.collection.history import relabelled
from deepclust.collection.landmarks import FILE, Landmarks, clusterer_of, save_model, trust_in
from deepclust.heads.readout import Votes, vote
from deepclust.model import build_network
from tests.collection.toys import toy_run


def head(x: np.ndarray, labels: np.ndarray, k: int, num_neighbors: int = 15) -> Votes:
    found = Votes(x.shape[1], k, num_anchors=len(x), num_neighbors=num_neighbors)
    rows = torch.nn.functional.normalize(torch.from_numpy(x), dim=1)
    found.anchors.copy_(rows.half())
    found.owners.copy_(torch.from_numpy(labels))
    return found


def test_votes_are_those_of_weighted_neighbours():
    x, y = make_blobs(600, 8, centers=4, cluster_std=4.0, random_state=0)
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    found = head(x[:400], y[:400], 4).predict(torch.from_numpy(x[400:]))

    def weights(
        distances: np.ndarray,
    ) -> np.ndarray:  # squared chords of unit rows are 2 - 2 cosines
        cosines = 1 - distances**2 / 2
        return (cosines - cosines[:, -1:]) / (cosines[:, :1] - cosines[:, -1:])

    rounded = x[:400].astype(np.float16).astype(np.float32)
    peer = KNeighborsClassifier(15, weights=weights).fit(
        rounded / np.linalg.norm(rounded, axis=1)[:, None], y[:400]
    )
    assert np.allclose(found.numpy(), peer.predict_proba(x[400:]), atol=2e-3)


def test_probabilities_sum_to_one_and_trust_lowers_the_confidence():
    random = torch.Generator().manual_seed(0)
    values = torch.rand(50, 15, generator=random).sort(dim=1, descending=True).values
    clusters = torch.randint(5, (50, 15), generator=random)
    sure = vote(values, clusters, torch.ones(50, 15), 5)
    unsure = vote(values, clusters, torch.full((50, 15), 0.5), 5)
    assert torch.allclose(sure.sum(1), torch.ones(50)) and torch.allclose(
        unsure.sum(1), torch.ones(50)
    )
    assert (
        torch.equal(sure.argmax(1), unsure.argmax(1))
        and (unsure.amax(1) <= sure.amax(1) + 1e-6).all()
    )
    single = vote(values, clusters * 0, torch.full((50, 15), 0.3), 1)
    assert single.shape == (50, 1) and torch.isfinite(single).all()


def test_an_anchor_keeps_its_cluster_whatever_its_neighbours_say():
    x = np.eye(4, dtype=np.float32)[np.zeros(20, dtype=int)] + 0.02 * np.random.default_rng(
        0
    ).normal(size=(20, 4))
    labels = np.zeros(20, dtype=np.int64)
    labels[7] = 1
    found = head(x.astype(np.float32), labels, 2).predict(torch.from_numpy(x.astype(np.float32)))
    assert found.argmax(1).tolist() == labels.tolist()


def test_leading_directions_are_those_of_an_svd():
    x = np.random.default_rng(0).normal(size=(300, 40)).astype(np.float32) * np.linspace(
        3, 0.1, 40, dtype=np.float32
    )
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    basis = leading_directions(x, np.arange(300), 5)
    right = np.linalg.svd(unit, full_matrices=False)[2][:5]
    assert np.allclose(np.abs(basis.numpy().T @ right.T), np.eye(5), atol=1e-3)
    assert torch.equal(leading_directions(x, np.arange(300), 64), torch.eye(40))


def test_derived_parts_are_made_once_and_neighbours_are_exact(tmp_path: Path):
    run = toy_run(tmp_path)
    told: list[str] = []
    first = Derived(run.store, run.facts["backbone"], told.append)
    values, places = first.neighbors
    x = first.x.numpy()
    near = x @ x.T - 2 * np.eye(len(x))
    assert np.allclose(values, -np.sort(-near, axis=1)[:, : values.shape[1]], atol=1e-5)
    assert first.map.shape == (len(x), 2) and np.isfinite(first.map).all()
    assert set(told) == {
        "leading directions of the features",
        "nearest neighbours",
        "near-duplicates",
        "",
        "a map",
    }
    assert len(told) == 5
    again = Derived(run.store, run.facts["backbone"], told.append)
    told.clear()
    assert (
        np.array_equal(again.map, first.map)
        and np.array_equal(again.neighbors[1], places)
        and not told
    )
    copies = {first.rows[at] for at in np.flatnonzero(first.copy_of >= 0)}
    assert {run.store.paths[row] for row in copies} == {"red/copy0.png", "red/copy1.png"}


def test_images_on_a_landmark_take_its_place_and_others_are_spread_around():
    positions = np.array([[0, 0], [1, 0], [0, 1]], dtype=np.float32)
    values = np.array([[1, 0.5, 0.4], [1, 0.5, 0.4], [0.9, 0.9, 0.2]], dtype=np.float32)
    found = place(values, np.array([[0, 1, 2], [0, 1, 2], [1, 2, 0]]), positions)
    assert np.array_equal(found[0], positions[0]) and 0 < np.linalg.norm(found[1]) < 0.01
    assert np.allclose(found[2], [0.5, 0.5], atol=0.01)


@pytest.fixture
def run_with_landmarks(tmp_path: Path):
    run = toy_run(tmp_path)
    derived = Derived(run.store, run.facts["backbone"])
    x = derived.x[torch.from_numpy(derived.landmarks)].numpy().astype(np.float16)
    rows = derived.rows[derived.landmarks]
    Landmarks(rows, x, np.ones(len(x), dtype=np.float32), derived.basis.numpy()).save(
        run.path / FILE
    )
    return run


def test_a_run_s_model_gives_back_its_clusters_and_follows_edits(run_with_landmarks):
    run, state = run_with_landmarks, run_with_landmarks.state()
    save_model(run, state)
    found = Clusterer.load(run.path)
    clustered = state.cluster >= 0
    assert np.array_equal(
        found.predict(run.features(state.rows))[clustered], state.cluster[clustered]
    )
    merged = relabelled(state, np.where(state.cluster == 2, 0, state.cluster))
    assert set(clusterer_of(run, merged).predict(run.features(state.rows))) == {0, 1}
    gone = replace(merged, excluded=merged.cluster == 1)
    assert set(clusterer_of(run, gone).predict(run.features(state.rows))) == {0}


def test_a_cluster_without_landmarks_gets_some_of_its_images(run_with_landmarks):
    run, state = run_with_landmarks, run_with_landmarks.state()
    copies = np.flatnonzero(state.copy_of >= 0)
    cluster = state.cluster.copy()
    cluster[copies] = 9
    found = clusterer_of(run, relabelled(state, cluster))
    assert found.num_clusters == 10 and (found.network.head.owners == 9).any()


def test_trust_is_high_where_clusterings_agree():
    x, y = make_blobs(400, 16, centers=4, cluster_std=1.0, random_state=0)
    rows = torch.nn.functional.normalize(torch.from_numpy(x).float(), dim=1)
    random = np.random.default_rng(0).integers(0, 4, 400)
    assert trust_in(rows, y).mean() > 0.95 and trust_in(rows, random).mean() < 0.5
    assert (trust_in(rows, np.zeros(400, dtype=int)) == 1).all()


@pytest.mark.parametrize("name", ["votes.Votes", "kmeans.KMeansHead"])
def test_models_of_earlier_versions_that_name_moved_heads_load(tmp_path: Path, name: str):
    identity = {"_target_": "deepclust.backbones.identity"}
    node: dict = {"_target_": f"deepclust.heads.readout.{name.rpartition('.')[2]}"}
    if name == "votes.Votes":
        node |= {"num_anchors": 6, "num_neighbors": 3}
    sizes = {"channels": 4, "size": 1, "num_clusters": 2, "image_size": [1, 1], "view_size": [1, 1]}
    spec = {"backbone": identity, "head": node, "clean": [], "mean": [0.0], "std": [1.0], **sizes}
    model = Clusterer(build_network(identity, node, sizes), spec)
    model.spec["head"] = {**node, "_target_": f"deepclust.heads.{name}"}
    model.save(tmp_path / "old.safetensors")
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    loaded = Clusterer.load(tmp_path / "old.safetensors")
    assert np.array_equal(loaded.predict_proba(x), model.predict_proba(x))
