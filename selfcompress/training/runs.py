"""A run's folder: its configuration, metrics, checkpoint and summary.

Files are written atomically, except for metrics.jsonl and TensorBoard's; a half-written last line
of metrics.jsonl is dropped when the run is resumed.
"""

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from selfcompress.disk import is_left_over, write_atomically
from selfcompress.text import first_line
from selfcompress.training.errors import UserError, out_of_memory
from selfcompress.training.lock import LOCK, hold

CONFIG = "config.json"
METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint.pt"
SUMMARY = "summary.json"
NETWORK = "net.scnn"
STORAGE = {"fold_norms": True, "half": True}  # options of `pack` for it, but for the float baseline
TENSORBOARD = "tensorboard"
WIDTHS = "widths.png"
_FILES = (SUMMARY, NETWORK, CHECKPOINT, METRICS, WIDTHS, CONFIG)
_LET_GO = 5.0  # seconds to wait for the lock of a process that was just killed


class RunFolder:
    """The folder `path` of the run with configuration `config`; not changed before `claim`."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self.config = path, config

    def check(self) -> dict[str, Any] | None:
        """Return the run's summary, or None if the run is not finished.

        Raises:
            UserError: the folder holds something else, or its files cannot be read.
        """
        there = self._read_json(CONFIG)
        if there is None:
            self._require_ours()
        elif (other := difference(there, self.config)) is not None:
            raise UserError(f"{self.path} holds another run ({other}); "
                            "choose another --run-dir, or start over with --overwrite")  # fmt: skip
        return self._read_json(SUMMARY)

    @contextmanager
    def claim(self, overwrite: bool) -> Iterator[None]:
        """Create and lock the folder for a `with` block; `overwrite` first removes the run in it.

        Raises:
            UserError: the folder holds something else, or another process trains in it or has
                meanwhile finished this run or begun another one.
        """
        if overwrite:
            self._require_ours()
        with hold(self.path, "train.py", _LET_GO):
            if overwrite:
                self._clear()
            elif self.check() is not None:
                raise UserError(f"another process has just finished the run in {self.path}")
            for file in self.path.iterdir():
                if is_left_over(file, _FILES):
                    file.unlink()
            if not (self.path / CONFIG).exists():
                write_atomically(self.path / CONFIG, _json_bytes(self.config))
            yield

    def _require_ours(self) -> None:
        """Raise UserError if the folder holds files but no run's configuration.

        A damaged configuration is accepted if there are no files but a run's.
        """
        files = self.path.iterdir() if self.path.exists() else ()
        names = {f.name for f in files if f.name != LOCK and not is_left_over(f, _FILES)}
        try:
            ours = {"dataset", "gamma", "seed"} <= (self._read_json(CONFIG) or {}).keys()
        except UserError:
            ours = names <= {*_FILES, TENSORBOARD}
        if names and not ours:
            raise UserError(
                f"{self.path} holds files but no run's {CONFIG}, so it is not a run's folder; "
                "choose another --run-dir"
            )

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_atomically(self.path / SUMMARY, _json_bytes(summary))

    def checkpoint(self) -> dict[str, Any] | None:
        """Return the last checkpoint, if any; it is read without unpickling arbitrary objects."""
        file = self.path / CHECKPOINT
        if not file.exists():
            return None
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or not isinstance(state.get("epoch"), int):
                raise ValueError("it holds something else")
        except Exception as error:  # damaged or truncated zip files, pickled objects, ...
            if isinstance(error, OSError) or out_of_memory(error):  # the file may be intact
                raise
            raise UserError(
                f"{file} cannot be read as a checkpoint ({first_line(error)}); "
                "remove it, or start over with --overwrite"
            ) from error
        return state

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.path / CHECKPOINT, buffer.getvalue())

    def metrics(self, epochs: int) -> list[dict[str, Any]]:
        """Return the metrics of the first `epochs` epochs, and remove later ones from the file.

        Raises UserError if there are fewer, or a line is damaged.
        """
        file = self.path / METRICS
        lines = file.read_text().splitlines()[:epochs] if file.exists() else []
        try:
            rows = [json.loads(line) for line in lines]
        except ValueError as error:
            raise UserError(f"{file} is damaged; start over with --overwrite") from error
        if len(rows) < epochs:
            raise UserError(
                f"{file} has {len(rows)} epochs, the checkpoint {epochs}; "
                "start over with --overwrite"
            )
        write_atomically(file, "".join(line + "\n" for line in lines).encode())
        return rows

    def append_metrics(self, row: dict[str, Any]) -> None:
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())  # the checkpoint that follows counts on it

    def _clear(self) -> None:
        """Remove the files that a run writes, and nothing else."""
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / TENSORBOARD, ignore_errors=True)

    def _read_json(self, name: str) -> dict[str, Any] | None:
        file = self.path / name
        if not file.exists():
            return None
        try:
            value = json.loads(file.read_text())
            if not isinstance(value, dict):
                raise ValueError
        except ValueError as error:
            raise UserError(f"{file} is damaged; start over with --overwrite") from error
        return value


def _json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def difference(there: dict[str, Any], here: dict[str, Any]) -> str | None:
    """Describe the first option that differs, if any; one missing (then unknown) counts as None."""
    for name in sorted(here.keys() | there.keys()):
        if there.get(name) != here.get(name):
            return f"{name} is {there.get(name)} there and {here.get(name)} here"
    return None
