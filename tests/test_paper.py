"""The runs of a folder are drawn over the paper's figures, at the right places."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from sweep_runs import make_run

from benchmarks import paper
from selfcompress.sweeping.results import read_all
from selfcompress.training.errors import UserError


def data(axes: Axes, line: int) -> list[list[float]]:
    """Return the x and y values of a line that was drawn."""
    return [np.asarray(values).tolist() for values in axes.lines[line].get_data()]


def test_runs_are_drawn_relative_to_their_own_start(tmp_path: Path) -> None:
    make_run(tmp_path / "float", None, 0, accuracy=0.9)
    make_run(tmp_path / "small", 0.1, 0, accuracy=0.85)
    lost, size, seconds, widths = paper.figure(read_all(tmp_path)).axes
    q, points = data(lost, 1)
    assert points == pytest.approx([-5])
    assert data(size, 0)[0][::4] == pytest.approx([0, 100])
    done, percent = data(size, 1)
    assert done == pytest.approx([25, 50, 75, 100])
    assert percent[-1:] == pytest.approx(q)
    # Epochs take 2.0, 1.9, 1.8 and 1.7 s; medians of neighbours are relative to the first three's.
    assert data(seconds, 1)[1] == pytest.approx([1.95 / 1.9, 1, 1.8 / 1.9, 1.75 / 1.9])
    assert data(widths, 0)[1][0] == pytest.approx(100 * 30 / 64)


def test_a_run_to_a_size_has_no_place_on_a_curve_over_gamma(tmp_path: Path) -> None:
    make_run(tmp_path / "float", None, 0)
    make_run(tmp_path / "small", 0.1, 0)
    make_run(tmp_path / "asked", 0.05, 0)
    summary = tmp_path / "asked" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"target_bytes": 1000}))
    _, size, *_ = paper.figure(read_all(tmp_path)).axes
    assert [line.get_label() for line in size.lines] == ["paper", "γ = 0.1"]


def test_without_a_float_run_nothing_can_be_compared(tmp_path: Path) -> None:
    make_run(tmp_path / "small", 0.1, 0)
    with pytest.raises(UserError, match="one with --float"):
        paper.figure(read_all(tmp_path))


def test_it_writes_the_picture_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "paper.png"
    monkeypatch.setattr(sys, "argv", ["paper", str(tmp_path), "--out", str(picture)])
    assert paper.main() == 2
    assert capsys.readouterr().err.startswith("error: runs of resnet9 are needed")
    make_run(tmp_path / "float", None, 0)
    make_run(tmp_path / "small", 0.1, 0)
    assert paper.main() == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
