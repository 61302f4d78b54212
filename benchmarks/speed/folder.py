"""What `deepclust cluster` costs beside the decoding and the network that it cannot do without.

    python -m benchmarks.speed.folder CLOTHING --backbone scripts/efficientnet_lite.py:lite0

printed the table of a folder of 50,000 photos; CLOTHING is the folder of clothing photos. They are
repeated to `--count` paths by links. Bare decoding (all threads) and the bare network are measured
on at most `--sample` of them, before and after the run, and their means are scaled to the count.
The run is `deepclust cluster` as a process of its own, without content hashing. Then it is asked
again with three other k, and the report is opened in headless Chromium, where there is one, to
count its errors on the console. Figures are seconds by the clock, in a table in Markdown.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from deepclust.data.folders import list_folder
from deepclust.data.images import decode, in_threads
from deepclust.features.encoder import Encoder, find_encoder

CHUNK = 256
"""Images that are decoded before the network sees them: few enough to stay in memory."""
BATCH = 32
GOALS = {"overhead": 1.3, "again": 10.0, "memory": 1000.0, "report": 10.0, "estimate": 0.3}
"""A ratio, seconds, MB, MB, a share."""


def repeat_photos(photos: Path, count: int, folder: Path) -> None:
    """Makes `count` links to the photos below `folder`, a sub-folder for each repetition.

    photos: a folder of images.
    count: of links.
    folder: made if it is not there.
    """
    listing = list_folder(str(photos))
    for number in range(count):
        turn, index = divmod(number, len(listing.paths))
        path = folder / f"{turn:03d}" / listing.paths[index]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to((listing.root / listing.paths[index]).resolve())


def bare_seconds(photos: Path, encoder: Encoder, sample: int) -> tuple[float, float]:
    """Seconds an image of decoding in threads, and of the network on decoded images.

    photos: a folder of images.
    encoder: the network and how it is fed.
    sample: most images that are looked at, spread evenly over the folder.
    """
    listing = list_folder(str(photos))
    step = max(1, len(listing.paths) // sample)
    paths = [listing.root / path for path in listing.paths[::step][:sample]]
    decoding = 0.0
    network = 0.0
    # The first batch sets up memory and kernels, which 50,000 images do not feel.
    encoder(torch.zeros(BATCH, encoder.channels, encoder.side, encoder.side, dtype=torch.uint8))
    for start in range(0, len(paths), CHUNK):
        part = paths[start : start + CHUNK]

        def decoded(index: int, part: Sequence[Path] = part) -> object:
            return decode(part[index], encoder.side, encoder.channels)

        # The clock and not CPU time: both use threads, and a user waits by the clock.
        began = time.monotonic()
        pixels = in_threads(decoded, len(part))
        middle = time.monotonic()
        for rows in torch.stack([torch.from_numpy(image) for image in pixels]).split(BATCH):
            encoder(rows)
        decoding += middle - began
        network += time.monotonic() - middle
    return decoding / len(paths), network / len(paths)


def run(words: Sequence[str], log: Path) -> tuple[float, str]:
    """Seconds of `deepclust WORDS` from its start to its end, and what it printed.

    words: of the command line.
    log: a file for the output.

    Ends the benchmark where the command fails.
    """
    command = [sys.executable, "-m", "deepclust.cli", *words]
    began = time.monotonic()
    with open(log, "w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    seconds = time.monotonic() - began
    output = log.read_text(errors="replace")
    if code:
        raise SystemExit(f"deepclust {' '.join(words)} ended with {code}:\n{output[-2000:]}")
    return seconds, output


def announced_seconds(output: str) -> float | None:
    """Seconds from start to end that a run announced; None where it was too short for that."""
    match = re.search(r"about (\d+):(\d\d):(\d\d) in all", output)
    if match is None:
        return None
    hours, minutes, seconds = map(int, match.groups())
    return 3600 * hours + 60 * minutes + seconds


def console_errors(report: Path) -> int | None:
    """Errors that Chromium writes to its console for a page; None without Chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        return None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    # 5 s of the page's own time, which passes as fast as its scripts run.
    flags += ["--virtual-time-budget=5000", "--dump-dom"]
    with tempfile.TemporaryDirectory() as profile:
        words = [browser, *flags, f"--user-data-dir={profile}", report.resolve().as_uri()]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace")
    return done.stderr.count("CONSOLE")


def benchmark(options: argparse.Namespace, out: Path) -> list[tuple[str, str, str]]:
    """The rows of the table: title, figure, and note with the goal.

    options: of the command line.
    out: a folder for photos, store, runs and logs.
    """
    if not (out / "photos").exists():
        repeat_photos(options.photos, options.count, out / "photos")
    encoder = find_encoder(options.backbone)
    encoder.begin("auto")
    before = bare_seconds(options.photos, encoder, options.sample)
    words = ["cluster", str(out / "photos"), "--backbone", options.backbone]
    # No content hashes: the bare decoding that the run stands beside has none either.
    words += ["--no-hash", "--store", str(out / "store")]
    arguments = ["-k", str(options.k[0]), "--out", str(out / "first")]
    first, output = run([*words, *arguments], out / "first.log")
    # Before the further runs, whose peaks would count as well; ru_maxrss is in kB.
    run_memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    bare_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    again = []
    for k in range(options.k[1], options.k[1] + 3):
        arguments = ["-k", str(k), "--out", str(out / f"again{k}")]
        again.append(run([*words, *arguments], out / "again.log")[0])
    # Once more afterwards: machines that others use grow slower and faster within minutes.
    after = bare_seconds(options.photos, encoder, options.sample)
    decoding, network = ((a + b) / 2 * options.count for a, b in zip(before, after))
    return [
        ("bare decoding", f"{decoding:.0f} s", f"{options.count / decoding:.0f} images a second"),
        ("bare network", f"{network:.0f} s", f"{options.count / network:.0f} images a second"),
        (
            "whole run",
            f"{first:.0f} s",
            f"{first / (decoding + network):.2f} of the two (goal {GOALS['overhead']})",
        ),
        _estimate_row(announced_seconds(output), first),
        (
            "again, another k",
            f"{statistics.median(again):.1f} s",
            (
                f"median of {', '.join(f'{seconds:.1f}' for seconds in again)}; goal"
                f" {GOALS['again']:.0f} s"
            ),
        ),
        (
            "peak memory",
            f"{run_memory:.0f} MB",
            f"bare decoding and network {bare_memory:.0f} MB (goal {GOALS['memory']:.0f} MB more)",
        ),
        _report_row(out / "first" / "report.html"),
    ]


def _estimate_row(announced: float | None, seconds: float) -> tuple[str, str, str]:
    figure = "none announced"
    if announced:
        figure = f"{announced:.0f} s announced, {100 * (announced / seconds - 1):+.0f} %"
    return "its estimate", figure, f"goal within {100 * GOALS['estimate']:.0f} %"


def _report_row(report: Path) -> tuple[str, str, str]:
    errors = console_errors(report)
    size = report.stat().st_size / 1e6
    return "report", f"{size:.1f} MB", f"goal {GOALS['report']:.0f} MB; {errors} console errors"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--sample", type=int, default=1024)
    parser.add_argument(
        "-k", type=int, nargs=2, default=[10, 12], help="of the run, and first of the others"
    )
    parser.add_argument("--out", type=Path, help="kept there; else a temporary folder")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        out = (options.out or Path(temporary)).absolute()
        out.mkdir(parents=True, exist_ok=True)
        rows = benchmark(options, out)
    # Cores that this process may use, which are fewer than the machine's under taskset.
    cores = len(os.sched_getaffinity(0))
    print(f"{options.count:,} paths, {cores} cores, {torch.get_num_threads()} threads\n")
    print("| | measured | |\n| --- | ---: | --- |")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
