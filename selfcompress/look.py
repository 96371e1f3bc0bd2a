"""Run a model to have a look at it, and leave it as it was found."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | tuple[Any, ...]
"""What a model is called with: one tensor, or all its positional arguments."""


def positional(inputs: Inputs) -> tuple[Any, ...]:
    """`inputs` as the arguments of a call."""
    return inputs if isinstance(inputs, tuple) else (inputs,)


def device_of(inputs: Inputs) -> torch.device:
    """Where the first tensor of `inputs` is."""
    tensors = (value for value in positional(inputs) if isinstance(value, Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Inside, modules may be switched to train() or eval(); afterwards each is as it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def undisturbed(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """The same, without gradients, and random numbers go on afterwards as if nothing had run."""
    device = device_of(inputs)
    devices = [device] if device.type == "cuda" else []
    with kept_modes(model), eagerly(), torch.no_grad(), torch.random.fork_rng(devices):
        yield


@contextmanager
def eagerly() -> Iterator[None]:
    """Inside, what torch.compile has compiled runs as it is written."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; and its import takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
