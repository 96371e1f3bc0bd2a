"""Draw the figures of the paper (arXiv 2301.13142) with the runs of a sweep over them.

    python -m benchmarks.paper runs/sweep --out docs/paper.png

reads the finished runs in and below the folder: one in float (`--float`), the others at several γ.
The paper's networks are ResNet-9 of width 64, trained for about 930 epochs on CIFAR-10, with
fractional bits; so everything is drawn relative to where each network started:

- *Fig. 3*: accuracy lost against the float network, over Q in percent of 32 bits;
- *Fig. 1*: Q over the training;
- *Fig. 2*: the time of an epoch, relative to the median of the first three;
- *Fig. 4*: channels left in every layer, in percent of its width.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfcompress.sweeping.curves import PAPER_ACCURACY, PAPER_PERCENT, log_ticks
from selfcompress.sweeping.results import Result, read_all
from selfcompress.training.errors import UserError

# Read off the paper's figures, or stated in its text; Fig. 3 is in `curves`.
FLOAT = 95.69  # accuracy of the float network, %
EPOCHS = 930
SIZE = {0: 24.0, 50: 8.0, 100: 5.0, 200: 3.3, 930: 2.2}  # epoch → Q %
SECONDS = {0: 16.0, 930: 10.5}  # epoch → its seconds
WIDTHS = {
    "prep.conv": (64, 30), "layer1.conv": (128, 102), "res1.block1.conv": (128, 101),
    "res1.block2.conv": (128, 97), "layer2.conv": (256, 112), "layer3.conv": (512, 364),
    "res3.block1.conv": (512, 58), "res3.block2.conv": (512, 346),
}  # fmt: skip
"""Name of a layer in `models.resnet9` → its width, and the channels left of it."""


@dataclass(frozen=True)
class Args:
    """Draw the paper's figures with the runs in a folder over them."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Where finished runs of train.py or sweep.py are."""
    out: Path = Path("paper.png")
    """File that the picture is written to."""


def main() -> int:
    args = tyro.cli(Args)
    try:
        results = read_all(args.folder)
        drawing = figure(results)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    drawing.savefig(args.out, dpi=120)
    print(args.out)
    return 0


def figure(results: Sequence[Result]) -> Figure:
    """Draw the four figures, for the runs of the default model (resnet9) among `results`.

    Raises:
        UserError: there is no float run, or nothing to compare with it.
    """
    runs = [r for r in results if r.summary["model"] == "resnet9"]
    full = [r for r in runs if r.gamma is None]
    ours = [r for r in runs if r.gamma and not r.summary.get("target_bytes")]
    if not full or not ours:
        raise UserError("runs of resnet9 are needed: one with --float, the others with --gamma")
    drawing = Figure(figsize=(11, 8), layout="constrained")
    lost, size, seconds, widths = drawing.subplots(2, 2).flat
    _lost(lost, full, ours)
    _over_training(size, ours, SIZE, _q_percent)
    size.set(yscale="log", ylabel="Q, % of 32 bits", title="Fig. 1: size")
    log_ticks(size.yaxis)
    _over_training(seconds, ours, {e: s / SECONDS[0] for e, s in SECONDS.items()}, _relative_time)
    seconds.set(ylim=(0, None), ylabel="an epoch's time, × the first", title="Fig. 2: speed")
    _widths(widths, ours)
    lost.legend()
    for axes in (size, seconds, widths):
        axes.legend(fontsize="small")
    for axes in (lost, size, seconds, widths):
        axes.grid(alpha=0.3, which="both")
    return drawing


def _lost(axes: Axes, full: Sequence[Result], ours: Sequence[Result]) -> None:
    top = 100 * sum(r.accuracy for r in full) / len(full)
    published = [accuracy - FLOAT for accuracy in PAPER_ACCURACY]
    axes.plot(PAPER_PERCENT, published, "ks-", label="paper, fractional bits")
    own = sorted((_q_percent(r)[-1], 100 * r.accuracy - top) for r in ours)
    axes.plot([q for q, _ in own], [a for _, a in own], "C0o-", label="ours, whole bits")
    axes.axhline(0, color="gray", linestyle=":")
    axes.set(
        xscale="log", xlabel="Q, % of 32 bits", ylabel="points of accuracy against its own float",
        title="Fig. 3: accuracy",
    )  # fmt: skip
    log_ticks(axes.xaxis)


def _over_training(
    axes: Axes,
    ours: Sequence[Result],
    paper: dict[int, float],
    of: Callable[[Result], list[float]],
) -> None:
    axes.plot([100 * e / EPOCHS for e in paper], list(paper.values()), "ks--", label="paper")
    for color, result in enumerate(ours):
        values = of(result)
        done = [100 * (n + 1) / len(values) for n in range(len(values))]
        axes.plot(done, values, f"C{color}-", label=_label(result))
    axes.set(xlabel="% of the training")


def _q_percent(result: Result) -> list[float]:
    return [row["size"]["q_percent"] for row in result.history]


def _relative_time(result: Result) -> list[float]:
    """Return epoch times relative to the first ones, as medians of three: machines are shared."""
    seconds = result.summary["seconds_per_epoch"]
    smooth = [median(seconds[max(0, n - 1) : n + 2]) for n in range(len(seconds))]
    return [s / median(seconds[:3]) for s in smooth]


def _widths(axes: Axes, ours: Sequence[Result]) -> None:
    left = [100 * kept / width for width, kept in WIDTHS.values()]
    axes.plot(left, "ks--", label="paper")
    for color, result in enumerate(ours):
        start, end = result.summary["channels_start"], result.summary["channels_end"]
        axes.plot([100 * end[n] / start[n] for n in WIDTHS], f"C{color}o-", label=_label(result))
    axes.set_xticks(range(len(WIDTHS)), [n.removesuffix(".conv") for n in WIDTHS], rotation=30)
    axes.set(ylim=(0, 105), ylabel="channels left, %", title="Fig. 4: widths")


def _label(result: Result) -> str:
    seed = f", seed {result.seed}" if result.seed else ""
    return f"γ = {result.gamma:g}{seed}"


if __name__ == "__main__":
    sys.exit(main())
