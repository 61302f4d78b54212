"""Options of the commands that work on a folder of images, and what they mean. Nothing here imports torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepclust.extract import Asked
    from deepclust.folder.cluster import Wanted


CLUSTERERS = ("kmeans", "spherical_kmeans", "gmm", "spectral", "diffusion", "prototypes", "ward", "tsne_gmm")
"""Clusterers that take a number of clusters, all without extras."""


def add_feature_options(parser: argparse.ArgumentParser) -> None:
    """What `features` and `cluster` have in common."""
    parser.add_argument("images", type=Path, help="a folder of images")
    add = parser.add_argument_group("features").add_argument
    add(
        "--backbone",
        action="append",
        default=[],
        metavar="NAME",
        help="a timm model (default: vit_small_patch16_224.dino), a run folder or its model.safetensors, or "
        "FILE.py:FUNCTION, which gives a torch module; may be given several times",
    )
    add("--weights", action="append", default=[], metavar="FILE", help="a local file, one for each timm model")
    add("--size", type=count, metavar="PX", help="side of the images that are fed; default: the backbone's own")
    add("--store", type=Path, metavar="DIR", help="default: outputs/features-<name of the folder>")
    add("--dtype", choices=("float16", "float32"), default="float16", help="of the stored features")
    add("--batch-size", type=count, metavar="B", help="at most 256; default: 32, and 256 on a GPU")
    add("--workers", type=count, metavar="N", help="threads that decode; default: one a core, at most 8")
    add("--no-hash", action="store_true", help="no SHA-256 of the files: size and time tell what changed")
    add("--train", action="store_true", help="without weights, train a backbone on these images first (SimCLR)")


def feature_options(asked: argparse.Namespace) -> Asked:
    """The same as `extract` wants them."""
    from deepclust.extract import Asked

    return Asked(
        asked.images,
        asked.store,
        asked.backbone,
        asked.weights,
        asked.size,
        asked.dtype,
        asked.batch_size,
        asked.workers,
        not asked.no_hash,
        asked.train,
    )


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Those of `cluster` alone come first."""
    add = parser.add_argument_group("clusters").add_argument
    add("-k", dest="number", type=_number, default=None, metavar="N|auto", help="how many clusters; default: auto")
    add(
        "--sort",
        choices=("copy", "symlink"),
        help="also sorted/, one folder per cluster, of copies or links; without it sorted/ is cleared",
    )
    add(
        "--append",
        action="store_true",
        help="new images join the clusters of --out, or of the same -k, which stay as they are",
    )
    add("--noise", action="store_true", help="images unlike all others go into a group of their own, -1")
    add("--out", "-o", type=Path, metavar="DIR", help="default: outputs/clusters-<name of the folder>-k<N|auto>")
    add("--new", action="store_true", help="forget the clusters that are there, their numbers, names and edits")
    add(
        "--clusterers",
        type=_names,
        metavar="NAME,...",
        help=f"to try, out of {', '.join(CLUSTERERS)}; the best is chosen without labels",
    )
    add("--seed", type=int, default=0, metavar="N", help="of everything random")
    add_feature_options(parser)


def cluster_options(asked: argparse.Namespace) -> Wanted:
    """The same as `folder.cluster` wants them. Raises UserError for options that exclude one another."""
    from deepclust.clusterers import METHODS
    from deepclust.errors import UserError
    from deepclust.folder.cluster import CANDIDATES, Wanted
    from deepclust.signatures import near

    if asked.append and asked.new:
        raise UserError("--append keeps the clusters that are there and --new forgets them; choose one")
    if len(asked.backbone) > 1:
        raise UserError(
            f"--backbone is given {len(asked.backbone)} times: clusters are of one; give one here "
            "(deepclust features keeps those of several in one store)"
        )
    names = asked.clusterers or CANDIDATES
    for name in names:
        if name not in METHODS:
            found = near(name, METHODS)
            advice = f"did you mean {found}?" if found else f"choose among {', '.join(METHODS)}"
            raise UserError(f"--clusterers {name}: there is no such clusterer; {advice}")
    features = feature_options(asked)
    return Wanted(
        features, asked.number, asked.out, asked.sort, asked.append, asked.noise, asked.new, tuple(names), asked.seed
    )


def _number(text: str) -> int | None:
    """A number of clusters, None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a whole number from 2 on")
    return int(text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


VERBS = ("merge", "split", "rename", "exclude", "undo")
EDITS = """\
without a verb     lists the clusters and what was done to them
merge 3 7 9        into the first one; wherever an id is asked for, a name will do
split 3 [-n 2]     by the images' features; the largest part keeps the id, the others get new ones
rename 3 "shoes"   a name, which wins over the id in the report and in sorted/; "" takes it away
exclude 5          a cluster, or images by their paths: out of clusters.csv, into left_out.csv
undo               takes the last of these back, and again the one before it
"""


def add_edit_options(parser: argparse.ArgumentParser) -> None:
    """`edit RUN [VERB ...] [-n PARTS]`"""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EDITS
    parser.add_argument("run", type=Path, help="the folder that deepclust cluster left")
    parser.add_argument("verb", nargs="?", choices=VERBS)
    parser.add_argument("words", nargs="*", metavar="CLUSTER", help="ids, names or paths, as below")
    parser.add_argument("-n", "--parts", type=int, metavar="N", help="parts to split into; default: 2")
