"""The output of a run: TensorBoard files, the figure of layer widths, and a line per epoch."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from selfcompress.layers.quantized import quantized_layers
from selfcompress.quantizer import integer_depth
from selfcompress.size import LayerSize

# Shown on the HPARAMS page, which starts with the first five options by name: γ must be among them.
HPARAMS_OPTIONS = (
    "bits", "dataset", "epochs", "gamma", "lr", "model", "seed", "weight_decay", "width",
)  # fmt: skip
HPARAMS_METRICS = (
    "val/accuracy", "size/file_bytes", "size/stored_percent", "size/weights_percent",
    "time/epoch_seconds",
)  # fmt: skip
LISTED_LAYERS = 16  # most layers whose channels an epoch's line lists one by one


class Board:
    """Writes a run's TensorBoard files, replacing epochs from `first_epoch` on after a resume."""

    def __init__(self, folder: Path, first_epoch: int) -> None:
        self.writer = SummaryWriter(str(folder), purge_step=first_epoch)
        if first_epoch == 0:
            self.writer.add_custom_scalars(
                {
                    "selfcompress": {
                        "accuracy": ["Multiline", ["val/accuracy"]],
                        "size (percent of 32-bit)": ["Multiline", ["size/stored_percent"]],
                        "file and target (KB)": ["Multiline", ["size/file_kb", "size/target_kb"]],
                        "γ": ["Multiline", ["train/gamma"]],
                        "weights left (percent)": ["Multiline", ["size/weights_percent"]],
                        "seconds per epoch": ["Multiline", ["time/epoch_seconds"]],
                    }
                }
            )

    def write(self, epoch: int, metrics: dict[str, Any], model: nn.Module) -> None:
        """Write an epoch: every scalar of `metrics`, and a histogram of each layer's bit depths."""
        for group in ("train", "val", "size", "bits", "channels", "time"):
            for name, value in metrics.get(group, {}).items():
                self.writer.add_scalar(f"{group}/{name}", value, epoch)
        for name, layer in quantized_layers(model).items():
            depth = integer_depth(layer.bit_depth)
            if depth.numel():
                self.writer.add_histogram(f"bit_depth/{name}", depth, epoch)
        self.writer.flush()

    def write_widths(self, image: bytes, epoch: int) -> None:
        """Write the figure of layer widths, given as PNG bytes."""
        pixels = np.array(Image.open(io.BytesIO(image)).convert("RGB"))
        self.writer.add_image("widths", torch.from_numpy(pixels), epoch, dataformats="HWC")

    def write_hyperparameters(self, summary: dict[str, Any]) -> None:
        """Write a finished run's line on the HPARAMS page: its options and its results."""
        epoch = summary["epochs"] - 1
        self.writer.add_scalar("size/file_bytes", summary["file_bytes"], epoch)
        config = summary["config"]
        chosen = {name: config[name] for name in HPARAMS_OPTIONS if config[name] is not None}
        shown = dict.fromkeys(HPARAMS_METRICS)  # whose values are the scalars already written
        for part in hparams(chosen, shown):
            self.writer._get_file_writer().add_summary(part)

    def close(self) -> None:
        self.writer.close()


def widths_figure(before: dict[str, int], after: list[LayerSize], title: str) -> bytes:
    """Draw live channels per layer at the start and now, with mean bits (Fig. 4), as PNG bytes."""
    now = {layer.name: layer for layer in after}
    names = list(before)
    figure = Figure(figsize=(8, 0.45 * len(names) + 1.6), layout="constrained")
    axes = figure.subplots()
    place = np.arange(len(names))
    left = [now[name].channels for name in names]
    axes.barh(place, list(before.values()), color="#d9d9d9", label="at the start")
    axes.barh(place, left, color="#2b6cb0", label="left")
    room = max(before.values())
    for at, name in enumerate(names):
        layer = now[name]
        text = f"{layer.channels} of {before[name]}"
        if layer.channels:
            text += f", {layer.mean_bits:.1f} bits"
        axes.text(before[name] + 0.01 * room, at, text, va="center", fontsize=9)
    axes.set_yticks(place, names)
    axes.margins(y=0.5 / len(names))  # half a bar, however many there are
    axes.invert_yaxis()
    axes.set_xlim(0, 1.28 * room)
    axes.set_xlabel("output channels")
    axes.set_title(title, fontsize=10)
    axes.legend(loc="lower right", fontsize=9, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def epoch_line(metrics: dict[str, Any], epochs: int) -> str:
    """Describe an epoch in one line; above `LISTED_LAYERS` layers, live channels are summed."""
    size, epoch, counts = metrics["size"], metrics["epoch"], metrics["channels"].values()
    file = ""
    if "target_kb" in size:
        file = (
            f"  file {size['file_kb']:,.1f} of {size['target_kb']:,.1f} KB"
            f"  γ {metrics['train']['gamma']:.2g}"
        )
    channels = " ".join(map(str, counts)) if len(counts) <= LISTED_LAYERS else f"{sum(counts):,}"
    return (
        f"epoch {epoch + 1:>{len(str(epochs))}}/{epochs}"
        f"  loss {metrics['train']['loss']:.3f}"
        f"  test accuracy {100 * metrics['val']['accuracy']:.2f} %"
        f"  Q {size['q_percent']:.2f} %"
        f"  stored {size['stored_kb']:,.1f} KB"
        f"{file}  weights {size['weights_percent']:.1f} %"
        f"  channels {channels}"
        f"  {metrics['time']['epoch_seconds']:.2f} s"
    )
