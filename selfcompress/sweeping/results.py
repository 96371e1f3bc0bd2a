"""The results of finished runs, read from their folders: table rows, a CSV file, a Pareto front."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfcompress.disk import write_atomically
from selfcompress.training import runs
from selfcompress.training.errors import UserError


@dataclass(frozen=True, eq=False)
class Result:
    """A finished run.

    Attributes:
        gamma: γ of the run; None for the float baseline.
        accuracy: on the test images, 0-1.
        file_bytes: bytes of the packed network.
        stored_percent: stored bits, in percent of 32 bits for each weight at the start.
        weights_percent: live weights, in percent of those at the start.
        history: the metrics of every epoch.
    """

    folder: Path
    summary: dict[str, Any]
    history: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def gamma(self) -> float | None:
        gamma: float | None = self.summary["gamma"]
        return gamma

    @property
    def seed(self) -> int:
        return int(self.summary["seed"])

    @property
    def accuracy(self) -> float:
        return float(self.summary["test_accuracy"])

    @property
    def file_bytes(self) -> int:
        return int(self.summary["file_bytes"])

    @property
    def stored_percent(self) -> float:
        return float(self.summary["stored_percent"])

    @property
    def weights_percent(self) -> float:
        return float(self.history[-1]["size"]["weights_percent"])

    def row(self) -> dict[str, Any]:
        """Return the run as a row of results.csv."""
        seconds = self.summary["seconds_per_epoch"]
        return {
            "run": self.name,
            "gamma": self.gamma,
            "seed": self.seed,
            "test_accuracy": self.accuracy,
            "file_bytes": self.file_bytes,
            "file_percent": self.summary["file_percent"],
            "stored_bits": self.summary["stored_bits"],
            "stored_percent": self.stored_percent,
            "q_bits": self.summary["q_bits"],
            "weights_percent": self.weights_percent,
            "parameters": self.summary["parameters_end"],
            "macs": self.summary["macs_end"],
            "first_epoch_seconds": seconds[0],
            "last_epoch_seconds": seconds[-1],
            "seconds_total": self.summary["seconds_total"],
        }


def read(folder: Path) -> Result | None:
    """Read the run in `folder`, or return None if it is not finished.

    Raises:
        UserError: the files of the run are damaged.
    """
    file = folder / runs.SUMMARY
    try:
        result = Result(folder, json.loads(file.read_text()), epochs(folder))
        result.row()
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{file} is no whole run's summary: {error!r}; if {folder} is a run's, train it again "
            "with --overwrite"
        ) from error
    return result


def read_all(root: Path, folders: str = "**") -> list[Result]:
    """Read the finished runs in `root` and below, sorted by γ (the float baseline first) and seed.

    Args:
        folders: glob pattern of the folders below `root` to look in.
    """
    found = [read(file.parent) for file in root.glob(f"{folders}/{runs.SUMMARY}")]
    return sorted(
        (result for result in found if result is not None),
        key=lambda r: (-1.0 if r.gamma is None else r.gamma, r.seed, r.name),
    )


def epochs(folder: Path) -> list[dict[str, Any]]:
    """Read the metrics of every epoch that the run in `folder` has finished so far.

    Raises:
        UserError: the file of the metrics is damaged.
    """
    file = folder / runs.METRICS
    try:
        lines = file.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{file} is damaged; remove {folder} and train it again") from error


def write_csv(results: Sequence[Result], path: Path) -> None:
    """Write a CSV file with a row for each of one or more runs."""
    text = io.StringIO()
    writer = csv.DictWriter(text, results[0].row(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(result.row() for result in results)
    write_atomically(path, text.getvalue().encode())


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the Pareto front of (size, accuracy): no other point is as small and as accurate."""
    best: list[tuple[float, float]] = []
    for size, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or accuracy > best[-1][1]:
            best.append((size, accuracy))
    return best
