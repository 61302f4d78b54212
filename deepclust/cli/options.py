"""Options of the commands that work on images, and what they mean. Nothing here imports torch."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from deepclust.cli.parser import did_you_mean
from deepclust.errors import UserError

if TYPE_CHECKING:
    from deepclust.collection.cluster import Wanted
    from deepclust.features.extract import Asked


CLUSTERERS = (
    "kmeans",
    "spherical_kmeans",
    "gmm",
    "spectral",
    "diffusion",
    "prototypes",
    "ward",
    "tsne_gmm",
)
"""Clusterers that take a number of clusters, all without extras.

Written here and not read from `deepclust.clustering.methods`, which would import torch for a help
page.
"""


def add_feature_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `features` and `cluster` share."""
    parser.add_argument("images", type=Path, help="a folder of images")
    add = parser.add_argument_group("features").add_argument
    add(
        "--backbone",
        action="append",
        default=[],
        metavar="NAME",
        help=(
            "a timm model (default: vit_small_patch16_224.dino), a run folder or its"
            " model.safetensors, or FILE.py:FUNCTION, which gives a torch module; may be given"
            " several times"
        ),
    )
    add(
        "--weights",
        action="append",
        default=[],
        metavar="FILE",
        help="a local file, one for each timm model",
    )
    add(
        "--size",
        type=count,
        metavar="PX",
        help="side of the images that are fed; default: the backbone's own",
    )
    add("--store", type=Path, metavar="DIR", help="default: outputs/features-<name of the folder>")
    add("--dtype", choices=("float16", "float32"), default="float16", help="of the stored features")
    add("--batch-size", type=count, metavar="B", help="at most 256; default: 32, and 256 on a GPU")
    add(
        "--workers",
        type=count,
        metavar="N",
        help="threads that decode; default: one a core, at most 8",
    )
    add(
        "--no-hash",
        action="store_true",
        help="no SHA-256 of the files: size and time tell what changed",
    )
    add(
        "--train",
        action="store_true",
        help="without weights, train a backbone on these images first (SimCLR)",
    )


def feature_options(options: argparse.Namespace) -> Asked:
    """Parsed options as `features` takes them."""
    from deepclust.features.extract import Asked

    return Asked(
        folder=options.images,
        store=options.store,
        backbones=options.backbone,
        weights=options.weights,
        size=options.size,
        dtype=options.dtype,
        batch_size=options.batch_size,
        workers=options.workers,
        hashing=not options.no_hash,
        train=options.train,
    )


def add_predict_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `predict`."""
    add = parser.add_argument
    add("run", type=Path, help="a run folder, or its model.safetensors")
    add(
        "data",
        type=Path,
        metavar="path",
        help=(
            "a folder of images, an image, a .txt file with a path on each line; for a model of "
            "features also a feature store or a .npy, .npz or .safetensors file"
        ),
    )
    add(
        "-o",
        "--out",
        type=Path,
        default=Path("clusters.csv"),
        help="the file to write: .csv or .parquet",
    )
    add("--new", action="store_true", help="start over, whatever an unfinished command left")
    add(
        "--backbone",
        metavar="NAME",
        help="what made the features that the model learned, if it is elsewhere now",
    )
    add("--weights", metavar="FILE", help="its local file of weights")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    add(
        "--batch-size",
        type=count,
        metavar="B",
        help="default: that of the features, or what suits the images",
    )
    add(
        "--workers",
        type=count,
        metavar="N",
        help="threads that decode; default: one a core, at most 8",
    )
    add(
        "--trust",
        action="append",
        default=[],
        metavar="NAME",
        help="a module of your own that the model needs, or the FILE.py that made its features",
    )


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `cluster`: its own first, then those of its features."""
    add = parser.add_argument_group("clusters").add_argument
    add(
        "-k",
        dest="number",
        type=_number,
        default=None,
        metavar="N|auto",
        help="how many clusters; default: auto",
    )
    add(
        "--sort",
        choices=("copy", "symlink"),
        help=(
            "also sorted/, one folder per cluster, of copies or links; without it sorted/ is"
            " cleared"
        ),
    )
    add(
        "--append",
        action="store_true",
        help="new images join the clusters of --out, or of the same -k, which stay as they are",
    )
    add(
        "--noise",
        action="store_true",
        help="images unlike all others go into a group of their own, -1",
    )
    add(
        "--out",
        "-o",
        type=Path,
        metavar="DIR",
        help="default: outputs/clusters-<name of the folder>-k<N|auto>",
    )
    add(
        "--new",
        action="store_true",
        help="forget the clusters that are there, their numbers, names and edits",
    )
    add(
        "--clusterers",
        type=_names,
        metavar="NAME,...",
        help=f"to try, out of {', '.join(CLUSTERERS)}; the best is chosen without labels",
    )
    add("--seed", type=int, default=0, metavar="N", help="of everything random")
    add_feature_options(parser)


def cluster_options(options: argparse.Namespace) -> Wanted:
    """Parsed options as `cluster` takes them.

    Raises UserError for options that exclude one another and for unknown clusterers.
    """
    from deepclust.collection.cluster import CANDIDATES, Wanted

    if options.append and options.new:
        raise UserError(
            "--append keeps the clusters that are there and --new forgets them; choose one"
        )
    if len(options.backbone) > 1:
        raise UserError(
            f"--backbone is given {len(options.backbone)} times: clusters are of one; give one "
            "here (deepclust features keeps those of several in one store)"
        )
    names = options.clusterers or CANDIDATES
    _check_clusterers(names)
    return Wanted(
        features=feature_options(options),
        num_clusters=options.number,
        out=options.out,
        sort=options.sort,
        append=options.append,
        noise=options.noise,
        new=options.new,
        clusterers=tuple(names),
        seed=options.seed,
    )


def _check_clusterers(names: Iterable[str]) -> None:
    # Not CLUSTERERS: umap_hdbscan is taken as well, though the help leaves it out.
    from deepclust.clustering.methods import METHODS

    for name in names:
        if name not in METHODS:
            advice = did_you_mean(name, METHODS, f"choose among {', '.join(METHODS)}")
            raise UserError(f"--clusterers {name}: there is no such clusterer; {advice}")


def _number(text: str) -> int | None:
    """A number of clusters; None for auto."""
    if text == "auto":
        return None
    # int() alone would take "1_0" and " 3" too.
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
    """Adds the options of `edit`."""
    # The epilog is a table: argparse must not fill it into a paragraph.
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EDITS
    parser.add_argument("run", type=Path, help="the folder that deepclust cluster left")
    parser.add_argument("verb", nargs="?", choices=VERBS)
    parser.add_argument("words", nargs="*", metavar="CLUSTER", help="ids, names or paths, as below")
    parser.add_argument(
        "-n", "--parts", type=int, metavar="N", help="parts to split into; default: 2"
    )
