"""Files of features of labelled sets: what a module of the user's own makes of a folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.quality import features
from benchmarks.quality.common import features_of

NETS = """
import torch
from deepclust.backbones import Preprocess

class Means(torch.nn.Module):
    def forward(self, images):
        return images.mean((2, 3))

def plain():
    return Means()

def fed():
    net = Means()
    net.preprocess = Preprocess(8, (0.5, 0.5, 0.5), (0.25, 0.5, 1.0))
    return net
"""


@pytest.fixture
def photos(tmp_path):
    """One image of one colour in each of three folders, and one that is none."""
    for name, color in (("ant", (255, 0, 0)), ("bee", (0, 255, 0)), ("cow", (0, 0, 255))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (10, 10), color).save(tmp_path / "photos" / name / "a.png")
    (tmp_path / "photos/cow/broken.png").write_bytes(b"no image")
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path / "photos"


def made(tmp_path, photos, function):
    out = tmp_path / "out.npz"
    words = ["data=image_folder", f"data.root={photos}", "data.size=8"]
    assert features.main([str(out), *words, "--module", f"{tmp_path / 'nets.py'}:{function}"]) == 0
    return out


def test_a_module_is_fed_as_it_says_and_unreadable_images_are_left_out(tmp_path, photos, capsys):
    out = made(tmp_path, photos, "fed")
    assert f"data=features data.file={out}" in capsys.readouterr().out
    with np.load(out) as content:
        assert content["labels"].tolist() == ["ant", "bee", "cow"]
        assert content["splits"].tolist() == ["train"] * 3
        assert [path.split("/")[-2:] for path in content["paths"]] == [
            [name, "a.png"] for name in ("ant", "bee", "cow")
        ]
        # (v - mean) / std of pure colours, by hand.
        expected = [[2, -1, -0.5], [-2, 1, -0.5], [-2, -1, 0.5]]
        assert content["features"] == pytest.approx(np.array(expected), abs=1e-5)
        assert content["features"].dtype == np.float32
    rows, classes = features_of("photos", 0, tmp_path, str(out))
    assert rows.shape == (3, 3) and classes.tolist() == [0, 1, 2]


def test_without_a_word_of_the_module_it_is_fed_as_for_imagenet(tmp_path, photos):
    with np.load(made(tmp_path, photos, "plain")) as content:
        pixels = np.eye(3)
        expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        assert content["features"] == pytest.approx(expected, abs=1e-5)


def test_a_backbone_of_the_configuration_gives_its_own_features(tmp_path, monkeypatch):
    torch.manual_seed(0)
    words = ["data=digits", "backbone=small_convnet", "backbone.width=8"]
    assert features.main([str(tmp_path / "a.npz"), *words]) == 0
    with np.load(tmp_path / "a.npz") as content:
        assert len(content["features"]) == len(content["labels"]) == 1797
        assert np.isfinite(content["features"]).all()
