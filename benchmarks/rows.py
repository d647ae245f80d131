"""One measured row: a workload in a mode on some threads by one peer. Rows are what a report is made of, as CSV too."""

from __future__ import annotations

import csv
import dataclasses
import pathlib
import typing


@dataclasses.dataclass
class Row:
    """Times are seconds by the clock (wall) and of the processor in all threads (cpu); None: not measured."""

    workload: str
    mode: str
    threads: int
    peer: str
    shape: str  # (batch, heads/kv heads, seqlen_q x seqlen_k, head_dim)
    options: str  # causal, dtype, mask, window
    version: str = ""  # of the peer's libraries
    rounds: int = 0
    wall_median: float | None = None
    wall_min: float | None = None
    cpu_median: float | None = None
    cpu_min: float | None = None
    gflops_per_second: float | None = None  # useful ones, at the minimum wall time
    limit: str = ""  # what was probed: fma_float32, fma_float64 (flops per second) or read (bytes per second)
    limit_per_second: float | None = None  # the best of the same rounds
    percent_of_limit: float | None = None  # at the minimum wall time
    error: float | None = None  # against the float64 reference, at a miniature
    memory_growth_bytes: int | None = None  # of the first step in a fresh process, outputs included

    @property
    def key(self) -> tuple[str, str, str, str, int, str]:
        return self.workload, self.shape, self.options, self.mode, self.threads, self.peer


_FIELDS = [field.name for field in dataclasses.fields(Row)]


def merge(rows: list[Row]) -> list[Row]:
    """One row for each key: times from one, memory from another, the first that has a value wins."""
    merged: dict[tuple, Row] = {}
    for row in rows:
        into = merged.setdefault(row.key, dataclasses.replace(row))
        for name in _FIELDS:
            if getattr(into, name) in (None, "", 0):
                setattr(into, name, getattr(row, name))
    return list(merged.values())


def write(path: pathlib.Path, rows: list[Row]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, _FIELDS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = dataclasses.asdict(row)
            writer.writerow({name: "" if value is None else value for name, value in values.items()})


def read(path: pathlib.Path) -> list[Row]:
    """The rows of a CSV file that `write` made.

    Raises:
        ValueError: it cannot be read, has other columns, or a value that is none.
    """
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            if list(reader.fieldnames or ()) != _FIELDS:
                found = ",".join(reader.fieldnames or ()) or "nothing"
                raise ValueError(f"{path} must have the columns {','.join(_FIELDS)}; it has {found}")
            return [_parsed(path, reader.line_num, values) for values in reader]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a readable results.csv: {error}") from None


def _parsed(path, line, values) -> Row:
    types = typing.get_type_hints(Row)
    parsed = {}
    for name, text in values.items():
        convert = next(t for t in (int, float, str) if t in (types[name], *typing.get_args(types[name])))
        try:
            parsed[name] = None if text == "" and convert is not str else convert(text)
        except (TypeError, ValueError):
            raise ValueError(f"{path}, line {line}: {name} ({text!r}) must be a {convert.__name__}") from None
    return Row(**parsed)
