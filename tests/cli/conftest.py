"""A stand-in for training, for tests of the command line around it."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest

from deepclust.config.run_config import RunConfig


@pytest.fixture
def trained(monkeypatch) -> Callable[[Callable[[RunConfig], int]], list[RunConfig]]:
    """Puts a stand-in for `deepclust.training.recipe.train`; the list collects what it was called
    with.
    """

    def use(train: Callable[[RunConfig], int]) -> list[RunConfig]:
        calls: list[RunConfig] = []

        def record(config: RunConfig) -> int:
            calls.append(config)
            return train(config)

        monkeypatch.setitem(
            sys.modules, "deepclust.training.recipe", types.SimpleNamespace(train=record)
        )
        return calls

    return use
