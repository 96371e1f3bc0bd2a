"""Time training steps of float, self-compressing and cut networks, side by side.

    python -m benchmarks.training --width 16
    pip install diffq, and add --diffq                     DiffQ's step too (CC-BY-NC licence)
    python -m benchmarks.training --whole                  and two whole runs on digits

Steps are train.py's own, on random images held in memory: forward, backward, the optimiser, and the
compressor's step; augmentation is timed separately. All networks take turns in one process; times
are medians, and the results to compare are their ratios. Networks with fewer MACs are the
self-compressing one after some channels of every layer, drawn at random, have lost their bits and
were cut: as in training, layers whose outputs are added lose different channels.
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks.peers import DiffQRun
from models import build, default_width
from selfcompress.training.config import Config
from selfcompress.training.data import Dataset, Split
from selfcompress.training.loop import Run, run
from selfcompress.training.memory import keep_freed
from selfcompress.training.runs import RunFolder

CLASSES, IMAGES = 10, 2048
EPOCH_IMAGES = 50_000  # of CIFAR-10; train.py cuts once per epoch


@dataclass(frozen=True)
class Options:
    """Time steps of training, and what they are made of."""

    model: str = "resnet9"
    """As in train.py."""
    width: int | None = None
    """As in train.py."""
    image_size: int = 32
    """Height and width of the images in pixels."""
    batch_size: int = 512
    """Images per step."""
    kept: tuple[float, ...] = (0.7, 0.45, 0.25)
    """Fractions of the channels of every layer that the smaller networks keep."""
    steps: int = 15
    """Steps of every network that the median is taken over."""
    threads: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Threads of torch; None is its default."""
    diffq: bool = False
    """Time DiffQ too."""
    whole: bool = False
    """Train digits to the end, in float and at γ = 0.01, and compare the time of the epochs."""


@dataclass
class Timed:
    """A network in training, and how long its steps took."""

    name: str
    run: Run
    times: list[float] = dataclasses.field(default_factory=list)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Do one training step, without augmentation, and note how long it took."""
        self.times.append(_seconds(lambda: self.run._step(images, labels), images.device))

    @property
    def seconds(self) -> float:
        return statistics.median(self.times[2:])

    @property
    def macs(self) -> int:
        return self.run.size().macs


def main() -> int:
    options = tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,), description=__doc__)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"{options.model}, {options.image_size} pixels, batch {options.batch_size}; {name}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        _steps(options, Path(folder), device)
        if options.whole:
            _whole(Path(folder))
    return 0


def _steps(options: Options, folder: Path, device: torch.device) -> None:
    dataset = _random_images(options.image_size, device)
    # With so many epochs a step changes bit depths very little, so the networks keep their sizes.
    config = Config(
        dataset="digits", model=options.model, width=options.width, epochs=100_000,
        batch_size=options.batch_size, gamma=0.01, flip=True,
    )  # fmt: skip
    config = config.resolved("digits", options.image_size, default_width(options.model))

    def make(kind: Callable[..., Run], **changes: object) -> Run:
        changed = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
        run = kind(changed, dataset, device, RunFolder(folder, {}), build)
        if run.compressor is not None:
            # In the middle of the run, where the penalty acts and formats change.
            run.compressor.steps = run.epochs * run.steps_per_epoch // 2
        return run

    networks = [
        Timed("float", make(Run, float_baseline=True)),
        Timed("self-compressing, at its start", make(Run)),
    ]
    cuts = []
    for share in options.kept:
        smaller = make(Run)
        cuts.append(_seconds(lambda run=smaller, share=share: _cut(run, share), device))  # type: ignore[misc]
        networks.append(Timed(f"… {100 * share:.0f} % of the channels", smaller))
    if options.diffq:
        diffq = make(lambda *args: DiffQRun(*args, penalty=1.0), float_baseline=True)
        networks.append(Timed("DiffQ", diffq))

    augmentation = []
    for _ in range(options.steps + 2):
        for network in networks:
            network.run.model.train()
            images, labels = next(dataset.train.batches(options.batch_size, shuffle=True))
            augmented: list[Tensor] = []
            seconds = _seconds(
                lambda images=images, to=augmented: to.append(networks[0].run.augment(images)),  # type: ignore[misc]
                device,
            )
            augmentation.append(seconds)
            network.step(augmented[0], labels)

    first, start = networks[0], networks[1]
    print("| network | MACs | ms a step | of float's | of the start's |\n|---|---|---|---|---|")
    for network in networks:
        macs = f"{100 * network.macs / start.macs:.0f} %" if network.macs else "–"
        print(
            f"| {network.name} | {macs} | {1000 * network.seconds:.1f} | "
            f"{network.seconds / first.seconds:.2f} | {network.seconds / start.seconds:.2f} |"
        )
    print("\n| beside the step | ms | of a step at the start |\n|---|---|---|")
    parts = {"augmentation": statistics.median(augmentation)}
    parts["the compressor's step"] = _compressor_step(start.run, augmented[0], labels)
    per_epoch = EPOCH_IMAGES // options.batch_size
    parts[f"a cut, over {per_epoch} steps"] = statistics.median(cuts) / per_epoch
    for part, seconds in parts.items():
        share = 100 * seconds / start.seconds
        print(f"| {part} | {1000 * seconds:.2f} | {share:.1f} % |")


def _compressor_step(run: Run, images: Tensor, labels: Tensor) -> float:
    """Return the median seconds of one `Compressor.step`, which is part of a training step."""
    compressor = run.compressor
    assert compressor is not None
    times = []
    for _ in range(5):
        run.optimizer.zero_grad()
        loss = F.cross_entropy(run.model(images), labels) + compressor.penalty()
        loss.backward()
        times.append(_seconds(lambda: compressor.step(run.optimizer), images.device))
    return statistics.median(times)


@torch.no_grad()
def _cut(run: Run, share: float) -> None:
    """Cut all but a `share` of the channels, drawn at random, of all layers but the last."""
    assert run.compressor is not None
    generator = torch.Generator().manual_seed(0)
    for layer in list(run.compressor.layers.values())[:-1]:
        if layer.grouped:  # a depthwise one loses the channels of the layer before it
            continue
        order = torch.randperm(layer.out_width, generator=generator)
        layer.bit_depth[order[max(1, round(share * layer.out_width)) :].to(layer.rows)] = 0
    run.compressor.cut(run.optimizer)


def _whole(folder: Path) -> None:
    """Train digits in float and at γ = 0.01, one after the other, and print both times."""
    seconds = {}
    for name, options in (("float", {"float_baseline": True}), ("γ = 0.01", {"gamma": 0.01})):
        config = Config(dataset="digits", run_dir=folder / name, **options)  # type: ignore[arg-type]
        summary = run(config, default_width(config.model), build)
        seconds[name] = summary["seconds_per_epoch"]
    print("\n| run on digits | s of all epochs | first five | last five |\n|---|---|---|---|")
    for name, epochs in seconds.items():
        print(f"| {name} | {sum(epochs):.1f} | {sum(epochs[:5]):.1f} | {sum(epochs[-5:]):.1f} |")
    print(f"\nthe whole run: {sum(seconds['γ = 0.01']) / sum(seconds['float']):.2f} of float's")


def _random_images(size: int, device: torch.device) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    split = Split(images.to(device), labels.to(device))
    names = tuple(map(str, range(CLASSES)))
    return Dataset("random", names, split, split, (0.5,) * 3, (0.25,) * 3, size)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    begin = _now(device)
    call()
    return _now(device) - begin


def _now(device: torch.device) -> float:
    """Return a clock's seconds, after waiting for the device to finish its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
