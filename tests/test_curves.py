"""A sweep's table, figures and page, and the pick of a run, for runs with made-up numbers."""

import csv
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox
from sweep_runs import EPOCHS, make_run, make_sweep

from selfcompress.sweeping import curves
from selfcompress.sweeping.curves import FILES, Group, write_figures
from selfcompress.sweeping.page import write_page
from selfcompress.sweeping.pick import describe, pick
from selfcompress.sweeping.results import front, read, read_all, write_csv
from selfcompress.training.errors import UserError

THREE = [0.003, 0.03, 0.3]
FORTY = [float(f"{0.001 * 1.16**i:.3g}") for i in range(40)]


def groups(root: Path) -> list[Group]:
    results = read_all(root)
    return [Group(g, tuple(r)) for g, r in itertools.groupby(results, lambda r: r.gamma)]


def labels(axes: Axes) -> dict[str, Bbox]:
    """Return the texts at the points of a plot, and the pixels that each takes."""
    found = [child for child in axes.get_children() if isinstance(child, Annotation)]
    return {text.get_text(): Text.get_window_extent(text) for text in found}


def boxes_of(figure: Figure) -> list[dict[str, Bbox]]:
    figure.draw_without_rendering()
    return [labels(axes) for axes in figure.axes]


def assert_apart(boxes: Sequence[Bbox]) -> None:
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)


@pytest.mark.parametrize(("gammas", "least"), [(THREE, 3), (FORTY, 30), ([0.1], 1)])
def test_points_are_named_without_overlaps(gammas: list[float], least: int, tmp_path: Path) -> None:
    make_sweep(tmp_path, gammas)
    every = [f"{gamma:g}" for gamma in gammas]
    shown = [
        *boxes_of(curves._curve(groups(tmp_path))),
        *boxes_of(curves._weight_curve(groups(tmp_path))),
    ]
    assert len(shown) == 3
    for names in shown:
        assert len(names) >= least
        assert names.keys() <= set(every)
        assert {every[0], every[-1]} <= names.keys()
        assert_apart(list(names.values()))


def test_every_figure_is_a_png_and_an_svg(tmp_path: Path) -> None:
    make_sweep(tmp_path, [0.0, *THREE])
    pictures = write_figures(read_all(tmp_path), tmp_path)
    assert [p.name for p in pictures] == ["curve", "weights", "size", "seconds", "widths"]
    for picture in pictures:
        assert (tmp_path / f"{picture.name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{picture.name}.svg").read_bytes() == picture.svg
        assert b"<svg" in picture.svg
    # The same results make the same files.
    assert write_figures(read_all(tmp_path), tmp_path)[0].svg == pictures[0].svg


def test_a_network_without_weights_is_drawn_like_others(tmp_path: Path) -> None:
    make_sweep(tmp_path, THREE)
    metrics = tmp_path / "gamma0.3-seed0" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows[-1]["size"]["weights_percent"] = 0
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(write_figures(read_all(tmp_path), tmp_path)) == 5
    assert {f.name for f in tmp_path.iterdir() if f.is_file()} == set(FILES)
    (tmp_path / "gamma0.3-seed1" / "metrics.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="is damaged"):
        read_all(tmp_path)


def test_a_sweep_of_which_only_the_baseline_is_done_has_its_figures(tmp_path: Path) -> None:
    make_sweep(tmp_path, [], seeds=1)
    assert [p.name for p in write_figures(read_all(tmp_path), tmp_path)] == ["seconds"]


@pytest.mark.parametrize(
    ("dataset", "shown"), [("cifar10", True), ("cifar10-jpeg", True), ("digits", False)]
)
def test_the_papers_curve_is_drawn_for_its_own_model_and_data(
    dataset: str, shown: bool, tmp_path: Path
) -> None:
    make_sweep(tmp_path, THREE, seeds=1, dataset=dataset)
    figure = curves._curve(groups(tmp_path))
    dashed = [line for line in figure.axes[1].get_lines() if line.get_linestyle() == "--"]
    assert len(dashed) == shown
    if shown:
        assert "Fig. 3" in str(dashed[0].get_label())
        low, high = figure.axes[1].get_xlim()
        assert low < 0.25 and high > 7


def test_the_means_and_the_baseline_are_where_the_runs_are(tmp_path: Path) -> None:
    make_sweep(tmp_path, THREE, seeds=3)
    results = read_all(tmp_path)
    assert [r.gamma for r in results[:3]] == [None] * 3
    figure = curves._curve(groups(tmp_path))
    lines = [np.column_stack(line.get_data()) for line in figure.axes[0].get_lines()]
    drawn = {(float(x), float(y)) for x, y in np.concatenate(lines).astype(float).round(6)}
    for result in results:
        if result.gamma is not None:
            assert (result.file_bytes / 1000, round(100 * result.accuracy, 6)) in drawn
    legend = figure.axes[1].get_legend()
    assert legend is not None
    (baseline,) = [t.get_text() for t in legend.get_texts() if "float" in t.get_text()]
    assert baseline == "float: 97.75 ± 0.20 %"  # 0.98 - 0.05/101, less 0.002 a seed
    for axes, size in zip(figure.axes, (curves._kilobytes, curves._stored), strict=True):
        for gamma, bars in zip(THREE, axes.containers, strict=True):
            same = [r for r in results if r.gamma == gamma]
            values = np.array([[size(r), 100 * r.accuracy] for r in same])
            mean, spread = values.mean(0), values.std(0, ddof=1)
            centre = np.ravel(bars[0].get_data()).astype(float)
            np.testing.assert_allclose(centre, mean)
            # The bars: first along x, then along y, each from its lower to its upper end.
            for dim, (bar,) in enumerate(part.get_segments() for part in bars[2]):
                np.testing.assert_allclose(bar[:, dim], mean[dim] + spread[dim] * np.array([-1, 1]))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1))
def test_front_is_what_nothing_dominates(points: list[tuple[float, float]]) -> None:
    best = front(points)
    assert best == sorted(best)
    for point in points:
        beaten = any(
            size <= point[0] and accuracy >= point[1] and (size, accuracy) != point
            for size, accuracy in points
        )
        assert (point in best) == (not beaten)


def test_the_table_has_a_row_for_every_run(tmp_path: Path) -> None:
    make_sweep(tmp_path, THREE)
    write_csv(read_all(tmp_path), tmp_path / "results.csv")
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows[:3]] == ["float-seed0", "float-seed1", "gamma0.003-seed0"]
    assert rows[0]["gamma"] == ""
    assert float(rows[0]["first_epoch_seconds"]) == 2.0
    assert float(rows[0]["last_epoch_seconds"]) == pytest.approx(2.0 - 0.1 * (EPOCHS - 1))
    for row in rows:
        size = (tmp_path / row["run"] / "net.scnn").stat().st_size
        assert int(row["file_bytes"]) == size


def test_the_page_needs_no_other_file_and_links_every_run(tmp_path: Path) -> None:
    make_sweep(tmp_path, THREE)
    results = read_all(tmp_path)
    page = write_page(results, write_figures(results, tmp_path), tmp_path).read_text()
    assert re.findall(r'src="(?!data:)', page) == []
    assert page.count("data:image/svg+xml;base64,") == 5
    links = re.findall(r'href="([^"]*)"', page)
    assert len(links) == 2 * len(results)
    for link in links:
        assert (tmp_path / link).exists()


def test_runs_are_in_order_and_an_epoch_that_is_being_written_is_none(tmp_path: Path) -> None:
    """Runs are sorted by γ and seed, and an unfinished line of metrics is ignored."""
    make_sweep(tmp_path, [0.1, 0.03], seeds=11)
    assert [(r.gamma, r.seed) for r in read_all(tmp_path)[11:]] == [
        (gamma, seed) for gamma in (0.03, 0.1) for seed in range(11)
    ]
    metrics = tmp_path / "gamma0.1-seed0" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"epoch": 4, "va')
    result = read(metrics.parent)
    assert result is not None and len(result.history) == EPOCHS


def test_unfinished_runs_are_no_results_and_others_are_refused_in_a_line(tmp_path: Path) -> None:
    """A run without a summary is skipped; a damaged summary is reported in one line."""
    make_run(tmp_path / "a", 0.1, 0)
    summary = tmp_path / "a" / "summary.json"
    values = json.loads(summary.read_text())
    del values["file_bytes"]
    for content, part in ((json.dumps(values), "file_bytes"), ("{", "--overwrite")):
        summary.write_text(content)
        with pytest.raises(UserError, match=part) as refusal:
            read(tmp_path / "a")
        assert len(str(refusal.value).splitlines()) == 1
        assert str(summary) in str(refusal.value)
    summary.unlink()
    assert read(tmp_path / "a") is None
    assert read_all(tmp_path) == read_all(tmp_path / "nowhere") == []


def test_pick_is_the_most_accurate_that_fits_or_the_smallest_that_is_good(tmp_path: Path) -> None:
    make_sweep(tmp_path / "sweep", [0.001, 0.01, 0.1, 1])
    results = read_all(tmp_path)
    for limit in (10_000, 30_000, 100_000):
        best = pick(tmp_path, str(limit), None)
        assert best.file_bytes <= limit
        assert best.accuracy == max(r.accuracy for r in results if r.file_bytes <= limit)
    small = pick(tmp_path, None, 0.965)
    assert small.accuracy >= 0.965
    assert small.file_bytes == min(r.file_bytes for r in results if r.accuracy >= 0.965)
    # 3 % of 32 bits for each of 250,000 weights
    assert pick(tmp_path, "3%", None).folder == pick(tmp_path, "30 KB", None).folder
    assert pick(tmp_path, "10MB", None).gamma is None  # nothing beats the float network
    both = pick(tmp_path, "30KB", 0.96)
    assert both.file_bytes <= 30_000 and both.accuracy >= 0.96
    last = describe(small).splitlines()[-1]
    assert Path(last).stat().st_size == small.file_bytes


def test_pick_refuses_in_a_line(tmp_path: Path) -> None:
    make_sweep(tmp_path / "sweep", THREE)
    cases: list[tuple[str | None, float | None, str]] = [
        (None, None, "--max-bytes"),
        ("10", None, "the smallest"),
        (None, 0.999, "the most accurate"),
        (None, 93, "fraction"),
        ("abc", None, "'abc' is no size"),
    ]
    for size, accuracy, part in cases:
        with pytest.raises(UserError, match=part) as refusal:
            pick(tmp_path, size, accuracy)
        assert len(str(refusal.value).splitlines()) == 1
    with pytest.raises(UserError, match="no finished runs in"):
        pick(tmp_path / "nowhere", "1KB", None)
    best = pick(tmp_path, "30KB", None)
    (best.folder / "net.scnn").unlink()
    with pytest.raises(UserError, match=r"net\.scnn is gone"):
        pick(tmp_path, "30KB", None)
    make_run(tmp_path / "other", 0.1, 0, dataset="cifar10")
    with pytest.raises(UserError, match=r"cifar10, digits"):
        pick(tmp_path, "30KB", None)
