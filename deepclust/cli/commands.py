"""The table of commands, and the functions of the small ones.

A command's code is imported when it runs, so that help and refusals wait for nothing.
"""

from __future__ import annotations

import importlib
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from deepclust.cli.parser import FAILED, OK, Parser, did_you_mean
from deepclust.errors import UserError


@dataclass(frozen=True)
class Command:
    """A command's line in the help, and the function behind it."""

    usage: str
    """The command and what it takes, without `deepclust`."""
    summary: str
    """What it does, in one line."""
    function: str
    """`module:function`, called with the words after the command; it returns the exit code."""

    def __call__(self, words: list[str]) -> int:
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)(words)


# In the order in which a newcomer needs them, which is that of the help.
COMMANDS = {
    "cluster": Command(
        "cluster IMAGES [-k N]",
        "clusters, table and report of a folder of images",
        "deepclust.cli.commands:cluster",
    ),
    "edit": Command(
        "edit RUN [merge|split|rename|exclude|undo ...]",
        "changes clusters; any edit can be undone",
        "deepclust.cli.commands:edit",
    ),
    "predict": Command(
        "predict RUN PATH [-o clusters.csv]",
        "clusters of new images, any number of them",
        "deepclust.cli.commands:predict",
    ),
    "train": Command(
        "train [key=value ...]",
        "train, cluster, evaluate, report",
        "deepclust.cli.train:train",
    ),
    "features": Command(
        "features IMAGES [--backbone NAME ...]",
        "a folder's features, once, in a store",
        "deepclust.cli.commands:features",
    ),
    "list": Command(
        "list [head|data|backbone|recipe|...]",
        "what a group offers",
        "deepclust.cli.commands:list_options",
    ),
    "checkpoint": Command(
        "checkpoint verify|digest PATH",
        "whether it is whole; SHA-256 of its parts",
        "deepclust.cli.commands:checkpoint",
    ),
    "doctor": Command(
        "doctor [--gpu]",
        "versions, device, precision, disk, GPU kernels",
        "deepclust.cli.commands:doctor",
    ),
}


def find(name: str) -> Command:
    """The command of that name. Raises UserError with what was probably meant."""
    if name in COMMANDS:
        return COMMANDS[name]
    if "=" in name:
        raise UserError(f"{name}: a command comes first; did you mean deepclust train {name}?")
    advice = did_you_mean(name, COMMANDS, f"commands are {', '.join(COMMANDS)}")
    # Whoever gives a folder alone has photos there.
    if os.path.isdir(name):
        advice = f"did you mean deepclust cluster {shlex.quote(name)}?"
    raise UserError(f"{name}: there is no such command; {advice}")


def list_options(words: list[str]) -> int:
    """Runs `list [GROUP] [--config-dir DIR]`: what a group offers; without a group, the groups."""
    from deepclust.cli.listing import groups_text, options_text
    from deepclust.config.compose import groups

    parser = Parser("deepclust list", description="What a group offers; without one, the groups.")
    parser.add_argument("group", nargs="?", help="recipe, head, data, backbone, experiment, ...")
    parser.add_argument(
        "--config-dir", type=Path, action="append", default=[], help="a folder with more groups"
    )
    options = parser.parse_args(words)
    for folder in options.config_dir:
        if not folder.is_dir():
            raise UserError(f"--config-dir {folder}: there is no such folder")
    if options.group is None:
        print(groups_text(options.config_dir))
        return OK
    names = groups(options.config_dir)
    if options.group not in names:
        advice = did_you_mean(options.group, names, f"groups are {', '.join(names)}")
        raise UserError(f"{options.group}: there is no such group; {advice}")
    print(options_text(options.group, options.config_dir))
    return OK


def checkpoint(words: list[str]) -> int:
    """Runs `checkpoint verify|digest PATH`."""
    parser = Parser(
        "deepclust checkpoint", description="Whether a checkpoint is whole; SHA-256 of its parts."
    )
    parser.add_argument("verb", choices=("verify", "digest"))
    parser.add_argument(
        "path", type=Path, help="as in outputs/NAME/checkpoints/00-pretext/step-00000712"
    )
    options = parser.parse_args(words)
    if not options.path.exists():
        raise UserError(f"{options.path}: there is no such checkpoint")
    # Only here: this import brings torch.
    from deepclust.runtime import checkpoint as checkpoints

    # A run folder, or its folder of checkpoints, is an easy slip for one of them.
    inside = checkpoints.listing(options.path / "checkpoints") or checkpoints.listing(options.path)
    if inside:
        raise UserError(f"{options.path} is not a checkpoint; its newest one is {inside[-1]}")
    if not options.path.is_dir():
        raise UserError(f"{options.path} is not a checkpoint; that is a folder")
    if options.verb == "digest":
        for part, digest in checkpoints.digest(options.path).items():
            print(f"{digest}  {part}")
        return OK
    problems = checkpoints.verify(options.path)
    if problems:
        print("\n".join(problems))
        return FAILED
    print(f"{options.path}: whole")
    return OK


def predict(words: list[str]) -> int:
    """Runs `predict RUN PATH [-o clusters.csv]`."""
    from deepclust.cli.options import add_predict_options

    parser = Parser(
        "deepclust predict",
        description=(
            "Clusters of any number of new images with the model of a run, as a CSV or "
            "Parquet file. After a stop the same command goes on."
        ),
    )
    add_predict_options(parser)
    options = parser.parse_args(words)
    for path in (options.run, options.data):
        if not path.exists():
            raise UserError(f"{path}: there is no such file or folder")
    from deepclust.predict.command import Asked
    from deepclust.predict.command import predict as predict_data

    return predict_data(Asked(**vars(options)))


def features(words: list[str]) -> int:
    """Runs `features IMAGES [--backbone NAME ...] [--store DIR]`."""
    from deepclust.cli.options import add_feature_options, feature_options

    parser = Parser(
        "deepclust features",
        description=(
            "Features of a folder of images in a store, made once. Asking again adds what is new,"
            " computes what changed and marks what is gone; after a stop the same command goes on."
        ),
    )
    add_feature_options(parser)
    options = parser.parse_args(words)
    from deepclust.features.extract import extract

    return extract(feature_options(options))


def cluster(words: list[str]) -> int:
    """Runs `cluster IMAGES [-k N|auto] [--sort copy|symlink] [--append] [--noise]`."""
    from deepclust.cli.options import add_cluster_options, cluster_options

    parser = Parser(
        "deepclust cluster",
        description=(
            "Clusters of a folder of images: clusters.csv, clusters.parquet and a report with a"
            " map. Features are made once and kept, so that another -k takes seconds. After a stop"
            " the same command goes on."
        ),
    )
    add_cluster_options(parser)
    options = cluster_options(parser.parse_args(words))
    # After the options, so that a slip in them does not wait for torch.
    from deepclust.collection.cluster import cluster as cluster_folder

    return cluster_folder(options)


def edit(words: list[str]) -> int:
    """Runs `edit RUN [merge|split|rename|exclude|undo] ...`."""
    from deepclust.cli.options import add_edit_options

    parser = Parser(
        "deepclust edit",
        description="Changes clusters of a folder's images and writes all files anew.",
    )
    add_edit_options(parser)
    # Intermixed: -n may stand between the verb and its words, or after them.
    options = parser.parse_intermixed_args(words)
    if options.parts is not None and options.verb != "split":
        raise UserError(
            f"-n {options.parts}: only split has it, as in: deepclust edit {options.run} split 3"
            " -n 3"
        )
    from deepclust.collection.edit import edit as edit_run

    edit_run(options.run, options.verb, options.words, options.parts or 2)
    return OK


def doctor(words: list[str]) -> int:
    """Runs `doctor [--gpu]`: what this machine has, and whether a run could work here."""
    parser = Parser(
        "deepclust doctor", description="What this machine has, and whether a run could work here."
    )
    parser.add_argument(
        "--gpu", action="store_true", help="also check and time k-means on the GPU, in two minutes"
    )
    options = parser.parse_args(words)
    from deepclust.cli.doctor import findings

    faults = 0
    # Each finding is printed as it comes: checks on a GPU take minutes.
    for subject, text, good in findings(gpu=options.gpu):
        print(f"{'ok  ' if good else 'BAD '} {subject:<14} {text}")
        faults += not good
    return FAILED if faults else OK
