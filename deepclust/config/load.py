"""From `key=value` words to a checked configuration. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from deepclust.config.check import _check, _says_trust
from deepclust.config.compose import compose
from deepclust.config.run_config import RunConfig
from deepclust.errors import ConfigError


def load(overrides: Sequence[str] = (), config_dirs: Sequence[Path] = ()) -> RunConfig:
    """The configuration that `key=value` words ask for.

    config_dirs: further folders of groups (`DIR/head/mine.yaml` makes `head=mine`). Python files
    that `trust` names are looked for beside DIR, in it, and where Python looks anyway. Raises
    ConfigError with all that is wrong.
    """
    composed, problems = compose(overrides, config_dirs)
    if _says_trust(overrides):  # else a file there could pose as a package that is not installed
        for folder in config_dirs:
            for place in (Path(folder).resolve().parent, Path(folder).resolve()):
                if str(place) not in sys.path:
                    sys.path.append(str(place))
    config = _check(composed, overrides, problems)
    if problems or config is None:
        raise ConfigError(problems)
    return config
