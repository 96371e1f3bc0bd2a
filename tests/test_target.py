"""--target-size: sizes as text, the fit, and whole runs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from commands import Cli, assert_refused
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import assert_same_run, interrupt_before
from torch import Tensor, nn

from selfcompress import Compressor
from selfcompress.file.write import pack
from selfcompress.quantizer import integer_depth
from selfcompress.training import runs
from selfcompress.training.filesize import FileSize
from selfcompress.training.trim import Fitter

TINY = (
    "--dataset digits --width 4 --image-size 8 --epochs 8 --batch-size 128 --device cpu "
    "--precision fp32"
).split()


@pytest.mark.parametrize(
    ("text", "of_a_million_bits"),
    [
        ("150KB", 150_000), ("150kB", 150_000), ("1.5MB", 1_500_000), ("20000B", 20_000),
        ("20000", 20_000), (" 20 kb ", 20_000), (".5KB", 500), ("3%", 3_750), ("0.25 %", 312),
        ("0.0314KB", 31),
    ],
)  # fmt: skip
def test_sizes_are_bytes_or_a_share_of_the_starting_weights(
    text: str, of_a_million_bits: int
) -> None:
    target = FileSize.parse(text)
    assert target.bytes(float_bits=1_000_000) == of_a_million_bits
    assert FileSize.parse(str(target)) == target


def test_the_same_size_has_one_name() -> None:
    names = {str(FileSize.parse(text)) for text in ("1.5MB", "1500 kB", "1500000B")}
    assert names == {"1500000B"}


@pytest.mark.parametrize(
    "text", ["", "KB", "-1", "0", "1,5MB", "-3KB", "0KB", "3KiB", "1e3B", "nanB", "3%%"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="150KB"):
        FileSize.parse(text)


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "%", "9" * 308 + "%", "9" * 300 + "GB"])
def test_sizes_beyond_what_any_file_has_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="999999999… is above 1e\\+18"):
        FileSize.parse(text)


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        target = FileSize.parse(text)
    except ValueError:
        return
    assert target.amount > 0


class TwoHalves(nn.Module):
    """A hidden layer of 32 channels, of which the output hardly reads the last 16."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 32, bias=False)
        self.out = nn.Linear(32, 4, bias=False)
        with torch.no_grad():
            self.out.weight[:, 16:] *= 1e-3

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.hidden(x).relu())
        return y


def fitter_of(model: nn.Module) -> tuple[Fitter, Compressor]:
    """Return a fitter of a frozen network with four random batches, and its compressor."""
    x, y = torch.randn(64, 64), torch.randint(4, (64,))
    compressor = Compressor(model, x[:8], 0.0, bits=4)
    compressor.freeze()

    def losses() -> Iterator[Tensor]:
        for part in range(4):
            yield F.cross_entropy(model(x[16 * part :][:16]), y[16 * part :][:16])

    optimizer = torch.optim.SGD(compressor.weights(), lr=0.1, momentum=0.9)
    return Fitter(
        compressor, optimizer, losses, lambda: len(pack(compressor.preview()))
    ), compressor


def test_trimming_takes_what_the_task_does_not_miss() -> None:
    model = TwoHalves()
    fitter, compressor = fitter_of(model)
    before = fitter.file_bytes()
    limit = before - 450
    after = fitter.fit(limit, least=limit - 8, most_bits=8)
    assert limit - 8 - 33 <= after <= limit  # a bit more of one row of 64 weights is 8 bytes
    hidden = compressor.layers["hidden"]
    depth = torch.zeros(32).index_copy(0, hidden.rows, integer_depth(hidden.bit_depth))
    assert depth[16:].max() == 0
    assert depth[:16].min() >= 3


def test_fitting_changes_formats_alone() -> None:
    model = TwoHalves()
    fitter, compressor = fitter_of(model)
    weights = {n: p.clone() for n, p in model.named_parameters() if n.endswith("weight")}
    limit = fitter.file_bytes() - 60
    fitter.fit(limit, limit - 100, 8)
    for name, layer in compressor.layers.items():
        rows, columns = layer.rows, layer.columns
        assert torch.equal(layer.weight, weights[f"{name}.weight"][rows][:, columns])
        assert layer.weight.grad is None


@pytest.mark.parametrize("limit", [0, 500])
def test_trimming_never_cuts_the_output_off(limit: int) -> None:
    fitter, compressor = fitter_of(TwoHalves())
    smallest, other = fitter_of(TwoHalves())
    with torch.no_grad():
        for layer in other.layers.values():
            layer.bit_depth.zero_()
    other.cut()
    reached = fitter.fit(limit, limit, 8)
    assert all(layer.live_rows().any() for layer in compressor.layers.values())
    # One more stream in the file, of integers that are coded or plain, takes 60 bytes.
    assert reached <= max(limit, smallest.file_bytes() + 64)


def test_filling_stops_at_the_limit_and_at_most_bits() -> None:
    fitter, compressor = fitter_of(TwoHalves())
    start = fitter.file_bytes()
    limit = start + 200
    assert limit - 40 < fitter.fit(limit, limit - 8, most_bits=8) <= limit
    full = fitter.fit(10**6, 10**6, most_bits=6)
    depth = torch.cat([integer_depth(layer.bit_depth) for layer in compressor.layers.values()])
    assert set(depth.tolist()) == {6}
    assert start < full < 10**6


def size_of(cli: Cli, folder: Path, *args: object) -> dict[str, Any]:
    """Run train.py to its end, check the file's size against the target, and return the summary."""
    code, _, err = cli(*args, "--run-dir", folder)
    assert code == 0, err
    summary: dict[str, Any] = json.loads((folder / runs.SUMMARY).read_text())
    assert summary["file_bytes"] == (folder / runs.NETWORK).stat().st_size
    reached = summary["file_bytes"] / summary["target_bytes"]
    print(f"{args}: {summary['target_bytes']} {reached:.4f} {summary['test_accuracy']:.4f}")
    assert reached <= 1
    assert reached >= 0.97
    return summary


def test_run_ends_in_the_size_asked_for(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    summary = size_of(cli, folder, *TINY, "--target-size", "5kB")
    assert summary["target_bytes"] == 5000
    assert summary["gamma"] > 0
    assert 0 < summary["test_accuracy"] <= 1
    assert summary["config"]["target_size"] == "5000B"
    assert summary["config"]["gamma"] is None
    rows = [json.loads(line) for line in (folder / runs.METRICS).read_text().splitlines()]
    sizes = [row["size"]["file_kb"] for row in rows]
    assert sizes[0] > 2 * sizes[-1]
    assert len({row["train"]["gamma"] for row in rows}) > 3
    events = EventAccumulator(str(folder / runs.TENSORBOARD)).Reload()
    assert {e.value for e in events.Scalars("size/target_kb")} == {5.0}
    shown = [e.value for e in events.Scalars("size/file_kb")]
    assert shown == pytest.approx(sizes, rel=1e-6)
    assert len(events.Scalars("train/gamma")) == len(rows)

    # The same size in other words is the same run; another size is not.
    assert "is finished" in cli(*TINY, "--target-size", "5000B", "--run-dir", folder)[1]
    other = cli(*TINY, "--target-size", "7KB", "--run-dir", folder)
    assert_refused(other, "target_size is 5000B there and 7000B here")


# Epochs during the time in which the penalty acts, and after it.
@pytest.mark.parametrize("epoch", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_interrupted_run_comes_to_the_same_file(
    epoch: int, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*TINY, "--target-size", "1.5%", "--width", "8", "--epochs", "6"]
    assert cli(*args, "--run-dir", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_before(epoch, patch)
        assert cli(*args, "--run-dir", tmp_path / "parts")[0] == 130
    assert cli(*args, "--run-dir", tmp_path / "parts")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    one, other = (tmp_path / name / runs.NETWORK for name in ("whole", "parts"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--target-size", "6KB", "--gamma", "0.01"], ["--target-size", "leave --gamma out"]),
        (["--target-size", "six"], ["--target-size", "'six' is no size"]),
        (["--target-size", "-6KB"], ["--target-size", "is no size"]),
        (["--target-size", "9" * 400], ["--target-size", "ask for less"]),
        (["--target-size", "6KB", "--penalty-from", "0.85"], ["--penalty-from"]),
    ],
)
def test_impossible_options_are_refused(
    args: list[str], parts: list[str], cli: Cli, tmp_path: Path
) -> None:
    assert_refused(cli(*TINY, *args, "--run-dir", tmp_path / "run"), *parts)
    assert not (tmp_path / "run").exists()


def test_target_that_is_too_small_is_told_what_is_not(cli: Cli, tmp_path: Path) -> None:
    """The refusal names the smallest target that is possible; one slightly larger is reached."""

    def call(size: int) -> tuple[int, str, str]:
        return cli(
            *TINY, "--epochs", "12", "--target-size", f"{size}B", "--run-dir", tmp_path / "run"
        )

    refused = call(100)
    assert_refused(refused, "100 bytes", "resnet9", "smaller than")
    assert not (tmp_path / "run").exists()
    least = int(refused[2].split("smaller than ")[1].split(":")[0].replace(",", ""))
    assert 700 < least < 3000
    assert_refused(call(least - 1), f"smaller than {least:,}")
    code, _, err = call(least + 100)
    assert code == 0
    assert "warning" not in err
    summary = json.loads((tmp_path / "run" / runs.SUMMARY).read_text())
    assert least - 64 <= summary["file_bytes"] <= least + 100


def test_target_that_is_too_large_changes_nothing(cli: Cli, tmp_path: Path) -> None:
    args = [*TINY, "--target-size", "1MB", "--epochs", "4", "--run-dir", tmp_path / "run"]
    code, _, err = cli(*args)
    assert code == 0
    assert "warning: --target-size 1MB has no effect" in err
    summary = json.loads((tmp_path / "run" / runs.SUMMARY).read_text())
    assert summary["channels_end"] == summary["channels_start"]
    assert summary["file_bytes"] < 100_000


def test_float_has_no_target(cli: Cli, tmp_path: Path) -> None:
    args = [*TINY, "--float", "--epochs", "1", "--run-dir", tmp_path / "run"]
    code, _, err = cli(*args, "--target-size", "6KB")
    assert code == 0
    assert "warning: --target-size has no effect with --float" in err
    assert "is finished" in cli(*args)[1]
    summary = json.loads((tmp_path / "run" / runs.SUMMARY).read_text())
    assert summary["target_bytes"] is None


@pytest.mark.slow
@pytest.mark.parametrize("target", ["6%", "3%", "1.5%"])
@pytest.mark.parametrize(
    "model", ["--model resnet9 --width 16", "--model resnet20 --width 16 --lr 0.2"]
)
def test_targets_are_hit_by_different_models(
    model: str, target: str, cli: Cli, tmp_path: Path
) -> None:
    args = "--dataset digits --image-size 8 --epochs 20 --device cpu --precision fp32".split()
    summary = size_of(cli, tmp_path / "run", *args, *model.split(), "--target-size", target)
    assert summary["test_accuracy"] > 0.8
