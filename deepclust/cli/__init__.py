"""The command line: `deepclust COMMAND ...`; `python train.py ...` is `deepclust train ...`."""
