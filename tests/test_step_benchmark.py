"""The benchmark of training steps times what it says it does."""

import re
import sys

import pytest

from benchmarks.training import main


def test_smaller_networks_have_fewer_macs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--width 4 --image-size 8 --batch-size 32 --steps 2 --kept 0.75 0.5"
    monkeypatch.setattr(sys, "argv", ["training", *options.split()])
    assert main() == 0
    out = capsys.readouterr().out
    macs = [int(percent) for percent in re.findall(r"\| (\d+) % \| \d", out)]
    assert macs[:2] == [100, 100]  # float, and self-compressing at its start
    assert 50 < macs[2] < 65 and 22 < macs[3] < 35
    assert all(part in out for part in ("augmentation", "the compressor's step", "a cut, over"))
