"""Read a packed file: check all of it and split its streams into layers, norms and tensors.

Files are not trusted: nothing in them is executed, sizes are checked before anything of that size
is allocated, and every stream has to be used up exactly.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from selfcompress.file import header as h
from selfcompress.file import integers
from selfcompress.file.streams import DTYPES, checksum, representable, stored_dtype
from selfcompress.text import first_line

_MAX_FILE = 8 * h.MAX_NUMBERS  # bytes
_OCTETS = ("header", "bits")  # streams of bytes; the others are named by their dtype


@dataclass(frozen=True)
class LayerContents:
    """The contents of a file for one quantised layer.

    Attributes:
        rows: (rows,) int64, the output channel of each row.
        columns: (columns,) int64, the input channels that the layer reads.
        groups: (rows,) int64, the group of each row of a grouped convolution; else None.
        depths: (rows,) int64 bit depths; 0 for rows without bits.
        values: (rows, fan-in) int32, the quantised weights as integers.
        exponents: (rows,) floats; 0 for rows without bits.
    """

    rows: np.ndarray
    columns: np.ndarray
    groups: np.ndarray | None
    depths: np.ndarray
    values: np.ndarray
    exponents: Tensor

    def by_depth(self) -> list[integers.Group]:
        """Return the integers of the rows of each bit depth, in the groups they are coded in."""
        depths = np.unique(self.depths[self.depths > 0]).tolist()
        return [(bits, self.values[self.depths == bits].ravel()) for bits in depths]


@dataclass(frozen=True)
class Bytes:
    """The number of bytes of a file, by what they are used for.

    Attributes:
        integers: the weights of rows that have bits, with the tables they are coded with.
        formats: the bit depths and exponents of these rows.
        placement: which channels the rows, columns and norm entries belong to.
        floats: all other numbers that the network needs.
        names: the header and the container: names, shapes and information about the network.
    """

    integers: int
    formats: int
    placement: int
    floats: int
    names: int

    @property
    def total(self) -> int:
        """The size of the file."""
        return self.integers + self.formats + self.placement + self.floats + self.names


@dataclass(frozen=True)
class Contents:
    """The contents of a packed file.

    Attributes:
        layers: quantised layer → its contents.
        norms: batch norm → (rows, columns), the output and input channel of each entry.
        tensors: the header's tensors by name, in the dtypes of the network.
        size: the bytes of the file.
    """

    header: h.Header
    layers: dict[str, LayerContents]
    norms: dict[str, tuple[np.ndarray, np.ndarray]]
    tensors: dict[str, Tensor]
    size: Bytes

    def entropy_bits(self) -> float:
        """Return the bits that an ideal coder would need for the integers, tables not counted."""
        return integers.entropy_bits(
            [g for layer in self.layers.values() for g in layer.by_depth()]
        )


def read(path: str | os.PathLike[str]) -> Contents:
    """Read the file at `path` and check it, without building the network.

    Raises:
        FileError: the file is not a packed network, or is damaged.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        why = "a folder: give the net.scnn in it" if Path(path).is_dir() else "no file"
        raise h.FileError(f"{path} cannot be read as a packed network: it is {why}")
    if path.stat().st_size > _MAX_FILE:
        raise h.FileError(f"{path} has more than {_MAX_FILE:,} bytes: no network is packed in it")
    try:
        return unpack(path.read_bytes())
    except h.FileError as error:
        raise h.FileError(f"{path} cannot be read as a packed network: {error}") from error


def unpack(data: bytes) -> Contents:
    """Check and split the bytes of a file; raises FileError as `read` does."""
    streams = _streams(data)
    text = streams.pop("header").numpy().tobytes()
    if text[:4] != checksum(text[4:], streams):
        raise h.FileError("it is damaged: its checksum is another")
    return _Unpacker(h.from_bytes(text[4:]), streams).run(len(data))


def _streams(data: bytes) -> dict[str, Tensor]:
    """Return the tensors in the container, after checking their names, dtypes and dimensions."""
    try:
        streams = safetensors.torch.load(data)
    except Exception as error:  # safetensors' own errors, and those for unknown dtypes
        raise h.FileError(
            f"it is no safetensors file, or a damaged one ({first_line(error)})"
        ) from error
    if "header" not in streams:
        raise h.FileError("it is a safetensors file, but no network packed by selfcompress")
    for name, stream in streams.items():
        dtype = torch.uint8 if name in _OCTETS else DTYPES.get(name)
        if stream.dtype != dtype or stream.is_complex() or stream.dim() != 1:
            raise h.FileError(f"it has a tensor {name!r} that does not belong there")
    return streams


class _Unpacker:
    """Splits the streams as the header describes."""

    def __init__(self, header: h.Header, streams: dict[str, Tensor]) -> None:
        self.header = header
        bits = streams.pop("bits", torch.zeros(0, dtype=torch.uint8)).numpy()
        self.numbers = streams
        self.used = dict.fromkeys(streams, 0)  # numbers used so far, by stream
        depths = -(-sum(layer.live for layer in header.layers) // 2)
        placed = sum(layer.placement_bits for layer in header.layers)
        placed += sum(norm.placement_bits for norm in header.norms)
        placement = -(-placed // 8)
        if len(bits) < depths + placement:
            raise h.FileError("there are fewer bits than there should be")
        self.depths, placement_bits, self.integers = np.split(bits, [depths, depths + placement])
        self.placement = np.unpackbits(placement_bits, bitorder="little").astype(bool)

    def run(self, file_bytes: int) -> Contents:
        placement_bytes = -(-len(self.placement) // 8)
        layers, tensors = self._layers(), {}
        exponent_bytes = self._bytes_used()
        norms = {n.name: self._placement(n.entries, n.entries, n) for n in self.header.norms}
        for entry in self.header.tensors:
            tensors[entry.name] = self._numbers(entry.dtype, entry.numel).view(entry.shape)
        if any(self.used[name] != len(stream) for name, stream in self.numbers.items()):
            raise h.FileError("there are more numbers than there should be")
        parts = {
            "integers": len(self.integers),
            "formats": len(self.depths) + exponent_bytes,
            "placement": placement_bytes,
            "floats": self._bytes_used() - exponent_bytes,
        }
        size = Bytes(**parts, names=file_bytes - sum(parts.values()))
        return Contents(self.header, layers, norms, tensors, size)

    def _bytes_used(self) -> int:
        return sum(self.numbers[name].element_size() * n for name, n in self.used.items())

    def _layers(self) -> dict[str, LayerContents]:
        entries = self.header.layers
        depths = self._depths(sum(entry.live for entry in entries))
        placed = []
        for entry in entries:
            rows, columns = self._placement(entry.rows, entry.columns, entry)
            groups = np.cumsum(self._bits(entry.rows)) - 1 if entry.grouped else None
            live = np.ones(entry.rows, bool) if entry.live == entry.rows else self._bits(entry.rows)
            if live.sum() != entry.live or (groups is not None and groups[:1].any()):
                raise h.FileError(f"the placement of layer {entry.name} is damaged")
            depth = np.zeros(entry.rows, np.int64)
            depth[live], depths = depths[: entry.live], depths[entry.live :]
            placed.append((rows, columns, groups, depth))
        coded = self._integers([depth for *_, depth in placed])
        layers = {}
        for entry, (rows, columns, groups, depth), values in zip(
            entries, placed, coded, strict=True
        ):
            live = depth > 0
            exponents = torch.zeros(entry.rows, dtype=DTYPES[entry.exponent_dtype])
            of_live = self._numbers(entry.exponent_dtype, entry.live)
            if not representable(torch.from_numpy(depth[live]), of_live, DTYPES[entry.dtype]):
                raise h.FileError(f"the exponents of layer {entry.name} are out of range")
            exponents[torch.from_numpy(live)] = of_live
            layers[entry.name] = LayerContents(rows, columns, groups, depth, values, exponents)
        return layers

    def _depths(self, count: int) -> np.ndarray:
        depths = np.stack([self.depths & 15, self.depths >> 4], 1).ravel()
        return depths[:count].astype(np.int64) + 1

    def _integers(self, depths: list[np.ndarray]) -> list[np.ndarray]:
        """Return the (rows, fan-in) integers of each layer, given the bit depths of its rows."""
        groups, places = [], []
        for entry, depth in zip(self.header.layers, depths, strict=True):
            for bits in np.unique(depth[depth > 0]).tolist():
                which = np.flatnonzero(depth == bits)
                groups.append((bits, len(which) * entry.fan_in))
                places.append((entry.name, which))
        try:
            values = integers.decode(self.integers, groups)
        except integers.DamagedIntegersError as error:
            raise h.FileError(str(error)) from error
        found = {e.name: np.zeros((e.rows, e.fan_in), np.int32) for e in self.header.layers}
        for (name, which), group in zip(places, values, strict=True):
            found[name][which] = group.reshape(len(which), -1)
        return list(found.values())

    def _placement(
        self, rows: int, columns: int, entry: h.Layer | h.Norm
    ) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for count, width in ((rows, entry.out_width), (columns, entry.in_width)):
            indices = np.arange(width) if count == width else np.flatnonzero(self._bits(width))
            if len(indices) != count:
                raise h.FileError(f"the placement of {entry.name} is damaged")
            found.append(indices)
        return found[0], found[1]

    def _bits(self, count: int) -> np.ndarray:
        bits, self.placement = self.placement[:count], self.placement[count:]
        return bits

    def _numbers(self, dtype_name: str, count: int) -> Tensor:
        """Take the next `count` numbers of a dtype from the stream in which they are stored."""
        dtype = DTYPES[dtype_name]
        stored = str(stored_dtype(dtype, self.header.half)).removeprefix("torch.")
        if count == 0:
            return torch.zeros(0, dtype=dtype)
        count *= 2 if dtype.is_complex else 1
        begin = self.used.get(stored, 0)
        if stored not in self.numbers or len(self.numbers[stored]) < begin + count:
            raise h.FileError(f"there are fewer numbers of type {stored} than there should be")
        self.used[stored] = begin + count
        numbers = self.numbers[stored][begin : begin + count].to(dtype.to_real())
        return torch.complex(numbers[0::2], numbers[1::2]) if dtype.is_complex else numbers
