"""Signatures as schemas: which values are taken, and that nothing but what is listed can be built."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepclust.config import check as config
from deepclust.config.build import build
from deepclust.config.compose import Composed, compose
from deepclust.config.signature import check_node, check_value, resolve, signature
from deepclust.errors import UserError, near


@pytest.fixture(scope="module")
def composed() -> Composed:
    return compose([])[0]


def problems_of(composed: Composed, tree: dict[str, Any]) -> list[str]:
    problems: list[str] = []
    config._check(Composed(tree, composed.choices, composed.stages, composed.picked), [], problems)
    return problems


def test_near_prefers_a_single_slip_over_likeness():
    assert (
        near("lt", ["lr", "logit"]) == "lr"
        and near("rl", ["lr"]) == "lr"
        and near("zzz", ["lr"]) is None
    )


# --- wrong values -----------------------------------------------------------------------------

ANY_VALUE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


ORACLES = {
    ("OptimSettings", "lr"): lambda v: _is_number(v) and v > 0,
    ("OptimSettings", "head_lr"): lambda v: v is None or (_is_number(v) and v >= 0),
    ("OptimSettings", "momentum"): lambda v: _is_number(v) and 0 <= v < 1,
    ("OptimSettings", "nesterov"): lambda v: isinstance(v, bool),
    ("OptimSettings", "name"): lambda v: v in ("adamw", "adam", "sgd", "lars"),
    ("TrainerSettings", "epochs"): lambda v: _is_number(v) and isinstance(v, int) and v >= 1,
    ("TrainerSettings", "max_steps"): lambda v: (
        v is None or (_is_number(v) and isinstance(v, int) and v >= 1)
    ),
    ("TrainerSettings", "num_workers"): lambda v: _is_number(v) and isinstance(v, int) and v >= 0,
    ("TrainerSettings", "device"): lambda v: isinstance(v, str) and "\0" not in v,
    ("JobSettings", "seed"): lambda v: _is_number(v) and isinstance(v, int) and 0 <= v < 2**32,
}


@pytest.mark.parametrize(("kind", "key"), sorted(ORACLES))
@settings(max_examples=60, deadline=None)
@given(value=ANY_VALUE)
def test_values_are_taken_exactly_where_their_range_allows(kind, key, value):
    problems: list[str] = []
    read = check_value(
        signature(f"deepclust.config.settings.{kind}").parameters[key].kind, value, key, problems
    )
    assert (not problems) == ORACLES[kind, key](value), (value, problems)
    expected = value
    if isinstance(read, float):  # a whole number beyond 2^53 is rounded to the nearest float
        expected = float(value)
    assert problems or read == expected


@settings(max_examples=60, deadline=None)
@given(low=st.floats(-1, 2), high=st.floats(-1, 2))
def test_places_of_a_tuple_are_checked_and_become_a_tuple(low, high):
    problems: list[str] = []
    read = check_value(
        signature("deepclust.config.settings.OptimSettings").parameters["betas"].kind,
        [low, high],
        "betas",
        problems,
    )
    assert (not problems) == (0 <= low < 1 and 0 <= high < 1)
    assert problems or read == (low, high)


# --- targets ----------------------------------------------------------------------------------

BAD_TARGETS = """
builtins.open builtins.eval builtins.exec builtins.__import__ os.system os.remove posix.system subprocess.run
subprocess.Popen shutil.rmtree pathlib.Path.write_text importlib.import_module pickle.loads torch.load torch.hub.load
torch.save torch.serialization.load torch.utils.data.get_worker_info numpy.load numpy.save ctypes.CDLL sys.exit
socket.socket urllib.request.urlopen webbrowser.open runpy.run_path timm.os.system torchvision.os.system
torch.nn.os.system torch.nn.modules.module.warnings.warn deepclust.config.check.os.system deepclust.heads.scan.torch.load
deepclust.cli.entry.main deepclust.config.load.load deepclust.heads.scan.copy deepclust.backbones.torch
deepclust.heads.base.Any
deepclustx.heads.Head os system deepclust..os torch.nn torchvision.sys.exit torch.nn.functional.torch.hub.load
""".split()  # noqa: SIM905


@pytest.mark.parametrize("target", BAD_TARGETS)
def test_nothing_but_methods_can_be_built(composed, target, tmp_path):
    canary = tmp_path / "canary"
    for section in ("data", "backbone", "head"):
        tree = copy.deepcopy(composed.tree)
        place = tree["stages"]["scan"] if section == "head" else tree
        place[section] = {"_target_": target, "file": str(canary), "mode": "w"}
        assert any("_target_" in line for line in problems_of(composed, tree))
    nested: list[str] = []
    check_node(
        {"_target_": "deepclust.heads.simclr.SimCLR", "temperature": {"_target_": target}},
        "head",
        nested,
    )
    assert nested
    with pytest.raises(UserError):
        build({"_target_": target, "file": str(canary), "mode": "w"})
    with pytest.raises(UserError):
        resolve(target)
    assert not canary.exists()


@pytest.mark.parametrize(
    "target", [None, 3, ["os.system"], {"a": 1}, "", "deepclust.heads.simclr.SimCLR()", "a.b;c"]
)
def test_targets_that_are_no_names_are_refused(composed, target):
    tree = copy.deepcopy(composed.tree)
    tree["backbone"]["_target_"] = target
    assert any(line.startswith("backbone._target_=") for line in problems_of(composed, tree))


def test_a_module_of_ones_own_that_is_not_found_is_explained(tmp_path, monkeypatch):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package/__init__.py").write_text("from my_package.mine import Mine\n")
    (tmp_path / "my_package/mine.py").write_text("class Mine:\n    pass\n")
    with pytest.raises(UserError, match="PYTHONPATH"):
        signature("my_package.Mine")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"did you mean my_package\.mine\.Mine\?"):
        signature("my_package.Mine")
    with pytest.raises(UserError, match="--trust"):
        resolve("my_package.mine.Mine")
