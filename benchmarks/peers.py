"""Compare self-compression with alternatives, by accuracy against the bytes of the file.

    python -m benchmarks.peers --dataset folder --data-dir data/cifar10-jpeg --epochs 12
    python -m benchmarks.peers --dataset digits --width 8          small, no network needed
    pip install diffq, and add --diffq 3 10 30                      DiffQ too (CC-BY-NC licence)

The peers, all trained by train.py's own loop with the same data, epochs, schedule and seeds:

- *float*: the full width in 32 bits, the accuracy to aim at;
- *uniform*: the obvious alternative, a narrower network whose weights all have 2, 3 or 4 bits
  (quantisation-aware training by the same quantiser, with exponents fitted and learned per row like
  ours, and packed into the same kind of file). They learn in 8 bits for the first 60 % of the run:
  with two bits from the start they end several points lower, with two bits from 30 % on, one point;
- *DiffQ* (with --diffq, its penalties): groups of 8 weights, bits learned by Adam as its authors
  advise; its bytes are those that it reports itself, compressed.

The bar is the upper hull of the uniform networks in (log bytes, accuracy): the networks at its
corners can be had by choosing a width and bits, those between only by luck. The table says how many
points a network is above the bar, and which share of the way from the bar to float that is. Every
run has a folder of its own below --runs, as train.py makes them, so the command resumes where it
was stopped.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.zoo import markdown
from models import UnknownModelError, build, default_width
from selfcompress import CutError
from selfcompress.compressor import Compressor
from selfcompress.disk import write_atomically
from selfcompress.quantizer import fit_exponent
from selfcompress.sweeping.curves import log_ticks
from selfcompress.training.config import Config, DatasetName
from selfcompress.training.errors import exit_code
from selfcompress.training.loop import Run, run

LEARN = 0.6  # fraction of the run in which uniform networks have 8 bits


@dataclass(frozen=True)
class Args:
    """Train the peers and put them into one table and one figure."""

    data_dir: Path = Path("data")
    """As in train.py."""
    dataset: DatasetName = "cifar10"
    """As in train.py."""
    model: str = "resnet9"
    """As in train.py."""
    width: int = 16
    """Width of our network and of the float one."""
    epochs: int | None = None
    """Epochs of every network, as in train.py."""
    gammas: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    """γ of our networks."""
    widths: tuple[int, ...] = (4, 6, 8, 10, 12, 14)
    """Widths of the uniform networks."""
    bits: tuple[int, ...] = (2, 3, 4)
    """Bits per weight of the uniform networks."""
    diffq: tuple[float, ...] = ()
    """Penalties of DiffQ per MB; without any, DiffQ is left out."""
    seeds: int = 1
    """Runs of every network, seeds 0, 1, ..."""
    runs: Path = Path("runs/peers")
    """Where the run folders, the table and the figure go."""


@dataclass(frozen=True)
class Point:
    """The size and accuracy of one network, as means over its seeds.

    Attributes:
        kind: "float", "uniform", "ours" or "DiffQ".
        spread: standard deviation of the accuracy over seeds; NaN for a single one.
        accuracy: percent of the test images; or another score of which more is better.
    """

    kind: str
    name: str
    size: float  # bytes of the file
    accuracy: float
    spread: float = math.nan


@torch.no_grad()
def set_bits(compressor: Compressor, bits: int) -> None:
    """Give all rows `bits` bits, and fit their exponents to that."""
    for layer in compressor.layers.values():
        layer.bit_depth.fill_(bits - 0.5)  # the middle of the depths that round up to `bits`
        layer.exponent.copy_(fit_exponent(layer.weight_by_row(), layer.bit_depth))


class UniformRun(Run):
    """Quantisation-aware training at γ = 0: rows have --bits until `LEARN`, then `bits`."""

    def __init__(self, *args: Any, bits: int) -> None:
        super().__init__(*args)
        self.bits = bits

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        assert self.compressor is not None
        if self.compressor.steps == round(LEARN * self.epochs * self.steps_per_epoch):
            set_bits(self.compressor, self.bits)
        return super()._step(images, labels)


class DiffQRun(Run):
    """A run in which DiffQ quantises a float network."""

    def __init__(self, *args: Any, penalty: float) -> None:
        super().__init__(*args)
        from diffq import DiffQuantizer

        self.penalty = penalty
        self.model.to(memory_format=torch.contiguous_format)  # as DiffQ flattens weights by views
        # For convolutions and the linear layer; DiffQ skips weights whose size 8 does not divide.
        self.quantizer = DiffQuantizer(self.model, group_size=8, min_size=0.001)
        self.bits = torch.optim.Adam(
            [p for name, p in self.model.named_parameters() if name.endswith("_diffq")], lr=5e-3
        )
        self.quantizer.no_optimizer()
        # DiffQ's hooks must not be recorded in a CUDA graph.
        self.differentiate = lambda _, *batch: self._differentiate(*batch)

    def train(self) -> dict[str, Any]:
        """Train from the start, and return a summary of only what `Point` needs."""
        for epoch in range(self.epochs):
            metrics = self._epoch(epoch)
        summary = {
            "test_accuracy": metrics["val"]["accuracy"],
            "file_bytes": round(2**20 * self.quantizer.compressed_model_size()),
        }
        self.folder.write_summary(summary)
        return summary

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        self.bits.zero_grad()
        told = super()._step(images, labels)
        (self.penalty * self.quantizer.model_size()).backward()
        self.bits.step()
        return told


def main() -> int:
    args = tyro.cli(Args)
    return exit_code(
        lambda: compare(args),
        mistakes=(UnknownModelError,),
        failures=(CutError, FloatingPointError),
        stopped="stopped; the same command finishes what is missing",
        smaller="a smaller --width",
    )


def compare(args: Args) -> int:
    points = list(train_all(args))
    text = table(points)
    write_atomically(args.runs / "peers.md", text.encode())
    figure(points).savefig(args.runs / "peers.png", dpi=120)
    print(f"\n{text}\n{args.runs}/peers.md, peers.png")
    return 0


def train_all(args: Args) -> Iterable[Point]:
    """Yield the point of every network, training those runs that are not finished."""
    base = Config(
        dataset=args.dataset, data_dir=args.data_dir, model=args.model, width=args.width,
        epochs=args.epochs,
    )  # fmt: skip
    full = dataclasses.replace(base, float_baseline=True)
    yield _point("float", f"width {args.width}", _runs(args, full, "float", Run))
    for width, bits in itertools.product(args.widths, args.bits):
        narrow = dataclasses.replace(base, gamma=0.0, width=width, bits=8, penalty_until=1.0)
        fixed = partial(UniformRun, bits=bits)
        summaries = _runs(args, narrow, f"uniform-w{width}-b{bits}", fixed)
        yield _point("uniform", f"width {width}, {bits} bits", summaries)
    for gamma in args.gammas:
        ours = dataclasses.replace(base, gamma=gamma)
        yield _point("ours", f"γ = {gamma:g}", _runs(args, ours, f"gamma{gamma:g}", Run))
    for penalty in args.diffq:
        peer = partial(DiffQRun, penalty=penalty)
        yield _point("DiffQ", f"penalty {penalty:g}", _runs(args, full, f"diffq{penalty:g}", peer))


def _runs(args: Args, config: Config, name: str, make: Callable[..., Run]) -> list[dict[str, Any]]:
    return [
        run(
            dataclasses.replace(config, seed=seed, run_dir=args.runs / f"{name}-seed{seed}"),
            default_width(config.model),
            build,
            make,
        )
        for seed in range(args.seeds)
    ]


def _point(kind: str, name: str, summaries: Sequence[dict[str, Any]]) -> Point:
    accuracies = [100 * summary["test_accuracy"] for summary in summaries]
    spread = stdev(accuracies) if len(accuracies) > 1 else math.nan
    size = mean(summary["file_bytes"] for summary in summaries)
    return Point(kind, name, size, mean(accuracies), spread)


def bar(points: Iterable[Point]) -> list[Point]:
    """Return the corners of the uniform networks' upper hull over log bytes, smallest first."""
    hull: list[Point] = []
    uniform = sorted((p for p in points if p.kind == "uniform"), key=lambda p: (p.size, p.accuracy))
    for point in uniform:
        while hull and point.accuracy >= hull[-1].accuracy and point.size == hull[-1].size:
            hull.pop()
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    best = max(hull, key=lambda p: p.accuracy)
    return hull[: hull.index(best) + 1]


def _slope(a: Point, b: Point) -> float:
    return (b.accuracy - a.accuracy) / math.log(b.size / a.size)


def height(size: float, hull: Sequence[Point]) -> float:
    """Return the bar's accuracy at `size` bytes; NaN below its smallest network."""
    if size < hull[0].size:
        return math.nan
    for a, b in itertools.pairwise(hull):
        if size <= b.size:
            return a.accuracy + _slope(a, b) * math.log(size / a.size)
    return hull[-1].accuracy


def table(points: Sequence[Point]) -> str:
    """Return a markdown table of all networks, by kind and size."""
    hull = bar(points)
    full = next(p for p in points if p.kind == "float")
    header = (
        "", "", "file KB", "of float", "accuracy", "±", "above the bar", "of the way to float"
    )  # fmt: skip
    rows = []
    for p in sorted(points, key=lambda p: (p.kind, p.size)):
        at = height(p.size, hull)
        above = p.accuracy - at
        way = 100 * above / (full.accuracy - at) if full.accuracy > at else math.nan
        cells = (
            p.kind, p.name, f"{p.size / 1000:.1f}", f"{100 * p.size / full.size:.2f} %",
            f"{p.accuracy:.2f} %", number(p.spread, ".2f"), number(above, "+.2f"),
            number(way, ".0f", " %"),
        )  # fmt: skip
        rows.append(cells)
    return markdown(header, rows) + "\n"


def number(value: float, form: str, unit: str = "") -> str:
    return "–" if math.isnan(value) else f"{value:{form}}{unit}"


def figure(points: Sequence[Point]) -> Figure:
    """Draw accuracy over the bytes of the file, with the bar as a line."""
    drawing = Figure(figsize=(7, 4.5), layout="constrained")
    axes = drawing.add_subplot()
    full = next(p for p in points if p.kind == "float")
    axes.axhline(full.accuracy, color="gray", linestyle=":", label=f"float, {full.name}")
    hull = bar(points)
    axes.plot([p.size / 1000 for p in hull], [p.accuracy for p in hull], "C1-", linewidth=1)
    for kind, style in (("uniform", "C1s"), ("DiffQ", "C2^"), ("ours", "C0o-")):
        some = sorted((p for p in points if p.kind == kind), key=lambda p: p.size)
        if some:
            x, y = [p.size / 1000 for p in some], [p.accuracy for p in some]
            error = [0.0 if math.isnan(p.spread) else p.spread for p in some]
            axes.errorbar(x, y, error, fmt=style, markersize=5, capsize=2, label=kind)
    axes.set(xscale="log", xlabel="file, KB", ylabel="test accuracy, %")
    log_ticks(axes.xaxis)
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right")
    return drawing


if __name__ == "__main__":
    sys.exit(main())
