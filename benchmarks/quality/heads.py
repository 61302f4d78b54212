"""Every head from scratch, on the same data, backbone and number of images: one table.

    python -m benchmarks.quality.heads --data digits --seeds 3 \\
        --heads swav,deepcluster_v2,sela,deepcluster,odc,simclr,moco,scan --write-readme \\
        trainer.num_threads=1

printed the committed table. Heads are those of conf/head; scan, selflabel and calibration are made
to follow a pretext, and begin here with random features. A run is what `python train.py head=NAME`
does, in a process of its own, with the budget in images seen; words at the end go to each. Runs
that are finished in --out are read, stopped ones go on, and runs with other words start over.

Written to --out: compare.md, the table, and compare.csv, a line per run. Labels are read by the
evaluation alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.common import table_row, table_rule, write_csv

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/results.md"
"""The document that holds the committed table."""
BEGIN = "<!-- compare_heads begins -->"
END = "<!-- compare_heads ends -->"
PER_CENT = ("acc", "nmi", "ari", "kmeans_acc", "kmeans_nmi", "kmeans_ari", "knn", "linear")
FIGURES = (*PER_CENT, "seconds", "images_per_second")
COLUMNS = (
    "head",
    "ACC",
    "NMI",
    "ARI",
    "k-means ACC",
    "NMI",
    "ARI",
    "kNN",
    "linear",
    "seconds",
    "images/s",
)
STOPPED = (130, 143)
"""Exit codes of a run that was interrupted (SIGINT, SIGTERM)."""


@dataclass(frozen=True)
class Run:
    """One head with one seed."""

    head: str
    seed: int
    folder: Path
    words: list[str]
    """Of train.py's command line."""


# --- runs -------------------------------------------------------------------------------------


def _run_of(options: argparse.Namespace, head: str, seed: int) -> Run:
    folder = options.out / f"{options.data}-{head}-{seed}"
    words = [
        f"head={head}",
        f"data={options.data}",
        f"seed={seed}",
        f"stages.main.trainer.num_images={options.budget}",
        # What k-means makes of the same features is a column; the other baselines are not.
        "eval.baselines=[kmeans]",
        "eval.gallery_images=1",
        "logger.console=false",
        *options.words,
    ]
    return Run(head, seed, folder, words)


def finish(run: Run) -> str:
    """Trains unless this very run is done. Returns why it failed, or an empty text.

    Ends the program where the run was interrupted.
    """
    note = run.folder / "compare.json"
    status = run.folder / "status.json"
    # A folder with other words is of another comparison: going on in it would mix the two.
    same = note.is_file() and json.loads(note.read_text()) == run.words
    if same and status.is_file() and json.loads(status.read_text())["state"] == "finished":
        return ""
    run.folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(run.words))
    command = [sys.executable, str(ROOT / "train.py"), *run.words, f"run.dir={run.folder}"]
    if not same:
        command.append("run.new=true")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    if done.returncode in STOPPED:
        sys.exit("stopped; the same command goes on")
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]


def read(folder: Path, budget: int) -> dict[str, float | None]:
    """Figures of a finished run by the names of FIGURES, accuracies as fractions; None for missing.

    folder: of the run.
    budget: images seen, of which whole passes are made.

    acc, nmi, ari are of the head's own clusters; kmeans_* are of k-means on its features, which is
    all that a pretext has.
    """
    summary = json.loads((folder / "summary.json").read_text())
    # One stage: `head=NAME` brings a recipe of a single one.
    (stage,) = summary["stages"].values()
    # `reads` says that the stage's clusters were read off its features: it has none of its own.
    clusters = {} if "reads" in stage else stage
    kmeans = summary["baselines"].get("kmeans", {})
    # Rounded as the trainer rounds it.
    passes = max(1, round(budget / summary["num_images"]))
    return {
        **{name: clusters.get(name) for name in ("acc", "nmi", "ari")},
        **{f"kmeans_{name}": kmeans.get(name) for name in ("acc", "nmi", "ari")},
        "knn": stage.get("knn_probe"),
        "linear": stage.get("linear_probe"),
        "seconds": stage["seconds"],
        "images_per_second": passes * summary["num_images"] / stage["seconds"],
    }


# --- the table --------------------------------------------------------------------------------


def table(
    rows: Sequence[dict],
    heads: Sequence[str],
    failed: dict[str, str],
    statistic: str,
) -> str:
    """A Markdown row per head: the statistic over its seeds, and their spread if there are several.

    rows: a run's head and figures each.
    heads: in the order of the table.
    failed: head to the reason.
    statistic: `median` or `mean`.
    """
    lines = [table_row(COLUMNS), table_rule(1, len(FIGURES))]
    for head in heads:
        of_head = [row for row in rows if row["head"] == head]
        if of_head:
            cells = [_cell(of_head, name, statistic) for name in FIGURES]
            lines.append(table_row([head, *cells]))
    lines += [f"\n{head} failed: {reason}" for head, reason in failed.items()]
    return "\n".join(lines)


def _cell(rows: Sequence[dict], name: str, statistic: str) -> str:
    """One figure of a head over its seeds."""
    scale, digits = (100, 1) if name in PER_CENT else (1, 0)
    values = [row[name] * scale for row in rows if row[name] is not None]
    if not values:
        return "–"
    middle = f"{getattr(statistics, statistic)(values):.{digits}f}"
    # The spread of a speed is that of the seconds beside it.
    if len(values) == 1 or name == "images_per_second":
        return middle
    if statistic == "mean":
        return f"{middle} ± {statistics.stdev(values):.{digits}f}"
    return f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def write_between(page: Path, text: str) -> None:
    """Replaces what stands between the two markers of a file.

    page: the file.
    text: between the markers, a line each.

    Ends the program where the markers are missing.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{page} has no place for the table; add the two lines\n{BEGIN}\n{END}")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def _command(options: argparse.Namespace, arguments: Sequence[str] | None) -> str:
    """What was typed, and what the figures are."""
    typed = sys.argv[1:] if arguments is None else arguments
    # Where the table goes has no part in its figures.
    words = [word for word in typed if word != "--write-readme"]
    command = " ".join(["python -m benchmarks.quality.heads", *words])
    over = "one seed"
    if options.seeds > 1:
        spread = "lowest and highest" if options.statistic == "median" else "standard deviation"
        over = f"{options.statistic} of {options.seeds} seeds ({spread})"
    return f"`{command}`: {over}, {options.budget:,} images seen each"


# --- the command ------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", default="", help="divided by commas; all of conf/head else")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--budget", type=int, default=160000, help="images seen in training, whole passes of them"
    )
    parser.add_argument("--statistic", choices=("median", "mean"), default="median")
    parser.add_argument("--out", type=Path, default=Path("outputs/compare"))
    parser.add_argument(
        "--write-readme",
        action="store_true",
        help=f"replaces what stands between {BEGIN} and {END}",
    )
    parser.add_argument("--readme", type=Path, default=PAGE)
    parser.add_argument("words", nargs="*", help="key=value for every run")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing and writes the table of all runs. Returns 1 where one failed."""
    options = _parser().parse_args(arguments)
    heads = options.heads.split(",")
    if not options.heads:
        heads = sorted(path.stem for path in (ROOT / "conf/head").glob("*.yaml"))
    seeds = range(options.first, options.first + options.seeds)
    runs = [_run_of(options, head, seed) for head in heads for seed in seeds]
    rows = []
    failed = {}
    for number, run in enumerate(runs, 1):
        print(f"{number}/{len(runs)} {run.head}, seed {run.seed}", file=sys.stderr, flush=True)
        reason = finish(run)
        if reason:
            failed[run.head] = reason
            print(f"  failed: {reason}", file=sys.stderr, flush=True)
        else:
            figures = read(run.folder, options.budget)
            rows.append({"head": run.head, "seed": run.seed, **figures})
    text = table(rows, heads, failed, options.statistic)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "compare.md").write_text(text + "\n", encoding="utf-8")
    columns = ["head", "seed", *FIGURES]
    write_csv(
        options.out / "compare.csv", columns, [[row[name] for name in columns] for row in rows]
    )
    print(text)
    if options.write_readme:
        write_between(options.readme, f"{_command(options, arguments)}\n\n{text}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
