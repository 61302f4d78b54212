"""Feature stores: what they hold, how they grow, and that no stop or damage is ever seen in them."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from deepclust.data import store_writer
from deepclust.data.images import decode
from deepclust.data.perceptual import perceptual_hash
from deepclust.data.store import FeatureStore
from deepclust.data.store_writer import StoreWriter
from deepclust.errors import UserError
from deepclust.features.extract import Asked, extract
from tests.data.conftest import colours

NETS = """
import os, signal, torch
from pathlib import Path
from deepclust.backbones import Backbone, Preprocess

def net(channels, seed):
    torch.manual_seed(seed)
    body = torch.nn.Sequential(torch.nn.Conv2d(3, channels, 3, 2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(2))
    return Backbone(body, 4 * channels, Preprocess(8, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)))

def one():
    return net(5, 0)

def two():
    return net(3, 1)

def large():
    body = net(3, 1)
    body.preprocess = Preprocess(12, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    return body

def huge():
    body = net(5, 0)
    body.body[0].weight.data *= 1e6
    return body

def killed():
    body, count = net(5, 0), [0]
    def stop(module, inputs):
        count[0] += 1
        if count[0] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
    body.register_forward_pre_hook(stop)
    return body
"""
PATHS = [f"{'ab'[number % 2]}/{number}.png" for number in range(40)]


class Folder:
    """Forty images, one of them broken, and a command to try on them."""

    def __init__(self, photos: Path, nets: Path) -> None:
        self.photos, self.nets = photos, nets

    def backbone(self, name: str) -> str:
        return f"{self.nets}:{name}"

    def asked(self, store: Path, *names: str, **more: object) -> Asked:
        given = {"dtype": "float32", "batch_size": 6, "workers": 2, **more}
        return Asked(
            self.photos, store, [self.backbone(name) for name in names or ("one",)], **given
        )  # pyright: ignore

    def extract(self, store: Path, *names: str, **more: object) -> FeatureStore:
        assert extract(self.asked(store, *names, **more)) == 0
        return FeatureStore.open(store)


@pytest.fixture
def folder(
    tmp_path: Path, make_folder: Callable[[Iterable[str]], Path], monkeypatch: pytest.MonkeyPatch
) -> Folder:
    for module in ("data.store", "data.store_writer", "features.extract"):
        monkeypatch.setattr(f"deepclust.{module}.BLOCK", 16)
    (tmp_path / "nets.py").write_text(NETS)
    photos = make_folder(PATHS)
    (photos / "a" / "30.png").write_bytes(b"no image")
    return Folder(photos, tmp_path / "nets.py")


def expected(photos: Path, paths: Iterable[str], channels: int = 5, seed: int = 0) -> np.ndarray:
    """What the network gives for single images, in float64."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(3, channels, 3, 2)
    body = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(2)).double()
    mean, std = (np.array(values)[:, None, None] for values in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25)))
    pixels = [(decode(photos / path, 8, 3) / 255 - mean) / std for path in paths]
    with torch.no_grad():
        return body(torch.from_numpy(np.stack(pixels))).flatten(1).numpy()


def content(store: FeatureStore) -> dict[str, object]:
    """All that must not depend on how a store came about."""
    files = {name: store.file(name).read_bytes() for name in store.backbones}
    table = [store.paths, store.status.tolist(), store.sizes.tolist(), store.hashes, store.reasons]
    table += [store.perceptual.tolist(), store.has_perceptual.tolist()]
    return {
        "files": files,
        "table": table,
        "computed": [store.computed(name).tolist() for name in store.backbones],
    }


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepclust.features.encoder.autocast_dtype", lambda precision, device: None)


@pytest.mark.usefixtures("float32")
def test_a_store_holds_what_the_backbone_gives(tmp_path: Path, folder: Folder) -> None:
    store = folder.extract(tmp_path / "store")
    assert (
        store.paths == sorted(PATHS, key=lambda path: (path[0], int(path[2:-4])))
        and len(store) == 40
    )
    bad = store.paths.index("a/30.png")
    assert store.status[bad] == "unreadable" and store.reasons == {
        bad: "not an image of a kind that can be read"
    }
    assert store.valid.sum() == 39 and store.computed().all() and bad not in store.rows()
    features = store.features()
    assert (
        isinstance(features, np.memmap)
        and features.shape == (40, 20)
        and features.dtype == np.float32
    )
    good = [store.paths[row] for row in store.rows()]
    np.testing.assert_allclose(features[store.rows()], expected(folder.photos, good), atol=2e-6)
    assert not features[bad].any()
    data = (folder.photos / "b/1.png").read_bytes()
    row = store.paths.index("b/1.png")
    assert store.hashes[row] == hashlib.sha256(data).digest() and store.sizes[row].tolist() == [
        12,
        12,
    ]
    assert store.mtime_ns[row] == os.stat(
        folder.photos / "b/1.png"
    ).st_mtime_ns and store.file_bytes[row] == len(data)
    identity = store.backbone("one").identity
    assert (
        identity["model"] == "one"
        and len(identity["weights"]) == 64
        and identity["preprocess"]["size"] == 8
    )
    assert identity["trained_with_labels"] is None and identity["precision"] == "float32"
    assert np.array_equal(np.load(store.file(store.backbone().name), mmap_mode="r"), features)


def test_float16_is_the_same_rounded_and_what_does_not_fit_is_refused(
    tmp_path: Path, folder: Folder
) -> None:
    wide, half = (
        folder.extract(tmp_path / "a").features(),
        folder.extract(tmp_path / "b", dtype="float16").features(),
    )
    assert half.dtype == np.float16 and np.array_equal(half, wide.astype(np.float16))
    with pytest.raises(
        UserError, match=r"features of a/0.png by huge do not fit float16; use --dtype float32"
    ):
        extract(folder.asked(tmp_path / "c", "huge", dtype="float16"))
    assert np.isfinite(folder.extract(tmp_path / "d", "huge").features("huge")).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("change", [False, True])
@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("_add", 1),
        ("_write", 1),
        ("_write", 2),
        ("_write", 3),
        ("_keep_facts", 1),
        ("_keep_facts", 2),
        ("_unseal", 1),
    ],
)
def test_a_kill_at_any_moment_is_never_seen(
    tmp_path: Path,
    folder: Folder,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    call: int,
    change: bool,
) -> None:
    """The process ends at once, in the middle of a write or a transaction; the next one finishes
    what it began.
    """
    if change:
        shutil.copytree(folder.photos, tmp_path / "before")
        folder.extract(tmp_path / "store")
        folder.extract(tmp_path / "other")
        Image.fromarray(colours(99)).save(folder.photos / "a/4.png")
        Image.fromarray(colours(98)).save(folder.photos / "b/99.png")
    folder.extract(tmp_path / "other")
    child = os.fork()
    if child == 0:
        _end_at(where, call)
        extract(folder.asked(tmp_path / "store"))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    happens = change or where != "_unseal"
    assert os.waitstatus_to_exitcode(status) == (9 if happens else 0)
    assert content(folder.extract(tmp_path / "store")) == content(
        FeatureStore.open(tmp_path / "other")
    )


def _end_at(where: str, call: int) -> None:
    """Makes this process end in the `call`-th call of a function: a write is then half done, the
    rest has not begun or, of `_keep_facts`, stands in an open transaction."""
    owner = StoreWriter if where in ("_add", "_unseal") else store_writer
    before, count = getattr(owner, where), [0]

    def end(*given: object) -> None:
        count[0] += 1
        if count[0] == call:
            if where == "_write":
                before(given[0], given[1], given[2][: len(given[2]) // 2])  # pyright: ignore
            if where == "_keep_facts":
                before(*given)
            os._exit(9)
        before(*given)

    setattr(owner, where, end)


def test_a_sigkill_of_the_command_and_the_same_command_again(
    tmp_path: Path, folder: Folder
) -> None:
    code = (
        "import sys, deepclust.data.store, deepclust.data.store_writer, deepclust.features.extract as e\n"
        "for m in (deepclust.data.store, deepclust.data.store_writer, e): m.BLOCK = 16\n"
        "from deepclust.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [
        "features",
        str(folder.photos),
        "--store",
        str(tmp_path / "store"),
        "--batch-size",
        "6",
    ]
    words += ["--backbone", folder.backbone("killed"), "--dtype", "float32"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    half = FeatureStore.open(tmp_path / "store")
    assert half.computed().tolist() == [True] * 16 + [False] * 24, "the block that was sealed stays"
    with pytest.raises(UserError, match="killed"):
        half.backbone("nothing")
    (folder.nets).write_text(NETS.replace("count[0] == 5", "False"))
    again, whole = (folder.extract(tmp_path / name, "killed") for name in ("store", "whole"))
    assert content(again) == content(whole)


def test_ctrl_c_says_what_is_done_and_the_same_command_goes_on(
    tmp_path: Path,
    folder: Folder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = StoreWriter.seal

    def seal(self: StoreWriter, block: int, *rest: object) -> None:
        if block == 1:
            raise KeyboardInterrupt
        before(self, block, *rest)  # pyright: ignore

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "seal", seal)
        assert extract(folder.asked(tmp_path / "store")) == 143
    assert "16 of 40 images by one-" in capsys.readouterr().out
    assert content(folder.extract(tmp_path / "store")) == content(
        folder.extract(tmp_path / "whole")
    )


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are decoded."""
    from deepclust.features import decode_ahead as ahead

    names: list[str] = []
    before = ahead.decode_file

    def decode_file(path: Path, *rest: object) -> object:
        names.append(path.name)
        return before(path, *rest)  # pyright: ignore

    monkeypatch.setattr(ahead, "decode_file", decode_file)
    return names


@pytest.mark.parametrize("hashing", [True, False])
@pytest.mark.usefixtures("float32")
def test_new_images_are_appended_changed_ones_computed_deleted_ones_marked(
    tmp_path: Path, folder: Folder, read: list[str], hashing: bool
) -> None:
    first = folder.extract(tmp_path / "store", hashing=hashing)
    before, paths = np.array(first.features()), list(first.paths)
    assert len(read) == 40 and (first.hashes[0] is not None) == hashing
    read.clear()
    folder.extract(tmp_path / "store", hashing=hashing)
    assert read == [], "nothing changed"
    Image.fromarray(colours(99, 20, 30)).save(folder.photos / "a/4.png")
    Image.fromarray(colours(97)).save(folder.photos / "a/30.png")
    Image.fromarray(colours(98)).save(folder.photos / "a/1.png")
    (folder.photos / "b/5.png").unlink()
    second = folder.extract(tmp_path / "store", hashing=hashing)
    assert sorted(read) == ["1.png", "30.png", "4.png"]
    assert second.paths == [*paths, "a/1.png"], "rows belong to their paths"
    changed = [paths.index("a/4.png"), paths.index("a/30.png"), 40]
    gone = paths.index("b/5.png")
    assert second.status[gone] == "deleted" and second.valid.sum() == 40 and second.reasons == {}
    assert second.sizes[changed[0]].tolist() == [30, 20]
    features = second.features()
    np.testing.assert_allclose(
        features[changed], expected(folder.photos, ["a/4.png", "a/30.png", "a/1.png"]), atol=2e-6
    )
    same = np.setdiff1d(np.arange(40), changed)
    assert np.array_equal(features[same], before[same])
    Image.fromarray(colours(5)).save(folder.photos / "b/5.png")
    third = folder.extract(tmp_path / "store", hashing=hashing)
    assert third.status[gone] == "ok" and third.valid.all()
    np.testing.assert_allclose(
        third.features()[gone], expected(folder.photos, ["b/5.png"])[0], atol=2e-6
    )


def test_content_decides_with_hashes_and_size_and_time_without(
    tmp_path: Path, folder: Folder, read: list[str]
) -> None:
    path = folder.photos / "a/4.png"
    with_hash, without = tmp_path / "with", tmp_path / "without"
    folder.extract(with_hash), folder.extract(without, hashing=False)
    times = os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns
    data = path.read_bytes()
    other = bytearray(
        Path(folder.photos / "a/6.png").read_bytes()[: len(data)].ljust(len(data), b"\0")
    )
    path.write_bytes(other)
    os.utime(path, ns=times)
    read.clear()
    folder.extract(without, hashing=False)
    assert read == [], "same size, same time"
    folder.extract(with_hash)
    assert read == ["4.png"]
    path.touch()
    read.clear()
    folder.extract(with_hash)
    assert read == [], "touched, not changed"
    folder.extract(without, hashing=False)
    assert read == ["4.png"]
    assert FeatureStore.open(without).hashes[0] is None
    assert folder.extract(without).hashes[0] is not None, "hashes are made up for when asked for"
    assert read == ["4.png"]


def test_a_file_that_changes_while_it_is_read_is_computed_again_next_time(
    tmp_path: Path, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = StoreWriter.update

    def update(self: StoreWriter, *given: object) -> object:
        found = before(self, *given)  # pyright: ignore
        Image.fromarray(colours(77, 30, 30)).save(folder.photos / "a/4.png")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "update", update)
        folder.extract(tmp_path / "store")
    store = folder.extract(tmp_path / "store", "one", "two")
    assert content(store) == content(folder.extract(tmp_path / "other", "one", "two"))


def test_a_damaged_block_is_named_and_only_that_one_is_computed_again(
    tmp_path: Path, folder: Folder, read: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    store = folder.extract(tmp_path / "store")
    before, file = content(store), store.file(store.backbone().name)
    data = bytearray(file.read_bytes())
    data[128 + 20 * 80 + 3] ^= 16
    file.write_bytes(data)
    assert FeatureStore.open(tmp_path / "store").damaged() == [1]
    capsys.readouterr(), read.clear()
    assert content(folder.extract(tmp_path / "store")) == before
    assert (
        f"{file}: rows 16-31 were changed on disk (SHA-256); computed again"
        in capsys.readouterr().out
    )
    assert len(read) == 16 - (store.paths.index("a/30.png") // 16 == 1), (
        "unreadable ones are not tried again"
    )
    file.write_bytes(data[:300])
    assert content(folder.extract(tmp_path / "store")) == before
    file.unlink()
    assert content(folder.extract(tmp_path / "store")) == before


def test_backbones_lie_beside_one_another_and_share_the_decoding(
    tmp_path: Path, folder: Folder, read: list[str]
) -> None:
    both = folder.extract(tmp_path / "both", "one", "two")
    assert len(read) == 40
    first = folder.extract(tmp_path / "store", "one")
    file = first.file(first.backbone().name)
    before = (file.read_bytes(), file.stat().st_mtime_ns)
    second = folder.extract(tmp_path / "store", "two")
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    assert content(second) == content(both)
    assert second.features("two").shape == (40, 12) and second.features("one").shape == (40, 20)
    with pytest.raises(UserError, match=r"has several backbones; there are: one-\w+, two-\w+"):
        second.features()
    with pytest.raises(UserError, match=r"has no backbones three; there are: one-\w+, two-\w+"):
        second.features("three")
    (folder.photos / "a/0.png").unlink()
    third = folder.extract(tmp_path / "store", "one")
    assert third.rows("one").tolist() == third.rows("two").tolist()
    Image.fromarray(colours(3)).save(folder.photos / "a/new.png")
    fourth = folder.extract(tmp_path / "store", "one")
    assert len(fourth.rows("one")) == 39 and len(fourth.rows("two")) == 38
    with pytest.raises(UserError, match="is not complete"):
        fourth.features("two")


def test_a_store_is_of_one_folder_and_follows_it_when_it_moves(
    tmp_path: Path, folder: Folder, read: list[str]
) -> None:
    folder.extract(tmp_path / "store")
    shutil.copytree(folder.photos, tmp_path / "copy")
    with pytest.raises(
        UserError,
        match=rf"holds the features of {folder.photos}, not of {tmp_path / 'copy'}; choose",
    ):
        extract(Asked(tmp_path / "copy", tmp_path / "store", [folder.backbone("one")]))
    shutil.rmtree(folder.photos)
    read.clear()
    moved = Folder(tmp_path / "copy", folder.nets).extract(tmp_path / "store")
    assert moved.root == tmp_path / "copy" and moved.valid.sum() == 39 and set(read) <= {"30.png"}


def test_what_cannot_be_done_is_said_in_words(tmp_path: Path, folder: Folder) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("text")
    one = [folder.backbone("one")]
    for root, words in (
        ("nowhere", "^.*nowhere: there is no such folder"),
        ("empty", "the folder is empty"),
        ("texts", "no image among 1 files"),
        ("nets.py", "this is a file"),
    ):
        with pytest.raises(UserError, match=words):
            extract(Asked(tmp_path / root, tmp_path / "store", one))
    with pytest.raises(UserError, match="holds other files and is no feature store"):
        extract(Asked(folder.photos, tmp_path / "texts", one))
    assert not (tmp_path / "store").exists() and os.listdir(tmp_path / "texts") == ["a.txt"]
    with pytest.raises(UserError, match="is no feature store; deepclust features IMAGES --store"):
        FeatureStore.open(tmp_path / "texts")
    for name, words in (
        (":missing", "no attribute 'missing'"),
        (":Path", "gives PosixPath; expected a torch module"),
    ):
        with pytest.raises(UserError, match=words):
            extract(Asked(folder.photos, tmp_path / "store", [f"{folder.nets}{name}"]))
    with (
        StoreWriter.create(tmp_path / "store", folder.photos),
        pytest.raises(UserError, match="is in use by"),
    ):
        extract(folder.asked(tmp_path / "store"))
    (tmp_path / "store/store.sqlite").write_bytes(b"garbage " * 1000)
    for attempt in (
        lambda: FeatureStore.open(tmp_path / "store"),
        lambda: extract(folder.asked(tmp_path / "store")),
    ):
        with pytest.raises(UserError, match=r"store.sqlite .*not a database.*Remove"):
            attempt()


def test_only_broken_images_are_an_error_that_names_them(
    tmp_path: Path, folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in PATHS:
        (folder.photos / path).write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the images can be read"):
        extract(folder.asked(tmp_path / "store"))
    assert "40 unreadable image(s)" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["_write", "fsync", "_keep_facts", "_add"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_leaves_what_was_there(
    tmp_path: Path, folder: Folder, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    store = folder.extract(tmp_path / "store")
    before, file = np.array(store.features()), store.file(store.backbone().name)
    Image.fromarray(colours(98)).save(folder.photos / "b/99.png")
    owner = os if where == "fsync" else StoreWriter if where == "_add" else store_writer

    def fail(*given: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, fail)
        words = {
            errno.ENOSPC: "the disk is full.*--store DIR",
            errno.EROFS: "no permission.*--store DIR",
        }[number]
        with pytest.raises(UserError, match=f"cannot be written: {words}"):
            extract(folder.asked(tmp_path / "store"))
    after = FeatureStore.open(tmp_path / "store")
    assert after.computed()[:40].all() and after.damaged() == []
    assert np.array_equal(np.fromfile(file, np.float32, offset=128)[: before.size], before.ravel())
    assert content(folder.extract(tmp_path / "store"))["files"] == {
        file.stem: folder.extract(tmp_path / "other").file(file.stem).read_bytes()[:128]
        + _in_order(tmp_path)
    }


def _in_order(tmp_path: Path) -> bytes:
    """The other store's rows as the grown one has them: the new image last."""
    grown, other = (FeatureStore.open(tmp_path / name) for name in ("store", "other"))
    return other.features()[[other.paths.index(path) for path in grown.paths]].tobytes()


def test_a_disk_without_room_is_refused_before_anything_is_computed(
    tmp_path: Path, folder: Folder, monkeypatch: pytest.MonkeyPatch, read: list[str]
) -> None:
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda path: os.terminal_size((0, 0)) and type("U", (), {"free": 100})(),
    )
    with pytest.raises(UserError, match="needs 0 MB more and the disk has 0 MB free"):
        extract(folder.asked(tmp_path / "store"))
    assert read == []


def test_a_link_out_of_the_store_is_not_followed(tmp_path: Path, folder: Folder) -> None:
    store = folder.extract(tmp_path / "store")
    file = store.file(store.backbone().name)
    (tmp_path / "precious").write_text("mine")
    file.unlink()
    file.symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="leads outside"):
        extract(folder.asked(tmp_path / "store"))
    assert (tmp_path / "precious").read_text() == "mine"


def test_perceptual_hashes_are_kept_of_the_pixels_that_the_first_backbone_was_fed(
    tmp_path: Path, folder: Folder
) -> None:
    store = folder.extract(tmp_path / "store")
    bad = store.paths.index("a/30.png")
    assert store.has_perceptual.tolist() == store.valid.tolist() and store.perceptual[bad] == 0
    assert store.perceptual.dtype == np.uint64
    expected = [
        perceptual_hash(decode(folder.photos / store.paths[row], 8, 3)) for row in store.rows()
    ]
    assert store.perceptual[store.rows()].tolist() == expected and len(set(expected)) == 39
    again = folder.extract(tmp_path / "store", "large")
    assert np.array_equal(again.perceptual, store.perceptual), "the one of side 12 changes none"
    Image.fromarray(colours(99)).save(folder.photos / "a/4.png")
    (folder.photos / "b/7.png").write_bytes(b"no longer an image")
    changed = folder.extract(tmp_path / "store", "large")
    row, gone = (store.paths.index(path) for path in ("a/4.png", "b/7.png"))
    assert changed.perceptual[row] == perceptual_hash(decode(folder.photos / "a/4.png", 12, 3))
    assert not changed.has_perceptual[gone]
    assert np.array_equal(
        np.delete(changed.perceptual, [row, gone]), np.delete(store.perceptual, [row, gone])
    )


def test_a_store_from_before_perceptual_hashes_opens_and_gets_them_for_what_is_read(
    tmp_path: Path, folder: Folder
) -> None:
    folder.extract(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    db = sqlite3.connect(tmp_path / "old/store.sqlite")
    with db:
        db.execute("ALTER TABLE images DROP COLUMN phash")
    db.close()
    old = FeatureStore.open(tmp_path / "old")
    assert not old.has_perceptual.any() and not old.perceptual.any() and old.computed().all()
    Image.fromarray(colours(98)).save(folder.photos / "b/99.png")
    grown = folder.extract(tmp_path / "old")
    assert np.flatnonzero(grown.has_perceptual).tolist() == [40], (
        "nothing is read again for its sake"
    )
    assert content(folder.extract(tmp_path / "old", "two")) == content(
        folder.extract(tmp_path / "new", "one", "two")
    )


def test_deep_grey_transparent_and_tiny_images_have_a_perceptual_hash(
    tmp_path: Path, folder: Folder
) -> None:
    grey = colours(50)[..., 0]
    files = {
        "deep": Image.fromarray(grey.astype(np.uint16) * 257),
        "grey": Image.fromarray(grey),
        "alpha": Image.fromarray(np.dstack([colours(51), grey])),
        "tiny": Image.new("RGB", (1, 1), "red"),
        "thin": Image.new("L", (1, 300)),
    }
    for name, image in files.items():
        image.save(folder.photos / f"{name}.png")
    store = folder.extract(tmp_path / "store")
    found = {name: store.paths.index(f"{name}.png") for name in files}
    assert store.has_perceptual[list(found.values())].all()
    assert store.perceptual[found["deep"]] == store.perceptual[found["grey"]]
    assert store.has_perceptual.sum() == 44


def test_images_are_tried_again_once_their_reader_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepclust.data import images

    root = tmp_path / "photos"
    root.mkdir()
    Image.fromarray(colours(0)).save(root / "a.png")
    (root / "b.heic").write_bytes(b"\0\0\0\x1cftypheic" + bytes(100))
    (tmp_path / "nets.py").write_text(NETS)
    asked = Asked(root, tmp_path / "store", [f"{tmp_path / 'nets.py'}:one"])
    monkeypatch.setattr(images, "_reads_heif", lambda: False)
    for _ in range(2):
        assert extract(asked) == 0
        store = FeatureStore.open(tmp_path / "store")
        assert (
            store.status.tolist() == ["ok", "unreadable"] and "deepclust[heic]" in store.reasons[1]
        )
    Image.fromarray(colours(1)).save(tmp_path / "x.png")
    state = os.stat(root / "b.heic")
    monkeypatch.setattr(images, "_reads_heif", lambda: True)
    monkeypatch.setattr(images, "_open", lambda file: Image.open(tmp_path / "x.png"))
    assert extract(asked) == 0 and os.stat(root / "b.heic").st_mtime_ns == state.st_mtime_ns
    store = FeatureStore.open(tmp_path / "store")
    assert store.status.tolist() == ["ok", "ok"] and store.computed().all()
