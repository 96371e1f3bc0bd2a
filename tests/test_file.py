"""Packed files: what is read is what was written, bit for bit, and no byte more than it says."""

import contextlib
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.models
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as some_numpy
from networks import NETWORKS, Chain, kill, outputs, prepare, randomise_norms
from random_kills import compressed, kill_at_random, told
from random_networks import build as build_random
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

import models
import selfcompress
from selfcompress import About, Architecture, Compressor, FileError
from selfcompress.convert import quantize_layers
from selfcompress.file import integers
from selfcompress.file.load import set_up
from selfcompress.file.read import Contents, read, unpack
from selfcompress.file.write import pack
from selfcompress.layers import PlacedBatchNorm, QuantizedLayer, quantized_layers
from selfcompress.quantizer import MAX_BITS, integer_depth, quantized_integers
from selfcompress.size import measure

# --- helpers --------------------------------------------------------------------------------------


@torch.no_grad()
def mix_bits(model: nn.Module, seed: int = 0) -> None:
    """Another bit depth, 1 to 16, for every row that has bits, mostly small; exponents to match."""
    generator = torch.Generator().manual_seed(seed)
    for layer in quantized_layers(model).values():
        depth = layer.bit_depth
        bits = torch.rand(depth.shape, generator=generator).square() * MAX_BITS
        new = bits.clamp(min=0.01) if not layer.integer_bits else bits.ceil().clamp(min=1)
        depth.copy_(torch.where(depth > 0, new.to(depth), 0))
        shift = torch.rand(depth.shape, generator=generator) - (new - 1)
        if layer.weight.numel():
            largest = layer.weight_by_row().flatten(1).abs().amax(1).clamp(min=1e-6)
            layer.exponent.copy_(largest.log2() + shift.to(depth))


@torch.no_grad()
def scramble(model: nn.Module) -> nn.Module:
    """Put other numbers everywhere, so that none can be right because it was never replaced."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.uniform_(3, 4)
        elif tensor.dtype != torch.bool:
            tensor.random_(0, 5)
    return model


def whole_numbers(model: nn.Module) -> dict[str, Tensor]:
    """Layer → its integers."""
    return {
        name: quantized_integers(
            layer.weight_by_row(), layer.bit_depth, layer.exponent, integer_bits=layer.integer_bits
        )
        for name, layer in quantized_layers(model).items()
    }


def evaluated(model: nn.Module, *x: Tensor) -> list[Tensor]:
    """All that `model` returns in evaluation mode."""
    with torch.no_grad():
        tree = model.eval()(*x)
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def assert_identical(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def check_round_trip(model: nn.Module, fresh: nn.Module, *x: Tensor, **options: Any) -> Contents:
    """Pack `model`, set up `fresh` from it, and compare all that they hold and compute."""
    model.eval()
    contents = unpack(pack(model, **options))
    loaded = set_up(contents, scramble(fresh))
    assert not loaded.training
    layers = quantized_layers(model)
    assert quantized_layers(loaded).keys() == layers.keys()
    for name, ours in whole_numbers(model).items():
        assert np.array_equal(contents.layers[name].values, ours.flatten(1).numpy()), name
    if all(layer.weight.dtype in (torch.float32, torch.float64) for layer in layers.values()):
        theirs = whole_numbers(loaded)
        assert all(torch.equal(ours, theirs[n]) for n, ours in whole_numbers(model).items())
    for name, tensor in tensors_of(loaded).items():
        was = tensors_of(model)[name]
        assert tensor.shape == was.shape, name
        assert tensor.dtype == was.dtype, name
        assert tensor.requires_grad == was.requires_grad, name
    sizes = (measure(m, None, 1) for m in (model, loaded))
    assert next(sizes).stored_bits == next(sizes).stored_bits
    assert_identical(evaluated(loaded, *x), evaluated(model, *x))
    return contents


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())
