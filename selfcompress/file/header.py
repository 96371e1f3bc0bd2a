"""What a packed network's file says of itself: the header, and how everything else is laid out.

The file is a safetensors file of a few flat tensors, called streams here:

    header          uint8   CRC-32 of everything else (4 bytes), then a `Header` as JSON,
                            compressed with zlib
    bits            uint8   three sections, each filled up to whole bytes: bit depths, placement,
                            and the first of the two streams of `integers.py`
    coded           uint8   the second one
    float32, int64 …        all other numbers, by type: first the exponents of the rows that have
                            bits, layer by layer, then the header's tensors in their order

Streams without content are left out. The bit depths are those of the rows that have bits, layer by
layer, 4 bits for each depth minus 1. The groups of integers are, layer by layer, the rows of one
bit depth, smallest depth first.

The placement has of every layer one bit per output channel (is there a row for it?) unless there
are rows for all, one per input channel (is it read?) unless all are, one per row (does it open a
new group?) if the convolution is grouped, and one per row (has it bits?) unless all have; then of
every norm the first two. The lowest bit of a byte comes first.

Nothing but the header names anything, and nothing in it is ever run or imported.
"""

import zlib
from typing import Annotated, Any

import msgspec
from msgspec import Meta

FORMAT = "selfcompress"
VERSION = 1

MAX_NUMBERS = 2**31
"""Weights and other numbers of one network, at most."""

MAX_CHANNELS = 2**24
"""Input and output channels of all layers, at most."""

MAX_WITHOUT_BITS = 2**26
"""Weights in rows without bits, at most: they take memory, but nothing in the file."""

_MAX_HEADER = 2**26  # bytes, unpacked

Count = Annotated[int, Meta(ge=0, le=MAX_NUMBERS)]
Shape = Annotated[list[Count], Meta(max_length=8)]


class FileError(ValueError):
    """A file is no packed network, or a damaged one, or does not fit the model: one line."""


class Architecture(msgspec.Struct, frozen=True, omit_defaults=True):
    """The arguments of `models.build`, from which the starting network can be made."""

    name: str
    classes: Annotated[int, Meta(ge=1, le=10**6)]
    width: Annotated[int, Meta(ge=1, le=10**6)] | None
    image_size: Annotated[int, Meta(ge=1, le=10**5)]


class About(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a file may tell beside the network itself. Everything can be left out.

    Attributes:
        architecture: what to build before loading; without it `load` wants a model.
        class_names: the classes' names, in the order of the logits.
        mean, std: what images are normalised with, by colour, for values from 0 to 1.
        image_size: pixels on a side of the square images it was trained on.
        dataset: name of the data it was trained on.
        dataset_kind: train.py's --dataset.
        gamma: γ of eq. (2).
        seed, epochs: of the training.
        test_accuracy: 0 to 1.
        starting_weights: N of eq. (3).
        channels_at_start, macs_at_start: layer → output channels and multiply-accumulates per
            sample of the starting network.
        macs: layer → multiply-accumulates per sample now.
    """

    architecture: Architecture | None = None
    class_names: list[str] = []
    mean: list[float] = []
    std: list[float] = []
    image_size: Annotated[int, Meta(ge=1, le=10**5)] | None = None
    dataset: str = ""
    dataset_kind: str = ""
    gamma: float | None = None
    seed: int | None = None
    epochs: int | None = None
    test_accuracy: float | None = None
    starting_weights: Count | None = None
    channels_at_start: dict[str, Count] = {}
    macs_at_start: dict[str, int] = {}
    macs: dict[str, int] = {}


class Layer(msgspec.Struct, frozen=True, array_like=True):
    """A quantised layer.

    Attributes:
        shape: of its weight as it is held, without rows and columns that were cut.
        row_dim: the dimension of `shape` that counts rows (1 in transposed convolutions).
        in_width, out_width: channels of its input and output.
        columns: input channels that it reads (of all groups together).
        live: rows that have bits.
        grouped: whether it was a grouped convolution at the start.
        dtype, exponent_dtype: of its weight and of its formats.
    """

    name: str
    shape: Shape
    row_dim: Annotated[int, Meta(ge=0, le=1)]
    in_width: Count
    out_width: Count
    columns: Count
    live: Count
    grouped: bool
    dtype: str
    exponent_dtype: str

    @property
    def rows(self) -> int:
        return self.shape[self.row_dim]

    @property
    def fan_in(self) -> int:
        """Weights per row."""
        total = 1
        for dim, size in enumerate(self.shape):
            total *= size if dim != self.row_dim else 1
        return total

    @property
    def placement_bits(self) -> int:
        per_row = self.grouped + (self.live < self.rows)
        return per_row * self.rows + _placement_bits(self, self.rows, self.columns)


def weights_without_bits(layers: list[Layer]) -> int:
    return sum((layer.rows - layer.live) * layer.fan_in for layer in layers)


class Norm(msgspec.Struct, frozen=True, array_like=True):
    """A batch norm: how many channels it has, and those of its input and output.

    If `folded`, its mean and variance are in its weight and bias.
    """

    name: str
    entries: Count
    in_width: Count
    out_width: Count
    folded: bool

    @property
    def placement_bits(self) -> int:
        return _placement_bits(self, self.entries, self.entries)


def _placement_bits(module: Layer | Norm, rows: int, columns: int) -> int:
    """One bit per output and per input channel, unless all are computed or read."""
    out_bits = module.out_width if rows < module.out_width else 0
    return out_bits + (module.in_width if columns < module.in_width else 0)


class FloatLayer(msgspec.Struct, frozen=True, array_like=True):
    """A convolution or linear layer that was left in float."""

    name: str
    in_width: Count
    out_width: Count


class Tensor(msgspec.Struct, frozen=True, array_like=True):
    """A parameter or buffer that is not quantised."""

    name: str
    dtype: str
    shape: Shape

    @property
    def numel(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """All that the streams need to be understood.

    Attributes:
        channels_last: whether the weights of convolutions are.
        half: whether floats are stored as float16, whatever their `dtype`.
        q_bits, stored_bits: see `size.py`.
    """

    format: str
    version: int
    channels_last: bool
    half: bool
    q_bits: int
    stored_bits: int
    layers: list[Layer]
    norms: list[Norm]
    float_layers: list[FloatLayer]
    tensors: list[Tensor]
    about: About


class _Preamble(msgspec.Struct):
    format: str
    version: int


def to_bytes(header: Header) -> bytes:
    return zlib.compress(msgspec.json.encode(header), 9)


def from_bytes(data: bytes) -> Header:
    """The header.

    Raises:
        FileError: it is none, is of another version, or its fields are not what they should be.
    """
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(data, _MAX_HEADER)
        if unpacker.unconsumed_tail or not unpacker.eof or unpacker.unused_data:
            raise FileError("the header is damaged: it does not end where it should")
        preamble = msgspec.json.decode(text, type=_Preamble)
        if preamble.format != FORMAT:
            raise FileError("it is no network packed by selfcompress")
        if preamble.version != VERSION:
            raise FileError(
                f"it is of version {preamble.version}, and this selfcompress reads version "
                f"{VERSION}: use the one that wrote it"
            )
        return msgspec.json.decode(text, type=Header)
    except (zlib.error, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FileError(f"the header is damaged: {_first_line(error)}") from error


def check_about(about: Any) -> About:
    """`about` as it will be read again.

    Raises:
        ValueError: a field of it is of another type than `About` says.
    """
    try:
        return msgspec.convert(about, About, from_attributes=True)
    except msgspec.ValidationError as error:
        raise ValueError(f"about: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
