"""Trains every head on the same data, backbone and number of images, and prints one table.

    python -m benchmarks.quality.heads --data digits --seeds 3

    python -m benchmarks.quality.heads --heads swav,sela --budget 80000 --out outputs/compare backbone.width=64

A run is what `python train.py head=NAME` does, in a process of its own, with the budget in images seen; words at the
end go to each. Runs that are finished in --out are read, stopped ones go on, and runs with other words start over.
Heads are those of conf/head: scan, selflabel and calibration are made to follow a pretext, and begin here with random
features.

Written to --out: compare.md, the table, and compare.csv, a line per run. Labels are read by the evaluation alone.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- compare_heads begins -->", "<!-- compare_heads ends -->"
FIGURES = (
    "acc",
    "nmi",
    "ari",
    "kmeans_acc",
    "kmeans_nmi",
    "kmeans_ari",
    "knn",
    "linear",
    "seconds",
    "images_per_second",
)
COLUMNS = ("head", "ACC", "NMI", "ARI", "k-means ACC", "NMI", "ARI", "kNN", "linear", "seconds", "images/s")
PER_CENT = FIGURES[:8]
STOPPED = (130, 143)


@dataclass(frozen=True)
class Run:
    """One head with one seed, and where it lies."""

    head: str
    seed: int
    folder: Path
    words: list[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, then writes the table of all. 1 if a run failed, which the table says."""
    asked = _parser().parse_args(arguments)
    heads = asked.heads.split(",") if asked.heads else sorted(path.stem for path in (ROOT / "conf/head").glob("*.yaml"))
    runs = [_run_of(asked, head, seed) for head in heads for seed in range(asked.first, asked.first + asked.seeds)]
    rows, failed = [], {}
    for number, run in enumerate(runs, 1):
        print(f"{number}/{len(runs)} {run.head}, seed {run.seed}", file=sys.stderr, flush=True)
        reason = finish(run)
        if reason:
            failed[run.head] = reason
            print(f"  failed: {reason}", file=sys.stderr, flush=True)
        else:
            rows.append({"head": run.head, "seed": run.seed, **read(run.folder, asked.budget)})
    text = table(rows, heads, failed, asked.statistic)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "compare.md").write_text(text + "\n", encoding="utf-8")
    (asked.out / "compare.csv").write_text(as_csv(rows), encoding="utf-8")
    print(text)
    if asked.write_readme:
        write_between(asked.readme, f"{_command(asked, arguments)}\n\n{text}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", default="", help="names divided by commas; all of conf/head without it")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--budget", type=int, default=160000, help="images seen in training, whole passes of them")
    parser.add_argument("--statistic", choices=("median", "mean"), default="median")
    parser.add_argument("--out", type=Path, default=Path("outputs/compare"))
    parser.add_argument("--write-readme", action="store_true", help=f"replaces what stands between {BEGIN} and {END}")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("words", nargs="*", help="key=value for every run")
    return parser


def _run_of(asked: argparse.Namespace, head: str, seed: int) -> Run:
    folder = asked.out / f"{asked.data}-{head}-{seed}"
    words = [f"head={head}", f"data={asked.data}", f"seed={seed}", f"stages.main.trainer.num_images={asked.budget}"]
    words += ["eval.baselines=[kmeans]", "eval.gallery_images=1", "logger.console=false", *asked.words]
    return Run(head, seed, folder, words)


def finish(run: Run) -> str:
    """Trains unless this very run is done. Returns why it failed, or nothing."""
    note, status = run.folder / "compare.json", run.folder / "status.json"
    same = note.is_file() and json.loads(note.read_text()) == run.words
    if same and status.is_file() and json.loads(status.read_text())["state"] == "finished":
        return ""
    run.folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(run.words))
    command = [sys.executable, str(ROOT / "train.py"), *run.words, f"run.dir={run.folder}"]
    done = subprocess.run(command if same else [*command, "run.new=true"], capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    if done.returncode in STOPPED:
        sys.exit("stopped; the same command goes on")
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]


def read(folder: Path, budget: int) -> dict[str, float | None]:
    """The figures of a finished run by the names of FIGURES, accuracies as fractions; None where there is none.

    acc, nmi, ari are of the head's own clusters, kmeans_* of k-means on its features, which is all that a pretext has.
    """
    summary = json.loads((folder / "summary.json").read_text())
    (stage,) = summary["stages"].values()
    own = {} if "reads" in stage else stage
    clusters = summary["baselines"].get("kmeans", {})
    passes = max(1, round(budget / summary["num_images"]))
    return {
        **{name: own.get(name) for name in FIGURES[:3]},
        **{f"kmeans_{name}": clusters.get(name) for name in FIGURES[:3]},
        "knn": stage.get("knn_probe"),
        "linear": stage.get("linear_probe"),
        "seconds": stage["seconds"],
        "images_per_second": passes * summary["num_images"] / stage["seconds"],
    }


def table(rows: Sequence[dict], heads: Sequence[str], failed: dict[str, str], statistic: str) -> str:
    """A Markdown line per head: the statistic over its seeds, and the spread in brackets where there are several."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * len(FIGURES)]
    for head in heads:
        mine = [row for row in rows if row["head"] == head]
        if mine:
            lines.append(f"| {' | '.join([head, *(_cell(mine, name, statistic) for name in FIGURES)])} |")
    lines += [f"\n{head} failed: {reason}" for head, reason in failed.items()]
    return "\n".join(lines)


def _cell(rows: Sequence[dict], name: str, statistic: str) -> str:
    values = [row[name] * (100 if name in PER_CENT else 1) for row in rows if row[name] is not None]
    if not values:
        return "–"
    digits = 1 if name in PER_CENT else 0
    middle = f"{getattr(statistics, statistic)(values):.{digits}f}"
    if len(values) == 1 or name == "images_per_second":
        return middle
    if statistic == "mean":
        return f"{middle} ± {statistics.stdev(values):.{digits}f}"
    return f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def as_csv(rows: Sequence[dict]) -> str:
    """A line per run, in full precision."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["head", "seed", *FIGURES], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_between(readme: Path, text: str) -> None:
    """Replaces what stands between the two markers of a file. Ends the program where they are missing."""
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{readme} has no place for the table; add the two lines\n{BEGIN}\n{END}")
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def _command(asked: argparse.Namespace, arguments: Sequence[str] | None) -> str:
    """What was typed, and what the figures are."""
    words = [word for word in (sys.argv[1:] if arguments is None else arguments) if word != "--write-readme"]
    spread = "lowest and highest" if asked.statistic == "median" else "standard deviation"
    over = f"{asked.statistic} of {asked.seeds} seeds ({spread})" if asked.seeds > 1 else "one seed"
    command = " ".join(["python -m benchmarks.quality.heads", *words])
    return f"`{command}`: {over}, {asked.budget:,} images seen each"


if __name__ == "__main__":
    sys.exit(main())
