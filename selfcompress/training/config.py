"""The configuration of a run: train.py's options, their defaults and their validation."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from selfcompress.quantizer import MAX_BITS
from selfcompress.training.augment import Policy
from selfcompress.training.errors import UserError
from selfcompress.training.filesize import FileSize

DatasetName = Literal["cifar10", "digits", "folder"]
COMPRESSION = (
    "gamma", "target_size", "bits", "fractional_bits", "exclude", "penalty_from", "penalty_until"
)  # fmt: skip
"""The options that have no effect with --float."""

GAMMA = 0.01  # the default γ, unless a size is asked for
MAX_GAMMA = 1e30  # the penalty, γ times bits, is then still far from overflowing float32


def gamma_name(gamma: float) -> str:
    """Format γ for the name of a run, as short as tells it from every other value."""
    short = f"{gamma:g}"
    return short if float(short) == gamma else repr(gamma)


@dataclass(frozen=True)
class Config:
    """Train a network that compresses itself while it trains.

    Options left at None take the default of their dataset or model, which is printed when the run
    starts.
    """

    gamma: float | None = None
    """Weight of the size in the loss: a larger γ gives a smaller, less accurate network (0.01,
    unless there is a --target-size). 0 quantises without any penalty."""
    target_size: str | None = None
    """Instead of γ, the size of the file: 150KB, 1.5MB, 20000B (KB is 1000 bytes), or 3%, of the
    starting weights at 32 bits. The run ends at most 3 % below it."""
    float_baseline: Annotated[bool, tyro.conf.arg(name="float")] = False
    """Train the uncompressed float network instead, by the same schedule."""
    model: str = "resnet9"
    """resnet9, resnet20, resnet56, vgg16, mobilenetv2, vit, or torchvision:NAME."""
    dataset: DatasetName | None = None
    """Images to train on. None is cifar10, or digits if cifar10 is unavailable."""
    data_dir: Path = Path("data")
    """Where cifar10 is or is downloaded to; for folder, the folder with train/ and test/."""
    image_size: int | None = None
    """Resize images to this many pixels square (digits: 16; others: as they are)."""
    width: int | None = None
    """Channels of the first layer (resnet20 and 56: 16; mobilenetv2: 32; vit: 192; others: 64)."""
    epochs: int | None = None
    """Passes over the training images (digits: 40; others: 24)."""
    batch_size: int | None = None
    """Images per step (digits: 64; others: 512)."""
    lr: float = 0.4
    """Peak learning rate of the weights (Nesterov SGD, one cycle); vit wants less, such as 0.1."""
    weight_decay: float = 5e-4
    """L2 on the weights; bit depths and exponents are not decayed."""
    flip: bool | None = None
    """Mirror half of the training images (digits: no; others: yes)."""
    augment: Policy = "standard"
    """standard: random crop, flip. cutout: also cuts a square out. autoaugment: the paper's."""
    bits: float = 8.0
    """Bit depth that channels start at and never exceed (with --target-size, they may get 8)."""
    fractional_bits: bool = False
    """The paper's fractional bit depths. Q is then smaller than what can be stored."""
    exclude: tuple[str, ...] = ()
    """Names of layers to leave in float, such as prep.conv; they count at 32 bits a weight."""
    penalty_from: float = 0.1
    """Where in the run γ begins to rise, as a fraction of all steps."""
    penalty_until: float = 0.85
    """Where in the run bit depths and exponents freeze, as a fraction of all steps; the rest of the
    run trains the weights that are left."""
    seed: int = 0
    """Seeds initial weights, the order of images, and augmentation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of training; auto is bf16 where it is faster. The result is evaluated in fp32."""
    run_dir: Path | None = None
    """Folder of this run. None makes a name from the options, in runs/."""
    overwrite: bool = False
    """Start over even if the run folder holds a run already."""

    def validate(self) -> None:
        """Raise UserError, with a one-line message, for options that cannot be run."""
        checks: list[tuple[bool, str]] = [
            (
                self.gamma is None or 0 <= self.gamma <= MAX_GAMMA,
                f"--gamma must be a number from 0 to {MAX_GAMMA:g}",
            ),
            (
                self.gamma is None or self.target_size is None or self.float_baseline,
                "--target-size finds its own γ: leave --gamma out",
            ),
            (self.width is None or self.width >= 1, "--width must be at least 1"),
            (self.image_size is None or self.image_size >= 8, "--image-size must be at least 8"),
            (self.epochs is None or self.epochs >= 1, "--epochs must be at least 1"),
            (self.batch_size is None or self.batch_size >= 2, "--batch-size must be at least 2"),
            (math.isfinite(self.lr) and self.lr > 0, "--lr must be above 0"),
            (self.weight_decay >= 0, "--weight-decay must be a number ≥ 0"),
            (
                0 < self.bits <= MAX_BITS and (self.fractional_bits or self.bits % 1 == 0),
                f"--bits must be a whole number from 1 to {MAX_BITS} (above 0 with "
                "--fractional-bits)",
            ),
            (-(2**31) <= self.seed < 2**31, "--seed must fit 32 bits"),
            (
                0 <= self.penalty_from < self.penalty_until <= 1,
                "0 ≤ --penalty-from < --penalty-until ≤ 1 does not hold",
            ),
        ]
        for holds, message in checks:
            if not holds:
                raise UserError(message)
        if self.target_size is not None:
            try:
                FileSize.parse(self.target_size)
            except ValueError as error:
                raise UserError(f"--target-size: {error}") from error

    def without_effect(self) -> list[str]:
        """Return warnings for options that were changed but have no effect in this combination."""
        warnings = []
        if self.float_baseline:
            warnings += [(name, "with --float") for name in COMPRESSION if self._changed(name)]
        elif self.gamma == 0 and self._changed("penalty_from"):
            warnings.append(("penalty_from", "with --gamma 0"))
        if self.model.startswith("torchvision:") and self._changed("width"):
            warnings.append(("width", f"with --model {self.model}"))
        if self.dataset == "digits" and self._changed("data_dir"):
            warnings.append(("data_dir", "with --dataset digits"))
        return [f"--{name.replace('_', '-')} has no effect {why}" for name, why in warnings]

    def _changed(self, name: str) -> bool:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return bool(getattr(self, name) != defaults[name])

    def resolved(
        self, dataset: DatasetName, image_size: int, default_width: int | None
    ) -> "Config":
        """Return this configuration with the defaults of its dataset and model filled in.

        `default_width` is None for a model whose width cannot be chosen.
        """
        digits = dataset == "digits"
        return dataclasses.replace(
            self,
            dataset=dataset,
            image_size=image_size,
            width=None if default_width is None else (self.width or default_width),
            epochs=self.epochs or (40 if digits else 24),
            batch_size=self.batch_size or (64 if digits else 512),
            flip=(not digits) if self.flip is None else self.flip,
            gamma=GAMMA if self.gamma is None and self.target_size is None else self.gamma,
        )

    def as_json(self) -> dict[str, Any]:
        """Return what identifies a run, as plain values: all but `run_dir` and `overwrite`."""
        values = dataclasses.asdict(self)
        del values["run_dir"], values["overwrite"]
        values["float"] = values.pop("float_baseline")
        if self.dataset != "folder":
            values["data_dir"] = None  # wherever they are, the images are the same
        if self.target_size is not None:
            values["target_size"] = str(FileSize.parse(self.target_size))  # 20KB is 20000B
        if self.float_baseline:
            for name in COMPRESSION:
                values[name] = None  # without effect, so it must not tell runs apart
        plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
        return plain
