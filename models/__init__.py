"""Example networks for train.py, each short enough to read in one sitting, and their names."""

import difflib
from collections.abc import Callable
from typing import Any

import torchvision.models
from torch import nn

from models.mobilenetv2 import MobileNetV2
from models.resnet import ResNet
from models.resnet9 import ResNet9
from models.vgg import VGG16
from models.vit import ViT

TORCHVISION = "torchvision:"

# Name → the width in the paper, and a function of (classes, width, image_size) that makes it.
_MODELS: dict[str, tuple[int, Callable[[int, int, int], nn.Module]]] = {
    "resnet9": (64, lambda classes, width, _: ResNet9(classes, width)),
    "resnet20": (16, lambda classes, width, _: ResNet(classes, width, depth=20)),
    "resnet56": (16, lambda classes, width, _: ResNet(classes, width, depth=56)),
    "vgg16": (64, lambda classes, width, _: VGG16(classes, width)),
    "mobilenetv2": (32, lambda classes, width, _: MobileNetV2(classes, width)),
    "vit": (192, ViT),
}

NAMES = tuple(_MODELS)
"""Names of the networks in this package; torchvision's are called "torchvision:NAME"."""


class UnknownModelError(ValueError):
    """There is no model of that name; the message says which there are."""


def default_width(name: str) -> int | None:
    """Return the width of the model `name` if none is given, or None for torchvision's (no width).

    Raises:
        UnknownModelError: there is no such model.
    """
    if name in _MODELS:
        return _MODELS[name][0]
    theirs = torchvision.models.list_models(module=torchvision.models)  # classifiers
    if name in [TORCHVISION + their for their in theirs]:
        return None
    close = difflib.get_close_matches(name.removeprefix(TORCHVISION).lower(), theirs)
    hint = f"; close: {', '.join(TORCHVISION + their for their in close)}" if close else ""
    raise UnknownModelError(
        f"no model {name!r}: choose {', '.join(NAMES)} or {TORCHVISION}NAME{hint}"
    )


def build(
    name: str, classes: int = 10, width: int | None = None, image_size: int = 32
) -> nn.Module:
    """Build the network `name` with random weights: (N, 3, image_size, image_size) → (N, classes).

    Args:
        name: one of `NAMES`, or "torchvision:" and the name of a torchvision classifier.
        width: channels of the first layer (vit: of a token); None is the model's default. Has no
            effect on torchvision's.

    Raises:
        UnknownModelError: there is no such model.
        ValueError: `width` is below 1, or the model is not made for `image_size`.
        Exception: of any kind, from some of torchvision's, if `image_size` does not suit them.
    """
    default = default_width(name)
    if default is None:
        return _from_torchvision(name.removeprefix(TORCHVISION), classes, image_size)
    if width is not None and width < 1:
        raise ValueError(f"width must be at least 1, not {width}")
    return _MODELS[name][1](classes, default if width is None else width, image_size)


def _from_torchvision(name: str, classes: int, image_size: int) -> nn.Module:
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # Otherwise they return several outputs in training, and warn about initialising weights.
        options = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": image_size}
    model: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=classes, **options
    )
    return model
