"""The page of `deepclust --help` and `python train.py --help`: one screen. Imports no torch."""

from __future__ import annotations

from deepclust.cli.commands import COMMANDS
from deepclust.cli.listing import counts

GROUPS = {
    "recipe": "the stages of a run: which method after which",
    "head": "the method that a stage trains",
    "data": "the images",
    "backbone": "the network from image to features",
    "augment": "the random views of an image",
    "optim": "the optimiser",
    "experiment": "presets, most of them with a paper's settings",
}
"""Groups that offer a choice, in the order in which a newcomer meets them."""

HELP = """\
deepclust: unlabelled images in; clusters, confidences, a model and a report out.

  deepclust cluster PHOTOS           clusters a folder of images with a pretrained network
  python train.py [key=value ...]    trains a network; the same as  deepclust train [key=value ...]

Commands (deepclust COMMAND --help explains one)
{commands}

Groups of train (deepclust list GROUP shows what each offers; GROUP=OPTION chooses)
{groups}

Five to train with
  python train.py                                           handwritten digits, under two minutes
  python train.py data=image_folder data.root=PHOTOS num_clusters=20        your own images
  python train.py seed=1 stages.scan.head.entropy_weight=3  another seed, another weight
  python train.py head=simclr trainer.epochs=100            one stage with one head
  python train.py -m seed=0,1,2                             three runs, one after another

Options of train
  --cfg              print every key with its value and exit
  --config-dir DIR   more groups: DIR/head/mine.yaml makes head=mine (may be given several times)
  -m, --multirun     key=a,b is a run for a and a run for b
  -h, --help         this page

A run leaves clusters.csv, report.html and model.safetensors in outputs/<recipe>-<data>-<seed>/;
run.name=NAME or run.dir=PATH changes that. The same command goes on where it stopped;
run.new=true starts over.

Exit codes: 0 finished; 143 stopped, and the same command goes on; 130 stopped before there was
anything to keep; 2 a wrong option, folder or file, named on the screen; 1 a fault of the program
(DEEPCLUST_TRACEBACK=1 shows where)."""


def help_text() -> str:
    """The help page: at most 60 lines of at most 100 columns, whatever the groups hold."""
    commands = [f"  {command.usage:<47} {command.summary}" for command in COMMANDS.values()]
    numbers = counts()
    groups = [f"  {group:<11}{numbers[group]:>3}  {text}" for group, text in GROUPS.items()]
    return HELP.format(commands="\n".join(commands), groups="\n".join(groups))
