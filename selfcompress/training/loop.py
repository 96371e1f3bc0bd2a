"""The training loop of a run, from its configuration to its summary."""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from selfcompress.compressor import Compressor
from selfcompress.disk import write_atomically
from selfcompress.file.header import About, check_about
from selfcompress.file.load import set_up
from selfcompress.file.read import read, unpack
from selfcompress.file.write import pack
from selfcompress.formats import Collected
from selfcompress.graph.follow import channel_graph
from selfcompress.replay import Replay
from selfcompress.schedule import Schedule
from selfcompress.size import Size, measure, starting_weights
from selfcompress.text import first_line
from selfcompress.training import runs
from selfcompress.training.augment import Augment, normalise
from selfcompress.training.board import Board, epoch_line, widths_figure
from selfcompress.training.config import Config
from selfcompress.training.data import Dataset
from selfcompress.training.errors import UserError, out_of_memory
from selfcompress.training.evaluate import evaluate, loss_and_accuracy
from selfcompress.training.filesize import FileSize
from selfcompress.training.memory import keep_freed
from selfcompress.training.read_late import late
from selfcompress.training.setup import autocast_of, device_of, load_data, run_dir
from selfcompress.training.size_control import SizeControl
from selfcompress.training.summary import about_of, headline_of, result_of, summary_of, title_of
from selfcompress.undisturbed import kept_modes

BuildModel = Callable[[str, int, int | None, int], nn.Module]
"""Builds the float network to train, from its name, number of classes, width and image size."""

WARM_UP = 0.2  # fraction of the run in which the learning rate rises
LABEL_SMOOTHING = 0.1
EXAMPLES = 8  # images that cuts are checked with
STATISTICS_BATCHES = 100  # most batches for the batch-norm statistics of the final network
EVALUATION_BATCHES = 10  # most batches for batch-norm statistics after all epochs but the last
MOST_BITS = 8  # bit depth up to which rows may grow to fill a file up to --target-size
FIT_BATCHES = 8  # batches that estimate what a bit is worth when fitting to --target-size
UNKNOWN_ACCURACY = 0.8765432198765432  # stands for the accuracy in a file that is only measured
SLACK = 32  # bytes by which the compressed header may grow with the true accuracy in it


def run(
    config: Config,
    default_width: int | None,
    build_model: BuildModel,
    make: "Callable[..., Run] | None" = None,
) -> dict[str, Any]:
    """Train a network, or resume an interrupted run, and return the run's summary.

    A run that is finished already is not trained again, unless `config.overwrite` is set.

    Args:
        default_width: default width of the model that `config` names; None if it cannot be chosen.
        build_model: builds that model.
        make: makes the run; None is `Run`.

    Raises:
        UserError: something that the user can correct.
    """
    config.validate()
    for warning in config.without_effect():
        print(f"warning: {warning}", file=sys.stderr)
    device = device_of(config)
    if device.type == "cpu":
        keep_freed()
    dataset_name, dataset = load_data(config, device)
    config = config.resolved(dataset_name, dataset.image_size, default_width)
    folder = runs.RunFolder(run_dir(config, dataset), config.as_json())
    summary = None if config.overwrite else folder.check()
    if summary is not None:
        print(f"{folder.path} is finished; --overwrite starts it over")
        return summary
    # Wrong options raise errors here, before anything on disk is changed.
    one = (make or Run)(config, dataset, device, folder, build_model)
    with folder.claim(config.overwrite):
        return one.train()


@dataclass
class Differentiated:
    """What a training step has computed once its gradients are known.

    Attributes:
        told: (2,) the task's loss, and the number of correctly classified images.
        gradients: the gradient of each parameter.
        collected: what the compressor's format stepper collected from the gradients.
    """

    told: Tensor
    gradients: dict[nn.Parameter, Tensor | None]
    collected: Collected


class Run:
    """A network in training, with all the state that a checkpoint has to restore."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        device: torch.device,
        folder: runs.RunFolder,
        build_model: BuildModel,
    ) -> None:
        assert config.epochs and config.batch_size and config.flip is not None
        self.config, self.dataset, self.device = config, dataset, device
        self.folder, self.build_model = folder, build_model
        self.storage = {} if config.float_baseline else runs.STORAGE
        self.epochs, self.batch_size = config.epochs, config.batch_size
        self.augment = Augment.for_size(
            dataset.image_size, dataset.mean, dataset.std, config.flip, config.augment
        )
        self.steps_per_epoch = len(dataset.train) // self.batch_size
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{len(dataset.train)} training images do not fill a batch of {self.batch_size}; "
                "choose a smaller --batch-size"
            )
        self.autocast = autocast_of(config, device)

        examples = next(dataset.train.batches(EXAMPLES))[0]
        self.examples = normalise(examples, dataset.mean, dataset.std)
        torch.manual_seed(config.seed)
        self.model = self._build()
        self.starting_weights = starting_weights(self.model)
        self._check_names()
        self.compressor = None if config.float_baseline else self._compressor(self.model)
        self.graph = (
            self.compressor.graph if self.compressor else channel_graph(self.model, self.examples)
        )
        self.start = self.size()
        weights = self.compressor.weights() if self.compressor else self.model.parameters()
        self.optimizer = torch.optim.SGD(
            weights, lr=config.lr, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
        )
        self.scheduler = LambdaLR(self.optimizer, self._lr_factor)
        self.control = None if config.target_size is None else self._control()
        self.differentiate: Callable[..., Differentiated] = Replay(self._differentiate)

    def _build(self) -> nn.Module:
        """Build the network, and check that it accepts images of the dataset's size."""
        config, size = self.config, self.dataset.image_size
        try:
            model = self.build_model(config.model, len(self.dataset.classes), config.width, size)
            model.to(self.device).to(memory_format=torch.channels_last)
            with kept_modes(model), torch.no_grad():
                model.eval()(self.examples)
        except (AssertionError, RuntimeError, ValueError) as error:  # as torchvision raises
            if out_of_memory(error):
                raise
            reason = first_line(error)
            raise UserError(
                f"{config.model} does not accept images of {size} pixels ({reason}); give another "
                "--image-size (many of torchvision's are made for 224)"
            ) from error
        return model

    def _check_names(self) -> None:
        """Raise UserError for class names that the network's file could not store."""
        for name in self.dataset.classes:
            try:
                check_about(About(class_names=[name]))
            except ValueError as error:
                raise UserError(f"the class {name!r} cannot be stored by that name") from error

    def _compressor(self, model: nn.Module) -> Compressor:
        config = self.config
        schedule = Schedule(
            self.epochs * self.steps_per_epoch,
            config.penalty_from,
            config.penalty_until,
            rise=config.target_size is None,
        )
        try:
            return Compressor(
                model,
                self.examples,
                config.gamma or 0.0,
                bits=config.bits,
                integer_bits=not config.fractional_bits,
                exclude=config.exclude,
                interval=self.steps_per_epoch,
                schedule=schedule,
            )
        except ValueError as error:
            raise UserError(str(error)) from error

    def _control(self) -> SizeControl | None:
        """Return the control for --target-size, after checking that the size can be reached."""
        config, compressor = self.config, self.compressor
        if compressor is None:
            return None
        assert config.target_size is not None
        target = FileSize.parse(config.target_size).bytes(self.start.float_bits)
        least = self._file_bytes(compressor.smallest())
        if target < least:
            raise UserError(
                f"--target-size {config.target_size} is {target:,} bytes, but no file of "
                f"{config.model} is smaller than {least:,}: so much takes one row in every layer "
                "that has to stay"
            )
        start = self._file_bytes(self.model)
        if target >= start:
            print(
                f"warning: --target-size {config.target_size} has no effect: it is {target:,} "
                f"bytes, and the network has {start:,} at its {config.bits:g} starting bits (give "
                "more --bits, or ask for less)",
                file=sys.stderr,
            )
        return SizeControl(
            compressor,
            self.optimizer,
            target,
            least,
            self.start,
            math.ceil(config.bits if target >= start else max(config.bits, MOST_BITS)),
            self._file_bytes,
            self._losses,
        )

    def _file_bytes(self, model: nn.Module) -> int:
        """Return the bytes that the file of `model` would have now, at most."""
        return len(self._pack(model, UNKNOWN_ACCURACY)) + SLACK

    def _pack(self, model: nn.Module, accuracy: float) -> bytes:
        """Pack `model` with this `accuracy`; unfolded and in 32 bits if float16 is too narrow."""
        about = about_of(self, accuracy)
        try:
            return pack(model, about, **self.storage)
        except ValueError as error:  # a number that float16 cannot hold
            if not self.storage:
                raise
            print(f"warning: the file will be in 32 bits, unfolded: {error}", file=sys.stderr)
            self.storage = {}
            return pack(model, about)

    def _write_network(self, path: Path) -> float:
        """Write the network to `path` and return its test accuracy as stored (floats rounded)."""
        stored = set_up(unpack(self._pack(self.model, UNKNOWN_ACCURACY)), self._build())
        _, accuracy = evaluate(stored, self.dataset, self.dataset.test, self.batch_size)
        write_atomically(path, self._pack(self.model, accuracy))
        return accuracy

    def _losses(self) -> Iterator[Tensor]:
        """Yield the task's loss on each of `FIT_BATCHES` training batches."""
        for images, labels in self._batches(FIT_BATCHES):
            with self.autocast:
                logits = self.model(images)
            yield F.cross_entropy(logits.float(), labels, label_smoothing=LABEL_SMOOTHING)

    def size(self) -> Size:
        """Measure the network, or the float baseline, as it is now and would be stored."""
        return measure(self.model, self.graph, self.starting_weights, **self.storage)

    def train(self) -> dict[str, Any]:
        """Train the remaining epochs, write the run's files and return its summary."""
        first = self._resume()
        history = self.folder.metrics(first)
        print(headline_of(self))
        if first:
            print(f"going on after epoch {first} of {self.epochs}")
        board = Board(self.folder.path / runs.TENSORBOARD, first)
        for epoch in range(first, self.epochs):
            metrics = self._epoch(epoch)
            history.append(metrics)
            self.folder.append_metrics(metrics)
            board.write(epoch, metrics, self.model)
            self.folder.write_checkpoint(self._state(epoch + 1))
            print(epoch_line(metrics, self.epochs), flush=True)
        network = self.folder.path / runs.NETWORK
        accuracy = self._write_network(network)
        summary = summary_of(self, history, accuracy, read(network))
        image = widths_figure(summary["channels_start"], list(self.size().layers), title_of(self))
        write_atomically(self.folder.path / runs.WIDTHS, image)
        board.write_widths(image, self.epochs - 1)
        board.write_hyperparameters(summary)
        board.close()
        self.folder.write_summary(summary)
        print(result_of(self, summary))
        if self.control is not None and summary["file_bytes"] > self.control.target:
            print(
                f"warning: the file has more than the {self.control.target:,} bytes asked for: "
                "nothing more could be taken from the network (train for more epochs)",
                file=sys.stderr,
            )
        return summary

    def _epoch(self, epoch: int) -> dict[str, Any]:
        # Reseeding makes an epoch the same whether or not the run was interrupted before it.
        torch.manual_seed(self.config.seed * 1_000_003 + epoch + 1)
        self.model.train()
        total, correct, started = 0.0, 0, time.perf_counter()
        batches = self.dataset.train.batches(self.batch_size, shuffle=True, drop_last=True)
        bar = tqdm(
            batches,
            desc=f"epoch {epoch + 1}/{self.epochs}",
            total=self.steps_per_epoch,
            leave=False,
            disable=None,  # shown on a terminal only
        )
        steps = (self._step(self.augment(images), labels) for images, labels in bar)
        for index, (loss, hits) in enumerate(late(steps)):
            if not math.isfinite(loss):
                raise self._diverged(loss, epoch * self.steps_per_epoch + index)
            total, correct = total + loss, correct + int(hits)
            bar.set_postfix(loss=f"{loss:.3f}")
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        self._settle(last=epoch == self.epochs - 1)
        with self.autocast:  # as in training; only the final network is evaluated in float32
            test_loss, accuracy = loss_and_accuracy(
                self.model, self.dataset, self.dataset.test, self.batch_size
            )
        if not math.isfinite(test_loss):
            # Divergence in the last step shows only now; it must not get into a checkpoint.
            raise self._diverged(test_loss, (epoch + 1) * self.steps_per_epoch - 1)
        size = self.size()
        layers = [layer for layer in size.layers if layer.out_width]
        return {
            "epoch": epoch,
            "train": {
                "loss": total / self.steps_per_epoch,
                "accuracy": correct / (self.steps_per_epoch * self.batch_size),
                "lr": self.scheduler.get_last_lr()[0],
                "gamma": self.compressor.price if self.compressor else 0.0,
            },
            "val": {"loss": test_loss, "accuracy": accuracy},
            "size": {
                "q_percent": size.q_percent,
                "stored_percent": size.stored_percent,
                "stored_kb": size.stored_bits / 8000,
                "weights_percent": size.weights_percent,
                "parameters": size.parameters,
                "macs": size.macs,
                **self._file_against_target(),
            },
            "bits": {layer.name: layer.mean_bits for layer in layers},
            "channels": {layer.name: layer.channels for layer in layers},
            "time": {"epoch_seconds": seconds, "eval_seconds": time.perf_counter() - started},
        }

    def _file_against_target(self) -> dict[str, float]:
        """Return the file's size and its target for an epoch's metrics, given a --target-size."""
        if self.control is None:
            return {}
        return {
            "file_kb": self.control.file_bytes() / 1000,
            "target_kb": self.control.target / 1000,
        }

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Do one training step; return (2,) the task's loss and the number of correct images."""
        compressor = self.compressor
        step = self.differentiate(self._version, images, labels)
        for parameter, gradient in step.gradients.items():
            parameter.grad = gradient
        self.optimizer.step()
        self.scheduler.step()
        if compressor is not None:
            compressor.formats.collected = step.collected
            # Not part of what `differentiate` records and replays, since γ changes at every step.
            penalty = compressor.penalty()
            if penalty.requires_grad:
                penalty.backward()
            compressor.step(self.optimizer)
        return step.told

    def _differentiate(self, images: Tensor, labels: Tensor) -> Differentiated:
        """Compute the task's loss and its gradients."""
        if self.compressor is not None:
            self.compressor.formats.collected = Collected()
        with self.autocast:
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=LABEL_SMOOTHING)
        hits = (logits.argmax(1) == labels).sum()
        self.optimizer.zero_grad()
        loss.backward()
        return Differentiated(
            torch.stack([loss.detach(), hits.to(loss)]),
            {p: p.grad for group in self.optimizer.param_groups for p in group["params"]},
            self.compressor.formats.collected if self.compressor else Collected(),
        )

    def _version(self) -> object:
        """Return a key that changes when a step uses other tensors or computes other gradients."""
        return (self.compressor.cuts, self.compressor.frozen) if self.compressor else None

    def _diverged(self, loss: float, step: int) -> UserError:
        epoch = step // self.steps_per_epoch
        kept = f"the checkpoint after epoch {epoch} is kept" if epoch else "no epoch was finished"
        return UserError(
            f"the loss is {loss} at step {step}; {kept}: try a smaller --lr in another --run-dir"
        )

    def _lr_factor(self, step: int) -> float:
        """Return the fraction of the peak learning rate: a linear rise, then a linear fall to 0."""
        done = step / (self.epochs * self.steps_per_epoch)
        return max(0.0, min((done + 0.01) / WARM_UP, (1 - done) / (1 - WARM_UP)))

    def _settle(self, last: bool) -> None:
        """End an epoch: fit the file to --target-size and re-estimate batch-norm statistics.

        Running statistics lag behind formats. After the `last` epoch, finish the compression too.
        """
        if self.control is not None:
            self.control.settle(last)
        if last and self.compressor is not None:
            self.compressor.finish(self._images(STATISTICS_BATCHES), self.optimizer)
        else:
            update_bn(self._images(STATISTICS_BATCHES if last else EVALUATION_BATCHES), self.model)

    def _images(self, count: int) -> Iterator[Tensor]:
        return (images for images, _ in self._batches(count))

    def _batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self.dataset.train.batches(self.batch_size, shuffle=True, drop_last=True)
        for images, labels in itertools.islice(batches, count):
            yield self.augment(images), labels

    def _state(self, epoch: int) -> dict[str, Any]:
        if self.compressor is not None:
            network = self.compressor.state_dict(self.optimizer)
        else:
            network = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
        return {
            "epoch": epoch,
            "network": network,
            "scheduler": self.scheduler.state_dict(),
        }

    def _resume(self) -> int:
        """Load the checkpoint, if there is one, and return the number of finished epochs."""
        state = self.folder.checkpoint()
        if state is None:
            return 0
        try:
            if self.compressor is not None:
                self.compressor.load_state_dict(state["network"], self.optimizer)
            else:
                self.model.load_state_dict(state["network"]["model"])
                self.optimizer.load_state_dict(state["network"]["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
            if out_of_memory(error):
                raise
            reason = first_line(error)
            raise UserError(
                f"{self.folder.path / runs.CHECKPOINT} does not fit this run ({reason}); "
                "remove it, or start over with --overwrite"
            ) from error
        return int(state["epoch"])

    def gamma(self) -> float | None:
        """Return the γ asked for, or the one that --target-size has led to; None in float."""
        if self.compressor is None:
            return None
        return self.compressor.gamma if self.config.gamma is None else self.config.gamma
