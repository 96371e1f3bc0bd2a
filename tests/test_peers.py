"""The benchmarks against narrow networks train every network, and compute their bar correctly."""

import math
import sys
from pathlib import Path

import pytest

from benchmarks import language
from benchmarks.peers import Point, bar, height, main, table
from selfcompress.file.read import read

FLOAT = Point("float", "width 16", 1000, 90)


def uniform(size: float, accuracy: float) -> Point:
    return Point("uniform", f"{size:g} bytes", size, accuracy)


def test_the_bar_is_the_upper_hull_over_log_bytes() -> None:
    corners = [uniform(10, 50), uniform(20, 65), uniform(40, 75), uniform(80, 80)]
    below = [uniform(20, 60), uniform(30, 68), uniform(60, 76), uniform(160, 79)]
    assert bar([*below, *corners, FLOAT]) == corners
    # A point below the line between its neighbours is no corner.
    assert bar([uniform(10, 50), uniform(20, 55), uniform(40, 75)])[1].size == 40


def test_between_corners_the_bar_is_straight_in_log_bytes() -> None:
    hull = bar([uniform(10, 50), uniform(40, 70), uniform(80, 72)])
    assert height(20, hull) == pytest.approx(60)
    assert height(40, hull) == pytest.approx(70)
    assert height(1000, hull) == 72
    assert math.isnan(height(9, hull))


def test_the_table_tells_how_far_above_the_bar() -> None:
    ours = Point("ours", "γ = 1", 20, 75)
    lines = table([uniform(10, 50), uniform(40, 70), ours, FLOAT]).splitlines()
    assert lines[3] == "| ours | γ = 1 | 0.0 | 2.00 % | 75.00 % | – | +15.00 | 50 % |"


def test_it_trains_what_it_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--dataset digits --width 3 --epochs 1 --widths 2 --bits 2 3 --gammas 0.01"
    monkeypatch.setattr(sys, "argv", ["peers", *options.split(), "--runs", str(tmp_path)])
    assert main() == 0
    for bits in (2, 3):
        contents = read(tmp_path / f"uniform-w2-b{bits}-seed0" / "net.scnn")
        assert {d for layer in contents.layers.values() for d in layer.depths.tolist()} == {bits}
    assert (tmp_path / "peers.png").stat().st_size > 0
    written = (tmp_path / "peers.md").read_text()
    assert written.count("| uniform |") == 2
    assert written.count("| ours |") == 1
    assert written in capsys.readouterr().out


def test_an_unknown_model_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["peers", "--model", "foo", "--runs", str(tmp_path / "runs")])
    assert main() == 2
    assert capsys.readouterr().err.startswith("error: no model 'foo': choose ")
    assert not (tmp_path / "runs").exists()


def test_language_models_are_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(language, "MEASURED", 2)  # batches
    options = "--width 8 --widths 4 --bits 3 --gammas 0.003 --steps 4 --runs"
    monkeypatch.setattr(sys, "argv", ["language", *options.split(), str(tmp_path)])
    language.main()
    first = capsys.readouterr().out
    contents = read(tmp_path / "uniform-w4-3-4-seed0.scnn")
    assert {d for layer in contents.layers.values() for d in layer.depths.tolist()} == {3}
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(times) == 3
    language.main()
    assert capsys.readouterr().out == first[first.index("\n|") :]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
