"""The command line: `python train.py key=value ...` and `deepclust COMMAND ...`. Nothing here imports torch by itself.

Exit codes: 0 finished, 143 preempted and saved, 2 bad configuration or data, 1 failed, 130 stopped with Ctrl-C before
there was anything to save.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from deepclust.errors import TRACEBACK, UserError, in_short
from deepclust.launched import rank
from deepclust.signatures import near

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
LISTED = ("recipe", "head", "data", "backbone", "augment", "optim", "experiment")

HELP = """\
deepclust: unlabelled images in; clusters, confidences, a model and a report out.

  deepclust cluster PHOTOS             clusters, a table and a report of a folder of images
  python train.py [key=value ...]      the same as   deepclust train [key=value ...]

Five to train with
  python train.py                                       handwritten digits, no labels, under two minutes
  python train.py data=image_folder data.root=PHOTOS num_clusters=20
                                                        a network trained on your own images
  python train.py seed=1 stages.scan.head.entropy_weight=3
                                                        another seed, another weight
  python train.py head=simclr trainer.epochs=100        one stage with one head
  python train.py -m seed=0,1,2                         three runs, one after another

What can be chosen
{choices}
Every key and its value: python train.py --cfg [key=value ...]
Results go to outputs/<recipe>-<data>-<seed>/ (run.name=NAME or run.dir=PATH): clusters.csv, report.html,
model.safetensors. The same command goes on where it stopped; run.new=true starts over.

Options of train
  --cfg                 print the composed configuration and exit
  --config-dir DIR      more groups: DIR/head/mine.yaml makes head=mine (may be given several times)
  -m, --multirun        key=a,b is a run for a and a run for b
  -h, --help            this page

Commands (each explains itself with --help)
{commands}

Exit codes: 0 finished; 143 stopped, and the same command goes on; 130 stopped before there was anything to keep;
2 a wrong option, folder or file, named on the screen; 1 a fault of the program (DEEPCLUST_TRACEBACK=1 shows where)."""


class _Parser(argparse.ArgumentParser):
    """Takes options by their whole names; says what is wrong as a UserError, with the nearest option or choice."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice and (meant := near(choice[1], re.split(r"[', ]+", choice[2]))):
            raise UserError(f"{message}; did you mean {meant}?")
        words = [word for word in message.split() if word.startswith("-")]
        known = [name for action in self._actions for name in action.option_strings]
        word = words[0].partition("=")[0].rstrip(":") if words else ""
        found = near(word, known) if word and word not in known else None
        raise UserError(f"{message}{f'; did you mean {found}?' if found else f'; see {self.prog} --help'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code. Faults that the user can mend are printed without a traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        name, *rest = words or ["--help"]
        if name in ("-h", "--help"):
            print(help_text())
            return OK
        return _command(name)(rest)
    except UserError as error:
        return _say(str(error), BAD_INPUT)
    except ModuleNotFoundError as error:
        advice = 'pip install -e ".[dev]" in a clone of the repository installs what is needed'
        return _say(f"{error}; {advice}", FAILED)
    except KeyboardInterrupt:
        return _say("stopped with Ctrl-C", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        shown = bool(os.environ.get(TRACEBACK))
        advice = f"{TRACEBACK}=1 before the command shows the traceback"
        return _say(traceback.format_exc() if shown else f"failed: {in_short(error)}\n{advice}", FAILED)


def _say(text: str, code: int) -> int:
    """Prints to stderr, once under torchrun."""
    if rank() == 0:
        print(text, file=sys.stderr)
    return code


def _command(name: str) -> Callable[[list[str]], int]:
    if name in COMMANDS:
        return COMMANDS[name][0]
    if "=" in name:
        raise UserError(f"{name}: a command comes first; did you mean deepclust train {name}?")
    found = near(name, COMMANDS)
    if os.path.isdir(name):
        found = f"deepclust cluster {shlex.quote(name)}"
    advice = f"did you mean {found}?" if found else f"commands are {', '.join(COMMANDS)}"
    raise UserError(f"{name}: there is no such command; {advice}")


def help_text() -> str:
    """The page for `--help`: what can be chosen, examples, where results go."""
    from deepclust.config import options

    lines: list[str] = []
    for group in LISTED:
        for place, (name, description) in enumerate(options(group)):
            first = f"  {f'{group}=' if place == 0 else '':<12}{name:<19} "
            lines += textwrap.wrap(first + description, 118, subsequent_indent=" " * len(first), drop_whitespace=False)
    commands = "\n".join(f"  deepclust {usage:<46} {text}" for _, usage, text in COMMANDS.values())
    return HELP.format(choices="\n".join(map(str.rstrip, lines)), commands=commands)


# --- train ----------------------------------------------------------------------------------------------------------


def train(words: list[str]) -> int:
    """`train [--cfg] [--config-dir DIR] [-m] key=value ...`"""
    from deepclust.compose import sweeps
    from deepclust.config import load

    parser = _Parser("train.py", add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--cfg", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--config-dir", type=Path, action="append", default=[])
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(words)
    if options.help:
        print(help_text())
        return OK
    if options.multirun:
        return _train_many(sweeps(options.overrides), options.config_dir)
    config = load(options.overrides, options.config_dir)
    if options.cfg:
        print(config.text(), end="")
        return OK
    return _train_one(config)


def _train_many(runs: list[list[str]], config_dirs: Sequence[Path]) -> int:
    """One run after another, each in its own folder, all checked before the first begins. Stops at the first fault."""
    from deepclust.config import ConfigError, load

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("-m runs one process after another; under torchrun give one configuration at a time")
    configs, problems = [], []
    for words in runs:
        try:
            configs.append(load(words, config_dirs))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    if len({config.folder() for config in configs}) < len(runs):
        configs = [load([*words, f"run.name={name}"], config_dirs) for words, name in zip(runs, _names(configs, runs))]
    for number, config in enumerate(configs, 1):
        print(f"run {number} of {len(configs)}: {config.folder()}")
        code = _train_one(config)
        if code != OK:
            return code
    return OK


def _names(configs: Sequence[Any], runs: Sequence[Sequence[str]]) -> list[str]:
    """Names of runs that would share a folder: the usual one and what is swept, as in scan-digits-0-optim.lr-0.001."""
    if any(config.run.dir is not None or config.run.name is not None for config in configs):
        raise UserError("these runs would share one folder; with -m leave run.name and run.dir out")
    swept = [place for place, words in enumerate(zip(*runs)) if len(set(words)) > 1]
    parts = [[config.name(), *(words[place] for place in swept)] for config, words in zip(configs, runs)]
    return [re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(part))[:200] for part in parts]


def _train_one(config: Any) -> int:
    try:
        from deepclust.recipe import train as train_recipe

        return train_recipe(config)
    except (UserError, KeyboardInterrupt):
        if config.run.traceback:
            traceback.print_exc()
        raise
    except Exception as error:
        return _failed(config, error)


def _failed(config: Any, error: Exception) -> int:
    """One line for a fault of the program; the traceback goes to the run's log, or to the screen if asked for."""
    log, text = config.folder() / "log.txt", traceback.format_exc()
    kept = False
    if log.parent.is_dir() and rank() == 0:
        try:
            with open(log, "a", encoding="utf-8") as file:
                file.write(text)
            kept = True
        except OSError:
            pass
    if config.run.traceback:
        return _say(text, FAILED)
    where = f"{log} has the traceback; " if kept else ""
    return _say(f"failed: {in_short(error)}\n{where}run.traceback=true shows it", FAILED)


# --- other commands -------------------------------------------------------------------------------------------------


def list_options(words: list[str]) -> int:
    """`list GROUP [--config-dir DIR]`"""
    from deepclust.compose import groups
    from deepclust.config import options

    parser = _Parser("deepclust list", description="What a group offers.")
    parser.add_argument("group", nargs="?", help="recipe, head, data, backbone, augment, ...; none lists the groups")
    parser.add_argument("--config-dir", type=Path, action="append", default=[], help="a folder with more groups")
    asked = parser.parse_args(words)
    names = groups(asked.config_dir)
    every = f"groups are {', '.join(names)}"
    if asked.group is None:
        raise UserError(f"deepclust list GROUP; {every}")
    if asked.group not in names:
        found = near(asked.group, names)
        raise UserError(f"{asked.group}: there is no such group; {f'did you mean {found}?' if found else every}")
    for name, description in options(asked.group, asked.config_dir):
        print(f"{name:<20} {description}".rstrip())
    return OK


def checkpoint(words: list[str]) -> int:
    """`checkpoint verify|digest PATH`"""
    parser = _Parser("deepclust checkpoint", description="Whether a checkpoint is whole; SHA-256 of its parts.")
    parser.add_argument("verb", choices=("verify", "digest"))
    parser.add_argument("path", type=Path, help="as in outputs/NAME/checkpoints/00-pretext/step-00000712")
    asked = parser.parse_args(words)
    if not asked.path.exists():
        raise UserError(f"{asked.path}: there is no such checkpoint")
    from deepclust import checkpoint as checkpoints

    inside = checkpoints.listing(asked.path / "checkpoints") or checkpoints.listing(asked.path)
    if inside or not asked.path.is_dir():
        advice = f"its newest one is {inside[-1]}" if inside else "that is a folder"
        raise UserError(f"{asked.path} is not a checkpoint; {advice}")
    if asked.verb == "digest":
        for part, digest in checkpoints.digest(asked.path).items():
            print(f"{digest}  {part}")
        return OK
    problems = checkpoints.verify(asked.path)
    print("\n".join(problems) if problems else f"{asked.path}: whole")
    return FAILED if problems else OK


def predict(words: list[str]) -> int:
    """`predict RUN PATH [-o clusters.csv]`"""
    from deepclust.folder.options import count

    parser = _Parser(
        "deepclust predict",
        description="Clusters of any number of new images with the model of a run, as a CSV or Parquet file. After a "
        "stop the same command goes on.",
    )
    add = parser.add_argument
    add("run", type=Path, help="a run folder, or its model.safetensors")
    add(
        "data",
        type=Path,
        metavar="path",
        help="a folder of images, an image, a .txt file with a path on each line; for a model of features also a "
        "feature store or a .npy, .npz or .safetensors file",
    )
    add("-o", "--out", type=Path, default=Path("clusters.csv"), help="the file to write: .csv or .parquet")
    add("--new", action="store_true", help="start over, whatever an unfinished command left")
    add("--backbone", metavar="NAME", help="what made the features that the model learned, if it is elsewhere now")
    add("--weights", metavar="FILE", help="its local file of weights")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    add("--batch-size", type=count, metavar="B", help="default: that of the features, or what suits the images")
    add("--workers", type=count, metavar="N", help="threads that decode; default: one a core, at most 8")
    trusted = "a module of your own that the model needs, or the FILE.py that made its features"
    add("--trust", action="append", default=[], metavar="NAME", help=trusted)
    asked = parser.parse_args(words)
    for path in (asked.run, asked.data):
        if not path.exists():
            raise UserError(f"{path}: there is no such file or folder")
    from deepclust.predict import Asked
    from deepclust.predict import predict as predict_data

    return predict_data(Asked(**vars(asked)))


def features(words: list[str]) -> int:
    """`features IMAGES [--backbone NAME ...] [--store DIR]`"""
    parser = _Parser(
        "deepclust features",
        description="Features of a folder of images in a store, made once. Asking again adds what is new, computes "
        "what changed and marks what is gone; after a stop the same command goes on.",
    )
    from deepclust.folder.options import add_feature_options, feature_options

    add_feature_options(parser)
    asked = parser.parse_args(words)
    from deepclust.extract import extract

    return extract(feature_options(asked))


def cluster(words: list[str]) -> int:
    """`cluster IMAGES [-k N|auto] [--sort copy|symlink] [--append] [--noise]`"""
    parser = _Parser(
        "deepclust cluster",
        description="Clusters of a folder of images: clusters.csv, clusters.parquet and a report with a map. Features "
        "are made once and kept, so that another -k takes seconds. After a stop the same command goes on.",
    )
    from deepclust.folder.options import add_cluster_options, cluster_options

    add_cluster_options(parser)
    asked = parser.parse_args(words)
    wanted = cluster_options(asked)
    from deepclust.folder.cluster import cluster as cluster_folder

    return cluster_folder(wanted)


def edit(words: list[str]) -> int:
    """`edit RUN [merge|split|rename|exclude|undo] ...`"""
    from deepclust.folder.options import add_edit_options

    parser = _Parser("deepclust edit", description="Changes clusters of a folder's images and writes all files anew.")
    add_edit_options(parser)
    asked = parser.parse_intermixed_args(words)
    if asked.parts is not None and asked.verb != "split":
        raise UserError(f"-n {asked.parts}: only split has it, as in: deepclust edit {asked.run} split 3 -n 3")
    from deepclust.folder.edit import edit as edit_run

    edit_run(asked.run, asked.verb, asked.words, asked.parts or 2)
    return OK


def doctor(words: list[str]) -> int:
    """`doctor [--gpu]`: what this machine has, and whether a run could work here."""
    parser = _Parser("deepclust doctor", description="What this machine has, and whether a run could work here.")
    parser.add_argument("--gpu", action="store_true", help="also check and time k-means on the GPU, in two minutes")
    asked = parser.parse_args(words)
    from deepclust.doctor import findings

    faults = 0
    for what, text, good in findings(gpu=asked.gpu):
        print(f"{'ok  ' if good else 'BAD '} {what:<14} {text}")
        faults += not good
    return FAILED if faults else OK


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str, str]] = {
    "cluster": (cluster, "cluster IMAGES [-k N]", "clusters, a table and a report of a folder of images"),
    "edit": (edit, "edit RUN [merge|split|rename|exclude|undo ...]", "changes clusters; any edit can be undone"),
    "predict": (predict, "predict RUN PATH [-o clusters.csv]", "clusters of new images, any number of them"),
    "train": (train, "train [key=value ...]", "train, cluster, evaluate, report"),
    "features": (features, "features IMAGES [--backbone NAME ...]", "a folder's features, once, in a store"),
    "list": (list_options, "list head|data|backbone|recipe|...", "what a group offers"),
    "checkpoint": (checkpoint, "checkpoint verify|digest PATH", "whether it is whole; SHA-256 of its parts"),
    "doctor": (doctor, "doctor [--gpu]", "versions, device, precision, disk; kernels on the GPU"),
}

if __name__ == "__main__":
    sys.exit(main())
