"""How far a run is: a bar with the time left on a terminal (where rich is installed), plain lines elsewhere."""

from __future__ import annotations

import importlib.util
import sys
import time


class Progress:
    """Use as a context manager; `advance` moves by parts of one of `total` equal pieces of work."""

    def __init__(self, total: int):
        self._total = total
        self._done = 0.0
        self._begin = time.monotonic()
        self._title = None
        self._bar = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty() and importlib.util.find_spec("rich"):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.table import Column

            # The title last: it is what may be cut off where the terminal is narrow.
            title = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
            columns = (BarColumn(20), TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn())
            columns += (TextColumn("left:"), TimeRemainingColumn(), title)
            self._bar = Progress(*columns, console=Console(stderr=True), speed_estimate_period=300, expand=True)
            self._bar.start()
            self._task = self._bar.add_task("starting", total=self._total)
        return self

    def __exit__(self, *exception) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, title: str, done: float) -> None:
        """`done` pieces of the total are done, and what is being measured now."""
        self._done = done
        if self._bar:
            self._bar.update(self._task, description=title, completed=done)
        elif title != self._title:
            spent = time.monotonic() - self._begin
            left = f", about {self._minutes(spent / done * (self._total - done))} left" if done else ""
            print(f"[{int(done) + 1}/{self._total}] {title}{left}", file=sys.stderr, flush=True)
        self._title = title

    @staticmethod
    def _minutes(seconds: float) -> str:
        return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
