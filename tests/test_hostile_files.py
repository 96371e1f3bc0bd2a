"""Damaged, forged or foreign files: a clear one-line error, or the network that they describe.

A damaged file may read as what it was before the damage, and a forged one may load if all its
claims agree. Everything else must be a `FileError` of one line, soon, without much memory, and the
model that was given must be left as it was.
"""

import contextlib
import functools
import io
import json
import pickle
import resource
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, Chain, kill, prepare
from torch import Tensor, nn

import selfcompress
from models import build
from selfcompress import About, Architecture, FileError
from selfcompress.convert import quantize_layers
from selfcompress.file.load import set_up
from selfcompress.file.read import Contents, unpack
from selfcompress.file.streams import checksum
from selfcompress.file.write import pack
from selfcompress.layers.quantized import quantized_layers

Header = dict[str, Any]
"""The header of a file, as parsed JSON."""

Streams = dict[str, bytes]

# --- files, and taking them apart -----------------------------------------------------------------


def resnet9() -> nn.Module:
    return build("resnet9", 5, 2, 8)


@functools.cache
def victim(name: str) -> bytes:
    """Return the file of a network in STARTS: one of NETWORKS, mostly cut, or another."""
    if name == "float":
        return pack(Chain(bias=True))
    if name == "resnet9":
        model = resnet9()
        quantize_layers(model, bits=2, exclude=["linear"])
        about = About(architecture=Architecture("resnet9", 5, 2, 8), mean=[0.5], gamma=0.1)
        return pack(model, about, half=True, fold_norms=True)
    network = prepare(name)
    with torch.no_grad():
        for layer in quantized_layers(network.model).values():
            layer.bit_depth.copy_(torch.arange(len(layer.bit_depth)) % 5 + 1)
    for layer_name in list(quantized_layers(network.model))[:-1]:
        kill(network.model, layer_name, [0])
    if name != "grouped":
        network.cut()
    return pack(network.model)


STARTS: dict[str, Callable[[], nn.Module] | None] = {
    "chain": Chain,
    "depthwise": NETWORKS["depthwise"][0],
    "grouped": NETWORKS["grouped"][0],  # with rows that have no bits
    "transformer": NETWORKS["transformer"][0],
    "float": lambda: Chain(bias=True),
    "resnet9": None,  # built as the file says
}
"""Name of a `victim` → how to build the model that it is loaded into."""


def take_apart(data: bytes) -> tuple[Header, Streams]:
    """Return the header and the other streams of a file."""
    tensors = safetensors.torch.load(data)
    text = tensors.pop("header").numpy().tobytes()
    return json.loads(zlib.decompress(text[4:])), {k: octets(v) for k, v in tensors.items()}


def octets(tensor: Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()


def put_together(header: Header | bytes, streams: Streams, packed: bool = True) -> bytes:
    """Return a file with a valid checksum, whatever is in it.

    Args:
        header: the header, or its text.
        packed: whether the text still has to be compressed.
    """
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text = zlib.compress(text) if packed else text
    tensors = {}
    for name, content in streams.items():
        dtype: torch.dtype = getattr(torch, name, torch.uint8)
        whole = len(content) - len(content) % dtype.itemsize
        flat = torch.frombuffer(bytearray(content[:whole]), dtype=torch.uint8) if whole else None
        tensors[name] = torch.zeros(0, dtype=dtype) if flat is None else flat.view(dtype)
    text = checksum(text, tensors) + text
    header_stream = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return safetensors.torch.save({"header": header_stream, **tensors})


def forged(name: str, *path: str | int, value: Any) -> bytes:
    """Return the file of a victim, with one value in its header replaced."""
    header, streams = take_apart(victim(name))
    place: Any = header
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return put_together(header, streams)


# --- what must happen -----------------------------------------------------------------------------


def equal(one: Contents, other: Contents) -> bool:
    """Return whether two files hold the same."""
    return (
        one.header == other.header
        and all(
            (a.values == b.values).all() and (a.depths == b.depths).all()
            and (a.rows == b.rows).all() and (a.columns == b.columns).all()
            and torch.equal(a.exponents, b.exponents)
            for a, b in ((one.layers[n], other.layers[n]) for n in one.layers)
        )
        and all(torch.equal(one.tensors[n], other.tensors[n]) for n in one.tensors)
    )  # fmt: skip


def refused(attempt: Callable[[], object]) -> bool:
    """Return whether `attempt` raises a FileError, of one line; other errors pass through."""
    try:
        attempt()
    except FileError as error:
        message = str(error)
    else:
        return False
    assert message.isprintable() and 10 < len(message) < 500, message
    return True


_MODELS: dict[str, nn.Module] = {}


def load_forged(name: str, data: bytes) -> bool:
    """Load a file that may be forged, and return whether it was refused.

    If it was, assert that the model is as it was before.
    """
    if refused(lambda: unpack(data)):
        return True
    contents, start = unpack(data), STARTS[name]
    if start is None:
        return refused(lambda: set_up(contents))
    model = _MODELS.setdefault(name, start())
    before = {n: (id(m), type(m)) for n, m in model.named_modules()}
    tensors = {n: (id(t), t.shape) for n, t in model.state_dict(keep_vars=True).items()}
    if not refused(lambda: set_up(contents, model)):
        del _MODELS[name]
        return False
    assert before == {n: (id(m), type(m)) for n, m in model.named_modules()}
    now = {n: (id(t), t.shape) for n, t in model.state_dict(keep_vars=True).items()}
    assert tensors == now
    return True


@pytest.mark.parametrize("name", STARTS)
def test_what_is_taken_apart_and_put_together_is_what_it_was(name: str) -> None:
    data = put_together(*take_apart(victim(name)))
    assert equal(unpack(data), unpack(victim(name)))
    assert not load_forged(name, data)


# --- damage ---------------------------------------------------------------------------------------


def check_damaged(data: bytes, *originals: str) -> None:
    """Assert that a file is refused, or reads as one of the originals."""
    if not refused(lambda: unpack(data)):
        assert any(equal(unpack(data), unpack(victim(name))) for name in originals)


@pytest.mark.parametrize("name", ["chain", "resnet9"])
def test_every_truncation_is_refused(name: str) -> None:
    whole = victim(name)
    for length in range(len(whole)):
        assert refused(lambda length=length: unpack(whole[:length])), length  # type: ignore[misc]
    assert refused(lambda: unpack(whole + b"\0"))


@pytest.mark.parametrize("name", ["chain", pytest.param("resnet9", marks=pytest.mark.slow)])
def test_every_flipped_bit_is_seen(name: str) -> None:
    whole, unseen = victim(name), 0
    for place in range(len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            check_damaged(bytes(data), name)
            unseen += not refused(lambda data=data: unpack(bytes(data)))  # type: ignore[misc]
    assert unseen < 10  # only spaces that pad the container's own header


Edit = tuple[str, float, float, bytes]
EDITS = ("flip", "set", "delete", "insert", "repeat", "swap", "cut", "splice")


def edits(most: int) -> st.SearchStrategy[list[Edit]]:
    """Draw edits of bytes: a kind, a place (0 to 1), another place or a length, some bytes."""
    share = st.floats(0, 1, width=32)
    edit = st.tuples(st.sampled_from(EDITS), share, share, st.binary(min_size=1, max_size=8))
    return st.lists(edit, min_size=1, max_size=most)


def edited(data: bytes, changes: list[Edit], other: bytes) -> bytes:
    for what, where, width, new in changes:
        begin = int(where * len(data))
        end = begin + int(width**4 * 64)  # mostly short
        if what == "flip" and begin < len(data):
            flipped = bytes([data[begin] ^ (1 << new[0] % 8)])
            data = data[:begin] + flipped + data[begin + 1 :]
        elif what == "set":
            data = data[:begin] + new + data[begin + len(new) :]
        elif what == "delete":
            data = data[:begin] + data[end:]
        elif what == "insert":
            data = data[:begin] + new + data[begin:]
        elif what == "repeat":
            data = data[:end] + data[begin:]
        elif what == "swap":
            piece, at = data[begin:end], int(width * len(data))
            data = data[:begin] + data[end:]
            data = data[:at] + piece + data[at:]
        elif what == "cut":
            data = data[:begin]
        elif what == "splice":
            data = data[:begin] + other[int(width * len(other)) :]
    return data


def check_edited(name: str, other: str, changes: list[Edit]) -> None:
    check_damaged(edited(victim(name), changes, victim(other)), name, other)


SOME = st.sampled_from(list(STARTS))


@settings(max_examples=600, deadline=None)
@given(name=SOME, other=SOME, changes=edits(4))
def test_damaged_files_are_refused(name: str, other: str, changes: list[Edit]) -> None:
    check_edited(name, other, changes)


# --- forgery --------------------------------------------------------------------------------------

NASTY: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 5, 7, 255, 2**16, 2**24, 2**31, 2**31 - 1, 2**32, 2**62, 2**63, 2**64, 10**30,
    -(2**63), 0.5, 1e300, float("nan"), float("inf"), "", "a", "a.0", "header", "a\nb", "\x1b[31m",
    "é\u2028", "\ud800", "__class__", "..", "a.0.weight", "float32", "float16", "bool", "int64",
    "uint8", "complex64", "resnet9", "torchvision:resnet18", "../x", None, True, False, [], {},
    [0], [1, 1], [2**31, 2**31], [0, 2**31, 2**31], [1] * 9, [[]], {"a": 1}, {"name": "vit"},
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths to all values in a piece of JSON."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, part in items:
        yield (*path, key)
        yield from places(part, (*path, key))


Change = tuple[str, float, float, Any]
CHANGES = ("replace", "number", "number", "delete", "repeat", "swap", "reverse", "copy")


def changes_of_headers() -> st.SearchStrategy[list[Change]]:
    share = st.floats(0, 1, width=32)
    value = st.one_of(st.sampled_from(NASTY), st.integers(-3, 40))
    return st.lists(st.tuples(st.sampled_from(CHANGES), share, share, value), max_size=3)


def changed(header: Header, changes: list[Change]) -> Header:
    header = json.loads(json.dumps(header))
    for what, first, second, value in changes:
        paths = list(places(header))
        if not paths:
            break
        path, other = (paths[min(int(s * len(paths)), len(paths) - 1)] for s in (first, second))
        parent, old = at(header, path[:-1]), at(header, path)
        value = json.loads(json.dumps(value))  # a copy
        if what == "replace":
            parent[path[-1]] = value
        elif what == "number":
            numbers = [p for p in paths if type(at(header, p)) is int]
            path = numbers[int(first * (len(numbers) - 1))] if numbers else path
            at(header, path[:-1])[path[-1]] = value
        elif what == "delete":
            del parent[path[-1]]
        elif what == "repeat" and isinstance(parent, list):
            parent.insert(path[-1], old)
        elif what == "reverse" and isinstance(old, list):
            old.reverse()
        elif what == "copy":
            parent[path[-1]] = json.loads(json.dumps(at(header, other)))
        elif what == "swap" and path[: len(other)] != other and other[: len(path)] != path:
            parent[path[-1]] = at(header, other)
            at(header, other[:-1])[other[-1]] = old
    return header


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def check_forged(
    name: str, other: str, header_changes: list[Change], stream_edits: list[tuple[float, Edit]]
) -> None:
    header, streams = take_apart(victim(name))
    _, others = take_apart(victim(other))
    for which, edit in stream_edits:
        stream = sorted(streams)[min(int(which * len(streams)), len(streams) - 1)]
        streams[stream] = edited(streams[stream], [edit], others.get(stream, b""))
    load_forged(name, put_together(changed(header, header_changes), streams))


def edits_of_streams() -> st.SearchStrategy[list[tuple[float, Edit]]]:
    one = edits(1).map(lambda edits: edits[0])
    return st.lists(st.tuples(st.floats(0, 1, width=32), one), max_size=2)


@settings(max_examples=600, deadline=None)
@given(name=SOME, other=SOME, header=changes_of_headers(), streams=edits_of_streams())
def test_forged_files_are_refused_or_loaded(
    name: str, other: str, header: list[Change], streams: list[tuple[float, Edit]]
) -> None:
    check_forged(name, other, header, streams)


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTS)
def test_a_hundred_thousand_damaged_and_forged_files(name: str) -> None:
    """Half of them damaged, half of them forged."""

    @settings(max_examples=8500, deadline=None)
    @given(other=SOME, changes=edits(4))
    def damaged(other: str, changes: list[Edit]) -> None:
        check_edited(name, other, changes)

    @settings(max_examples=8500, deadline=None)
    @given(other=SOME, header=changes_of_headers(), streams=edits_of_streams())
    def forged(other: str, header: list[Change], streams: list[tuple[float, Edit]]) -> None:
        check_forged(name, other, header, streams)

    damaged()
    forged()


FORGERIES: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "another version": (("version",), 2),
    "another format": (("format",), "a"),
    "a rank too many": (("layers", 0, 1), [6, 3, 3, 3, 1]),
    "no rank": (("layers", 0, 1), []),
    "more rows than widths": (("layers", 0, 1, 0), 50),
    "more live rows than rows": (("layers", 0, 6), 50),
    "a row dimension of 2": (("layers", 0, 2), 2),
    "transposed": (("layers", 0, 2), 1),
    "negative": (("layers", 0, 1, 0), -1),
    "a fraction": (("layers", 0, 1, 0), 2.5),
    "huge rows": (("layers", 0, 1, 0), 2**31),
    "a huge fan-in of no rows": (("layers", 0, 1), [0, 2**31, 2**31, 2**31]),
    "huge widths": (("layers", 0, 3), 2**31),
    "many columns": (("layers", 0, 5), 2**24),
    "weights of whole numbers": (("layers", 0, 8), "int64"),
    "weights that are true or false": (("layers", 0, 8), "bool"),
    "exponents of whole numbers": (("layers", 0, 9), "int8"),
    "weights that overflow": (("layers", 0, 8), "float16"),
    "an unknown type": (("tensors", 0, 1), "complex32"),
    "pairs of numbers": (("tensors", 0, 1), "complex64"),
    "a tensor of no numbers that is huge": (("tensors", 0, 2), [0, 2**31, 2**31]),
    "a huge tensor": (("tensors", 0, 2), [2**31]),
    "tensors of nine dimensions": (("tensors", 0, 2), [1] * 9),
    "a norm of fewer entries": (("norms", 0, 1), 5),
    "a norm of huge widths": (("norms", 0, 2), 2**31),
    "a folded norm that was none": (("norms", 0, 4), True),
    "a control character": (("layers", 0, 0), "a\x1b[2J"),
    "a line end": (("layers", 0, 0), "a.0\n"),
    "another name": (("layers", 0, 0), "a.1"),
    "a name twice": (("layers", 0, 0), "b.0"),
    "a private name": (("tensors", 0, 0), "__class__"),
    "a layer in float": (("float_layers",), [["a.0", 3, 6]]),
    "a huge integer": (("stored_bits",), 10**30),
    "too long an integer": (("about",), {"seed": 10**4000}),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_lying_headers_are_refused(what: str) -> None:
    path, value = FORGERIES[what]
    if what == "weights that overflow":
        header, streams = take_apart(victim("chain"))
        header["layers"][0][8] = value
        exponents = torch.full((len(streams["float32"]) // 4,), 20.0)
        streams["float32"] = octets(exponents)
        data = put_together(header, streams)
    else:
        data = forged("chain", *path, value=value)
    assert load_forged("chain", data)


def test_shapes_that_contradict_one_another_are_refused() -> None:
    """The number of elements stays what it was, so only the shapes themselves tell."""
    header, streams = take_apart(victim("chain"))
    names = {tensor[0]: tensor for tensor in header["tensors"]}
    weight, bias = names["a.1.weight"], names["a.1.bias"]
    weight[2], bias[2] = [weight[2][0] + 1], [bias[2][0] - 1]
    assert load_forged("chain", put_together(header, streams))
    header, streams = take_apart(victim("float"))
    layer = next(entry for entry in header["float_layers"] if entry[0] == "b.0")
    layer[1], layer[2] = 5, 6
    assert load_forged("float", put_together(header, streams))


@pytest.mark.parametrize("name", ["chain", "depthwise", "grouped"])
def test_every_other_placement_is_refused(name: str) -> None:
    """Any bit that is flipped changes a number of rows, columns, groups or live rows."""
    header, streams = take_apart(victim(name))
    contents = unpack(victim(name)).header
    begin = 8 * -(-sum(layer.live for layer in contents.layers) // 2)
    end = begin + sum(layer.placement_bits for layer in contents.layers)
    end += sum(norm.placement_bits for norm in contents.norms)
    assert end > begin
    for place in range(begin, end):
        bits = bytearray(streams["bits"])
        bits[place // 8] ^= 1 << place % 8
        assert load_forged(name, put_together(header, streams | {"bits": bytes(bits)})), place


def test_streams_of_other_types_and_shapes_are_refused() -> None:
    """The bytes of a stream, and so the checksum, are the same, but its dtype or shape is not."""
    tensors = safetensors.torch.load(victim("float"))
    data = safetensors.torch.save(tensors | {"float32": tensors["float32"].view(torch.int32)})
    assert load_forged("float", data)
    tensors = safetensors.torch.load(victim("chain"))
    floats = tensors["float32"]
    for other in (floats.view(torch.int32), floats.view(torch.uint8), floats.view(2, -1)):
        data = safetensors.torch.save(tensors | {"float32": other})
        assert load_forged("chain", data)
    data = safetensors.torch.save(tensors | {"bits": tensors["bits"][None]})
    assert load_forged("chain", data)
    header, streams = take_apart(victim("chain"))
    assert load_forged("chain", put_together(header, streams | {"complex64": b""}))


@pytest.mark.parametrize("stream", ["bits", "float32", "int64", "unknown"])
def test_more_or_fewer_numbers_than_there_should_be_are_refused(stream: str) -> None:
    header, streams = take_apart(victim("chain"))
    old = streams.get(stream, b"")
    assert load_forged("chain", put_together(header, streams | {stream: old + b"\1" * 8}))
    if old:
        assert load_forged("chain", put_together(header, streams | {stream: old[:-8]}))
        assert load_forged("chain", put_together(header, streams | {stream: b""}))
        del streams[stream]
        assert load_forged("chain", put_together(header, streams))


def small() -> nn.Module:
    """Return a grouped convolution, with 4 rows in 2 groups, and a batch norm."""
    return nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4))


def test_groups_of_other_widths_are_refused() -> None:
    model = small()
    quantize_layers(model, bits=2)
    header, streams = take_apart(pack(model))
    bits = streams["bits"]
    assert bits[:3] == b"\x11\x11\5"  # depths; the rows that open a group, 0 and 2
    for opening in (0b0011, 0b1001):  # groups of 1 and 3
        forged_bits = bits[:2] + bytes([opening]) + bits[3:]
        contents = unpack(put_together(header, streams | {"bits": forged_bits}))
        assert refused(lambda contents=contents: set_up(contents, small()))  # type: ignore[misc]


def test_norms_of_other_widths_are_refused() -> None:
    """The file has a norm that reads 4 of 5 channels, but the model has only 4."""
    model = small()
    quantize_layers(model, bits=2)
    header, streams = take_apart(pack(model))
    bits = streams["bits"]
    header["norms"][0][2] = 5
    forged_bits = bits[:2] + (5 | 0b01111 << 4).to_bytes(2, "little") + bits[3:]
    contents = unpack(put_together(header, streams | {"bits": forged_bits}))
    assert refused(lambda: set_up(contents, small()))


def test_whole_numbers_of_another_type_are_refused() -> None:
    def start() -> nn.Module:
        model = Chain()
        model.register_buffer("mask", torch.tensor([True, False]))
        return model

    header, streams = take_apart(pack(start()))
    mask = next(tensor for tensor in header["tensors"] if tensor[0] == "mask")
    for dtype, content in (("uint8", b"\1\2"), ("float16", b"\1\2\3\4")):
        mask[1] = dtype
        forged_streams = {k: v for k, v in streams.items() if k != "bool"} | {dtype: content}
        contents = unpack(put_together(header, forged_streams))
        assert refused(lambda contents=contents: set_up(contents, start()))  # type: ignore[misc]


def test_a_folded_norm_without_coefficients_is_refused() -> None:
    def start() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False))

    model = start()
    quantize_layers(model, bits=2)
    header, streams = take_apart(pack(model))
    header["norms"][0][4] = True
    header["tensors"] = [t for t in header["tensors"] if "running" not in t[0]]
    streams["float32"] = streams["float32"][: 4 * (4 + 4)]
    contents = unpack(put_together(header, streams))
    assert refused(lambda: set_up(contents, start()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38, -1e38])
def test_exponents_out_of_range_are_refused(value: float) -> None:
    header, streams = take_apart(victim("chain"))
    numbers = torch.frombuffer(bytearray(streams["float32"]), dtype=torch.float32).clone()
    numbers[1] = value
    assert load_forged("chain", put_together(header, streams | {"float32": octets(numbers)}))


def text_of(name: str) -> bytes:
    return json.dumps(take_apart(victim(name))[0]).encode()


def headers_of_any_text() -> Iterator[tuple[str, bytes, bool]]:
    """Yield a description, a header's text, and whether it still has to be compressed."""
    text = text_of("chain")
    begin = b'{"extra": '
    yield "lists in lists", begin + b"[" * 10**6 + b"]" * 10**6 + b"," + text[1:], True
    yield (
        "objects in objects",
        begin + b'{"a":' * 10**5 + b"1" + b"}" * 10**5 + b"," + text[1:],
        True,
    )
    yield "no end", b"[" * 10**6, True
    yield "digits", text.replace(b'"stored_bits": ', b'"stored_bits": 1' + b"0" * 10**6), True
    yield "a large float", text.replace(b'"about": {', b'"about": {"gamma": 1e999'), True
    yield "a lone surrogate", text.replace(b'"about": {', b'"about": {"dataset": "\\ud800"'), True
    yield "no UTF-8", text.replace(b'"about": {', b'"about": {"dataset": "\xff"'), True
    yield "a bomb", text[:-1] + b" " * 10**8 + b"}", True
    yield (
        "many facts",
        text.replace(b'"about": {', b'"about": {"mean": [1' + b",1" * (4 * 10**6) + b"]"),
        True,
    )
    yield "nothing", b"", True
    yield "null", b"null", True
    yield "a list", b"[]", True
    yield "not compressed", text, False
    yield "something behind", zlib.compress(text) + b"\0", False
    yield "no end of zlib", zlib.compress(text)[:-3], False
    yield "no bytes", b"", False


@contextlib.contextmanager
def little_memory(more: int = 2**29) -> Iterator[None]:
    """Within the block, limit the process to `more` bytes of memory beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


@linux
def test_headers_of_any_text_are_refused_without_much_memory() -> None:
    for what, text, packed in headers_of_any_text():
        data = put_together(text, take_apart(victim("chain"))[1], packed)
        with little_memory():
            assert refused(lambda data=data: unpack(data)), what  # type: ignore[misc]


def claims() -> Iterator[tuple[str, Header, Streams]]:
    """Yield a description, a header that claims a huge network, and streams with almost nothing."""
    header = take_apart(victim("chain"))[0] | {"layers": [], "norms": [], "tensors": []}
    little = {"bits": b"\0" * 64, "float32": b"\0" * 64}

    def layer(shape: list[int], widths: tuple[int, int], columns: int, live: int) -> Header:
        types = [False, "float32", "float32", False]
        return header | {"layers": [["z", shape, 0, *widths, columns, live, *types]]}

    yield "rows", layer([2**23, 1], (1, 2**23), 1, 2**23), little
    yield "dead rows", layer([2**23, 1], (1, 2**23), 1, 0), little
    yield "fan-in", layer([1, 2**30], (1, 1), 1, 1), little
    yield "columns", layer([1, 1], (2**23, 1), 2**23, 1), little
    # The streams have all that the next two claim.
    none_has_bits = {"bits": b"\0" * 2**11}
    yield "weights without bits", layer([2**14, 2**14], (1, 2**14), 1, 0), none_has_bits
    yield "a fan-in of no rows", layer([0, 2**31, 2**31, 2**31], (0, 0), 0, 0), {}
    for width in (2**23, 2**28):
        yield "a norm", header | {"norms": [["z", width, width, width, False]]}, {}
    for shape in ([2**31 - 1], [0, 2**31, 2**31, 2**31]):
        yield "a tensor", header | {"tensors": [["z", "float64", shape, False]]}, {}


@linux
def test_huge_claims_are_refused_without_much_memory() -> None:
    for what, header, streams in claims():
        data = put_together(header, streams)
        with little_memory():
            assert load_forged("chain", data), what


def test_a_small_file_does_not_unfold_into_a_huge_network() -> None:
    """Coded integers may take almost no space, so their number is limited by that of the bytes."""
    header, streams = take_apart(victim("chain"))
    rows = 16
    layer = ["z", [rows, 2**22], 0, 2**22, rows, 2**22, rows, False, "float32", "float32", False]
    header |= {"layers": [layer], "norms": [], "tensors": []}
    table = bytes([255, 1])
    bits = b"\0" * (rows // 2) + b"\1" + table + b"\1\0\0\0" * 100
    streams = {"bits": bits, "float32": b"\0" * 4 * rows}
    with little_memory():
        assert load_forged("chain", put_together(header, streams))


# --- other files ----------------------------------------------------------------------------------


def no_networks(folder: Path) -> Iterator[Path]:
    """Write files that are not packed networks, and yield their paths."""

    def made(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    yield folder
    yield made("empty", b"")
    yield made("text", b"Once upon a time there was a network.\n" * 50)
    yield made("zeros", bytes(10_000))
    yield made("ones", b"\xff" * 10_000)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("net.scnn", victim("chain"))
    yield made("net.zip", archive.getvalue())
    torch.save(Chain().state_dict(), folder / "net.pt")
    yield folder / "net.pt"
    torch.save(Chain(), folder / "model.pt")
    yield folder / "model.pt"
    yield made("model.pkl", pickle.dumps(Bomb(folder / "exploded")))
    yield made("other", safetensors.torch.save({"weight": torch.zeros(3)}))
    yield made("half", safetensors.torch.save({"header": torch.zeros(3)}))
    yield made("none", safetensors.torch.save({"header": torch.zeros(0, dtype=torch.uint8)}))
    yield made("short", safetensors.torch.save({"header": torch.zeros(3, dtype=torch.uint8)}))
    yield made("flat", safetensors.torch.save({"header": torch.zeros(3, 3, dtype=torch.uint8)}))
    yield made("claim", (2**63 - 1).to_bytes(8, "little") + b"{}")
    shape = [2**62, 2**62]
    claim = {"header": {"dtype": "U8", "shape": shape, "data_offsets": [0, 2**63]}}
    text = json.dumps(claim).encode()
    yield made("overflow", len(text).to_bytes(8, "little") + text)


class Bomb:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    model = Chain()
    for path in no_networks(tmp_path):
        for given_model in (None, model):
            with pytest.raises(FileError) as refusal:
                selfcompress.load(path, given_model)
            assert str(refusal.value).startswith(str(path))
            assert str(refusal.value).isprintable()
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(OSError, match="No such file"):
        selfcompress.load(tmp_path / "nowhere")


@linux
def test_a_device_that_never_ends_is_refused() -> None:
    """A device is refused at once, instead of read until memory is full."""
    with little_memory(), pytest.raises(FileError, match=r"^/dev/zero .* no file"):
        selfcompress.load("/dev/zero")


def test_architectures_that_cannot_be_built_are_refused() -> None:
    header, streams = take_apart(victim("resnet9"))
    for architecture in (
        {"name": "resnet10", "classes": 5, "width": 2, "image_size": 8},
        {"name": "os:system", "classes": 5, "width": 2, "image_size": 8},
        {"name": "torchvision:resnet18", "classes": 5, "width": 2, "image_size": 8},
        {"name": "vit", "classes": 5, "width": 10**6, "image_size": 10**5},
        {"name": "vgg16", "classes": 10**6, "width": 10**6, "image_size": 8},
        {"name": "resnet9", "classes": 5, "width": 1, "image_size": 8},
    ):
        header["about"]["architecture"] = architecture
        with little_memory():
            assert load_forged("resnet9", put_together(header, streams)), architecture
    del header["about"]["architecture"]
    contents = unpack(put_together(header, streams))
    with pytest.raises(FileError, match="does not say how to build its network"):
        set_up(contents)
