"""Runs one configuration with several seeds, each in its own process as a user would, and prints a Markdown table.

    python scripts/run_seeds.py --seeds 5 --out outputs/seeds data=digits

Accuracies are those of the kept stage, in per cent; wall seconds are from process start to the end of the process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCORES = ("acc", "nmi", "ari")


def main() -> int:
    """Runs, reads each summary.json, prints the table. Stops at the first run that fails, with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--out", type=Path, default=Path("outputs/seeds"))
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    rows = []
    for seed in range(asked.first, asked.first + asked.seeds):
        folder = asked.out / str(seed)
        began = time.perf_counter()
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            *asked.overrides,
            f"seed={seed}",
            f"run.dir={folder}",
            "run.new=true",
        ]
        code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        if code:
            return code
        summary = json.loads((folder / "summary.json").read_text())
        rows.append((seed, summary, time.perf_counter() - began))
        print(_line(*rows[-1]), file=sys.stderr, flush=True)
    print(table(rows))
    return 0


def _line(seed: int, summary: dict, wall: float) -> str:
    kept = summary["stages"][summary["kept_stage"]]
    scores = " | ".join(f"{100 * kept[name]:.1f}" for name in SCORES)
    stages = ", ".join(f"{name} {100 * stage['acc']:.1f}" for name, stage in summary["stages"].items())
    return f"| {seed} | {scores} | {summary['kept_stage']} | {stages} | {wall:.0f} |"


def table(rows: list[tuple[int, dict, float]]) -> str:
    """A line per seed, then the medians; then the baselines' medians on the same features."""
    lines = [
        "| seed | ACC | NMI | ARI | kept | ACC of each stage | wall s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_line(*row) for row in rows]
    kept = [summary["stages"][summary["kept_stage"]] for _, summary, _ in rows]
    medians = " | ".join(f"{100 * statistics.median(stage[name] for stage in kept):.1f}" for name in SCORES)
    means = " | ".join(f"{100 * statistics.mean(stage[name] for stage in kept):.1f}" for name in SCORES)
    wall = statistics.median(wall for *_, wall in rows)
    lines += [f"| median | {medians} | | | {wall:.0f} |", f"| mean | {means} | | | |"]
    for name in rows[0][1]["baselines"]:
        found = [summary["baselines"][name] for _, summary, _ in rows]
        if all("acc" in entry for entry in found):
            scores = " | ".join(f"{100 * statistics.median(entry[score] for entry in found):.1f}" for score in SCORES)
            lines.append(f"| {name}, median | {scores} | | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
