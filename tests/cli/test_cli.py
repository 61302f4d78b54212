"""The command line: exit codes, plain words for tracebacks, nothing heavy imported for them."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from deepclust.cli import commands, main
from deepclust.cli.parser import BAD_INPUT, FAILED, INTERRUPTED, OK
from deepclust.config.run_config import RunConfig
from deepclust.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[2]


def test_help_list_and_refusals_import_nothing_heavy():
    code = """
import sys
from deepclust.cli import main
for words in (["train", "--help"], ["list", "head"], ["list"], ["train", "--cfg", "seed=3"]):
    assert main(words) == 0, words
for words in (["train", "optim.lr=abc", "head=simlcr"], ["lits"], ["cluster"], ["predict", "x"]):
    assert main(words) == 2, words
heavy = {"torch", "torchvision", "timm", "wandb", "matplotlib", "sklearn", "scipy", "numpy"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (
        "did you mean simclr" in done.stderr
        and "Traceback" not in done.stderr
        and "seed: 3" in done.stdout
    )


def test_train_py_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "train.py", "sed=1"], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert (
        done.returncode == BAD_INPUT and "did you mean seed?" in done.stderr and done.stdout == ""
    )


def test_codes_of_a_run_are_passed_on(trained):
    trained(lambda config: 143)
    assert main(["train"]) == 143


def test_user_errors_and_interrupts_are_plain_words(trained, capsys):
    def refuse(config: RunConfig) -> int:
        raise UserError("data.root=/nowhere: there is no such folder")

    def stop(config: RunConfig) -> int:
        raise KeyboardInterrupt

    trained(refuse)
    assert main(["train"]) == BAD_INPUT
    assert capsys.readouterr().err == "data.root=/nowhere: there is no such folder\n"
    trained(stop)
    assert main(["train"]) == INTERRUPTED and "Ctrl-C" in capsys.readouterr().err


def test_a_fault_of_the_program_is_one_line_and_its_traceback_is_in_the_log(
    trained, capsys, tmp_path
):
    def fail(config: RunConfig) -> int:
        config.folder().mkdir()
        raise ZeroDivisionError("so\nit is")

    trained(fail)
    assert main(["train", f"run.root={tmp_path}"]) == FAILED
    message = capsys.readouterr().err
    log = tmp_path / "scan-digits-0/log.txt"
    assert (
        "failed: ZeroDivisionError: so it is (test_cli.py, line" in message and str(log) in message
    )
    assert "Traceback" not in message and "Traceback" in log.read_text()
    (tmp_path / "scan-digits-0/log.txt").unlink()
    (tmp_path / "scan-digits-0").rmdir()
    assert main(["train", f"run.root={tmp_path}", "run.traceback=true"]) == FAILED
    assert "Traceback" in capsys.readouterr().err


GROUP = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_only_the_first_rank_speaks(monkeypatch, capsys):
    for name, value in GROUP.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "sed=1"]) == BAD_INPUT and capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "sed=1"]) == BAD_INPUT and "sed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"WORLD_SIZE": None},
        {"WORLD_SIZE": "1"},
        {"MASTER_ADDR": None},
        {"MASTER_PORT": None},
        {"RANK": "7"},
    ],
)
@pytest.mark.parametrize("command", ["train", "predict"])
def test_a_rank_without_a_group_hides_nothing(
    monkeypatch, capsys, tmp_path, trained, change, command
):
    for name, value in {**GROUP, **change}.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    if command == "predict":
        assert main(["predict", "nowhere", "photos"]) == BAD_INPUT
        assert "nowhere: there is no such file or folder" in capsys.readouterr().err
        return

    def fail(config: RunConfig) -> int:
        config.folder().mkdir()
        raise ZeroDivisionError("so it is")

    trained(fail)
    assert main(["train", f"run.root={tmp_path}"]) == FAILED
    assert "ZeroDivisionError: so it is" in capsys.readouterr().err
    assert "Traceback" in (tmp_path / "scan-digits-0/log.txt").read_text()


def test_sweeps_run_in_folders_of_their_own_and_stop_at_a_fault(trained, capsys, monkeypatch):
    calls = trained(lambda config: OK if config.tree["optim"]["momentum"] < 0.6 else FAILED)
    assert main(["train", "-m", "optim.momentum=0.5,0.6,0.7"]) == FAILED
    names = [str(config.folder()) for config in calls]
    assert names == [
        "outputs/scan-digits-0-optim.momentum-0.5",
        "outputs/scan-digits-0-optim.momentum-0.6",
    ]
    assert main(["train", "-m", "seed=0,-1", "optim.lrr=1"]) == BAD_INPUT and len(calls) == 2
    message = capsys.readouterr().err
    assert "seed=-1" in message and message.count("optim.lrr") == 1
    assert main(["train", "-m", "seed=0,1", "run.name=same"]) == BAD_INPUT
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "-m", "seed=0,1"]) == BAD_INPUT


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["trian"], "did you mean train?"),
        (["seed=1"], "deepclust train seed=1"),
        (["train", "--confg"], "did you mean --cfg?"),
        (["train", "--config-dir"], "expected one argument; see train.py --help"),
        (["list", "haed"], "did you mean head?"),
        (["list", "zebra"], "no such group; groups are augment"),
        (["list", "head", "--config-dir", "no"], "--config-dir no: there is no such folder"),
        (["checkpoint", "verfy", "x"], "verify"),
        (["checkpoint", "verify", "nowhere"], "there is no such checkpoint"),
        (["predict", "nowhere", "nothing"], "nowhere: there is no such file or folder"),
        (["doctor", "x"], "unrecognized arguments: x"),
        (["features"], "the following arguments are required: images"),
        (["features", "nowhere"], "nowhere: there is no such folder"),
        (["features", ".", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["features", ".", "--batch-size", "0"], "'0' is no whole number from 1 on"),
        (["features", ".", "--backbnoe", "x"], "did you mean --backbone?"),
    ],
)
def test_wrong_words_are_answered(words, part, capsys):
    assert main(words) == BAD_INPUT
    assert part in capsys.readouterr().err


@pytest.mark.parametrize("command", ["predict", "features", "list", "checkpoint", "doctor"])
def test_each_command_says_what_it_takes(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"usage: deepclust {command}" in capsys.readouterr().out


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "hydra", None)
    assert main(["train"]) == FAILED
    message = capsys.readouterr().err
    assert "hydra" in message and "pip install" in message and "Traceback" not in message


def test_doctor_says_what_is_there(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == OK
    text = capsys.readouterr().out
    assert all(
        f" {what} " in text
        for what in ("python", "packages", "conf", "device", "bfloat16", "threads", "disk")
    )
    assert list(tmp_path.iterdir()) == []


def test_doctor_without_a_gpu_says_so_in_one_sentence(capsys, tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor", "--gpu"]) == FAILED
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("BAD")]
    assert len(lines) == 1 and "no CUDA device is visible to torch here" in lines[0]


def test_doctor_checks_the_kernels_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "deepclust.cli", "doctor", "--gpu"]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(CHECKOUT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == OK, done.stdout + done.stderr
    assert "tf32" in done.stdout and "96 x 16, k 8, triton: labels right" in done.stdout
    assert "triton: sums right" in done.stdout


def test_checkpoints_are_verified_and_digested(tmp_path, capsys):
    import torch

    from deepclust.runtime.checkpoint import save

    path = save(
        tmp_path,
        "00-a/step-00000001",
        {"model": {"w": torch.arange(4.0)}, "rng": {"cpu": torch.zeros(2)}},
        {"stage": "a"},
    )
    assert main(["checkpoint", "verify", str(path)]) == OK
    assert main(["checkpoint", "digest", str(path)]) == OK
    text = capsys.readouterr().out
    assert "whole" in text and "model" in text and "rng" in text
    victim = next(file for file in path.rglob("*") if file.is_file() and "model" in file.name)
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(bytes(data))
    assert main(["checkpoint", "verify", str(path)]) == FAILED
    assert "model" in capsys.readouterr().out


def test_predict_is_handed_on(tmp_path, monkeypatch):
    calls = []
    codes = iter([OK, BAD_INPUT])
    stand_in = types.SimpleNamespace(
        predict=lambda asked: calls.append(asked) or next(codes), Asked=dict
    )
    monkeypatch.setitem(sys.modules, "deepclust.predict.command", stand_in)
    words = ["predict", str(tmp_path), str(tmp_path), "-o", "out.csv"]
    assert main(words) == OK and main([*words, "--trust", "mine", "--batch-size", "7"]) == BAD_INPUT
    usual = {
        "new": False,
        "backbone": None,
        "weights": None,
        "device": "auto",
        "batch_size": None,
        "workers": None,
    }
    usual.update(run=tmp_path, data=tmp_path, out=Path("out.csv"), trust=[])
    assert calls == [usual, {**usual, "trust": ["mine"], "batch_size": 7}]


def test_what_was_meant_is_guessed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my photos").mkdir()
    assert (
        main(["my photos"]) == BAD_INPUT
        and "mean deepclust cluster 'my photos'?" in capsys.readouterr().err
    )
    assert (
        main(["edit", "run", "mrege", "1", "2"]) == BAD_INPUT
        and "did you mean merge?" in capsys.readouterr().err
    )
    assert main(["cluster", "my photos", "--appen"]) == BAD_INPUT
    assert "did you mean --append?" in capsys.readouterr().err


def test_a_fault_of_any_command_is_one_line_with_the_way_to_its_traceback(monkeypatch, capsys):
    def fail(words):
        raise RuntimeError("a bug")

    monkeypatch.setattr(commands, "doctor", fail)
    assert main(["doctor"]) == FAILED
    text = capsys.readouterr().err
    assert (
        text.startswith("failed: RuntimeError: a bug (test_cli.py, line ")
        and "Traceback" not in text
    )
    monkeypatch.setenv("DEEPCLUST_TRACEBACK", "1")
    assert main(["doctor"]) == FAILED and "Traceback" in capsys.readouterr().err


def test_the_help_of_cluster_names_the_clusterers():
    from deepclust.cli.options import CLUSTERERS
    from deepclust.clustering.methods import METHODS

    assert set(CLUSTERERS) == set(METHODS) - {"umap_hdbscan"}
