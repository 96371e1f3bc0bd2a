"""Packed files: what is read is exactly what was written, in no more bytes than stored bits say."""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.models
from hypothesis import example, given, settings
from hypothesis import strategies as st
from networks import NETWORKS, Chain, Head, block, kill, prepare, randomise_norms
from random_kills import compressed, kill_at_random, told
from random_networks import build as build_random
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

import models
import selfcompress
import train
from selfcompress import About, Architecture, Compressor, FileError, save, to_dense
from selfcompress.convert import quantize_layers
from selfcompress.file import integers
from selfcompress.file.load import load, set_up
from selfcompress.file.read import Contents, read, unpack
from selfcompress.file.write import pack
from selfcompress.layers.batch_norms import PlacedBatchNorm
from selfcompress.layers.placing import Placed
from selfcompress.layers.quantized import QuantizedLayer, quantized_layers
from selfcompress.quantizer import MAX_BITS, integer_depth, quantized_integers
from selfcompress.size import measure
from selfcompress.training import loop, runs
from selfcompress.training.augment import normalise
from selfcompress.training.config import Config
from selfcompress.training.data import load as load_dataset

# --- helpers --------------------------------------------------------------------------------------


@torch.no_grad()
def mix_bits(model: nn.Module, seed: int = 0) -> None:
    """Give every row that has bits a random bit depth up to 16, and an exponent to match.

    Most depths are small. They are fractional in layers without `integer_bits`.
    """
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
    """Overwrite all numbers, so that loading cannot be right where it replaces nothing."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.uniform_(3, 4)
        elif tensor.is_complex():
            tensor.fill_(3 + 4j)
        elif tensor.dtype != torch.bool:
            tensor.random_(0, 5)
    return model


def whole_numbers(model: nn.Module) -> dict[str, Tensor]:
    """Return layer name → the integers of its quantised weight."""
    return {
        name: quantized_integers(
            layer.weight_by_row(), layer.bit_depth, layer.exponent, integer_bits=layer.integer_bits
        )
        for name, layer in quantized_layers(model).items()
    }


def evaluated(model: nn.Module, *x: Tensor) -> list[Tensor]:
    """Return all tensors that `model` returns in evaluation mode."""
    with torch.no_grad():
        tree = model.eval()(*x)
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def assert_identical(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def check_round_trip(model: nn.Module, fresh: nn.Module, *x: Tensor, **options: Any) -> Contents:
    """Pack `model`, set up `fresh` from it, and compare all that they hold and compute.

    Args:
        options: of `pack`.

    Returns:
        The contents of the file.
    """
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


# --- integers -------------------------------------------------------------------------------------


@st.composite
def groups_of_integers(draw: st.DrawFn) -> list[integers.Group]:
    """Draw groups of any bit depth and size, with values spread evenly or not, or all equal."""
    groups = []
    for depth in draw(st.lists(st.integers(1, MAX_BITS), max_size=6)):
        low, high = -(2 ** (depth - 1)), 2 ** (depth - 1) - 1
        size = draw(st.sampled_from((0, 1, 2, 7, 8, 9, 100, 3000)))
        generator = np.random.default_rng(draw(st.integers(0, 2**32)))
        narrow = draw(st.sampled_from((1.0, 0.2, 0.01)))
        values = np.round(
            generator.standard_normal(size) * narrow * high + draw(st.integers(-1, 0))
        )
        values = values.clip(low, high).astype(np.int32)
        values[: draw(st.integers(0, 2))] = draw(st.sampled_from((low, high)))
        groups.append((depth, values))
    return groups


@settings(max_examples=150, deadline=None)
@given(groups=groups_of_integers(), entropy_coding=st.booleans())
@example(groups=[], entropy_coding=True)
@example(groups=[(1, np.zeros(0, np.int32))], entropy_coding=True)
@example(groups=[(16, np.arange(-(2**15), 2**15, dtype=np.int32))], entropy_coding=True)
@example(groups=[(12, np.arange(-3, 2000, dtype=np.int32) % 3)], entropy_coding=True)
def test_integers_come_back(groups: list[integers.Group], entropy_coding: bool) -> None:
    data = integers.encode(groups, entropy_coding)
    decoded = integers.decode(data, [(depth, len(values)) for depth, values in groups])
    assert all(np.array_equal(v, d) for (_, v), d in zip(groups, decoded, strict=True))
    plain_bits = sum(depth * len(values) for depth, values in groups)
    plain = -(-len(groups) // 8) + -(-plain_bits // 8)
    if entropy_coding:
        assert len(data) <= plain + 8  # a coder ends with two words
        assert 8 * len(data) >= integers.entropy_bits(groups)
    else:
        assert len(data) == plain


def test_entropy_coding_comes_close_to_the_entropy() -> None:
    values = np.random.default_rng(0).standard_normal(200_000) * 2
    group = 8, values.round().clip(-128, 127).astype(np.int32)
    assert 8 * len(integers.encode([group], True)) < 1.005 * integers.entropy_bits([group]) + 2048


def test_a_byte_never_stands_for_more_integers_than_the_cap() -> None:
    """No file is written, or read, in which a byte stands for more than `MAX_CODED` integers."""
    zeros = np.zeros(10**6, np.int32)
    data = integers.encode([(8, zeros)], entropy_coding=True)
    assert len(data) == 1 + 10**6  # plain: coding would take almost no bytes
    assert np.array_equal(integers.decode(data, [(8, 10**6)])[0], zeros)
    some = zeros.copy()
    some[::40] = 1
    data = integers.encode([(8, some)], entropy_coding=True)
    with pytest.raises(integers.DamagedIntegersError, match="coded integers take another number"):
        integers.decode(data, [(8, integers.MAX_CODED * len(data))])


def test_other_numbers_of_bytes_or_integers_are_refused() -> None:
    generator = np.random.default_rng(0)
    coded = generator.standard_normal(1000).round().clip(-8, 7).astype(np.int32)
    plain = generator.integers(-16, 16, 77).astype(np.int32)
    groups = [(4, coded), (5, plain)]
    data, shape = integers.encode(groups, True), [(4, 1000), (5, 77)]
    assert data[0] == 1  # the first group is coded
    integers.decode(data, shape)
    uncoded = 1 + 16 + -(-5 * 77 // 8)  # a coder that misses words goes on with zeros
    for length in range(len(data)):
        if length < uncoded + 4 or (len(data) - length) % 4:
            with pytest.raises(integers.DamagedIntegersError):
                integers.decode(data[:length], shape)
    for more in (1, 4, 8):
        with pytest.raises(integers.DamagedIntegersError):
            integers.decode(np.append(data, np.ones(more, np.uint8)), shape)
    for other in (shape[:1], [*shape, (1, 100)], [(4, 1000), (5, 79)], [(5, 1000), (5, 77)]):
        with pytest.raises(integers.DamagedIntegersError):
            integers.decode(data, other)
    empty = data.copy()
    empty[1:17] = 0
    with pytest.raises(integers.DamagedIntegersError, match="a table of frequencies is empty"):
        integers.decode(empty, shape)


# --- the format -----------------------------------------------------------------------------------


class Bits:
    """Reads numbers from bytes, lowest bit first."""

    def __init__(self, data: bytes) -> None:
        self.bits = [byte >> bit & 1 for byte in data for bit in range(8)]

    def number(self, width: int) -> int:
        bits, self.bits = self.bits[:width], self.bits[width:]
        return sum(bit << place for place, bit in enumerate(bits))

    def to_byte(self) -> None:
        self.bits = self.bits[len(self.bits) % 8 :]


def test_the_format_is_what_the_documentation_says() -> None:
    """Read a file by nothing but the description at the top of header.py and integers.py."""
    network = prepare("grouped")  # then mixed bit depths, a cut, and rows without bits
    model = network.model
    mix_bits(model)
    kill(model, "a.0", [0, 1])
    kill(model, "b", [4])
    with torch.no_grad():
        model.get_parameter("a.1.bias")[:2] = -1
        model.get_parameter("b.bias")[4] = 0
    network.cut()
    kill(model, "c.0", [1])  # not cut
    layers = quantized_layers(model)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, PlacedBatchNorm)}
    data = pack(model, entropy_coding=False)

    length = int.from_bytes(data[:8], "little")
    entries, streams = json.loads(data[8 : 8 + length]), {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        streams[name] = data[8 + length + begin : 8 + length + end]
    assert streams.keys() == {"header", "bits", "float32"}
    header = json.loads(zlib.decompress(streams["header"][4:]))
    assert [entry[0] for entry in header["layers"]] == list(layers)
    assert [entry[0] for entry in header["norms"]] == list(norms)

    bits = Bits(streams["bits"])
    live = [int(d) for m in layers.values() for d in integer_depth(m.bit_depth).tolist() if d > 0]
    assert [bits.number(4) + 1 for _ in live] == live
    bits.to_byte()
    modules: list[Placed] = [*layers.values(), *norms.values()]
    for module in modules:
        for indices, width in ((module.rows, module.out_width), (module.columns, module.in_width)):
            if len(indices) < width:
                assert [i for i in range(width) if bits.number(1)] == indices.tolist()
        if isinstance(module, QuantizedLayer):
            if module.grouped:
                group = -1
                for slot in module.slots.tolist():
                    group += bits.number(1)
                    assert group == slot // module.group_width
            if not module.live_rows().all():
                assert [bits.number(1) for _ in module.rows] == module.live_rows().tolist()
    bits.to_byte()
    groups = [
        (int(depth), ours[integer_depth(layers[name].bit_depth) == depth].flatten().tolist())
        for name, ours in whole_numbers(model).items()
        for depth in sorted(set(integer_depth(layers[name].bit_depth).tolist()) - {0})
    ]
    assert not any(bits.number(1) for _ in groups)  # is it coded?
    bits.to_byte()
    for depth, values in groups:
        assert [bits.number(depth) - 2 ** (depth - 1) for _ in values] == values
    assert len(bits.bits) < 8 and not any(bits.bits)

    exponents = [m.exponent[m.live_rows()] for m in layers.values()]
    others = [tensors_of(model)[entry[0]].flatten() for entry in header["tensors"]]
    numbers = torch.cat([*exponents, *others]).detach()
    assert streams["float32"] == numbers.numpy().tobytes()
    kept = {name for name in tensors_of(model) if "num_batches" not in name}
    quantised = {f"{n}.{key}" for n in layers for key in ("weight", "bit_depth", "exponent")}
    assert {entry[0] for entry in header["tensors"]} == kept - quantised

    crc = zlib.crc32(streams["header"][4:])
    for name in ("bits", "float32"):
        crc = zlib.crc32(name.encode() + b";" + streams[name], crc)
    assert int.from_bytes(streams["header"][:4], "little") == crc


# --- bytes are honest -----------------------------------------------------------------------------


def assert_honest(model: nn.Module) -> None:
    """Assert that a file, names apart, is no larger than its stored bits, within 1 % and 1 KiB.

    Entropy coding may add 16 bytes at most. All floats that stored bits count are in the file.
    """
    plain, coded = pack(model, entropy_coding=False), pack(model)
    assert len(coded) <= len(plain) + 16
    for data in (plain, coded):
        assert unpack(data).size.total == len(data)
    size, stored = unpack(plain).size, measure(model, None, 1).stored_bits
    assert size.total - size.names <= stored / 8 * 1.01 + 1024
    assert unpack(plain).header.stored_bits == stored
    small = unpack(pack(model, fold_norms=True, half=True, entropy_coding=False))
    stored = measure(model, None, 1, fold_norms=True, half=True).stored_bits
    assert small.size.total - small.size.names <= stored / 8 * 1.01 + 1024
    assert small.header.stored_bits == stored
    # Nor may stored bits be more than the file has: all floats that they count are in it.
    kept = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in tensors_of(model).items()
        if not name.endswith(("num_batches_tracked", ".bit_depth", ".exponent"))
        and name.removesuffix(".weight") not in quantized_layers(model)
    )
    assert size.floats == kept


def set_bits(model: nn.Module, bits: int) -> None:
    with torch.no_grad():
        for layer in quantized_layers(model).values():
            layer.bit_depth.fill_(bits)


@pytest.mark.parametrize("name", NETWORKS)
def test_bytes_are_honest(name: str) -> None:
    network = prepare(name)
    model = network.model
    for bits in (0, 1, 16):
        set_bits(model, bits)
        assert_honest(model)
    mix_bits(model)
    assert_honest(model)
    for layer in quantized_layers(model):
        kill(model, layer, slice(None, None, 2))
    assert_honest(model)
    network.cut()
    assert_honest(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_bytes_are_honest_in_other_types(dtype: torch.dtype) -> None:
    network = prepare("depthwise")
    mix_bits(network.model)
    network.cut()
    assert_honest(network.model.to(dtype))


def test_bytes_are_honest_at_the_edges() -> None:
    edges = {
        "all zero": nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2)),
        "one channel": nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 3)),
        "attention": nn.TransformerEncoderLayer(16, 4, 32),
        "groups": nn.Sequential(nn.Conv1d(64, 64, 1, groups=64), nn.Conv1d(64, 128, 3, groups=4)),
    }
    with torch.no_grad():
        for p in edges["all zero"].parameters():
            p.zero_()
    for model in edges.values():
        quantize_layers(model, bits=5)
        assert_honest(model)
        mix_bits(model)
        assert_honest(model)
    fractional = Chain()
    quantize_layers(fractional, bits=2.5, integer_bits=False)
    assert_honest(fractional)
    assert_honest(Chain(bias=True))  # all in float


def test_a_vanished_branch_takes_no_bytes() -> None:
    network = prepare("residual")
    before = unpack(pack(network.model)).size
    kill(network.model, "two.0", slice(None))
    with torch.no_grad():
        network.model.get_parameter("two.1.bias").fill_(-1)
    network.cut()
    assert quantized_layers(network.model)["one.0"].weight.numel() == 0
    assert_honest(network.model)
    contents = check_round_trip(network.model, NETWORKS["residual"][0](), network.x)
    assert contents.size.integers < 0.6 * before.integers


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "vit_b_32"]
)
def test_bytes_of_torchvisions_models_are_honest(name: str) -> None:
    model = torchvision.models.get_model(name, num_classes=10)
    quantize_layers(model, bits=4)
    assert_honest(model)
    mix_bits(model)
    for layer in quantized_layers(model):
        kill(model, layer, slice(None, None, 3))
    assert_honest(model)


# --- bit for bit ----------------------------------------------------------------------------------


def check_random_network(seed: int) -> None:
    """Check the round trip of a random network with killed rows, mostly cut.

    Depending on the seed it is float32 or float64, perhaps channels-last, and perhaps not coded.
    """
    with told(seed):
        compressor = compressed(seed)
        model, x = compressor.model, compressor.example_input
        assert isinstance(x, Tensor)
        if seed % 4 == 0 and takes_channels_last(model, x):
            model.to(memory_format=torch.channels_last)
        kill_at_random(compressor, seed)
        if seed % 3:
            compressor.cut()
        if seed % 5 == 0 and takes_channels_last(model, x):
            model.to(memory_format=torch.channels_last)
        dtype = torch.float64 if seed % 2 else torch.float32
        mix_bits(model.to(dtype), seed)
        fresh = build_random(seed)[0].float()
        check_round_trip(model, fresh, x.to(dtype), entropy_coding=seed % 7 > 0)


def takes_channels_last(model: nn.Module, x: Tensor) -> bool:
    """Return whether `model` runs in channels-last: some `.view()` may need the default format."""
    try:
        evaluated(copy.deepcopy(model).to(memory_format=torch.channels_last), x)
    except RuntimeError:
        return False
    return True


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
@example(seed=105)  # channels-last, the first layer in float
def test_random_networks_come_back_bit_for_bit(seed: int) -> None:
    check_random_network(seed)


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(10))
def test_a_thousand_random_networks_come_back_bit_for_bit(hundred: int) -> None:
    for seed in range(100 * hundred, 100 * (hundred + 1)):
        check_random_network(seed)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_come_back_bit_for_bit(name: str) -> None:
    network, start = prepare(name), NETWORKS[name][0]
    mix_bits(network.model)
    check_round_trip(network.model, start(), network.x)
    for layer in quantized_layers(network.model):
        kill(network.model, layer, [0, 2])
    check_round_trip(network.model, start(), network.x, entropy_coding=False)
    network.cut()
    check_round_trip(network.model, start(), network.x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    network = prepare("depthwise")
    mix_bits(network.model)
    with torch.no_grad():
        for layer in quantized_layers(network.model).values():
            layer.bit_depth.clamp_(max=8)  # float16 overflows with all too random formats
    check_round_trip(network.model.to(dtype), NETWORKS["depthwise"][0](), network.x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fractional_bits_and_mixed_types_come_back(dtype: torch.dtype) -> None:
    model, x = Chain(bias=True).to(dtype), torch.randn(4, 3, 8, 8, dtype=dtype)
    quantize_layers(model, bits=3, integer_bits=False)  # formats are float32, whatever weights are
    randomise_norms(model)
    mix_bits(model)
    check_round_trip(model, Chain(bias=True), x)


def test_memory_layouts_come_back() -> None:
    """Strides come back, also of kernels of one pixel or one channel.

    Whether these are channels-last, is_contiguous() cannot tell.
    """
    layers = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 1, 2)]
    model = nn.Sequential(*layers, nn.Flatten(1), nn.Conv1d(4, 4, 1, groups=2))
    quantize_layers(model, bits=3)
    for some in (model[0], model[1], model[2], model):
        some.to(memory_format=torch.channels_last)
        fresh = nn.Sequential(*(copy.deepcopy(layer) for layer in layers), nn.Flatten(1))
        fresh.append(nn.Conv1d(4, 4, 1, groups=2))
        loaded = set_up(unpack(pack(model)), fresh)
        for name, tensor in tensors_of(loaded).items():
            assert tensor.stride() == tensors_of(model)[name].stride(), name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_float_network_comes_back_bit_for_bit(layout: torch.memory_format) -> None:
    model = Chain(bias=True).to(memory_format=layout)
    contents = check_round_trip(model, Chain(bias=True), torch.randn(4, 3, 8, 8))
    loaded = set_up(contents, Chain(bias=True).to(memory_format=torch.channels_last))
    assert [p.stride() for p in loaded.parameters()] == [p.stride() for p in model.parameters()]


class Odd(nn.Module):
    """What a user's model may hold besides layers: tied and frozen parameters, buffers, a lock."""

    mask: Tensor
    seen: Tensor
    flags: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.embed = nn.Embedding(11, 6)
        self.inner, self.act = nn.Conv1d(6, 6, 3, padding=1), nn.PReLU(6)
        self.scale = nn.Parameter(torch.randn(6, 1), requires_grad=False)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, add_bias_kv=True)
        self.twice = nn.Linear(6, 6)
        self.again = self.twice
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("mask", torch.full((1, 4), -torch.inf), persistent=False)
        self.register_buffer("seen", torch.tensor(3))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.inner(self.embed(x).transpose(1, 2))) * self.scale
        y = y.transpose(1, 2)
        y = self.again(torch.relu(self.twice(y))) + self.attention(y, y, y)[0]
        z: Tensor = self.out(self.normed(y))
        return z + self.seen + self.flags.sum() + torch.exp(self.mask).sum()


def test_whatever_a_users_model_holds_comes_back(tmp_path: Path) -> None:
    model, x = Odd(), torch.randint(11, (2, 5))
    quantize_layers(model, bits=4)
    model.inner.weight.requires_grad = False
    model.get_parameter("inner.bit_depth").requires_grad = False
    mix_bits(model)
    fresh = Odd()
    fresh.inner.weight.requires_grad = False
    scramble(fresh)
    selfcompress.save(model, tmp_path / "net.scnn")
    assert selfcompress.load(tmp_path / "net.scnn", fresh) is fresh
    assert_identical(evaluated(fresh, x), evaluated(model, x))
    assert fresh.out.embedding is fresh.embed and "out.weight" not in fresh.state_dict()
    assert fresh.again is fresh.twice
    assert not fresh.scale.requires_grad
    assert not fresh.inner.weight.requires_grad
    assert fresh.embed.weight.requires_grad
    assert "mask" not in fresh.state_dict()
    assert fresh.seen == 3 and fresh.flags.tolist() == [True, False]


class Waves(nn.Module):
    """Complex tensors: a spectral convolution, and turns as of rotary embeddings.

    `shift` puts an odd number of floats before them in the file.
    """

    turns: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.shift = nn.Conv1d(3, 4, 1), nn.Parameter(torch.randn(1))
        self.waves = nn.Parameter(torch.randn(4, 4, 3, dtype=torch.complex64))
        self.register_buffer("turns", torch.randn(8, dtype=torch.complex64))
        self.register_buffer("sharp", torch.randn(2, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.fft.rfft(self.lift(x) + self.shift)[..., :3]
        y = torch.fft.irfft(torch.einsum("bim,iom->bom", waves, self.waves), n=8)
        turned: Tensor = y * self.turns
        return turned.imag


def test_complex_numbers_come_back_as_two() -> None:
    """A complex number is stored, and counted, as two floats."""
    model, x = Waves(), torch.randn(2, 3, 8)
    quantize_layers(model, bits=4)
    check_round_trip(model, Waves(), x)
    assert_honest(model)
    size = measure(model, None, 1)
    (own,) = (layer for layer in size.layers if not layer.name)
    assert (own.weights, own.stored_bits) == (96, 32 * (96 + 1 + 16 + 8))
    assert size.q_bits == 4 * 12 + 32 * 96
    (own,) = (layer for layer in measure(model, None, 1, half=True).layers if not layer.name)
    assert own.stored_bits == 16 * (96 + 1 + 16 + 4)
    beside = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    model.lift.register_parameter("beside", beside)
    assert measure(model, None, 1).q_bits == size.q_bits + 32 * 8
    del model.lift.beside
    loaded = set_up(unpack(pack(model, half=True)), Waves())
    torch.testing.assert_close(loaded.waves, model.waves, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        model.waves.mul_(1e5j)
    with pytest.raises(ValueError, match=r"^waves has values too large for float16"):
        pack(model, half=True)
    model.turns.mul_(torch.nan)
    with pytest.raises(ValueError, match=r"^turns is not a number in places"):
        pack(model)


class Recurrent(nn.Module):
    """An LSTM, which lists its weights a second time, and a norm without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.norm = nn.LSTM(3, 4, num_layers=2), nn.BatchNorm1d(4, affine=False)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.norm(self.lstm(x)[0][-1]))
        return y


def test_recurrent_layers_come_back() -> None:
    model, x = Recurrent(), torch.randn(5, 2, 3)
    quantize_layers(model, bits=4)
    for options in ({}, {"fold_norms": True}):
        check_round_trip(model, Recurrent(), x, **options)


def test_prelus_and_scales_of_cut_channels_come_back() -> None:
    network = prepare("sequences")
    kill(network.model, "a", [1, 4])
    with torch.no_grad():
        network.model.get_parameter("norm.bias")[[1, 4]] = 0
        network.model.get_parameter("a.bias")[[1, 4]] = 0
        network.model.get_buffer("norm.running_mean")[[1, 4]] = 0
    network.cut()
    assert network.model.get_parameter("act.weight").shape == (4,)
    loaded = NETWORKS["sequences"][0]()
    check_round_trip(network.model, loaded, network.x)
    assert loaded.get_submodule("act").num_parameters == 4


def test_a_network_that_was_loaded_can_be_trained_on_and_saved_again(tmp_path: Path) -> None:
    network = prepare("residual")
    kill(network.model, "one.0", [0, 1])
    network.cut()
    contents = unpack(pack(network.model))
    first, other = (set_up(contents, NETWORKS["residual"][0]()) for _ in range(2))
    before = evaluated(other, network.x)
    first.train()
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    for _ in range(3):
        first(network.x).square().sum().backward()
        optimizer.step()
    assert_identical(evaluated(other, network.x), before)  # the two share no memory
    assert_identical(evaluated(set_up(contents, NETWORKS["residual"][0]()), network.x), before)
    check_round_trip(first, NETWORKS["residual"][0](), network.x)


def test_loading_keeps_no_memory_of_others() -> None:
    """No loaded tensor keeps alive more memory than its own elements take."""
    model = Chain(bias=True)
    loaded = set_up(unpack(pack(model)), Chain(bias=True))
    for name, tensor in tensors_of(loaded).items():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "resnet56")) for n in models.NAMES]
)
def test_our_models_are_built_and_loaded(name: str, tmp_path: Path) -> None:
    about = About(architecture=Architecture(name, classes=7, width=4, image_size=16))
    x = torch.randn(2, 3, 16, 16)
    compressor = Compressor(models.build(name, 7, 4, 16), x, gamma=0.0)
    model = compressor.model
    randomise_norms(model)
    for layer in list(compressor.layers)[1:-1]:
        kill(model, layer, [0])
    compressor.cut()
    mix_bits(model)
    size = selfcompress.save(model, tmp_path / "net.scnn", about)
    assert size == (tmp_path / "net.scnn").stat().st_size
    assert read(tmp_path / "net.scnn").header.about == about
    loaded = selfcompress.load(tmp_path / "net.scnn")
    assert_identical(evaluated(loaded, x), evaluated(model, x))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "densenet121", "googlenet", "swin_t"],
)
def test_torchvisions_models_are_built_and_loaded(name: str, tmp_path: Path) -> None:
    architecture = Architecture(f"torchvision:{name}", classes=5, width=None, image_size=64)
    x = torch.randn(2, 3, 64, 64)
    model = models.build(architecture.name, 5, None, 64)
    compressor = Compressor(model, x, gamma=0.0)
    randomise_norms(model)
    for layer in list(compressor.layers)[1:-1]:
        kill(model, layer, [0])
    compressor.cut()
    selfcompress.save(model, tmp_path / "net.scnn", About(architecture=architecture))
    loaded = selfcompress.load(tmp_path / "net.scnn")
    assert_identical(evaluated(loaded, x), evaluated(model, x))


FRESH_PROCESS = """
import sys
from pathlib import Path
import torch
from selfcompress import load
from selfcompress.training.augment import normalise
from selfcompress.training.data import load as load_dataset
from selfcompress.training.evaluate import evaluate
run, result = sys.argv[1:]
torch.set_num_threads(1)
data = load_dataset("digits", Path(), 8, torch.device("cpu"))
model = load(f"{run}/net.scnn")
loss, accuracy = evaluate(model, data, data.test, 64)
images = normalise(next(data.test.batches(16))[0], data.mean, data.std)
torch.save({"loss": loss, "accuracy": accuracy, "logits": model(images).detach()}, result)
"""


@pytest.mark.parametrize(
    "options", ["--gamma 0.3", pytest.param("--float", marks=pytest.mark.slow)]
)
def test_a_run_in_a_fresh_process(
    options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a fresh process, the file of a run has the accuracy and the logits that the run found."""
    run = tmp_path / "run"
    arguments = "--dataset digits --width 4 --image-size 8 --epochs 2 --batch-size 64 --device cpu "
    arguments += f"--precision fp32 {options} --run-dir {run}"
    monkeypatch.setattr("sys.argv", ["train.py", *arguments.split()])
    assert train.main() == 0
    command = [sys.executable, "-c", FRESH_PROCESS, str(run), str(tmp_path / "result")]
    subprocess.run(command, check=True, cwd=Path(train.__file__).parent)
    result = torch.load(tmp_path / "result", weights_only=True)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test_accuracy"] == result["accuracy"]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val"]["loss"] == pytest.approx(result["loss"], rel=0.01)

    values = json.loads((run / "config.json").read_text())
    defaults = dataclasses.asdict(Config(float_baseline=values.pop("float")))
    config = Config(**defaults | {k: v for k, v in values.items() if v is not None})
    data = load_dataset("digits", Path(), 8, torch.device("cpu"))
    trainer = loop.Run(config, data, torch.device("cpu"), runs.RunFolder(run, {}), models.build)
    assert trainer._resume() == 2
    images = normalise(next(data.test.batches(16))[0], data.mean, data.std)
    here = load(run / "net.scnn")
    assert_identical(evaluated(here, images), [result["logits"]])
    trained, rounded = evaluated(trainer.model, images)[0], result["logits"]
    if options == "--float":
        assert_identical([trained], [rounded])
    else:  # floats are rounded to 16 bits
        assert 0 < (trained - rounded).abs().max() < 0.01 * trained.abs().max()


# --- another model --------------------------------------------------------------------------------


class Reordered(Chain):
    """A chain whose layers are registered in another order."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        chain = Chain()
        self.head, self.b, self.a = chain.head, chain.b, chain.a


def test_the_order_of_modules_does_not_matter() -> None:
    model = Chain()
    quantize_layers(model, bits=3)
    check_round_trip(model, Reordered(), torch.randn(2, 3, 8, 8))


def narrower(widths: tuple[int, int]) -> nn.Module:
    model = Chain()
    model.a, model.b, model.head = block(3, widths[0]), block(*widths), Head(widths[1])
    return model


def without_head() -> nn.Module:
    model = Chain()
    model.head = nn.Flatten()  # type: ignore[assignment]
    return model


def already_quantised() -> nn.Module:
    model = Chain()
    quantize_layers(model, bits=3)
    return model


def test_a_wider_start_is_cut_to_the_file() -> None:
    model = narrower((5, 6))
    quantize_layers(model, bits=3)
    check_round_trip(model, Chain(), torch.randn(2, 3, 8, 8))


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "narrower": lambda: narrower((5, 7)),
    "another bias": lambda: Chain(bias=True),
    "no head": without_head,
    "another network": lambda: NETWORKS["residual"][0](),
    "quantised": already_quantised,
    "one layer": lambda: nn.Linear(3, 3),
    "nothing": lambda: nn.Sequential(),
    "shapes unknown": lambda: nn.Sequential(nn.LazyLinear(3)),
    "kernels": lambda: nn.Sequential(
        OrderedDict(a=nn.Conv2d(3, 6, 5), b=block(6, 7), head=Head(7))
    ),
}


def snapshot(model: nn.Module) -> list[Any]:
    """Return all that loading could change: modules, attributes, tensors by id and version."""
    found: list[Any] = []
    for name, module in model.named_modules():
        own = {
            k: v
            for k, v in vars(module).items()
            if k not in ("_parameters", "_buffers", "_modules")
        }
        found.append((name, id(module), type(module), repr(sorted(own.items()))))
    for name, tensor in tensors_of(model).items():
        version = None if is_lazy(tensor) else tensor._version
        found.append((name, id(tensor), version, tensor.requires_grad))
    return found


@pytest.mark.parametrize("other", OTHERS)
def test_a_file_of_another_model_is_refused_and_the_model_left_alone(
    other: str, tmp_path: Path
) -> None:
    network = prepare("chain")
    kill(network.model, "a.0", [0])
    network.cut()
    selfcompress.save(network.model, tmp_path / "net.scnn")
    model = OTHERS[other]()
    before = snapshot(model)
    with pytest.raises(FileError) as refusal:
        selfcompress.load(tmp_path / "net.scnn", model)
    assert_one_line(refusal.value)
    says = "compressed already" if other == "quantised" else "it does not fit|does not know"
    assert re.search(says, str(refusal.value))
    assert snapshot(model) == before


def assert_one_line(error: BaseException) -> None:
    assert str(error).isprintable() and 10 < len(str(error)) < 500


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["chain", "depthwise", "cat"])
def test_folded_norms_compute_the_same_but_for_rounding(name: str, dtype: torch.dtype) -> None:
    network = prepare(name)
    for layer in quantized_layers(network.model):
        kill(network.model, layer, [1])
    network.cut()
    model, x = network.model.to(dtype), network.x.to(dtype)
    data, folded = pack(model), pack(model, fold_norms=True)
    channels = sum(m.num_features for m in model.modules() if isinstance(m, PlacedBatchNorm))
    saved = unpack(data).size.floats - unpack(folded).size.floats
    assert saved == 2 * channels * x.element_size() > 0
    loaded = set_up(unpack(folded), scramble(NETWORKS[name][0]()))
    (ours,), (theirs,) = evaluated(loaded, x), evaluated(model, x)
    # A folded norm rounds its few operations on numbers of about 1 differently, and each layer
    # after it, of which there are at most six, passes the difference on.
    tolerance = 50 * torch.finfo(dtype).eps * float(theirs.abs().max().clamp(min=1))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    if dtype == torch.float32:
        loaded.train()(x)  # with the statistics of the batch, as any norm


def test_folding_norms_of_a_float_model_has_no_effect_and_says_so(tmp_path: Path) -> None:
    model = nn.Sequential(block(3, 4))
    plain = selfcompress.save(model, tmp_path / "plain.scnn")
    with pytest.warns(UserWarning, match="fold_norms has no effect"):
        assert selfcompress.save(model, tmp_path / "net.scnn", fold_norms=True) == plain
    quantize_layers(model, bits=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert selfcompress.save(model, tmp_path / "net.scnn", fold_norms=True) < plain


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        selfcompress.save(nn.Linear(3, 2), tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_file_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    there, link = tmp_path / "disk" / "net.scnn", tmp_path / "net.scnn"
    link.symlink_to(there)  # which does not exist at first
    for _ in range(2):
        selfcompress.save(nn.Linear(3, 2), link)
        assert link.is_symlink() and read(there).header.float_layers
    assert [file.name for file in (tmp_path / "disk").iterdir()] == ["net.scnn"]


@pytest.mark.parametrize("fold_norms", [False, True])
def test_half_floats_are_close_and_smaller(fold_norms: bool) -> None:
    network = prepare("depthwise")
    model, x = network.model.eval(), network.x
    data, halved = pack(model), pack(model, half=True, fold_norms=fold_norms)
    whole, half = unpack(data).size, unpack(halved).size
    assert half.floats <= whole.floats / (2.5 if fold_norms else 2)
    assert half.formats < 0.6 * whole.formats
    loaded = set_up(unpack(halved), scramble(NETWORKS["depthwise"][0]()))
    for name, tensor in tensors_of(loaded).items():
        if fold_norms or name.endswith(".bit_depth"):
            continue
        was = tensors_of(model)[name]
        assert tensor.dtype == was.dtype
        if name.endswith(".weight") and name.removesuffix(".weight") in quantized_layers(model):
            continue
        # Rounded to nearest: off by at most half a unit in the last of 11 bits, or half of 2^-24.
        limit = was.abs().double() * 2.0**-11 + 2.0**-25
        assert ((tensor.double() - was.double()).abs() <= limit).all(), name
    # An exponent of up to 16 in size moves by up to 2^-8, and its weights by 2^(2^-8) - 1 = 0.3 %;
    # there are seven layers, and what floats lose, 0.05 % each, is little beside that.
    (ours,), (theirs,) = evaluated(loaded, x), evaluated(model, x)
    assert float((ours - theirs).abs().max()) < 0.03 * float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) > 0


def test_what_float16_cannot_hold_is_refused_by_name() -> None:
    model = Chain(bias=True)
    quantize_layers(model, bits=4)
    with torch.no_grad():
        model.get_parameter("b.0.bias")[2] = 1e5
    pack(model)
    with pytest.raises(ValueError, match=r"^b\.0\.bias has values too large for float16"):
        pack(model, half=True)


# --- writing --------------------------------------------------------------------------------------


def test_a_failing_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.scnn"
    selfcompress.save(Chain(), path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    for what in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(f"os.{what}", fail)
            with pytest.raises(OSError, match="No space left"):
                selfcompress.save(Chain(bias=True), path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["net.scnn"]
    with pytest.raises(OSError, match="No such file"):
        selfcompress.save(Chain(), tmp_path / "nowhere" / "net.scnn")


def spoil(model: nn.Module, name: str, value: float) -> None:
    with torch.no_grad():
        tensors_of(model)[name].view(-1)[0] = value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("b.0.weight", torch.nan, "b.0.weight is not finite"),
        ("b.0.weight", torch.inf, "b.0.weight is not finite"),
        ("a.0.exponent", -torch.inf, "a.0.exponent is not finite"),
        ("a.0.bit_depth", torch.nan, "a.0.bit_depth is not finite"),
        ("a.1.bias", torch.nan, "a.1.bias is not finite"),
        ("a.1.running_var", torch.nan, "a.1.running_var is not a number in places"),
        ("a.0.bit_depth", 16.5, "the bit depths of layer a.0 are not all from 0 to 16"),
        ("a.0.bit_depth", -1, "the bit depths of layer a.0 are not all from 0 to 16"),
        ("a.0.exponent", 200, "the exponents of layer a.0 are out of the range of its weights"),
        ("a.0.exponent", -200, "the exponents of layer a.0 are out of the range of its weights"),
    ],
)
def test_what_makes_no_network_is_refused_by_name(
    name: str, value: float, message: str, tmp_path: Path
) -> None:
    model = Chain()
    quantize_layers(model, bits=4)
    spoil(model, name, value)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        selfcompress.save(model, tmp_path / "net.scnn")
    assert not os.listdir(tmp_path)


def test_what_no_file_can_hold_is_refused_when_written() -> None:
    model = Chain()
    model.register_buffer("turns", torch.zeros(3, dtype=torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="turns is of type float8_e4m3fn"):
        pack(model)
    model.register_buffer("turns", torch.zeros(1, 1, 1, 1, 1, 1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"^no file could be read that holds this model"):
        pack(model)
    odd = nn.Sequential(OrderedDict({"a\nb": nn.Linear(2, 2)}))
    with pytest.raises(ValueError, match=r"^no file could be read that holds this model"):
        pack(odd)


WRONG: dict[str, Any] = {
    "gamma": "much", "seed": 1.5, "mean": [0.5, torch.nan], "std": "1", "image_size": 0,
    "class_names": ["a", 3], "dataset": "two\nlines", "test_accuracy": torch.inf,
    "macs": {"a": -1}, "channels_at_start": {1: 2}, "architecture": "resnet9",
    "starting_weights": 2**40, "epochs": object(), "dataset_kind": "\udcff",
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG)
def test_wrong_facts_are_refused_in_one_line(field: str) -> None:
    with pytest.raises(ValueError, match=r"^about: ") as refusal:
        pack(Chain(), About(**{field: WRONG[field]}))
    assert_one_line(refusal.value)


def test_facts_come_back() -> None:
    about = About(
        architecture=Architecture("resnet9", 10, 64, 32), class_names=["ä", "ß"], mean=[0.1] * 3,
        std=[1, 2, 3], image_size=32, dataset="CIFAR-10", dataset_kind="cifar10", gamma=0.01,
        seed=-3, epochs=7, test_accuracy=0.9, starting_weights=10**6,
        channels_at_start={"a.0": 6}, macs_at_start={"a.0": 10**12}, macs={"a.0": 3},
    )  # fmt: skip
    assert unpack(pack(Chain(), about)).header.about == about


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    compressor = Compressor(nn.Sequential(nn.Linear(3, 2)), torch.zeros(1, 3), 0.0)
    for call in (lambda: save(compressor, tmp_path / "a"), lambda: to_dense(compressor)):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"a torch module .* not a Compressor"):
            call()
    save(compressor.model, tmp_path / "a")
    with pytest.raises(TypeError, match=r"a torch module .* not a type"):
        load(tmp_path / "a", nn.Linear)  # type: ignore[arg-type]


def test_files_have_the_modes_of_others_and_a_folder_is_none(tmp_path: Path) -> None:
    """A file gets the permissions that the umask leaves, and saving to a folder is refused."""
    model = nn.Sequential(nn.Linear(3, 2))
    before = os.umask(0o027)
    try:
        save(model, tmp_path / "a")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    with pytest.raises(IsADirectoryError, match=f"directory: '{tmp_path}'"):
        save(model, tmp_path)
