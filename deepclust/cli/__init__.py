"""The command line: `deepclust COMMAND ...`; `python train.py ...` is `deepclust train ...`."""

from deepclust.cli.entry import main

__all__ = ["main"]
