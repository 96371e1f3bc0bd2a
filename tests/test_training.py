"""train.py as a user meets it: runs, resumes, refusals, and what a run leaves behind."""

import errno
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Cli, assert_refused
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.datasets import CIFAR10

from models import NAMES, default_width
from selfcompress.training import loop, runs, setup
from selfcompress.training.config import Config
from selfcompress.training.data import load as load_dataset
from selfcompress.training.errors import UserError
from selfcompress.training.lock import LOCK, hold
from selfcompress.training.setup import run_dir

TINY = (
    "--dataset digits --width 4 --image-size 8 --epochs 4 --batch-size 128 --device cpu "
    "--precision fp32 --gamma 0.1"
).split()


def interrupt_before(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the next run stop, as by Ctrl-C, in the middle of `epoch` (counted from 0)."""
    whole_step = loop.Run._step

    def step(self: loop.Run, *batch: torch.Tensor) -> torch.Tensor:
        if self.scheduler.last_epoch == epoch * self.steps_per_epoch + 2:
            raise KeyboardInterrupt
        return whole_step(self, *batch)

    monkeypatch.setattr(loop.Run, "_step", step)


def tensors(value: Any, path: str = "") -> dict[str, Any]:
    """Return every tensor and number in a nested checkpoint by its path."""
    if isinstance(value, dict):
        parts = [tensors(v, f"{path}/{k}") for k, v in value.items()]
    elif isinstance(value, list | tuple):
        parts = [tensors(v, f"{path}/{i}") for i, v in enumerate(value)]
    else:
        return {path: value}
    return {k: v for part in parts for k, v in part.items()}


def assert_same_run(a: Path, b: Path) -> None:
    one, other = (
        tensors(torch.load(folder / runs.CHECKPOINT, weights_only=True)) for folder in (a, b)
    )
    assert one.keys() == other.keys()
    for place, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[place]), place
        else:
            assert value == other[place], place


@pytest.mark.parametrize("epoch", [2, 3])
def test_interrupted_run_ends_in_the_same_weights(
    epoch: int, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # γ is high enough for channels to be cut before and after both interruptions.
    args = [*TINY, "--gamma", "0.003", "--bits", "2", "--width", "8"]
    args += ["--penalty-from", "0", "--penalty-until", "1"]
    assert cli(*args, "--run-dir", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_before(epoch, patch)
        code, _, err = cli(*args, "--run-dir", tmp_path / "parts")
        assert code == 130
        assert "the same command goes on" in err
    assert not (tmp_path / "parts" / runs.SUMMARY).exists()
    code, out, _ = cli(*args, "--run-dir", tmp_path / "parts")
    assert code == 0
    assert f"going on after epoch {epoch} of 4" in out

    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    rows = [
        [json.loads(line) for line in (tmp_path / name / runs.METRICS).read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    for whole, parts in zip(*rows, strict=True):
        assert {k: v for k, v in whole.items() if k != "time"} == {
            k: v for k, v in parts.items() if k != "time"
        }
    parameters = [row["size"]["parameters"] for row in rows[0]]
    summary = json.loads((tmp_path / "whole" / runs.SUMMARY).read_text())
    assert summary["parameters_start"] > parameters[epoch - 1] > parameters[-1]


def test_float_baseline_resumes_too(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*TINY[:-2], "--float"]
    assert cli(*args, "--run-dir", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_before(2, patch)
        assert cli(*args, "--run-dir", tmp_path / "parts")[0] == 130
    assert cli(*args, "--run-dir", tmp_path / "parts")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    summary = json.loads((tmp_path / "whole" / runs.SUMMARY).read_text())
    assert summary["gamma"] is None
    assert summary["config"]["float"] is True
    assert summary["parameters_start"] == summary["parameters_end"]
    assert summary["stored_bits"] > summary["float_bits"]  # batch norms are stored too


def test_what_a_run_leaves_behind(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, out, _ = cli(*TINY, "--run-dir", folder)
    assert code == 0
    assert out.count("\nepoch ") == 4  # a line per epoch
    summary = json.loads((folder / runs.SUMMARY).read_text())
    wanted = (
        "dataset model gamma seed epochs test_accuracy float_bits q_bits stored_bits "
        "parameters_start parameters_end macs_start macs_end seconds_per_epoch seconds_total "
        "widths_start widths_end config versions"
    ).split()
    assert summary.keys() >= set(wanted)
    assert summary["dataset"] == "digits"
    assert summary["model"] == "resnet9"
    assert 0 <= summary["test_accuracy"] <= 1
    assert len(summary["seconds_per_epoch"]) == 4
    assert summary["q_bits"] < summary["stored_bits"] < summary["float_bits"]
    assert (folder / runs.WIDTHS).read_bytes().startswith(b"\x89PNG")

    events = EventAccumulator(str(folder / runs.TENSORBOARD)).Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {
        "train/loss", "val/accuracy", "size/q_percent", "size/stored_kb", "time/epoch_seconds",
        "bits/res1.block1.conv", "channels/linear",
    }  # fmt: skip
    assert len(events.Scalars("size/stored_kb")) == 4
    assert "bit_depth/prep.conv" in events.Tags()["histograms"]
    assert "widths" in events.Tags()["images"]
    assert any("custom_scalars" in tag for tag in events.Tags()["tensors"])
    hparams = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert all(name.encode() in hparams for name in ("gamma", "seed", "width"))
    assert events.Scalars("size/file_bytes")[-1].value == summary["file_bytes"]
    last = events.Scalars("size/stored_kb")[-1].value
    assert last == pytest.approx(summary["stored_bits"] / 8000, rel=1e-6)


def test_finished_runs_are_skipped_and_others_refused(cli: Cli, tmp_path: Path) -> None:
    args = [*TINY, "--epochs", "1", "--run-dir", tmp_path / "run"]
    assert cli(*args)[0] == 0
    before = (tmp_path / "run" / runs.SUMMARY).read_bytes()
    code, out, _ = cli(*args)
    assert code == 0
    assert "is finished" in out
    assert (tmp_path / "run" / runs.SUMMARY).read_bytes() == before

    assert_refused(cli(*args, "--seed", "1"), "seed is 0 there and 1 here")
    code, out, _ = cli(*args, "--seed", "1", "--overwrite")
    assert code == 0
    assert json.loads((tmp_path / "run" / runs.SUMMARY).read_text())["seed"] == 1


def test_every_model_has_runs_of_its_own(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*TINY, "--model", "resnet20", "--epochs", "2", "--batch-size", "400"]
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        interrupt_before(1, patch)
        assert cli(*args)[0] == 130
    code, out, _ = cli(*args)
    assert code == 0
    assert "resnet20 of width 4 at γ = 0.1" in out
    assert "going on after epoch 1 of 2" in out
    folder = Path("runs/digits-resnet20-w4-gamma0.1-seed0")
    assert "is finished" in cli(*args)[1]
    config = json.loads((folder / runs.CONFIG).read_text())
    assert (config["model"], config["width"]) == ("resnet20", 4)
    assert json.loads((folder / runs.SUMMARY).read_text())["model"] == "resnet20"

    other = cli(*args, "--model", "resnet9", "--run-dir", folder)
    assert_refused(other, "model is resnet20 there and resnet9 here")


def test_torchvision_models_have_no_width(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "torchvision:squeezenet1_1"
    args = [*TINY, "--model", name]
    for how in ([], ["--float"]):
        refused = cli(*args, *how)
        assert_refused(refused, f"{name} does not accept images of 8 pixels", "--image-size")
    assert not (tmp_path / "runs").exists()

    args += ["--image-size", "20", "--epochs", "1", "--batch-size", "700", "--float"]
    code, out, err = cli(*args)
    assert code == 0
    assert f"warning: --width has no effect with --model {name}" in err
    assert f"{name} in float" in out
    folder = Path("runs/digits-torchvision-squeezenet1_1-float-seed0")
    assert json.loads((folder / runs.CONFIG).read_text())["width"] is None
    at = args.index("--width")
    del args[at : at + 2]
    _, out, err = cli(*args)
    assert "is finished" in out  # --width makes no other run
    assert "--width" not in err


def test_default_width_is_the_models(tmp_path: Path) -> None:
    dataset = load_dataset("digits", tmp_path, 8, torch.device("cpu"))
    for model, width, name in (
        ("resnet9", 64, "digits-resnet9-w64-gamma0.01-seed0"),
        ("vit", 192, "digits-vit-w192-gamma0.01-seed0"),
        ("torchvision:resnet18", None, "digits-torchvision-resnet18-gamma0.01-seed0"),
    ):
        config = Config(model=model).resolved("digits", 8, default_width(model))
        assert config.width == width
        assert run_dir(config, dataset) == Path("runs") / name


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--gamma", "-0.1"], "--gamma"),
        (["--gamma", "nan"], "--gamma"),
        (["--gamma", "1e305"], "--gamma"),
        (["--width", "0"], "--width"),
        (["--epochs", "0"], "--epochs"),
        (["--image-size", "4"], "--image-size"),
        (["--bits", "0"], "--bits"),
        (["--bits", "17"], "--bits"),
        (["--lr", "0"], "--lr"),
        (["--penalty-from", "0.9"], "--penalty-from"),
        (["--exclude", "nothing"], "nothing"),
        (["--batch-size", "5000"], "--batch-size"),
        (["--dataset", "folder", "--data-dir", "missing"], "missing"),
    ],
)
def test_bad_input_is_one_line(args: list[str], part: str, cli: Cli, tmp_path: Path) -> None:
    assert_refused(cli(*TINY, "--run-dir", tmp_path / "run", *args), part)
    assert not (tmp_path / "run").exists()


def test_unknown_dataset_is_refused(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli("--dataset", "imagenet")
    assert stop.value.code not in (0, None)
    assert "imagenet" in capsys.readouterr().err


def test_unknown_model_is_refused_before_anything_is_loaded(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*_: object) -> None:
        raise AssertionError("the dataset was loaded")

    monkeypatch.setattr(setup, "load", unwanted)
    result = cli(*TINY, "--model", "resnet19")
    assert result[0] == 2
    assert_refused(result, "'resnet19'", "resnet9, resnet20", "torchvision:resnet18")


def test_help_lists_the_models(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli("--help")
    shown = capsys.readouterr().out
    for name in (*NAMES, "torchvision:NAME"):
        assert name in shown


def test_several_processes_are_refused(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("2", "two"):
        monkeypatch.setenv("WORLD_SIZE", value)
        assert_refused(cli(*TINY), "WORLD_SIZE")


def test_options_without_effect_warn(cli: Cli, tmp_path: Path) -> None:
    _, _, err = cli(*TINY, "--float", "--epochs", "1", "--run-dir", tmp_path / "run")
    assert "warning: --gamma has no effect with --float" in err


def test_falls_back_to_digits_loudly_and_by_name(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CIFAR10, "url", "https://invalid.invalid/cifar.tar.gz")
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("--width", "2", "--epochs", "1", "--image-size", "8")
    assert code == 0
    assert "TRAINING ON DIGITS INSTEAD" in err
    assert "1 epochs, batch 64, no flip" in out
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("digits-")
    assert json.loads((folder / runs.SUMMARY).read_text())["dataset"] == "digits"

    assert_refused(cli("--dataset", "cifar10"), "cifar10")


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 1437 // 128

    def explode(self: loop.Run, step: int) -> float:
        return 1.0 if step < steps else math.inf

    monkeypatch.setattr(loop.Run, "_lr_factor", explode)
    assert_refused(cli(*TINY, "--run-dir", tmp_path / "run"), f"nan at step {steps + 1}")
    checkpoint = torch.load(tmp_path / "run" / runs.CHECKPOINT, weights_only=True)
    assert checkpoint["epoch"] == 1
    model = checkpoint["network"]["model"]
    assert all(t.isfinite().all() for t in model.values())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("err == 0. DefaultCPUAllocator: can't allocate memory: you tried\nto"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA error: out of memory"),
    ],
)
@pytest.mark.parametrize("where", ["train.build", "selfcompress.training.loop.Run._step"])
def test_memory_that_does_not_suffice_is_told_apart(
    where: str, error: Exception, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(where, fail)
    result = cli(*TINY, "--run-dir", tmp_path / "run")
    assert_refused(result, "not enough memory", "try a smaller --batch-size or --width")
    assert "does not accept images" not in result[2]


def test_other_errors_are_not_taken_for_want_of_memory(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("kernel size")

    args = [*TINY, "--run-dir", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr("train.build", fail)
        assert_refused(cli(*args), "resnet9 does not accept images of 8 pixels (kernel size)")
    monkeypatch.setattr(loop.Run, "_step", fail)
    with pytest.raises(RuntimeError, match="kernel size"):
        cli(*args)


def test_damaged_and_foreign_checkpoints_are_refused(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*TINY, "--run-dir", tmp_path / "run"]
    with monkeypatch.context() as patch:
        interrupt_before(1, patch)
        cli(*args)
        cli(*TINY, "--width", "5", "--run-dir", tmp_path / "wider")
    checkpoint = tmp_path / "run" / runs.CHECKPOINT
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: len(content) // 2])
    assert_refused(cli(*args), "checkpoint.pt cannot be read")
    checkpoint.write_bytes((tmp_path / "wider" / runs.CHECKPOINT).read_bytes())
    assert_refused(cli(*args), "checkpoint.pt does not fit")
    checkpoint.write_bytes(content)
    assert cli(*args)[0] == 0


@pytest.mark.parametrize(
    "error",
    [RuntimeError("out of memory"), PermissionError(errno.EACCES, "Permission denied", "x")],
)
def test_a_checkpoint_that_may_be_intact_is_not_called_damaged(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Errors of memory or permissions say nothing about the file, so its removal is not advised."""

    def fail(*_: object, **__: object) -> None:
        raise error

    args = [*TINY, "--run-dir", tmp_path / "run"]
    with monkeypatch.context() as patch:
        interrupt_before(1, patch)
        cli(*args)
    for place in ("torch.load", "selfcompress.compressor.Compressor.load_state_dict"):
        if isinstance(error, PermissionError) and place != "torch.load":
            continue
        with monkeypatch.context() as patch:
            patch.setattr(place, fail)
            code, _, err = cli(*args)
        assert code == 1 and str(error.args[-1]).split()[0] in err and "remove" not in err
    assert cli(*args)[0] == 0


def test_full_disk_leaves_the_last_checkpoint_whole(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*TINY, "--run-dir", tmp_path / "run"]
    with monkeypatch.context() as patch:
        interrupt_before(1, patch)
        cli(*args)
    before = (tmp_path / "run" / runs.CHECKPOINT).read_bytes()
    replace = os.replace

    def full(source: str, target: Path) -> None:
        if Path(target).name == runs.CHECKPOINT:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert_refused(cli(*args), "No space left on device", "checkpoint.pt")
    assert (tmp_path / "run" / runs.CHECKPOINT).read_bytes() == before
    assert not list((tmp_path / "run").glob(".checkpoint*"))
    assert cli(*args)[0] == 0


@pytest.mark.parametrize("args", [TINY, [*TINY[:-2], "--float"]])
def test_loss_that_diverges_in_the_last_step_of_an_epoch_is_not_kept(
    args: list[str], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 1437 // 128

    def explode(self: loop.Run, step: int) -> float:
        return math.inf if step == 2 * steps - 1 else 1.0

    monkeypatch.setattr(loop.Run, "_lr_factor", explode)
    assert_refused(cli(*args, "--run-dir", tmp_path / "run"))
    checkpoint = torch.load(tmp_path / "run" / runs.CHECKPOINT, weights_only=True)
    assert checkpoint["epoch"] == 1
    assert all(t.isfinite().all() for t in checkpoint["network"]["model"].values())


def test_overwrite_removes_nothing_but_a_run(cli: Cli, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("config.json", "checkpoint.pt", "thesis.tex"):
        (foreign / name).write_text("{}")
    assert_refused(cli(*TINY, "--run-dir", foreign, "--overwrite"), "not a run's folder")
    assert sorted(f.name for f in foreign.iterdir()) == [
        "checkpoint.pt", "config.json", "thesis.tex"
    ]  # fmt: skip

    args = [*TINY, "--epochs", "1", "--run-dir", tmp_path / "run"]
    assert cli(*args)[0] == 0
    before = sorted(f.name for f in (tmp_path / "run").iterdir())
    assert_refused(cli(*args, "--exclude", "nothing", "--overwrite"), "nothing")
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == before


def test_a_folder_in_which_another_process_trains_is_refused(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*TINY, "--epochs", "1", "--run-dir", tmp_path / "run"]
    monkeypatch.setattr(runs, "_LET_GO", 0.2)
    for more in ([], ["--overwrite"]):
        with hold(tmp_path / "run", "train.py"):
            assert_refused(cli(*args, *more), "another train.py is at work", "run")
        assert [file.name for file in (tmp_path / "run").iterdir()] == [LOCK]
    # A process that is killed while it writes leaves this, and releases its lock.
    (tmp_path / "run" / ".config.json.x1y2z3_4").write_text("{")
    (tmp_path / "run" / ".checkpoint.pt.x1y2z3_4").write_text("")
    assert cli(*args)[0] == 0
    assert not [
        f for f in (tmp_path / "run").iterdir() if f.name.startswith(".") and f.name != LOCK
    ]


def test_a_folder_that_another_run_has_taken_meanwhile_is_refused(tmp_path: Path) -> None:
    one, other = (
        runs.RunFolder(tmp_path / "run", {"dataset": "digits", "gamma": gamma, "seed": 0})
        for gamma in (0.01, 0.3)
    )
    assert one.check() is other.check() is None
    with one.claim(overwrite=False):
        one.write_checkpoint({"epoch": 1})
    with pytest.raises(UserError, match=r"holds another run \(gamma is 0\.01 there"):
        other.claim(overwrite=False).__enter__()
    with one.claim(overwrite=False):
        one.write_summary({})
    with pytest.raises(UserError, match="has just finished"):
        one.claim(overwrite=False).__enter__()


def test_a_run_is_the_same_wherever_its_images_are_unless_it_is_of_a_folder() -> None:
    cases: list[tuple[Any, bool]] = [("cifar10", True), ("digits", True), ("folder", False)]
    for dataset, same in cases:
        runs_ = [Config(dataset=dataset, data_dir=Path(where)).as_json() for where in "ab"]
        assert (runs_[0] == runs_[1]) == same


def test_a_class_that_no_file_can_name_is_refused_at_once(cli: Cli, tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("a", "b\tc"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (8, 8)).save(tmp_path / "data" / part / name / f"{i}.png")
    args = "--dataset folder --width 4 --batch-size 8 --epochs 1".split()
    paths = ["--data-dir", tmp_path / "data", "--run-dir", tmp_path / "run"]
    assert_refused(cli(*args, *paths), r"b\tc")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("epoch", [0, 2])
def test_every_epoch_is_told_once_after_a_kill_between_its_metrics_and_its_checkpoint(
    epoch: int, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*TINY, "--run-dir", tmp_path / "run"]
    write = runs.RunFolder.write_checkpoint

    def killed(self: runs.RunFolder, state: dict[str, Any]) -> None:
        if state["epoch"] == epoch + 1:
            raise KeyboardInterrupt
        write(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(runs.RunFolder, "write_checkpoint", killed)
        assert cli(*args)[0] != 0
    assert cli(*args)[0] == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2, 3]
    events = EventAccumulator(str(tmp_path / "run" / runs.TENSORBOARD)).Reload()
    assert [point.step for point in events.Scalars("val/accuracy")] == [0, 1, 2, 3]
    assert any("custom_scalars" in tag for tag in events.Tags()["tensors"])


def test_run_folder_that_cannot_be_is_one_line(cli: Cli, tmp_path: Path) -> None:
    """A run folder that cannot be made, or holds other files, is refused in one line."""
    (tmp_path / "file").write_text("")
    assert_refused(cli(*TINY, "--run-dir", tmp_path / "file" / "run"), str(tmp_path / "file"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    assert_refused(cli(*TINY, "--run-dir", tmp_path / "full"), "choose another --run-dir")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_a_cpu_keeps_what_a_step_frees() -> None:
    """keep_freed() has glibc keep freed memory, so that using it again causes no page faults."""
    code = (
        "import resource, sys, torch\n"
        "from selfcompress.training.memory import keep_freed\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(2**24)\n"  # 64 MiB, 16,384 pages
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults(); ordinary = faults(); keep_freed()\n"
        "print(ordinary, min(faults() for _ in range(6)))"  # the first ones find no room yet
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ordinary, kept = map(int, done.stdout.split())
    assert kept < 0.01 * ordinary
