"""`deepclust predict`: what it writes, from what, and that a stop at any moment changes nothing."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from deepclust import Clusterer
from deepclust.cli import main
from deepclust.collection.derived import Derived
from deepclust.collection.history import relabelled
from deepclust.collection.landmarks import FILE, Landmarks, save_model
from deepclust.data.folders import printable
from deepclust.data.store import FeatureStore
from deepclust.predict import command as module
from deepclust.predict.command import STOPPED
from tests.collection.toys import toy_photos, toy_run
from tests.features.test_extract import NETS
from tests.runs import pixels, small_run

CHECKOUT = Path(__file__).resolve().parents[2]


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on digits."""
    folder = tmp_path_factory.mktemp("images") / "run"
    assert small_run(folder) == 0
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 digits as files."""
    folder = tmp_path_factory.mktemp("digits")
    for number, image in enumerate(pixels()):
        Image.fromarray(image[0]).save(folder / f"{number}.png")
    return folder


def coloured(folder: Path, count: int) -> Path:
    """Red and blue images in a folder each, one of them broken."""
    random = np.random.default_rng(0)
    for number in range(count):
        name = ("blue", "red")[number % 2]
        picture = random.integers(0, 100, (10, 14, 3), dtype=np.uint8)
        picture[..., 0 if name == "red" else 2] += 150
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / name / f"{number}.png")
    (folder / "red/broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photos`, their `store`, what made it (`nets.py`) and a `run` that learned from it."""
    folder = tmp_path_factory.mktemp("features")
    (folder / "nets.py").write_text(NETS)
    coloured(folder / "photos", 30)
    words = ["features", str(folder / "photos"), "--backbone", f"{folder / 'nets.py'}:colours"]
    assert main([*words, "--store", str(folder / "store")]) == 0
    return trained(folder)


def trained(folder: Path) -> Path:
    """Trains `run` on `store` in a folder."""
    words = ["train", "data=features", f"data.file={folder / 'store'}", f"run.dir={folder / 'run'}"]
    words += [
        "head.num_neighbors=3",
        "trainer.epochs=2",
        "trainer.batch_size=15",
        "eval.baselines=none",
    ]
    assert main([*words, "logger.console=false", "head.init=kmeans"]) == 0
    return folder


def predict(*words: Any) -> int:
    return main(["predict", *map(str, words)])


def test_clusters_are_those_of_the_model_in_natural_order(
    run: Path, digits: Path, tmp_path: Path
) -> None:
    assert predict(run, digits, "-o", tmp_path / "all.csv") == 0
    found = rows(tmp_path / "all.csv")
    assert [row["path"] for row in found] == [str(digits / f"{number}.png") for number in range(60)]
    assert list(found[0]) == ["path", "cluster", "confidence", "error"]
    direct = Clusterer.load(run).predict_proba(pixels())
    assert [int(row["cluster"]) for row in found] == direct.argmax(1).tolist()
    np.testing.assert_allclose(
        [float(row["confidence"]) for row in found], direct.max(1), atol=2e-6
    )
    assert [path.name for path in tmp_path.iterdir()] == ["all.csv"], "nothing is left beside it"

    assert (
        predict(run, digits, "-o", tmp_path / "all.parquet", "--batch-size", "7", "--device", "cpu")
        == 0
    )
    table = pq.read_table(tmp_path / "all.parquet")
    assert table.column("path").to_pylist() == [row["path"] for row in found]
    assert table.column("cluster").to_pylist() == [int(row["cluster"]) for row in found]
    assert table.schema.types == ["string", "int64", "float", "string"]
    assert table.column("error").null_count == 60

    (tmp_path / "list.txt").write_text(f"{digits / '7.png'}\nnowhere.png\n")
    assert predict(run, tmp_path / "list.txt", "-o", tmp_path / "list.csv") == 0
    two = rows(tmp_path / "list.csv")
    assert two[0]["cluster"] == found[7]["cluster"] and two[1]["path"] == str(
        tmp_path / "nowhere.png"
    )
    assert two[1]["cluster"] == two[1]["confidence"] == "" and "no such file" in two[1]["error"]
    assert predict(run, digits / "7.png", "-o", tmp_path / "one.csv") == 0
    assert rows(tmp_path / "one.csv") == [found[7]]
    (tmp_path / "list.txt").write_text("nowhere.png\n")
    assert predict(run, tmp_path / "list.txt", "-o", tmp_path / "list.csv") == 2, (
        "nothing could be clustered"
    )


def test_parquet_comes_in_row_groups(
    run: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_IMAGES", 8)
    monkeypatch.setattr("deepclust.predict.parts.ROW_GROUP", 24)
    assert predict(run, digits, "-o", tmp_path / "all.parquet", "--batch-size", "4") == 0
    file = pq.ParquetFile(tmp_path / "all.parquet")
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [
        24,
        24,
        12,
    ]


KILLED = """
import os, random, signal, sys, time
from deepclust import predict
from deepclust.cli import main

predict.PART_IMAGES = 8
random.seed(0)

def begin(words):
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(words))
    return child

def suffer(out):
    words = ["predict", *sys.argv[1:], "-o", out, "--batch-size", "4"]
    began, kills = time.monotonic(), 0
    assert os.waitpid(begin(words), 0)[1] == 0
    whole = time.monotonic() - began
    expected = open(out, "rb").read()
    os.remove(out)
    for _ in range(3):
        child = begin(words)
        time.sleep(random.uniform(0.1, 0.9) * whole)
        os.kill(child, signal.SIGKILL)
        kills += os.waitpid(child, 0)[1] == signal.SIGKILL
        if os.path.exists(out):
            assert open(out, "rb").read() == expected, "the file is there whole or not at all"
            os.remove(out)
    assert os.waitpid(begin(words), 0)[1] == 0
    assert open(out, "rb").read() == expected
    return kills

assert suffer("c.csv") + suffer("c.parquet") > 1
assert sorted(os.listdir()) == ["c.csv", "c.parquet"]
"""


def test_kills_at_any_moment_change_nothing(run: Path, digits: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(run), str(digits)]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def stopped(
    run: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, Path]]:
    """Stops a command by a signal after two parts of 8 images; gives its code and the file that it
    was to write.
    """
    monkeypatch.setattr(module, "PART_IMAGES", 8)

    def stop(number: int = signal.SIGINT) -> tuple[int, Path]:
        write, count = module.Parts.write, iter(range(100))

        def interrupted(*given: Any) -> None:
            if next(count) == 2:
                os.kill(os.getpid(), number)
            write(*given)

        with monkeypatch.context() as patch:
            patch.setattr(module.Parts, "write", interrupted)
            return predict(
                run, digits, "-o", tmp_path / "c.csv", "--batch-size", "4"
            ), tmp_path / "c.csv"

    return stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_says_what_is_done_and_the_same_command_goes_on(
    number: int,
    stopped: Callable[..., tuple[int, Path]],
    run: Path,
    digits: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out = stopped(number)
    assert code == STOPPED and not out.exists()
    assert "Stopped. 16 of 60 are done. The same command goes on from there." in " ".join(
        capsys.readouterr().out.split()
    )
    assert predict(run, digits, "-o", out, "--batch-size", "4") == 0
    assert "16 of them were done before" in capsys.readouterr().out
    whole = out.read_bytes()
    assert predict(run, digits, "-o", out, "--batch-size", "4") == 0 and out.read_bytes() == whole


def test_what_was_done_for_another_command_is_not_lost(
    stopped: Callable[..., tuple[int, Path]],
    run: Path,
    digits: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, out = stopped()
    capsys.readouterr()
    assert predict(run, digits, "-o", out, "--batch-size", "5") == 2
    said = capsys.readouterr().err
    assert "with another batch size" in said and "--new" in said
    assert predict(run, digits / "7.png", "-o", out, "--batch-size", "4") == 2
    assert "another list of images" in capsys.readouterr().err
    assert predict(run, digits, "-o", out, "--batch-size", "5", "--new") == 0
    assert "done before" not in capsys.readouterr().out


def test_parts_are_made_again_where_images_or_the_disk_changed(
    stopped: Callable[..., tuple[int, Path]], run: Path, digits: Path, tmp_path: Path, capsys: Any
) -> None:
    _, out = stopped()
    os.utime(digits / "1.png")
    part = tmp_path / ".c.csv.parts/000001.arrow"
    part.write_bytes(part.read_bytes()[:100])
    assert predict(run, digits, "-o", out, "--batch-size", "4") == 0
    assert "2 part(s) of 8 made again: images changed since" in capsys.readouterr().out
    assert len(rows(out)) == 60


def test_a_folder_in_use_is_refused(run: Path, digits: Path, tmp_path: Path, capsys: Any) -> None:
    other = module.Parts(tmp_path / "c.csv", 60, 8)
    other.open({}, lambda first, last: "")
    assert predict(run, digits, "-o", tmp_path / "c.csv") == 2
    assert "is in use by another run" in capsys.readouterr().err
    other.close()


def test_a_model_of_features_clusters_images_by_what_made_its_features(
    learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(learned / "run", learned / "store", "-o", tmp_path / "store.csv") == 0
    assert predict(learned / "run", learned / "photos", "-o", tmp_path / "photos.csv") == 0
    said = capsys.readouterr().out
    assert (
        "30 rows clustered, 1 could not be read" in said
        and "a model of features by colours" in said
    )
    by_path = {row["path"]: row for row in rows(tmp_path / "store.csv")}
    for row in rows(tmp_path / "photos.csv"):
        other = by_path[row["path"]]
        assert row["cluster"] == other["cluster"] and row["error"] == other["error"]
        assert (
            row["cluster"] == ""
            or abs(float(row["confidence"]) - float(other["confidence"])) < 2e-6
        )
    store = FeatureStore.open(learned / "store")
    known = store.rows()
    rows_of = np.array(store.features()[known])
    rows_of[3] = np.nan
    np.save(tmp_path / "rows.npy", rows_of)
    assert predict(learned / "run", tmp_path / "rows.npy", "-o", tmp_path / "rows.csv") == 0
    found = rows(tmp_path / "rows.csv")
    assert found[3]["error"] == "its features are not finite" and found[3]["cluster"] == ""
    assert [row["path"] for row in found] == [str(number) for number in range(len(known))]
    for number, row in enumerate(found):
        path = str(learned / "photos" / store.paths[known[number]])
        assert number == 3 or row["cluster"] == by_path[path]["cluster"]
    np.savez(tmp_path / "rows.npz", features=rows_of[:3], paths=["a", "b", "c"])
    assert predict(learned / "run", tmp_path / "rows.npz", "-o", tmp_path / "rows.csv") == 0
    assert [row["path"] for row in rows(tmp_path / "rows.csv")] == ["a", "b", "c"]


def test_features_of_images_are_exactly_those_of_the_store(learned: Path) -> None:
    from deepclust.predict.model import ImageModel, open_model

    model = open_model(learned / "run", torch.device("cpu"))
    given: list[np.ndarray] = []
    model.of_rows = given.append  # pyright: ignore
    images = ImageModel(model, None, None, None)
    store = FeatureStore.open(learned / "store")
    batches = []
    for batch in module.decode_ahead(
        module._jobs(images, len(store), 0, 64),
        store.root,
        store.paths,
        images.side,
        images.channels,
        False,
        1,
    ):
        images(batch.pixels)
        batches.append(len(batch.facts))
    assert np.array_equal(
        np.concatenate(given)[: len(store)][store.rows()], store.features()[store.rows()]
    )


def test_what_made_the_features_must_be_there_and_the_same(
    learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, out = learned / "nets.py", tmp_path / "c.csv"
    text = net.read_text()
    command = [learned / "run", learned / "photos/red/1.png", "-o", out]
    try:
        net.write_text(text + "\n# changed\n")
        assert predict(*command) == 2
        assert "was changed since; --backbone" in capsys.readouterr().err
        assert predict(*command, "--backbone", f"{net}:colours") == 0, (
            "it is the same network still"
        )
        net.write_text(text.replace("Preprocess(8", "Preprocess(9"))
        assert predict(*command, "--backbone", f"{net}:colours") == 2
        assert "has images fed in another way" in capsys.readouterr().err
        net.unlink()
        assert predict(*command) == 2
        assert "give it again" in capsys.readouterr().err
    finally:
        net.write_text(text)
    shutil.copy(learned / "run/model.safetensors", tmp_path / "model.safetensors")
    command[0] = tmp_path / "model.safetensors"
    assert predict(*command) == 2
    said = capsys.readouterr().err
    assert "there is no config.yaml beside it" in said and "--backbone NAME" in said
    assert predict(*command, "--backbone", f"{net}:colours") == 0
    assert "taken on trust" in " ".join(capsys.readouterr().out.split())


def test_a_timm_model_is_found_again_with_its_local_weights(tmp_path: Path, capsys: Any) -> None:
    import timm
    from safetensors.torch import save_file

    for seed in (0, 1):
        torch.manual_seed(seed)
        save_file(timm.create_model("test_vit").state_dict(), tmp_path / f"{seed}.safetensors")
    photos = coloured(tmp_path / "photos", 30)
    words = [
        "features",
        str(photos),
        "--backbone",
        "test_vit",
        "--weights",
        str(tmp_path / "0.safetensors"),
    ]
    assert main([*words, "--size", "32", "--store", str(tmp_path / "store")]) == 0
    trained(tmp_path)
    command = [tmp_path / "run", photos, "-o", tmp_path / "c.csv"]
    assert predict(*command) == 0
    assert "features by test_vit, images of 32 px" in capsys.readouterr().out
    first = (tmp_path / "c.csv").read_bytes()
    (tmp_path / "0.safetensors").rename(tmp_path / "moved.safetensors")
    assert predict(*command) == 2
    said = capsys.readouterr().err
    assert "0.safetensors could not be loaded" in said and "--weights FILE" in said
    assert predict(*command, "--weights", tmp_path / "1.safetensors") == 2
    assert (
        "test_vit has other weights (SHA-256) than what made these features"
        in capsys.readouterr().err
    )
    assert predict(*command, "--weights", tmp_path / "moved.safetensors") == 0
    assert (tmp_path / "c.csv").read_bytes() == first


def test_a_store_of_another_backbone_is_refused(learned: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "nets.py").write_text(NETS.replace("Preprocess(8", "Preprocess(6"))
    words = ["features", str(learned / "photos"), "--backbone", f"{tmp_path / 'nets.py'}:colours"]
    assert main([*words, "--store", str(tmp_path / "store")]) == 0
    assert predict(learned / "run", tmp_path / "store", "-o", tmp_path / "c.csv") == 2
    said = capsys.readouterr().err
    assert (
        "holds features by colours-" in said and f"--backbone {learned / 'nets.py'}:colours" in said
    )


def test_models_and_what_they_cannot_take(
    learned: Path, run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "rows.npy", np.ones((4, 3)))
    np.save(tmp_path / "flat.npy", np.ones(4))
    for words, part in (
        ((run, learned / "store"), "is a model of images; give images"),
        ((run, digits, "--backbone", "x"), "--backbone and --weights go with a model of features"),
        ((learned / "run", tmp_path / "rows.npy"), "features have 3 columns"),
        ((learned / "run", tmp_path / "flat.npy"), "expected numbers (N, D)"),
        ((run, digits, "--device", "warp"), "--device warp is no device"),
        ((run, digits, "-o", tmp_path / "c.txt"), "must end in .csv or .parquet"),
    ):
        assert predict(*words, *([] if "-o" in words else ["-o", tmp_path / "c.csv"])) == 2
        assert part in capsys.readouterr().err
    assert not list(tmp_path.glob(".c.*"))


def test_a_run_of_deepclust_cluster_names_its_clusters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = toy_run(tmp_path)
    derived = Derived(run.store, run.facts["backbone"])
    x = derived.x[torch.from_numpy(derived.landmarks)].numpy().astype(np.float16)
    rows_of = derived.rows[derived.landmarks]
    Landmarks(rows_of, x, np.ones(len(x), dtype=np.float32), derived.basis.numpy()).save(
        run.path / FILE
    )
    state = run.state()
    merged = relabelled(
        state, np.where(state.cluster == 1, 2, state.cluster), names={2: "not blue"}
    )
    run.history.push("merge", merged)
    save_model(run, merged)
    new = toy_photos(tmp_path / "new", 9, 0)
    for out in ("c.csv", "c.parquet"):
        assert predict(run.path, new, "-o", tmp_path / out) == 0
    assert "2 clusters" in capsys.readouterr().out
    found = rows(tmp_path / "c.csv")
    assert list(found[0]) == ["path", "cluster", "confidence", "error", "name"]
    for row in found:
        colour = Path(row["path"]).parent.name
        assert row["error"] or (row["cluster"], row["name"]) == (
            ("0", "") if colour == "blue" else ("2", "not blue")
        )
    table = pq.read_table(tmp_path / "c.parquet")
    assert table.column("name").to_pylist() == [row["name"] or None for row in found]
    shutil.rmtree(run.store.path)
    assert predict(run.path, new, "-o", tmp_path / "c.csv") == 2
    assert "is no feature store" in capsys.readouterr().err


def test_a_folder_as_people_have_them(run: Path, learned: Path, tmp_path: Path) -> None:
    """Whatever lies there costs its own line and nothing else, of images and of features alike."""
    folder = coloured(tmp_path / "my photos", 4)
    picture = Image.open(folder / "blue/0.png")
    good = {
        "été/IMG 1.JPG": picture,
        "日本語 🐱.png": picture,
        "new\nline.png": picture,
        'quote",comma.png': picture,
    }
    good |= {
        "deep.png": Image.fromarray(np.full((9, 9), 40_000, np.uint16)),
        "print.jpg": picture.convert("CMYK"),
    }
    good |= {
        "thin.png": Image.new("L", (999, 1)),
        "web.webp": picture,
        "scan.TIFF": picture.convert("LA"),
    }
    for name, image in good.items():
        (folder / name).parent.mkdir(exist_ok=True)
        image.save(folder / name)
    picture.save(tmp_path / "outside.png")
    picture.save(folder / "moving.gif", save_all=True, append_images=[picture.rotate(90)])
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=turned)
    for name, content in {
        "empty.jpg": b"",
        "letter.jpg": b"Dear all",
        "table.csv": b"1,2",
        "doc.pdf": b"%PDF",
    }.items():
        (folder / name).write_bytes(content)
    (folder / "half.jpg").write_bytes((folder / "turned.jpg").read_bytes()[:300])
    for name, target in {
        "up": "..",
        "self.jpg": "self.jpg",
        "self": "self",
        "gone.png": "nowhere",
    }.items():
        (folder / name).symlink_to(target)
    bad = ["empty.jpg", "gone.png", "half.jpg", "letter.jpg", "red/broken.png", "self.jpg"]
    with contextlib.suppress(OSError):  # where names must be UTF-8
        name = os.fsdecode(b"latin-\xe9.png")
        shutil.copy(folder / "blue/0.png", folder / name)
        bad.append(printable(name))
    for number, model in enumerate((run, learned / "run")):
        for kind in ("csv", "parquet"):
            assert predict(model, folder, "-o", tmp_path / f"{number}.{kind}") == 0
        found = rows(tmp_path / f"{number}.csv")
        assert sorted(row["path"] for row in found if row["error"]) == sorted(
            f"{folder}/{name}" for name in bad
        )
        expected = {f"{folder}/{name}" for name in [*good, *bad, "moving.gif", "turned.jpg"]}
        assert expected < {row["path"] for row in found} and len(found) == len(expected) + 4
        assert pq.read_table(tmp_path / f"{number}.parquet").column("path").to_pylist() == [
            r["path"] for r in found
        ]
    store = tmp_path / "store"
    assert (
        main(
            [
                "features",
                str(folder),
                "--backbone",
                f"{learned / 'nets.py'}:colours",
                "--store",
                str(store),
            ]
        )
        == 0
    )
    kept = FeatureStore.open(store)
    unreadable = sorted(
        printable(kept.paths[row]) for row in np.flatnonzero(kept.status == "unreadable")
    )
    assert unreadable == sorted(bad) and len(kept.rows()) == len(kept) - len(bad)
