"""Checkpoints: what is loaded is what was saved, whatever kills the process or damages the files in
between.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepclust.runtime import checkpoint
from deepclust.runtime.checkpoint import CheckpointError


def make_state(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(4, 3, generator=generator)
    model = {
        "weight": weights,
        "count": torch.tensor(seed),
        "half": weights.bfloat16(),
        "mask": weights > 0,
    }
    optimizer = {
        "state": {0: {"exp_avg": weights * 2}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0]}],
    }
    return {
        "model": model,
        "optimizer": optimizer,
        "rng": [seed, None, True, "text"],
        "rank0": {"order": torch.arange(7)},
    }


def save(
    root: Path, step: int, stage: str = "00-pretext", seed: int | None = None, **meta: Any
) -> Path:
    state = make_state(step if seed is None else seed)
    return checkpoint.save(root, f"{stage}/step-{step:08d}", state, {"step": step, **meta})


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and a == b


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    path = save(tmp_path, 200, note="ü")
    assert path == tmp_path / "00-pretext" / "step-00000200"
    loaded = checkpoint.load(path)
    assert equal(loaded.state, make_state(200))
    assert loaded.meta == {"step": 200, "note": "ü"}
    assert checkpoint.verify(path) == []
    assert not list(tmp_path.glob(".tmp-*"))


def test_optimizer_state_survives(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path = checkpoint.save(
        tmp_path, "00-a/step-00000001", {"optimizer": optimizer.state_dict()}, {}
    )
    assert equal(checkpoint.load(path).state["optimizer"], optimizer.state_dict())


def test_a_slice_does_not_drag_its_storage_along(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, "00-a/step-00000001", {"bank": torch.zeros(1 << 20)[:4]}, {})
    assert (path / "bank.pt").stat().st_size < 10_000


@pytest.mark.parametrize("bad", [torch.nn, {"a": {1, 2}}, [object()], {("a",): 1}])
def test_what_could_not_be_read_back_is_refused_when_saved(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(TypeError, match="checkpoint state at part"):
        checkpoint.save(tmp_path, "00-a/step-00000001", {"part": bad}, {})
    assert checkpoint.listing(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["../x/step-00000001", "step-00000001", "00-a/last", "/00-a/step-00000001"]
)
def test_a_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="bad checkpoint name"):
        checkpoint.save(tmp_path, name, {}, {})


def test_digest_sees_content_and_nothing_else(tmp_path: Path) -> None:
    first = checkpoint.digest(save(tmp_path / "a", 1, seed=5))
    second = checkpoint.digest(save(tmp_path / "b", 900, stage="03-other", seed=5))
    assert first == second == checkpoint.digest_state(make_state(5))
    assert set(first) == set(make_state())

    def of(value: Any) -> str:
        return checkpoint.digest_state({"x": value})["x"]

    zeros = torch.zeros(2, 3)
    values = [
        zeros,
        zeros.T,
        zeros.double(),
        zeros.int(),
        zeros[:1],
        -zeros,
        [0, 0],
        (0, 0),
        [0, [0]],
        [[0], 0],
    ]
    values += [
        0,
        0.0,
        False,
        None,
        "0",
        "",
        {},
        [],
        {"a": 1, "b": 2},
        {"a": 2, "b": 1},
        {1: 1},
        {"1": 1},
    ]
    assert len({of(value) for value in values}) == len(values)
    assert of({"a": 1, "b": zeros}) == of({"b": zeros.clone(), "a": 1})
    assert of(zeros.T) == of(torch.zeros(3, 2))


def test_order_is_by_stage_and_step_never_by_time(tmp_path: Path) -> None:
    paths = [
        save(tmp_path, 900),
        save(tmp_path, 1000),
        save(tmp_path, 100, stage="01-scan"),
        save(tmp_path, 100, stage="01-scan"),
    ]
    assert paths[-1].name == "step-00000100-2"
    for age, path in enumerate(paths):
        os.utime(path, (1e9 - age * 1e6, 1e9 - age * 1e6))
        os.utime(path / "manifest.json", (1e9 - age * 1e6, 1e9 - age * 1e6))
    (tmp_path / "01-scan" / "notes").mkdir()
    (tmp_path / "99-x").mkdir()
    assert checkpoint.listing(tmp_path) == paths
    found, notes = checkpoint.newest(tmp_path)
    assert found is not None and found.path == paths[-1] and notes == []


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "absent") == (None, [])


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["model.pt", "rank0.pt", "manifest.json"])
def test_every_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    whole = (path / name).read_bytes()
    rng = random.Random(name)
    for _ in range(20):
        flip(path / name, rng.randrange(8 * len(whole)))
        with pytest.raises(
            CheckpointError, match=r"step-00000002 cannot be used: .*" + name.split(".")[0]
        ):
            checkpoint.load(path)
        found, notes = checkpoint.newest(tmp_path)
        assert found is not None and found.meta["step"] == 1
        assert len(notes) == 1 and name in notes[0] and "The one before it is used" in notes[0]
        (path / name).write_bytes(whole)
    assert checkpoint.verify(path) == []


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def zero_tail(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


@pytest.mark.parametrize("damage", [cut, empty, zero_tail, Path.unlink])
@pytest.mark.parametrize("name", ["optimizer.pt", "manifest.json"])
def test_damaged_files_are_named_and_passed_over(
    tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    good = save(tmp_path, 1)
    damage(save(tmp_path, 2) / name)
    found, notes = checkpoint.newest(tmp_path)
    assert found is not None and found.path == good and equal(found.state, make_state(1))
    assert len(notes) == 1 and name in notes[0] and "step-00000002" in notes[0]
    damage(good / name)
    found, notes = checkpoint.newest(tmp_path)
    assert found is None and len(notes) == 2 and "No checkpoint before it is left" in notes[1]


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Somebody who knows the format writes a manifest whose own hash is right."""
    content = checkpoint.manifest(path)
    change(content)
    (path / "manifest.json").write_bytes(checkpoint._render(content))


def test_a_future_version_is_refused_in_words(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    rewrite_manifest(path, lambda content: content.update(version=99))
    with pytest.raises(
        CheckpointError, match="format version 99, this program reads up to 1; update deepclust"
    ):
        checkpoint.load(path)


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    rewrite_manifest(
        path, lambda content: content["parts"].update({"../../x": content["parts"]["model"]})
    )
    assert checkpoint.verify(path) == ["manifest.json is damaged"]


class Payload:
    """Unpickles into a call that leaves a trace."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_code_in_a_part_is_never_run(tmp_path: Path, form: str) -> None:
    """The manifest's hashes are right: only the reading itself stands between the payload and the
    process.
    """
    good, path, canary = save(tmp_path, 1), save(tmp_path, 2), tmp_path / "canary"
    buffer = io.BytesIO()
    torch.save(Payload(canary), buffer) if form == "torch" else pickle.dump(Payload(canary), buffer)
    (path / "model.pt").write_bytes(buffer.getvalue())
    written = checkpoint._Hashed(tmp_path / "copy")
    written.write(buffer.getvalue())
    rewrite_manifest(path, lambda content: content["parts"].update(model=written.result()))
    assert checkpoint.verify(path) == []
    with pytest.raises(
        CheckpointError, match=r"model\.pt holds something other than tensors and plain data"
    ):
        checkpoint.load(path)
    found, notes = checkpoint.newest(tmp_path)
    assert found is not None and found.path == good and len(notes) == 1
    assert not canary.exists()
    if form == "torch":
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        assert canary.exists(), "the payload does nothing, so this test shows nothing"


def test_rotation_keeps_the_newest_and_the_permanent(tmp_path: Path) -> None:
    end = save(tmp_path, 40, permanent=True)
    paths = [save(tmp_path, step, stage="01-scan") for step in (10, 20, 30, 40)]
    assert checkpoint.rotate(tmp_path, keep=2) == [paths[1], paths[0]]
    assert checkpoint.listing(tmp_path) == [end, *paths[2:]]
    assert not list(tmp_path.glob(".tmp-*"))


def test_rotation_counts_only_what_is_whole(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in (10, 20, 30)]
    cut(paths[2] / "model.pt")
    assert checkpoint.rotate(tmp_path, keep=1) == [paths[0]]
    assert checkpoint.listing(tmp_path) == paths[1:]
    cut(paths[1] / "model.pt")
    assert checkpoint.rotate(tmp_path, keep=1) == []
    again = save(tmp_path, 30)
    assert checkpoint.rotate(tmp_path, keep=1) == [paths[2], paths[1]]
    assert checkpoint.listing(tmp_path) == [again]


class Killer:
    """Ends the process, as SIGKILL would, at the n-th open, write, fsync, rename or removal; a
    write is torn.
    """

    def __init__(self, at: int) -> None:
        self.left = at
        for name in ("fsync", "rename", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self._before(getattr(os, name)))
        builtins.open = self._before(open)
        inner = checkpoint._Hashed.write
        checkpoint._Hashed.write = lambda file, data: inner(
            file, data[: len(data) // 2] if self._now() else data
        )  # type: ignore[method-assign]
        self.torn = False

    def _now(self) -> bool:
        if self.torn:
            os._exit(9)
        self.left -= 1
        self.torn = self.left == 0
        return self.torn

    def _before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._now():
                os._exit(9)
            return function(*args, **kwargs)

        return call


def run_killed_at(at: int, action: Callable[[], object]) -> int:
    """Exit code of a child process that does `action` and is killed at its `at`-th change to the
    disk.
    """
    child = os.fork()
    if child == 0:
        try:
            Killer(at)
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_at_every_moment_of_a_save_and_a_rotation(tmp_path: Path) -> None:
    torch.save(
        {}, io.BytesIO()
    )  # imports what the first save imports, before the children are forked
    state = {
        step: {"model": {"w": torch.full((2,), step)}, "rng": [step]}
        for step in (100, 200, 300, 400)
    }

    def put(root: Path, step: int) -> Path:
        return checkpoint.save(root, f"00-a/step-{step:08d}", state[step], {"step": step})

    put(tmp_path / "before", 100)
    put(tmp_path / "before", 200)
    moments, survivors, root = 0, set(), tmp_path / "run"
    while True:
        shutil.copytree(tmp_path / "before", root)
        code = run_killed_at(moments + 1, lambda: (put(root, 300), checkpoint.rotate(root, keep=1)))
        found, notes = checkpoint.newest(root)
        assert found is not None and notes == [], f"moment {moments}: {notes}"
        assert found.meta["step"] in (200, 300)
        assert equal(found.state, state[found.meta["step"]])
        assert not list(root.glob(".tmp-*"))
        assert all(checkpoint.verify(path) == [] for path in checkpoint.listing(root)), (
            f"moment {moments}"
        )
        survivors.add(found.meta["step"])
        if moments % 10 == 0:
            again = put(root, found.meta["step"] + 100)
            checkpoint.rotate(root, keep=1)
            assert checkpoint.newest(root)[0].path == again  # type: ignore[union-attr]
        shutil.rmtree(root)
        if code == 0:
            break
        assert code == 9
        moments += 1
    assert moments > 30 and survivors == {200, 300}


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
@pytest.mark.parametrize("limit", [0, 100, 900, 3000])
def test_a_full_disk_leaves_the_old_one_and_says_so(tmp_path: Path, limit: int) -> None:
    """The kernel itself refuses to write further than `limit` bytes into any file (EFBIG)."""
    old = save(tmp_path, 1)
    state = {"model": torch.zeros(2000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match="could not be saved: the disk is full"):
            checkpoint.save(tmp_path, "00-pretext/step-00000002", state, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.glob(".tmp-*"))
    found, notes = checkpoint.newest(tmp_path)
    assert found is not None and found.path == old and notes == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("function", ["fsync", "rename", "mkdir"])
def test_any_failing_call_is_told_in_words(
    tmp_path: Path, monkeypatch: Any, number: int, function: str
) -> None:
    old = save(tmp_path, 1)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(CheckpointError, match=r"step-00000002 could not be saved: \w+"):
            save(tmp_path, 2)
    assert not list(tmp_path.glob(".tmp-*")) and checkpoint.newest(tmp_path)[0].path == old  # type: ignore[union-attr]


def test_the_manifest_lists_every_file_and_is_json(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    content = json.loads((path / "manifest.json").read_text())
    assert {f"{part}.pt" for part in content["parts"]} | {"manifest.json"} == {
        file.name for file in path.iterdir()
    }
    assert all(zipfile.is_zipfile(path / f"{part}.pt") for part in content["parts"])
