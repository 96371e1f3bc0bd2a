"""Pick a run: the most accurate that is small enough, or the smallest that is accurate enough."""

from pathlib import Path

from selfcompress.sweeping.results import Result, read_all
from selfcompress.training.errors import UserError
from selfcompress.training.filesize import FileSize
from selfcompress.training.runs import NETWORK


def pick(runs: Path, max_bytes: str | None, min_accuracy: float | None) -> Result:
    """Return the best of the finished runs in `runs` and its subfolders.

    That is the most accurate one whose file is no larger than `max_bytes`; without `max_bytes`, it
    is the smallest one that is at least as accurate as `min_accuracy`. Accuracies are those on the
    test images, so the accuracy of the picked run is slightly biased upwards.

    Args:
        max_bytes: a size that `FileSize.parse` accepts.
        min_accuracy: from 0 to 1. If both limits are given, both hold.

    Raises:
        UserError: no run is within the limits, or the limits or runs are unsuitable.
    """
    if max_bytes is None and min_accuracy is None:
        raise UserError("give --max-bytes, such as 100KB or 3%, or --min-accuracy, such as 0.93")
    if min_accuracy is not None and not 0 <= min_accuracy <= 1:
        raise UserError("--min-accuracy must be a fraction from 0 to 1, such as 0.93")
    try:
        limit = None if max_bytes is None else FileSize.parse(max_bytes)
    except ValueError as error:
        raise UserError(f"--max-bytes: {error}") from error
    results = read_all(runs)
    if not results:
        raise UserError(f"there are no finished runs in {runs}")
    datasets = sorted({result.summary["dataset"] for result in results})
    if len(datasets) > 1:
        raise UserError(
            f"the runs in {runs} are of several datasets ({', '.join(datasets)}), whose accuracies "
            "say nothing about each other; give a folder with runs of one"
        )
    fitting = [
        result
        for result in results
        if _fits(result, limit) and (min_accuracy is None or result.accuracy >= min_accuracy)
    ]
    if not fitting:
        small = min(results, key=lambda r: r.file_bytes)
        best = max(results, key=lambda r: r.accuracy)
        raise UserError(
            f"none of {len(results)} runs is within these limits; the smallest, {small.name}, has "
            f"{small.file_bytes:,} bytes, the most accurate, {best.name}, is right in "
            f"{100 * best.accuracy:.2f} %"
        )
    if max_bytes is None:
        best = min(fitting, key=lambda r: (r.file_bytes, -r.accuracy))
    else:
        best = max(fitting, key=lambda r: (r.accuracy, -r.file_bytes))
    if not (best.folder / NETWORK).exists():
        raise UserError(f"the best run is {best.folder}, but its {NETWORK} is gone; train it again")
    return best


def describe(result: Result) -> str:
    """Describe a picked run in two lines, the second of them the path of its network."""
    gamma = "float" if result.gamma is None else f"γ = {result.gamma:g}"
    return (
        f"{result.name} ({gamma}): {100 * result.accuracy:.2f} % test accuracy, "
        f"{result.file_bytes:,} bytes, {result.summary['file_percent']:.2f} % of the 32-bit size\n"
        f"{result.folder / NETWORK}"
    )


def _fits(result: Result, limit: FileSize | None) -> bool:
    return limit is None or result.file_bytes <= limit.bytes(result.summary["float_bits"])
