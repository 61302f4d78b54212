"""`DeepClusterer` and `Clusterer`: scikit-learn's habits, and the same clusters whichever way
images come in.
"""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.metrics import adjusted_rand_score

from deepclust import Clusterer, DeepClusterer
from deepclust.errors import UserError
from tests.runs import SMALL, pixels

OVERRIDES = dict(word.split("=", 1) for word in SMALL if not word.startswith("logger"))


def colour(count=24):
    """(count, 16, 16, 3) uint8 noise in three tints, so that there is something to find."""
    rng = np.random.default_rng(0)
    tint = np.eye(3)[np.arange(count) % 3] * 150
    return (rng.integers(0, 100, (count, 16, 16, 3)) + tint[:, None, None]).astype(np.uint8)


def make(**more):
    return DeepClusterer(**{"n_clusters": 3, "overrides": OVERRIDES, **more})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Colour images as files, one of them broken."""
    path = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(colour()):
        Image.fromarray(image).save(path / f"{number:02d}.png")
    (path / "07.png").write_bytes(b"no image")
    return path


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """A fitted one, with its run folder."""
    return make(run_dir=str(tmp_path_factory.mktemp("grey") / "run with 'quotes', spaces=1")).fit(
        pixels()[:, 0]
    )


def test_labels_are_those_of_clusters_csv_and_of_predict(grey):
    with open(f"{grey.run_dir}/clusters.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert grey.labels_.tolist() == [int(row["cluster"]) for row in rows] and len(rows) == 60
    np.testing.assert_array_equal(grey.predict(pixels()[:, 0]), grey.labels_)
    np.testing.assert_allclose(grey.predict_proba(pixels()).max(1), grey.confidence_, atol=1e-5)
    np.testing.assert_allclose(grey.predict_proba(pixels()).sum(1), 1, atol=1e-5)
    assert (
        grey.transform(pixels()).shape[0] == 60
        and grey.summary_["num_clusters"] == 3
        and grey.skipped_ == []
    )


@pytest.mark.parametrize("form", ["(N,H,W)", "(N,1,H,W)", "(N,H,W,1)", "float", "tensor", "list"])
def test_one_image_in_any_form_is_the_same_image(grey, form):
    images = pixels(10)
    given = {
        "(N,H,W)": images[:, 0],
        "(N,1,H,W)": images,
        "(N,H,W,1)": images[:, 0, :, :, None],
        "float": images / 255.0,
        "tensor": torch.from_numpy(images),
        "list": list(images[:, 0]),
    }[form]
    np.testing.assert_array_equal(grey.predict_proba(given), grey.predict_proba(images))


def test_batches_do_not_matter(grey):
    whole = grey.model_.predict_proba(pixels(), batch_size=60)
    np.testing.assert_allclose(grey.model_.predict_proba(pixels(), batch_size=7), whole, atol=1e-5)
    np.testing.assert_allclose(grey.model_.predict_proba(pixels(1)), whole[:1], atol=1e-5)


def test_a_saved_model_gives_identical_probabilities(grey, tmp_path):
    grey.model_.save(tmp_path / "model.safetensors")
    again = Clusterer.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(again.predict_proba(pixels()), grey.predict_proba(pixels()))
    np.testing.assert_array_equal(
        Clusterer.load(grey.run_dir).transform(pixels()), grey.transform(pixels())
    )
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()


def test_fitting_again_in_the_same_folder_is_instant_and_the_same(grey, monkeypatch):
    monkeypatch.setattr("deepclust.training.recipe._run", None)
    again = clone(grey).fit(pixels()[:, 0])
    np.testing.assert_array_equal(again.labels_, grey.labels_)
    with pytest.raises(UserError, match="not those that"):
        clone(grey).fit(255 - pixels())


def test_a_folder_a_list_of_paths_and_an_array_of_colour(folder):
    files = sorted(str(path) for path in folder.iterdir())
    good = np.array([number != 7 for number in range(24)])
    fits = {}
    for name, given in (("folder", folder), ("paths", files), ("array", colour())):
        model = fits[name] = make(overrides={**OVERRIDES, "augment.size": 16}).fit(given)
        assert model.labels_.shape == (24,)
        if name != "array":
            assert (
                model.labels_[7] == -1
                and np.isnan(model.confidence_[7])
                and len(model.skipped_) == 1
            )
            readable = [file for file, fine in zip(files, good) if fine]
            np.testing.assert_array_equal(model.predict(readable), model.labels_[good])
        else:
            np.testing.assert_array_equal(model.predict(colour()), model.labels_)
    np.testing.assert_array_equal(fits["folder"].labels_, fits["paths"].labels_)


def test_one_picture_is_one_cluster_whoever_holds_it(folder):
    """A single (H, W, 3) array came back as H clusters; a Pillow image ended in an AttributeError."""
    model = make().fit(str(folder))
    path = str(folder / "03.png")
    expected = model.predict_proba([path])
    side = model.model_.spec["image_size"][0]
    array = np.asarray(Image.open(path).resize((side, side), Image.Resampling.BICUBIC))
    given = [
        array,
        list(array[None]),
        Image.open(path),
        [Image.open(path)],
        path,
        np.array([path]),
        iter([path]),
    ]
    for one in given:
        np.testing.assert_allclose(model.predict_proba(one), expected, atol=1e-5)
        assert model.predict(path).shape == (1,)
    for one, words in (
        (array[..., 0], r"images\[None\]"),
        (array.transpose(2, 0, 1), "cannot be told"),
        ({path}, "a set"),
    ):
        with pytest.raises(UserError, match=words):
            model.predict(one)


def test_it_has_the_habits_of_scikit_learn(grey):
    model = make(
        random_state=3,
        overrides={"stages.selflabel.trainer.ema": None, "eval.baselines": ["kmeans"]},
    )
    assert clone(model).get_params() == model.get_params()
    assert model.set_params(n_clusters=5) is model and model.n_clusters == 5
    assert "n_clusters=5" in repr(model)
    assert not hasattr(clone(grey), "labels_")
    first = make(random_state=1).fit_predict(pixels())
    assert (
        adjusted_rand_score(first, make(random_state=1).fit(pixels(), y=np.arange(60) % 2).labels_)
        == 1
    )
    with pytest.raises(UserError, match="not fitted"):
        make().predict(pixels())


def test_python_values_become_words_of_the_command_line():
    from deepclust.config.load import load

    overrides = {
        "stages.selflabel.trainer.ema": None,
        "eval.baselines": ["kmeans", "gmm"],
        "trainer.deterministic": True,
    }
    overrides |= {"stages.scan.optim.betas": (0.5, 0.9), "run.root": "a folder, with: 'signs'"}
    config = load(make(overrides=overrides)._words())
    assert config.stages["selflabel"].trainer.ema is None and config.eval.baselines == [
        "kmeans",
        "gmm",
    ]
    assert config.stages["scan"].trainer.deterministic is True and config.stages[
        "scan"
    ].optim.betas == (0.5, 0.9)
    assert config.run.root == "a folder, with: 'signs'" and config.num_clusters == 3


@pytest.mark.parametrize(
    ("more", "given", "told"),
    [
        ({"n_clusters": None}, pixels(), "num_clusters is needed"),
        ({"n_clusters": 61}, pixels(), "more than the 60 images"),
        ({"n_clusters": 0}, pixels(), "num_clusters=0"),
        ({"recipe": "scam"}, pixels(), "scan"),
        ({}, pixels()[:1], "at least 2 image"),
        ({}, np.zeros((5, 4)), "shape"),
        ({}, np.full((5, 8, 8), np.nan), "NaN"),
        ({}, "no/such/folder", "no such folder"),
    ],
)
def test_bad_settings_and_images_are_told_in_words(more, given, told):
    with pytest.raises(UserError, match=told):
        make(**more).fit(given)
