"""What `deepclust predict` has done so far, part by part, beside the file that it writes; and that
file, at the end.

```
.<out>.parts/
  manifest.json    what is being done: model, images, options
  000000.arrow …   clusters of `size` images each, one after another,
                    each whole or not at all
  out              the file in the making
```
The file itself appears at the end, at once. A kill at any moment leaves parts that the same command
goes on from.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from deepclust.data.folders import printable
from deepclust.data.images import in_threads
from deepclust.errors import UserError
from deepclust.predict.model import Found
from deepclust.runtime.files import (
    LOCK,
    explain,
    fsync_folder,
    inside,
    release_lock,
    take_lock,
    write_atomic,
)

FORMAT = 1
ROW_GROUP = 65_536
"""Rows of a Parquet file that are written together."""
KINDS = (".csv", ".parquet")
MANIFEST = "manifest.json"
OPTION = "-o FILE"


def check_out(out: Path) -> None:
    """Raises UserError unless a file of one of `KINDS` can be written there."""
    if out.suffix.lower() not in KINDS:
        raise UserError(f"-o {out}: must end in {' or '.join(KINDS)}")
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise UserError(f"-o {out}: must be a file in a folder that exists")


class Parts:
    """The parts of one output file, held by one process until `close`.

    folder: where they are. size: images in each but the last. done: numbers of those that are
    there.
    """

    def __init__(self, out: Path, count: int, size: int) -> None:
        self.out, self.count, self.size = out, count, size
        self.folder = out.parent / f".{out.name}.parts"
        self.done: set[int] = set()
        self._lock: IO[str] | None = None

    @property
    def number(self) -> int:
        """How many parts there are to be."""
        return -(-self.count // self.size)

    @property
    def images_done(self) -> int:
        """How many images the parts that are there hold."""
        return sum(min(self.size, self.count - part * self.size) for part in self.done)

    def open(
        self, manifest: dict[str, Any], states: Callable[[int, int], str], new: bool = False
    ) -> int:
        """Takes over what an earlier command of the same kind left. Gives how many parts are made
        again.

        manifest: what results depend on, plain JSON. states: what tells whether images first..last
        changed since.
        Raises UserError: parts of another command that are not to be lost, unless `new`; no way to
        write there.
        """
        told, manifest = (
            manifest,
            {"format": FORMAT, "count": self.count, "part": self.size, **manifest},
        )
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = take_lock(self.folder, "-o ")
        except OSError as error:
            raise UserError(f"-o {self.out} cannot be written: {explain(error, OPTION)}") from error
        before = self._manifest()
        if before is not None and before != manifest and self._files() and not new:
            changed = (
                ", ".join(key for key in told if before.get(key) != told[key])
                or "version of deepclust"
            )
            raise UserError(
                f"{self.folder} holds what was done towards {self.out} with another {changed}, by"
                " another command or before that changed. Finish it with that command, choose"
                " another -o FILE, or start over with --new"
            )
        if before != manifest or new:
            self._clear()
            write_atomic(inside(self.folder, MANIFEST), json.dumps(manifest, indent=1) + "\n")
        found = [int(file.stem) for file in self._files() if int(file.stem) < self.number]

        def same(place: int) -> bool:
            first = found[place] * self.size
            wanted = states(first, min(first + self.size, self.count))
            table = self._load(found[place])
            return (
                table is not None
                and (table.schema.metadata or {}).get(b"states") == wanted.encode()
            )

        fine = in_threads(same, len(found))
        self.done = {part for part, is_fine in zip(found, fine) if is_fine}
        return len(found) - len(self.done)

    def write(self, part: int, found: Found, states: str) -> None:
        """Keeps a part, whole or not at all."""
        fine = np.array([fault is None for fault in found.faults], dtype=bool)
        faults = [None if fault is None else printable(fault) for fault in found.faults]
        table = pa.table(
            {
                "cluster": pa.array(found.cluster, pa.int64(), mask=~fine),
                "confidence": pa.array(found.confidence, pa.float32(), mask=~fine),
                "error": pa.array(faults, pa.string()),
            }
        ).replace_schema_metadata({"states": states})
        buffer = io.BytesIO()
        with pa.ipc.new_stream(buffer, table.schema) as stream:
            stream.write_table(table)
        write_atomic(inside(self.folder, f"{part:06d}.arrow"), buffer.getvalue())
        self.done.add(part)

    def finish(self, names: Sequence[str], titles: dict[int, str] | None) -> tuple[int, int]:
        """Writes the file and removes the parts. Gives how many images were clustered and how many
        could not be.

        names: paths. titles: names of clusters, by id, for a column of its own; None for no such
        column.
        """
        temporary = inside(self.folder, "out")
        try:
            write = _write_csv if self.out.suffix.lower() == ".csv" else _write_parquet
            with open(temporary, "wb") as file:
                write(file, self._tables(names, titles), _schema(titles is not None))
                file.flush()
                os.fsync(file.fileno())
            clustered = sum(
                self._read(part).column("error").null_count for part in range(self.number)
            )
            os.replace(temporary, self.out)
            fsync_folder(self.out.resolve().parent)
        except OSError as error:
            raise UserError(f"-o {self.out} cannot be written: {explain(error, OPTION)}") from error
        self._clear()
        self.close()
        (self.folder / LOCK).unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()
        return clustered, self.count - clustered

    def close(self) -> None:
        """Lets another process have them."""
        if self._lock is not None:
            release_lock(self.folder, self._lock)
            self._lock = None

    def _tables(self, names: Sequence[str], titles: dict[int, str] | None) -> Iterator[pa.Table]:
        """The file's rows, part by part."""
        for part in range(self.number):
            table = self._read(part).replace_schema_metadata(None)
            first = part * self.size
            paths = [printable(name) for name in names[first : first + table.num_rows]]
            columns = [pa.array(paths, pa.string()), *table.columns]
            if titles is not None:
                found = [titles.get(cluster) for cluster in table.column("cluster").to_pylist()]
                columns.append(pa.array(found, pa.string()))
            yield pa.table(columns, schema=_schema(titles is not None))

    def _read(self, part: int) -> pa.Table:
        table = self._load(part)
        if table is None:
            raise UserError(
                f"{self.folder / f'{part:06d}.arrow'} was changed on disk; the same command makes"
                " it again"
            )
        return table

    def _load(self, part: int) -> pa.Table | None:
        """A part, None where it is not whole."""
        try:
            with pa.ipc.open_stream((self.folder / f"{part:06d}.arrow").read_bytes()) as stream:
                table = stream.read_all()
        except (OSError, pa.ArrowInvalid):
            return None
        whole = table.num_rows == min(self.size, self.count - part * self.size)
        return table if whole and table.column_names == ["cluster", "confidence", "error"] else None

    def _files(self) -> list[Path]:
        return sorted(file for file in self.folder.glob("[0-9]*.arrow") if file.stem.isdecimal())

    def _manifest(self) -> dict[str, Any] | None:
        try:
            value = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def _clear(self) -> None:
        """Removes what this file writes, the manifest last: without it the rest is nobody's."""
        leftovers = [self.folder / "out", *self.folder.glob(".tmp-*")]
        for file in (*self._files(), *leftovers, self.folder / MANIFEST):
            file.unlink(missing_ok=True)
        self.done = set()


def _schema(named: bool) -> pa.Schema:
    """Columns of the file."""
    columns = [
        ("path", pa.string()),
        ("cluster", pa.int64()),
        ("confidence", pa.float32()),
        ("error", pa.string()),
    ]
    return pa.schema([*columns, *([("name", pa.string())] if named else [])])


def _write_csv(file: IO[bytes], tables: Iterator[pa.Table], schema: pa.Schema) -> None:
    """UTF-8, a header, six digits of the confidence, nothing where there is nothing."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(schema.names)
    for table in tables:
        columns = [column.to_pylist() for column in table.columns]
        columns[2] = ["" if value is None else f"{value:.6f}" for value in columns[2]]
        writer.writerows(zip(*columns))
    text.detach()


def _write_parquet(file: IO[bytes], tables: Iterator[pa.Table], schema: pa.Schema) -> None:
    """Row groups of at most `ROW_GROUP` rows, or of a part where that is larger."""
    from pyarrow import parquet

    waiting: list[pa.Table] = []
    with parquet.ParquetWriter(file, schema) as writer:
        for table in tables:
            if waiting and sum(each.num_rows for each in waiting) + table.num_rows > ROW_GROUP:
                writer.write_table(pa.concat_tables(waiting).combine_chunks())
                waiting = []
            waiting.append(table)
        if waiting:
            writer.write_table(pa.concat_tables(waiting).combine_chunks())
