"""The files that a run's clusters are given out in, all from one state.

After a change they are written anew, one after another; `run.json` then holds the SHA-256 of the
state that they show. So a stop in between is seen by the next command, which writes them again.
"""

from __future__ import annotations

from deepclust.collection.history import State
from deepclust.collection.run import SHOWN, FolderRun
from deepclust.data.folders import printable
from deepclust.runtime.files import write_atomic

TABLES = ("clusters.csv", "clusters.parquet", "left_out.csv")
FILES = (*TABLES, "report.html", "model.safetensors")


def write_all(run: FolderRun, state: State) -> None:
    """Writes tables, model, report and, where it was asked for, `sorted/`. state: the last one of
    the run's history.

    Raises UserError where something cannot be written; what was written by then is whole.
    """
    from deepclust.collection.landmarks import save_model
    from deepclust.collection.report import write_page
    from deepclust.collection.sorted import sort_images

    write_tables(run, state)
    save_model(run, state)
    write_page(run, state)
    found = sort_images(run, state)
    if found.missing:
        what = f"{len(found.missing):,} images are gone, and sorted/ gets nothing new of them"
        print(f"{what}: {printable(found.missing[0])}")
    run.history.tidy()
    run.facts[SHOWN] = run.history.digest()
    run.save()


def write_tables(run: FolderRun, state: State) -> None:
    """clusters.csv, clusters.parquet, left_out.csv: see `tables.py`."""
    from deepclust.collection.tables import as_csv, as_parquet, clusters_table, left_out_table

    table = clusters_table(run, state, run.derived)
    write_atomic(run.path / "clusters.csv", as_csv(table))
    write_atomic(run.path / "clusters.parquet", as_parquet(table))
    write_atomic(run.path / "left_out.csv", as_csv(left_out_table(run, state)))


def up_to_date(run: FolderRun) -> bool:
    """Whether the files are there and show the last state."""
    return run.facts.get(SHOWN) == run.history.digest() and all(
        (run.path / name).is_file() for name in FILES
    )
