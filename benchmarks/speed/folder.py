"""What `deepclust cluster` costs beside the decoding and the network that it cannot do without: a table, in Markdown.

    python -m benchmarks.speed.folder PHOTOS --backbone scripts/efficientnet_lite.py:lite0 [--count 50000] [--out DIR]

The photos are repeated to `--count` paths by links. Bare decoding (all threads) and the bare network are measured on at
most `--sample` of them, before and after the run, and the means are scaled to the count; the run is
`deepclust cluster` as a process of its own, without content hashing. Then it is asked again with three other k, and the
report is opened in headless Chromium where there is one: its errors on the console are counted.
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
from deepclust.encoders import Encoder, find_encoder

CHUNK = 256
GOALS = {"overhead": 1.3, "again": 10.0, "memory": 1000.0, "report": 10.0, "estimate": 0.3}


def repeated(photos: Path, count: int, folder: Path) -> None:
    """`count` links below `folder` to the photos, in sub-folders of a repetition each."""
    listing = list_folder(str(photos))
    for number in range(count):
        turn, place = divmod(number, len(listing.paths))
        path = folder / f"{turn:03d}" / listing.paths[place]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to((listing.root / listing.paths[place]).resolve())


def bare(photos: Path, encoder: Encoder, sample: int) -> tuple[float, float]:
    """Seconds an image of decoding in threads, and of the network on decoded images, one after the other."""
    listing = list_folder(str(photos))
    step = max(1, len(listing.paths) // sample)
    paths = [listing.root / path for path in listing.paths[::step][:sample]]
    decoding = network = 0.0
    encoder(torch.zeros(32, encoder.channels, encoder.side, encoder.side, dtype=torch.uint8))
    for start in range(0, len(paths), CHUNK):
        part = paths[start : start + CHUNK]
        began = time.monotonic()
        pixels = in_threads(lambda at, part=part: decode(part[at], encoder.side, encoder.channels), len(part))
        middle = time.monotonic()
        for rows in torch.stack([torch.from_numpy(each) for each in pixels]).split(32):
            encoder(rows)
        decoding, network = decoding + middle - began, network + time.monotonic() - middle
    return decoding / len(paths), network / len(paths)


def run(words: Sequence[str], log: Path) -> tuple[float, str]:
    """Seconds of the command from its start to its end, and what it said."""
    began = time.monotonic()
    with open(log, "w") as file:
        code = subprocess.run([sys.executable, "-m", "deepclust.cli", *words], stdout=file, stderr=subprocess.STDOUT)
    said = log.read_text(errors="replace")
    if code.returncode:
        raise SystemExit(f"deepclust {' '.join(words)} ended with {code.returncode}:\n{said[-2000:]}")
    return time.monotonic() - began, said


def estimated(said: str) -> float | None:
    """The seconds from start to end that the run announced; None where it was too short for that."""
    found = re.search(r"about (\d+):(\d\d):(\d\d) in all", said)
    return None if not found else sum(int(part) * unit for part, unit in zip(found.groups(), (3600, 60, 1)))


def console_errors(report: Path) -> int | None:
    """Errors that Chromium writes to its console for the page; None without Chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if not browser:
        return None
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
        flags += [f"--user-data-dir={profile}", "--virtual-time-budget=5000", "--dump-dom"]
        words = [browser, *flags, report.resolve().as_uri()]
        said = subprocess.run(words, capture_output=True, text=True, errors="replace").stderr
    return len(re.findall(r"CONSOLE", said))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--sample", type=int, default=1024)
    parser.add_argument("-k", type=int, nargs=2, default=[10, 12])
    parser.add_argument("--out", type=Path, help="kept there; else a temporary folder")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        out = (asked.out or Path(temporary)).absolute()
        out.mkdir(parents=True, exist_ok=True)
        measured(asked, out)
    return 0


def measured(asked: argparse.Namespace, out: Path) -> None:
    """The whole benchmark in the folder `out`."""
    if not (out / "photos").exists():
        repeated(asked.photos, asked.count, out / "photos")
    encoder = find_encoder(asked.backbone)
    encoder.begin("auto")
    before = bare(asked.photos, encoder, asked.sample)
    words = ["cluster", str(out / "photos"), "--backbone", asked.backbone, "--no-hash", "--store", str(out / "store")]
    first, said = run([*words, "-k", str(asked.k[0]), "--out", str(out / "first")], out / "first.log")
    memory, own = (resource.getrusage(of).ru_maxrss / 1024 for of in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF))
    others = range(asked.k[1], asked.k[1] + 3)
    again = [run([*words, "-k", str(k), "--out", str(out / f"again{k}")], out / "again.log")[0] for k in others]
    after = bare(asked.photos, encoder, asked.sample)
    decoding, network = ((a + b) / 2 * asked.count for a, b in zip(before, after))
    floor = decoding + network
    told, report = estimated(said), out / "first" / "report.html"
    size, errors = report.stat().st_size / 1e6, console_errors(report)
    off = f"{told:.0f} s announced, {100 * (told / first - 1):+.0f} %" if told else "none announced"
    rows = [
        ("bare decoding", f"{decoding:.0f} s", f"{asked.count / decoding:.0f} images a second"),
        ("bare network", f"{network:.0f} s", f"{asked.count / network:.0f} images a second"),
        ("whole run", f"{first:.0f} s", f"{first / floor:.2f} of the two (goal {GOALS['overhead']})"),
        ("its estimate", off, f"goal within {100 * GOALS['estimate']:.0f} %"),
        (
            "again, another k",
            f"{statistics.median(again):.1f} s",
            f"median of {', '.join(f'{each:.1f}' for each in again)}; goal {GOALS['again']:.0f} s",
        ),
        (
            "peak memory",
            f"{memory:.0f} MB",
            f"bare decoding and network {own:.0f} MB (goal {GOALS['memory']:.0f} MB more)",
        ),
        ("report", f"{size:.1f} MB", f"goal {GOALS['report']:.0f} MB; {errors} console errors"),
    ]
    print(f"{asked.count:,} paths, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads\n")
    print("| | measured | |\n| --- | ---: | --- |")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows), flush=True)


if __name__ == "__main__":
    sys.exit(main())
