"""Show a sweep's progress: a table redrawn in place on a terminal, a line per event elsewhere."""

import time
from collections.abc import Collection
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from selfcompress.sweeping.results import Result, epochs

REDRAW = 1.0  # seconds between two redraws of the table


class Progress:
    """A context manager that shows the progress of a sweep.

    Args:
        folders: the folders of all runs of the sweep, by name.
        length: epochs of each run.
        done: the runs that were already finished.
    """

    def __init__(self, folders: dict[str, Path], length: int, done: Collection[Result]) -> None:
        self.folders, self.length = folders, length
        self.done, self.failed = list(done), set[str]()
        self.epochs = {name: len(epochs(folder)) for name, folder in folders.items()}
        self.started = self.drawn = time.monotonic()
        self.epochs_before = sum(self.epochs.values())
        self.since: dict[str, float] = {}
        self.console = Console(highlight=False)
        self.live = Live(console=self.console, auto_refresh=False, transient=True)

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def show(self, running: set[str]) -> None:
        """Redraw the table if it is due, and note which runs have started."""
        now = time.monotonic()
        for name in running - self.since.keys():
            self.since[name] = now
            if not self.console.is_terminal:
                self._print(f"{name} started")
        if now - self.drawn < REDRAW:
            return
        self.drawn = now
        table = Table("running", "epoch", "test accuracy", "stored", "time", box=None)
        for name in sorted(running):
            rows = epochs(self.folders[name])
            self.epochs[name] = len(rows)
            accuracy = f"{100 * rows[-1]['val']['accuracy']:.2f} %" if rows else ""
            stored = f"{rows[-1]['size']['stored_kb']:,.1f} KB" if rows else ""
            since = _duration(now - self.since[name])
            table.add_row(name, f"{len(rows)}/{self.length}", accuracy, stored, since)
        if self.console.is_terminal:
            self.live.update(Group(table, Text(self.state(len(running)))), refresh=True)

    def finished(self, result: Result) -> None:
        """Report that a run is done."""
        self.done.append(result)
        self.epochs[result.name] = self.length
        self._print(f"{result.name} done: {_outcome(result)}; {self.state()}")

    def failure(self, name: str, lines: list[str]) -> None:
        """Report that a run failed, with the last `lines` that it printed."""
        self.failed.add(name)
        self._print("\n    ".join([f"{name} FAILED", *lines]) + f"\n{self.state()}")

    def state(self, running: int | None = None) -> str:
        """Describe counts, the best run so far, and the time left, in one line."""
        counts = [] if running is None else [f"{running} running"]
        counts += [f"{len(self.done)} of {len(self.folders)} done", f"{len(self.failed)} failed"]
        compressed = [r for r in self.done if r.gamma is not None]
        if compressed:
            best = max(compressed, key=lambda r: (r.accuracy, -r.file_bytes))
            counts.append(f"best so far {best.name}: {_outcome(best)}")
        now = sum(self.epochs.values())
        if now > self.epochs_before:
            pace = (time.monotonic() - self.started) / (now - self.epochs_before)
            ahead = self.folders.keys() - self.failed
            left = pace * sum(self.length - self.epochs[name] for name in ahead)
            counts.append(f"about {_duration(left)} left")
        return ", ".join(counts)

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


def _outcome(result: Result) -> str:
    return f"{100 * result.accuracy:.2f} % at {result.file_bytes / 1000:,.1f} KB"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
