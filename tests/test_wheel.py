"""The wheel: conf/ travels inside, and the installed package works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    hatchling = pytest.importorskip(
        "hatchling.build", reason="pip install hatchling to build the wheel here"
    )
    folder = tmp_path_factory.mktemp("wheel")
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        name = hatchling.build_wheel(str(folder))
    finally:
        os.chdir(before)
    with zipfile.ZipFile(folder / name) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    code = "import sys; from deepclust.cli import main; sys.exit(main(sys.argv[1:]))"
    command = (
        [sys.executable, "-P", "-c", code, *words]
        if sys.version_info >= (3, 11)
        else [sys.executable, "-c", code, *words]
    )
    return subprocess.run(
        command, cwd=installed.parent, env=environment, capture_output=True, text=True
    )


def test_conf_is_inside_and_nothing_else_comes_along(installed):
    assert (installed / "deepclust" / "conf" / "config.yaml").is_file()
    tops = {path.name for path in installed.iterdir()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"deepclust"}


def test_what_reports_are_made_of_is_inside(installed):
    for path in (ROOT / "deepclust/report").iterdir():
        if path.is_file():
            assert (
                installed / "deepclust" / "report" / path.name
            ).read_bytes() == path.read_bytes()


def test_the_installed_package_finds_its_configuration(installed):
    result = run(installed, "list", "head")
    assert result.returncode == 0 and "simclr" in result.stdout, result.stderr
    result = run(installed, "train", "--cfg")
    assert result.returncode == 0 and "pretext" in result.stdout, result.stderr


def test_the_installed_package_refuses_a_wrong_key(installed):
    result = run(installed, "train", "optim.lrr=1")
    assert (
        result.returncode == 2 and "optim.lr" in result.stderr and "Traceback" not in result.stderr
    )
