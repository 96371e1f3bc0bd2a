"""Descriptions of a run: on the terminal, in its network's file and in its summary."""

import dataclasses
import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from selfcompress.file.header import About, Architecture
from selfcompress.file.read import Contents
from selfcompress.size import Size
from selfcompress.training import runs

if TYPE_CHECKING:
    from selfcompress.training.loop import Run


def headline_of(run: "Run") -> str:
    """Describe, in a line, what is about to be trained, on what, how, and in which folder."""
    config, data = run.config, run.dataset
    how = "in float" if config.float_baseline else f"at γ = {run.gamma():g}"
    if run.control is not None:
        how = f"to {run.control.target:,} bytes"
    width = "" if config.width is None else f" of width {config.width}"
    return (
        f"{config.model}{width} {how} on {data.name}: "
        f"{len(data.train):,} + {len(data.test):,} images of {data.image_size} pixels, "
        f"{len(data.classes)} classes; {run.epochs} epochs, batch {run.batch_size}, "
        f"{'with' if config.flip else 'no'} flip; {_device_name(run.device)}; "
        f"in {run.folder.path}"
    )


def title_of(run: "Run") -> str:
    """Return the title of a figure: network, dataset and γ or target size."""
    how = "float" if run.compressor is None else f"γ = {run.gamma():g}"
    if run.control is not None:
        how = f"{run.control.target:,} bytes"
    width = "" if run.config.width is None else f", width {run.config.width}"
    return f"{run.config.model}{width}, {run.dataset.name}, {how}"


def about_of(run: "Run", accuracy: float) -> About:
    """Return the information about the run that its network's file stores."""
    config, data, end = run.config, run.dataset, run.size()
    assert config.dataset is not None
    return About(
        architecture=Architecture(config.model, len(data.classes), config.width, data.image_size),
        class_names=list(data.classes),
        mean=list(data.mean),
        std=list(data.std),
        image_size=data.image_size,
        dataset=data.name,
        dataset_kind=config.dataset,
        gamma=run.gamma(),
        seed=config.seed,
        epochs=run.epochs,
        test_accuracy=accuracy,
        starting_weights=run.starting_weights,
        channels_at_start=_by_layer(run.start, "channels"),
        macs_at_start=_by_layer(run.start, "macs"),
        macs=_by_layer(end, "macs"),
    )


def summary_of(
    run: "Run", history: list[dict[str, Any]], accuracy: float, contents: Contents
) -> dict[str, Any]:
    """Return the content of summary.json: options, results, versions of packages and hardware."""
    end, sizes = run.size(), contents.size
    seconds = [row["time"]["epoch_seconds"] for row in history]
    return {
        "dataset": run.dataset.name,
        "model": run.config.model,
        "gamma": run.gamma(),
        "target_bytes": None if run.control is None else run.control.target,
        "seed": run.config.seed,
        "epochs": run.epochs,
        "test_accuracy": accuracy,
        "float_bits": run.start.float_bits,
        "q_bits": end.q_bits,
        "stored_bits": end.stored_bits,
        "stored_percent": end.stored_percent,
        "file_bytes": sizes.total,
        "file_percent": 100 * 8 * sizes.total / end.float_bits,
        "file_bytes_of": dataclasses.asdict(sizes),
        "entropy_bits": contents.entropy_bits(),
        "parameters_start": run.start.parameters,
        "parameters_end": end.parameters,
        "macs_start": run.start.macs,
        "macs_end": end.macs,
        "seconds_per_epoch": seconds,
        "seconds_total": sum(seconds) + sum(row["time"]["eval_seconds"] for row in history),
        "widths_start": _by_layer(run.start, "out_width"),
        "widths_end": _by_layer(end, "out_width"),
        "channels_start": _by_layer(run.start, "channels"),
        "channels_end": _by_layer(end, "channels"),
        "config": run.config.as_json(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("selfcompress", "torch", "torchvision", "numpy")},
            "device": _device_name(run.device),
            "threads": torch.get_num_threads(),
        },
    }


def result_of(run: "Run", summary: dict[str, Any]) -> str:
    """Describe, in a few lines, the results of a finished run and where its files are."""
    seconds = summary["seconds_per_epoch"]
    return (
        f"{run.size()}\n"
        f"{summary['dataset']}: {100 * summary['test_accuracy']:.2f} % test accuracy, "
        f"{summary['parameters_end']:,} of {summary['parameters_start']:,} parameters; "
        f"an epoch {seconds[0]:.2f} s at first, {seconds[-1]:.2f} s at last\n"
        f"{run.folder.path / runs.NETWORK}: {summary['file_bytes']:,} bytes, "
        f"{summary['file_percent']:.2f} % of the 32-bit size "
        f"({summary['stored_bits'] / 8:,.0f} bytes stored, before entropy coding)\n"
        f"{run.folder.path / runs.SUMMARY}"
    )


def _device_name(device: torch.device) -> str:
    """Return the name of a GPU, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _by_layer(size: Size, attribute: str) -> dict[str, int]:
    return {layer.name: getattr(layer, attribute) for layer in size.layers if layer.out_width}
