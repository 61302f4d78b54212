"""Runs one configuration with several seeds, each in its own process as a user would, and prints a Markdown table.

    python -m benchmarks.quality.seeds --seeds 5 --out outputs/seeds data=digits

    python -m benchmarks.quality.seeds --seeds 5 --out outputs/seeds --read   # the table of runs that are there

Accuracies are those of the kept stage, in per cent. Seconds are those of summary.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCORES = ("acc", "nmi", "ari")


def main() -> int:
    """Runs, reads each summary.json, prints the table. Stops at the first run that fails, with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--out", type=Path, default=Path("outputs/seeds"))
    parser.add_argument("--read", action="store_true", help="run nothing, read what is in --out")
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    rows = []
    for seed in range(asked.first, asked.first + asked.seeds):
        folder = asked.out / str(seed)
        if not asked.read:
            words = [*asked.overrides, f"seed={seed}", f"run.dir={folder}", "run.new=true"]
            code = subprocess.run(
                [sys.executable, str(ROOT / "train.py"), *words], stdout=subprocess.DEVNULL
            ).returncode
            if code:
                return code
        rows.append((seed, json.loads((folder / "summary.json").read_text())))
        print(_line(*rows[-1]), file=sys.stderr, flush=True)
    print(table(rows))
    return 0


def _line(seed: int, summary: dict) -> str:
    kept = summary["stages"][summary["kept_stage"]]
    scores = " | ".join(f"{100 * kept[name]:.1f}" for name in SCORES)
    stages = ", ".join(f"{name} {100 * stage['acc']:.1f}" for name, stage in summary["stages"].items())
    return f"| {seed} | {scores} | {summary['kept_stage']} | {stages} | {summary['seconds']:.0f} |"


def _row(name: str, entries: list[dict], average: Callable[[list[float]], float]) -> str:
    scores = " | ".join(f"{100 * average([entry[score] for entry in entries]):.1f}" for score in SCORES)
    return f"| {name} | {scores} | | | |"


def table(rows: list[tuple[int, dict]]) -> str:
    """A line per seed, their median and mean, then the mean of each baseline on the same features."""
    lines = [
        "| seed | ACC | NMI | ARI | kept stage | ACC of each stage | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_line(*row) for row in rows]
    kept = [summary["stages"][summary["kept_stage"]] for _, summary in rows]
    lines += [_row("**median**", kept, statistics.median), _row("**mean**", kept, statistics.mean)]
    for name in rows[0][1]["baselines"]:
        found = [summary["baselines"][name] for _, summary in rows]
        if all("acc" in entry for entry in found):
            lines.append(_row(f"{name}, mean", found, statistics.mean))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
