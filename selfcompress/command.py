"""The command `selfcompress`: show, evaluate, run and export packed networks, and pick runs.

    selfcompress info net.scnn                            layers, widths, bits, bytes, accuracy
    selfcompress eval net.scnn [--data-dir DIR]           accuracy on the test images
    selfcompress predict net.scnn IMAGE [IMAGE ...]       the five likeliest classes
    selfcompress export net.scnn --onnx net.onnx          for ONNX Runtime and others
    selfcompress pick RUNS --max-bytes 100KB              the best of many runs, and its network

Networks of the package `models` are built as the file says, if the folder models/ can be imported;
for any other network, --model package.module:callable names what makes the starting network.
"""

import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec
import torch
import tyro
from torch import Tensor, nn
from torchvision.transforms import v2

from selfcompress.export import ExportError, export_onnx
from selfcompress.file.header import About, FileError
from selfcompress.file.load import load_described
from selfcompress.file.read import Contents, read
from selfcompress.sweeping.pick import describe as describe_pick
from selfcompress.sweeping.pick import pick
from selfcompress.text import aligned, first_line
from selfcompress.training.augment import Colours, normalise
from selfcompress.training.config import DatasetName
from selfcompress.training.data import load as load_dataset
from selfcompress.training.data import read_image
from selfcompress.training.errors import UserError, exit_code, out_of_memory
from selfcompress.training.evaluate import evaluate
from selfcompress.training.runs import NETWORK

TOP = 5  # classes that `predict` names
BATCH = 500  # images at a time in `eval`


@dataclass(frozen=True, kw_only=True)
class _OnFile:
    file: tyro.conf.Positional[Path]
    """A packed network, as written by train.py or selfcompress.save."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class _OnNetwork(_OnFile):
    model: Annotated[str | None, tyro.conf.arg(metavar="MODULE:CALLABLE")] = None
    """What makes the starting network, if that is one of your own."""

    def load(self) -> tuple[nn.Module, "_Prepared"]:
        """Load the network, and return it with how to prepare images for it."""
        sys.path.insert(0, os.getcwd())  # where models/ and the user's modules may be
        start = None if self.model is None else _built(self.model)
        model, about = load_described(self.file, start)
        return model, _Prepared.of(self.file, about)

    def classifier(self, batch: int) -> tuple[nn.Module, "_Prepared", int]:
        """Load a classifier, and return what `load` does and the number of its classes.

        Args:
            batch: the number of images that it is tried on.

        Raises:
            UserError: the network does not accept the images, or does not return a row of floats
                for each of them.
        """
        model, images = self.load()
        try:
            with torch.no_grad():
                logits = model(torch.zeros(batch, 3, images.size, images.size))
        except Exception as error:  # whatever the user's forward() does
            if out_of_memory(error):
                raise
            raise UserError(
                f"the network of {self.file} does not accept RGB images of {images.size} pixels "
                f"({first_line(error)}); networks of other inputs are for selfcompress.load"
            ) from error
        kind = type(logits).__name__
        if isinstance(logits, Tensor):
            if logits.is_floating_point() and logits.dim() == 2 and len(logits) == batch:
                return model, images, logits.shape[1]
            kind = f"{logits.dtype} of shape {tuple(logits.shape)}"
        raise UserError(
            f"the network of {self.file} returns {kind} for {batch} images, where a classifier "
            f"returns floats of shape ({batch}, classes); networks of other outputs are for "
            "selfcompress.load"
        )


@dataclass(frozen=True, kw_only=True)
class Info(_OnFile):
    """Show what is in a packed network: nothing is built or run."""

    def run(self) -> None:
        facts = describe(read(self.file))
        print(json.dumps(facts, indent=2) if self.json else _table(self.file, facts))


@dataclass(frozen=True, kw_only=True)
class Eval(_OnNetwork):
    """Measure a packed network's accuracy on the test images of a dataset."""

    data_dir: Path | None = None
    """The folder of the images, else data/; for a folder dataset, the folder with test/ in it."""
    dataset: DatasetName | None = None
    """The dataset to measure on; None is the one that the network was trained on."""

    def run(self) -> None:
        model, images, width = self.classifier(2)
        kinds = {kind: kind for kind in get_args(DatasetName)}
        name: DatasetName | None = self.dataset or kinds.get(images.about.dataset_kind)
        if name is None:
            raise UserError(f"{self.file} does not say what it was trained on: give --dataset")
        if name == "digits" and self.data_dir is not None:
            raise UserError(
                "digits come with scikit-learn, not from --data-dir: for images of your own add "
                "--dataset folder"
            )
        folder = self.data_dir or Path("data")
        dataset = load_dataset(name, folder, images.size, torch.device("cpu"), test_only=True)
        trained_on = tuple(images.about.class_names)
        if trained_on and dataset.classes != trained_on:
            raise UserError(
                f"{dataset.name} has other classes than {self.file} was trained on: "
                f"{_some(dataset.classes)} instead of {_some(trained_on)}"
            )
        if len(dataset.classes) != width:
            raise UserError(
                f"{dataset.name} has {len(dataset.classes)} classes, and the network of "
                f"{self.file} tells {width} apart: give the --dataset that it was trained on"
            )
        dataset = dataclasses.replace(dataset, mean=images.mean, std=images.std)
        loss, accuracy = evaluate(model, dataset, dataset.test, BATCH)
        facts = {
            "dataset": dataset.name,
            "images": len(dataset.test),
            "accuracy": accuracy,
            "loss": loss,
            "file_bytes": self.file.stat().st_size,
        }
        text = (
            f"{100 * accuracy:.2f} % of {len(dataset.test):,} test images of {dataset.name} right "
            f"(cross-entropy {loss:.4f}), from {facts['file_bytes']:,} bytes"
        )
        print(json.dumps(facts, indent=2) if self.json else text)


@dataclass(frozen=True, kw_only=True)
class Predict(_OnNetwork):
    """Name the likeliest classes of images."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files; each is resized to the size that the network was trained on."""

    def run(self) -> None:
        if not self.images:
            raise UserError("no image to look at: give one or more image files")
        model, prepared, _ = self.classifier(1)
        names = prepared.about.class_names
        found = {}
        for path in self.images:
            with torch.no_grad():
                logits = model(prepared.read(path))[0]
            probabilities, classes = logits.softmax(0).topk(min(TOP, len(logits)))
            found[str(path)] = [
                {"class": names[i] if i < len(names) else str(i), "probability": p}
                for p, i in zip(probabilities.tolist(), classes.tolist(), strict=True)
            ]
        if self.json:
            print(json.dumps(found, indent=2))
            return
        for image, best in found.items():
            print(image)
            for entry in best:
                print(f"  {100 * entry['probability']:6.2f} %  {entry['class']}")


@dataclass(frozen=True, kw_only=True)
class Export(_OnNetwork):
    """Write a packed network as an ONNX file."""

    onnx: Path
    """The file to write."""

    def run(self) -> None:
        model, images = self.load()
        notes = {
            "class_names": json.dumps(images.about.class_names),
            "mean": json.dumps(images.mean),
            "std": json.dumps(images.std),
        }
        example = torch.zeros(2, 3, images.size, images.size)
        size = export_onnx(model, example, self.onnx, notes=notes)
        facts = {"onnx": str(self.onnx), "onnx_bytes": size, "file_bytes": self.file.stat().st_size}
        text = f"{self.onnx}: {size:,} bytes (the packed file: {facts['file_bytes']:,})"
        print(json.dumps(facts, indent=2) if self.json else text)


@dataclass(frozen=True, kw_only=True)
class Pick:
    """Find the most accurate run that is small enough, or the smallest that is accurate enough."""

    runs: tyro.conf.Positional[Path]
    """A folder with runs of one dataset in it, such as a sweep's."""
    max_bytes: Annotated[str | None, tyro.conf.arg(metavar="SIZE")] = None
    """Largest file: 100KB (100,000 bytes), 1.5MB, 20000, or 3% of 32 bits per starting weight."""
    min_accuracy: float | None = None
    """Lowest accuracy on the test images, from 0 to 1."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        best = pick(self.runs, self.max_bytes, self.min_accuracy)
        facts = best.row() | {"file": str(best.folder / NETWORK)}
        print(json.dumps(facts, indent=2) if self.json else describe_pick(best))


@dataclass(frozen=True)
class _Prepared:
    """How to prepare images for a network, and what else its file says."""

    about: About
    size: int
    mean: Colours
    std: Colours

    @classmethod
    def of(cls, path: Path, about: About) -> "_Prepared":
        if about.image_size is None or len(about.mean) != 3 or len(about.std) != 3:
            raise UserError(
                f"{path} does not say how RGB images are prepared for it: save it with "
                "About(image_size=…, mean=(r, g, b), std=(r, g, b)). Networks of other inputs are "
                "for selfcompress.load and selfcompress.export_onnx"
            )
        (r, g, b), (sr, sg, sb) = about.mean, about.std
        return cls(about, about.image_size, (r, g, b), (sr, sg, sb))

    def read(self, path: Path) -> Tensor:
        """Return an image file as a normalised (1, 3, size, size) tensor.

        Raises:
            UserError: there is no such file, or it is no image.
        """
        if not path.is_file():
            raise UserError(f"there is no image file {path}")
        pixels = v2.functional.pil_to_tensor(read_image(str(path)))
        pixels = v2.functional.resize(pixels, [self.size, self.size], antialias=True)
        return normalise(pixels[None], self.mean, self.std)


def main() -> int:
    """Run the command and return its exit code: 0 on success, 2 for a user's mistake, else 1.

    See `exit_code` for the codes after Ctrl-C and a broken pipe.
    """
    commands = Info | Eval | Predict | Export | Pick
    command = tyro.cli(
        commands,
        prog="selfcompress",
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )

    def run() -> int:
        command.run()
        return 0

    return exit_code(run, mistakes=(FileError,), failures=(ExportError,))


def describe(contents: Contents) -> dict[str, Any]:
    """Return what `info` shows as plain values, sizes in bits or bytes as named, accuracy 0-1."""
    header, about, size = contents.header, contents.header.about, contents.size
    layers = []
    for entry in header.layers:
        layer = contents.layers[entry.name]
        q_bits = int(layer.depths.sum()) * entry.fan_in
        layers.append(
            {
                "name": entry.name,
                "channels_at_start": about.channels_at_start.get(entry.name),
                "channels": entry.live,
                "mean_bits": float(layer.depths.sum()) / max(1, entry.live),
                "weights": entry.live * entry.fan_in,
                "q_bits": q_bits,
                "macs_at_start": about.macs_at_start.get(entry.name),
                "macs": about.macs.get(entry.name),
            }
        )
    float_bits = 32 * about.starting_weights if about.starting_weights else None
    return {
        "model": about.architecture and msgspec.structs.asdict(about.architecture),
        "dataset": about.dataset or None,
        "gamma": about.gamma,
        "test_accuracy": about.test_accuracy,
        "classes": len(about.class_names) or None,
        "image_size": about.image_size,
        "layers": layers,
        "layers_in_float": [entry.name for entry in header.float_layers],
        "q_bits": header.q_bits,
        "stored_bits": header.stored_bits,
        "entropy_bits_of_integers": contents.entropy_bits(),
        "file_bytes": size.total,
        "file_bytes_of": dataclasses.asdict(size),
        "file_percent_of_float": 100 * 8 * size.total / float_bits if float_bits else None,
    }


def _table(path: Path, facts: dict[str, Any]) -> str:
    rows = [("layer", "channels", "mean bits", "weights", "Q bits", "MACs")]
    for layer in facts["layers"]:
        rows.append(
            (
                layer["name"],
                _before_after(layer["channels_at_start"], layer["channels"]),
                f"{layer['mean_bits']:.2f}",
                f"{layer['weights']:,}",
                f"{layer['q_bits']:,}",
                _before_after(layer["macs_at_start"], layer["macs"]),
            )
        )
    lines = [_about(path, facts), *aligned(rows, numbers=True)]
    if facts["layers_in_float"]:
        lines.append("in float: " + ", ".join(facts["layers_in_float"]))
    parts = facts["file_bytes_of"]
    of_float = facts["file_percent_of_float"]
    percent = "" if of_float is None else f", {of_float:.2f} % of the starting weights at 32 bits"
    lines += [
        f"Q {facts['q_bits']:,} bits; stored {facts['stored_bits']:,} bits "
        f"({facts['stored_bits'] / 8:,.0f} bytes); the integers' entropy "
        f"{facts['entropy_bits_of_integers'] / 8:,.0f} bytes",
        f"file {facts['file_bytes']:,} bytes{percent}: "
        + ", ".join(f"{name} {count:,}" for name, count in parts.items()),
    ]
    return "\n".join(lines)


def _about(path: Path, facts: dict[str, Any]) -> str:
    """Return one line on what is known of the network besides its layers."""
    model = facts["model"] or {}
    width = f" of width {model['width']}" if model.get("width") else ""
    said = [
        f"{model['name']}{width}" if model else "",
        f"{facts['classes']} classes" if facts["classes"] else "",
        f"{facts['image_size']} pixels" if facts["image_size"] else "",
        f"trained on {facts['dataset']}" if facts["dataset"] else "",
        "" if facts["gamma"] is None else f"γ = {facts['gamma']:g}",
        ""
        if facts["test_accuracy"] is None
        else f"test accuracy {100 * facts['test_accuracy']:.2f} %",
    ]
    return f"{path}: {', '.join(part for part in said if part) or 'a packed network'}"


def _before_after(before: int | None, now: int | None) -> str:
    if now is None:
        return "-"
    return f"{now:,}" if before is None else f"{before:,} → {now:,}"


def _built(builder: str) -> nn.Module:
    """Call the callable in `builder`, "package.module:callable", and return its network."""
    module_name, colon, name = builder.partition(":")
    if not colon or not name:
        raise UserError(f"--model {builder}: give MODULE:CALLABLE, such as my.networks:make")
    try:
        make = getattr(importlib.import_module(module_name), name)
        if not callable(make):
            raise TypeError(f"{name} cannot be called")
        model = make()
    except Exception as error:  # whatever the user's code does when it is imported and called
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"--model {builder}: {reason}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"--model {builder}: it returns {type(model).__name__}, not a torch module")
    return model


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
