"""Features instead of images: files, views that leave them as they are, and a whole run on them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save_file

from deepclust import Clusterer
from deepclust.cli import main
from deepclust.config.load import load
from deepclust.data.datasets import digits
from deepclust.data.features import features, from_features
from deepclust.data.loader import Loader
from deepclust.data.random import sample_keys
from deepclust.data.sampler import Sampler
from deepclust.data.views.transform import build_views
from deepclust.errors import UserError
from deepclust.heads import View

ROWS = np.random.default_rng(0).normal(size=(40, 12)).astype(np.float32)
LABELS = np.arange(40) % 4


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ROWS)
    np.savez(
        tmp_path / "b.npz", features=ROWS, labels=LABELS, paths=[f"{row}.jpg" for row in range(40)]
    )
    save_file({"features": ROWS, "labels": LABELS}, tmp_path / "c.safetensors")
    np.save(tmp_path / "labels.npy", LABELS)
    found = [
        features(str(tmp_path / "a.npy"), labels=str(tmp_path / "labels.npy")),
        features(str(tmp_path / "b.npz")),
        features(str(tmp_path / "c.safetensors")),
    ]
    for data in found:
        assert data.train.images is not None and data.train.is_features and data.num_classes == 4
        assert torch.equal(data.train.images[:, :, 0, 0], torch.from_numpy(ROWS))
    assert found[1].train.paths[7] == "7.jpg" and found[0].train.paths[7] == "all/7"
    assert len({data.train.fingerprint() for data in found}) == 1


def test_splits_hold_out_what_is_not_trained_on() -> None:
    data = from_features(ROWS, LABELS, splits=["train"] * 30 + ["test"] * 10, protocol="inductive")
    assert data.test is not None and (len(data.train), len(data.test)) == (30, 10)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (ROWS[:, :, None], r"shape \(40, 12, 1\)"),
        (ROWS[:1], "N >= 2"),
        (np.where(np.arange(40)[:, None] == 3, np.nan, ROWS), r"1 of 40 rows, first \[3\]"),
        (ROWS.astype(np.complex64), "complex64"),
    ],
)
def test_what_is_no_feature_array_is_refused_in_words(rows: np.ndarray, words: str) -> None:
    with pytest.raises(UserError, match=words):
        from_features(rows)
    with pytest.raises(UserError, match="there is no such file"):
        features("nowhere.npz")


def test_views_leave_features_as_they_are_or_shake_them() -> None:
    data = from_features(ROWS).train
    views = build_views(
        load(["augment=features"]).stages["pretext"].augment, data, ["clean", "weak", "strong"]
    )
    assert data.images is not None
    before, keys = data.images.clone(), sample_keys(0, 0, 0, torch.arange(40), 0)
    for name in ("clean", "weak"):
        assert torch.equal(views[name].batch(data.images, keys), before), name
    strong = views["strong"].batch(data.images, keys)
    alone = torch.stack(
        [views["strong"].sample(data.read(row), int(keys[row])) for row in range(40)]
    )
    torch.testing.assert_close(strong, alone)
    assert torch.equal(data.images, before), "the stored rows must never change"
    assert not torch.equal(strong, views["strong"].batch(data.images, keys + 1))


def test_noise_and_dropout_are_of_the_size_they_say() -> None:
    rows = from_features(np.full((400, 256), 3.0)).train
    assert rows.images is not None
    keys = sample_keys(0, 0, 0, torch.arange(400), 0)
    for op, least, most in (
        ("feature_noise: {std: 0.2}", 0.59, 0.61),
        ("feature_dropout: {rate: 0.36}", 2.2, 2.3),
    ):
        view = build_views({"views": {"v": [yaml.safe_load(op)]}}, rows, ["v"])["v"].batch(
            rows.images, keys
        )
        assert abs(float(view.mean()) - 3) < 0.03 and least < float(view.std()) < most, op


def test_operations_on_images_and_on_features_are_not_mixed_up() -> None:
    with pytest.raises(
        UserError, match="Resize is for images, the data are features; choose augment=features"
    ):
        build_views(
            load([]).stages["pretext"].augment | {"size": 1},
            from_features(ROWS).train,
            ["clean", "strong"],
        )
    with pytest.raises(
        UserError, match="strong: FeatureNoise is for features, the data are images"
    ):
        build_views(
            load(["augment=features"]).stages["pretext"].augment,
            digits().train,
            ["clean", "strong"],
        )


@pytest.mark.parametrize("engine", ["device", "workers"])
def test_both_engines_hand_features_through(engine: str) -> None:
    data = from_features(ROWS).train
    views = build_views(load(["augment=features"]).stages["pretext"].augment, data, ["weak"])
    weak = [View("weak"), View("weak")]
    samples = Sampler(40, 16, weak, seed=0, stage_index=0).rest_of_pass(0)
    for batch in Loader(data, weak, views, engine=engine).batches(samples):
        for view in batch.views.values():
            assert torch.equal(view[:, :, 0, 0], torch.from_numpy(ROWS)[batch.index])


def test_a_whole_run_on_features_and_its_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    centres = np.random.default_rng(1).normal(size=(4, 12)) * 4
    rows = (ROWS + centres[LABELS]).astype(np.float32)
    np.savez(
        tmp_path / "rows.npz",
        features=rows,
        labels=LABELS,
        paths=[f"{row}.jpg" for row in range(40)],
    )
    words = [
        "data=features",
        f"data.file={tmp_path / 'rows.npz'}",
        f"run.dir={tmp_path / 'run'}",
        "head.init=kmeans",
    ]
    words += [
        "head.kind=cosine",
        "head.num_neighbors=5",
        "trainer.epochs=3",
        "trainer.batch_size=20",
    ]
    assert main(["train", *words, "eval.baselines=[kmeans,pixels]", "logger.console=false"]) == 0, (
        capsys.readouterr()
    )
    with open(tmp_path / "run" / "clusters.csv") as file:
        lines = list(csv.DictReader(file))
    assert lines[3]["path"] == "3.jpg"
    model = Clusterer.load(tmp_path / "run")
    assert model.predict(rows).tolist() == [int(line["cluster"]) for line in lines]
    assert np.array_equal(model.transform(rows), rows)
    with pytest.raises(UserError, match="have 3 columns; this model was trained on 12"):
        model.predict(rows[:, :3])
