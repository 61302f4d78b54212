"""One configuration with several seeds, each in its own process as a user would run it.

    python -m benchmarks.quality.seeds --seeds 5 data=digits trainer.num_threads=1
    python -m benchmarks.quality.seeds --seeds 3 data=fashion_mnist

printed the committed tables, in Markdown; words are those of train.py. `--read` runs nothing and
prints the table of runs that are there already. Accuracies are those of the kept stage, in per
cent, beside the classical clusterings of the same features that every run evaluates. Seconds are
those of summary.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.quality.common import table_row, table_rule

ROOT = Path(__file__).resolve().parents[2]
SCORES = ("acc", "nmi", "ari")
COLUMNS = ("seed", "ACC", "NMI", "ARI", "kept stage", "ACC of each stage", "seconds")


def table(rows: Sequence[tuple[int, dict]]) -> str:
    """A line per seed, their median and mean, then each baseline's mean on the same features.

    rows: a seed and its summary.json each.
    """
    lines = [table_row(COLUMNS), table_rule(len(COLUMNS))]
    lines += [_seed_row(seed, summary) for seed, summary in rows]
    kept = [summary["stages"][summary["kept_stage"]] for _, summary in rows]
    lines.append(_average_row("**median**", kept, statistics.median))
    lines.append(_average_row("**mean**", kept, statistics.mean))
    for name in rows[0][1]["baselines"]:
        scores = [summary["baselines"][name] for _, summary in rows]
        # A baseline that failed in one run has a reason there instead of scores.
        if all("acc" in entry for entry in scores):
            lines.append(_average_row(f"{name}, mean", scores, statistics.mean))
    return "\n".join(lines)


def _seed_row(seed: int, summary: dict) -> str:
    kept = summary["kept_stage"]
    scores = [f"{100 * summary['stages'][kept][name]:.1f}" for name in SCORES]
    accuracies = [f"{name} {100 * stage['acc']:.1f}" for name, stage in summary["stages"].items()]
    return table_row([str(seed), *scores, kept, ", ".join(accuracies), f"{summary['seconds']:.0f}"])


def _average_row(
    name: str,
    entries: Sequence[dict],
    average: Callable[[list[float]], float],
) -> str:
    scores = [f"{100 * average([entry[score] for entry in entries]):.1f}" for score in SCORES]
    return f"| {name} | {' | '.join(scores)} | | | |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all seeds and prints the table; stops at the first that fails, with its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--out", type=Path, default=Path("outputs/seeds"))
    parser.add_argument("--read", action="store_true", help="run nothing, read what is in --out")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    rows = []
    for seed in range(options.first, options.first + options.seeds):
        folder = options.out / str(seed)
        if not options.read:
            # A new run each time: the figures are of one commit, not of runs that went on.
            words = [*options.overrides, f"seed={seed}", f"run.dir={folder}", "run.new=true"]
            command = [sys.executable, str(ROOT / "train.py"), *words]
            # Its console would drown the lines printed here; errors go to stderr and are seen.
            code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
            if code:
                return code
        summary = json.loads((folder / "summary.json").read_text())
        rows.append((seed, summary))
        print(_seed_row(seed, summary), file=sys.stderr, flush=True)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
