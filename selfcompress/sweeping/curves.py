"""Figures of a sweep: accuracy against size, and how networks shrink, as PNG and SVG files."""

import io
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from selfcompress.disk import write_atomically
from selfcompress.sweeping.results import Result, front

BLUE, GREY = "#2b6cb0", "#8a8a8a"
KINDS = ("png", "svg")
FILES = [f"{name}.{k}" for name in ("curve", "weights", "size", "seconds", "widths") for k in KINDS]
"""All files that `write_figures` may write."""

NAMED = 10  # most groups that get a legend; with more, γ get a colour bar
PAPER = "Cséfalvay & Imber (2023), Fig. 3:\nwidth 64, ~930 epochs, fractional bits"
PAPER_PERCENT = (0.25, 0.5, 1, 2, 3, 4, 7)  # percent of 32 bits, read off the figure
PAPER_ACCURACY = (90.1, 93, 94.2, 95.0, 95.5, 95.65, 95.65)


@dataclass(frozen=True)
class Picture:
    """A figure: its name, which is that of its files, its caption, and its SVG."""

    name: str
    caption: str
    svg: bytes


@dataclass(frozen=True, eq=False)
class Group:
    """The runs of one γ, or of the float baseline, with different seeds."""

    gamma: float | None
    results: tuple[Result, ...]

    @property
    def label(self) -> str:
        return "float" if self.gamma is None else f"γ = {self.gamma:g}"

    def mean_std(self, value: Callable[[Result], float]) -> tuple[float, float]:
        """Return the mean and standard deviation over seeds; the latter is 0 for a single run."""
        values = np.array([value(result) for result in self.results])
        return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0

    def over_epochs(self, value: Callable[[dict[str, Any]], float]) -> np.ndarray:
        """Return (epochs,) the mean over seeds of a metric."""
        rows = [[value(row) for row in result.history] for result in self.results]
        return np.asarray(np.mean(rows, axis=0))


def write_figures(results: Sequence[Result], folder: Path) -> list[Picture]:
    """Draw the figures of one or more runs, sorted as by `read_all`, and write them to `folder`."""
    groups = [
        Group(gamma, tuple(same)) for gamma, same in itertools.groupby(results, lambda r: r.gamma)
    ]
    figures = {
        "curve": (
            _curve,
            "Test accuracy against size. Dots are runs, circles with bars their mean ± standard "
            "deviation over seeds; the line joins the means that no other is better than in both.",
        ),
        "weights": (_weight_curve, "Test accuracy against the weights that are left."),
        "size": (_size, "Size while training, mean over seeds (Fig. 1 of the paper)."),
        "seconds": (
            _seconds,
            "Seconds of an epoch's training steps, mean over seeds (Fig. 2 of the paper). Runs "
            "that trained at the same time slowed each other down.",
        ),
        "widths": (
            _widths,
            "Channels with bits after training, mean over seeds (Fig. 4 of the paper).",
        ),
    }
    if not _compressed(groups):  # the other figures show the effect of γ
        figures = {"seconds": figures["seconds"]}
    pictures = []
    for name, (draw, caption) in figures.items():
        figure = draw(groups)
        files = {kind: _drawn(figure, kind) for kind in KINDS}
        for kind, content in files.items():
            write_atomically(folder / f"{name}.{kind}", content)
        pictures.append(Picture(name, caption, files["svg"]))
    return pictures


def _drawn(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "png":
        figure.savefig(buffer, format=kind, dpi=130)
    else:
        with matplotlib.rc_context({"svg.hashsalt": "selfcompress"}):  # same runs, same bytes
            figure.savefig(buffer, format=kind, metadata={"Date": None})
    return buffer.getvalue()


def _accuracy(result: Result) -> float:
    return 100 * result.accuracy


def _kilobytes(result: Result) -> float:
    return result.file_bytes / 1000


def _stored(result: Result) -> float:
    return result.stored_percent


def _weights_left(result: Result) -> float:
    return result.weights_percent


def _compressed(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if group.gamma is not None]


def _curve(groups: Sequence[Group]) -> Figure:
    """Draw accuracy against file bytes and, beside it, against percent of bits."""
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _scatter(left, groups, _kilobytes)
    left.set_xlabel("file of the network, KB (1,000 bytes)")
    left.set_ylabel("test accuracy, %")
    _scatter(right, groups, _stored)
    right.set_xlabel("stored bits, % of 32 for each weight at the start")
    some = groups[0].results[0].summary
    if some["model"] == "resnet9" and some["dataset"].startswith("cifar10"):
        right.plot(PAPER_PERCENT, PAPER_ACCURACY, "--", color="#c05621", label=PAPER)
        low, high = right.get_xlim()
        right.set_xlim(min(low, 0.2), max(high, 8))
    for axes in (left, right):
        log_ticks(axes.xaxis)
    right.legend(loc="lower right", fontsize=9, frameon=False)
    figure.suptitle(_what(groups) + "; numbers at points: γ", fontsize=11)
    figure.draw_without_rendering()  # fixes the places of what labels must not overlap
    _name_points(left, groups, _kilobytes)
    _name_points(right, groups, _stored)
    return figure


def _weight_curve(groups: Sequence[Group]) -> Figure:
    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    axes = figure.subplots()
    _scatter(axes, groups, _weights_left)
    log_ticks(axes.xaxis)
    axes.set_xlabel("weights left, % of those at the start")
    axes.set_ylabel("test accuracy, %")
    axes.legend(loc="lower right", fontsize=9, frameon=False)
    axes.set_title(_what(groups) + "; numbers at points: γ", fontsize=11)
    figure.draw_without_rendering()
    _name_points(axes, groups, _weights_left)
    return figure


def _scatter(axes: Axes, groups: Sequence[Group], size: Callable[[Result], float]) -> None:
    """Draw runs, their means, the Pareto front of the means, and the float baseline as a band."""
    axes.set_xscale("log")
    sizes = [size(result) for group in _compressed(groups) for result in group.results]
    sizes = [s for s in sizes if s > 0] or [1.0]  # a network may have lost all of its weights
    room = max(1.2, (max(sizes) / min(sizes)) ** 0.08)  # above 1 even if all sizes are the same
    axes.set_xlim(min(sizes) / room, max(sizes) * room)
    means = []
    for group in groups:
        accuracy, spread = group.mean_std(_accuracy)
        if group.gamma is None:
            label = f"float: {accuracy:.2f}" + (f" ± {spread:.2f} %" if spread else " %")
            axes.axhspan(accuracy - spread, accuracy + spread, color=GREY, alpha=0.2, lw=0)
            axes.axhline(accuracy, color=GREY, lw=1, label=label)
            continue
        x, x_spread = group.mean_std(size)
        means.append((x, accuracy))
        axes.plot(
            [size(r) for r in group.results], [_accuracy(r) for r in group.results],
            "o", ms=3, color=BLUE, alpha=0.45, mew=0,
        )  # fmt: skip
        axes.errorbar(
            x, accuracy, yerr=spread or None, xerr=x_spread or None,
            fmt="o", ms=6, mfc="white", mec=BLUE, mew=1.4, ecolor=BLUE, elinewidth=1, zorder=3,
        )  # fmt: skip
    axes.plot(*zip(*front(means), strict=True), "-", color=BLUE, lw=1.4, label="front of the means")
    axes.margins(y=0.08)
    axes.grid(alpha=0.25, which="both", lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def log_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, as many as fit."""
    low, high = axis.get_view_interval()
    if high > 6 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _name_points(axes: Axes, groups: Sequence[Group], size: Callable[[Result], float]) -> None:
    """Write γ beside the means, as near as there is room; labels without room are left out.

    The ends come first, then the middle, then the quarters, so that missing labels are spread out.
    """
    named = _compressed(groups)
    points = {g: (g.mean_std(size)[0], g.mean_std(_accuracy)[0]) for g in named}
    pixels = axes.transData.transform(list(points.values()))
    unit = axes.figure.dpi / 72  # pixels per point
    taken = [Bbox([[x, y], [x, y]]).padded(4 * unit) for x, y in pixels]
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent())
    # Above left and below right come first, as the front rises to the right.
    around = [(-1, 1), (1, -1), (1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0)]
    for group in _spread(named):
        text = axes.annotate(
            f"{group.gamma:g}", points[group], (0, 0), textcoords="offset points", fontsize=8,
            ha="center", va="center", path_effects=[withStroke(linewidth=2, foreground="white")],
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": GREY, "shrinkA": 0, "shrinkB": 4},
        )  # fmt: skip
        text.get_window_extent()  # computes its place
        extent = Text.get_window_extent(text).padded(unit)  # without the line to the point
        for distance, (right, up) in itertools.product((7, 14, 22, 32, 44), around):
            dx, dy = right * (distance * unit + extent.width / 2), up * distance * unit
            box = extent.translated(dx, dy)
            inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            if inside and not box.count_overlaps(taken):
                text.set_position((dx / unit, dy / unit))
                taken.append(box)
                break
        else:
            text.remove()


def _spread(items: Sequence[Group]) -> Iterable[Group]:
    """Return the items in another order: first, last, middle, middles of the halves, …"""
    order, step = [0, len(items) - 1], len(items) - 1
    while step > 1:
        step = -(-step // 2)
        order += range(0, len(items), step)
    return [items[i] for i in dict.fromkeys(order)]


def _size(groups: Sequence[Group]) -> Figure:
    figure, axes = _over_epochs(_compressed(groups), lambda row: row["size"]["stored_percent"])
    axes.set_yscale("log")
    log_ticks(axes.yaxis)
    axes.set_ylabel("stored bits, % of 32 for each weight at the start")
    return figure


def _seconds(groups: Sequence[Group]) -> Figure:
    figure, axes = _over_epochs(groups, lambda row: row["time"]["epoch_seconds"])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("seconds per epoch")
    return figure


def _over_epochs(
    groups: Sequence[Group], value: Callable[[dict[str, Any]], float]
) -> tuple[Figure, Axes]:
    """Draw a line per group, in the colour of its γ; the float baseline and γ = 0 in black."""
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    gammas = [group.gamma for group in groups if group.gamma]
    scale = LogNorm(min(gammas), max(gammas)) if len(set(gammas)) > 1 else None
    colours = matplotlib.colormaps["viridis_r"]
    few = len(groups) <= NAMED
    for group in groups:
        style: dict[str, Any] = {"color": BLUE, "lw": 1.5}
        if not group.gamma:
            style = {"color": "black", "ls": ":" if group.gamma == 0 else "--", "lw": 1.5}
        elif scale is not None:
            style["color"] = colours(0.1 + 0.9 * scale(group.gamma))
        values = group.over_epochs(value)
        label = group.label if few or not group.gamma else None
        axes.plot(np.arange(1, len(values) + 1), values, label=label, **style)
    if not few and scale is not None:
        ramp = matplotlib.colors.LinearSegmentedColormap.from_list(
            "gamma", [colours(x) for x in np.linspace(0.1, 1, 64)]
        )
        figure.colorbar(ScalarMappable(scale, ramp), ax=axes, label="γ")
    if few or any(not group.gamma for group in groups):
        axes.legend(fontsize=9, frameon=False)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(_what(groups), fontsize=11)
    axes.grid(alpha=0.25, which="both", lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _widths(groups: Sequence[Group]) -> Figure:
    """Draw the percentage of channels that are left, with a row per layer and a column per γ."""
    shown = _compressed(groups)
    start: dict[str, int] = shown[0].results[0].summary["channels_start"]
    left = np.array(
        [[np.mean([r.summary["channels_end"][n] for r in g.results]) for g in shown] for n in start]
    )
    share = 100 * left / np.array(list(start.values()))[:, None]
    written = len(shown) <= 12  # whether columns are wide enough for numbers
    figure = Figure(
        figsize=(3 + len(shown) * (0.7 if written else 0.25), 1.6 + 0.3 * len(start)),
        layout="constrained",
    )
    axes = figure.subplots()
    image = axes.imshow(share, aspect="auto", cmap="Blues", vmin=0, vmax=100)
    axes.set_yticks(range(len(start)), [f"{name} ({width})" for name, width in start.items()])
    axes.set_xticks(
        range(len(shown)), [f"{g.gamma:g}" for g in shown], rotation=0 if written else 90
    )
    axes.set_xlabel("γ")
    if written:
        for (row, column), count in np.ndenumerate(left):
            colour = "white" if share[row, column] > 55 else "black"
            axes.text(column, row, f"{count:.0f}", ha="center", va="center", color=colour)
    figure.colorbar(image, ax=axes, label="channels left, %")
    figure.suptitle(_what(groups) + ": channels left", fontsize=11)
    return figure


def _what(groups: Sequence[Group]) -> str:
    """Return the figures' common title: model, dataset, epochs and seeds."""
    some = groups[-1].results[0]
    width = some.summary["config"].get("width")
    seeds = max(len(group.results) for group in groups)
    return (
        f"{some.summary['model']}{'' if width is None else f', width {width}'}, "
        f"{some.summary['dataset']}, {some.summary['epochs']} epochs, "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}"
    )
