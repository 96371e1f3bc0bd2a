"""What a packed network's file says of itself: the header, and how everything else is laid out.

The file is a safetensors file of a few flat tensors, called streams here:

    header          uint8   CRC-32 (4 bytes, lowest first), then a `Header` as JSON, compressed
                            with zlib
    bits            uint8   three sections, each filled up to whole bytes: bit depths, placement,
                            and what `integers.py` makes of the integers
    float32, int64 …        all other numbers, by type: first the exponents of the rows that have
                            bits, layer by layer, then the header's tensors in their order (of
                            a complex number the real part, then the imaginary one)

Streams without content are left out. The CRC-32 is that of the compressed JSON and then, in the
order of their names, of the other streams: name, semicolon, content.

The bit depths are those of the rows that have bits, layer by layer, 4 bits for each depth minus 1.
The groups of integers are, layer by layer, the rows of one bit depth, smallest depth first.

The placement has of every layer one bit per output channel (is there a row for it?) unless there
are rows for all, one per input channel (is it read?) unless all are, one per row (does it open a
new group?) if the convolution is grouped, and one per row (has it bits?) unless all have; then of
every norm the first two. The lowest bit of a byte comes first.

Nothing but the header names anything, and nothing in it is ever run or imported.
"""

import math
import zlib
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from selfcompress.size import placement_bits
from selfcompress.text import first_line

FORMAT = "selfcompress"
VERSION = 1

MAX_NUMBERS = 2**31
"""Weights and other numbers of one network, at most."""

MAX_CHANNELS = 2**24
"""Input and output channels of all layers, at most."""

MAX_WITHOUT_BITS = 2**26
"""Weights in rows without bits, at most: they take memory, but nothing in the file."""

_MAX_HEADER = 2**23  # bytes, unpacked

Count = Annotated[int, Meta(ge=0, le=MAX_NUMBERS)]
Large = Annotated[int, Meta(ge=0, le=2**62)]
Shape = Annotated[list[Count], Meta(max_length=8)]
Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]

# A stranger's words reach terminals and error messages of one line: no control characters.
Text = Annotated[str, Meta(pattern=r"\A[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z")]

FloatType = Literal["float64", "float32", "float16", "bfloat16"]
NumberType = Literal[FloatType, "int64", "int32", "int16", "int8", "uint8", "bool"]
"""The types of numbers that a file can hold, by their names in torch."""

TensorType = Literal[NumberType, "complex128", "complex64"]
"""The types of tensors; complex ones are held as pairs of floats, real and imaginary part."""


class FileError(ValueError):
    """A file is no packed network, or a damaged one, or does not fit the model: one line."""


class Architecture(msgspec.Struct, frozen=True, omit_defaults=True):
    """The arguments of `models.build`, from which the starting network can be made."""

    name: Text
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
    class_names: list[Text] = []
    mean: Annotated[list[Finite], Meta(max_length=16)] = []
    std: Annotated[list[Finite], Meta(max_length=16)] = []
    image_size: Annotated[int, Meta(ge=1, le=10**5)] | None = None
    dataset: Text = ""
    dataset_kind: Text = ""
    gamma: Finite | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    epochs: Large | None = None
    test_accuracy: Finite | None = None
    starting_weights: Count | None = None
    channels_at_start: dict[Text, Count] = {}
    macs_at_start: dict[Text, Large] = {}
    macs: dict[Text, Large] = {}


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
        channels_last: whether that is how its weight is laid out in memory.
    """

    name: Text
    shape: Shape
    row_dim: Annotated[int, Meta(ge=0, le=1)]
    in_width: Count
    out_width: Count
    columns: Count
    live: Count
    grouped: bool
    dtype: FloatType
    exponent_dtype: FloatType
    channels_last: bool

    @property
    def rows(self) -> int:
        return self.shape[self.row_dim]

    @property
    def fan_in(self) -> int:
        """Weights per row."""
        return math.prod(size for dim, size in enumerate(self.shape) if dim != self.row_dim)

    @property
    def placement_bits(self) -> int:
        per_row = self.grouped + (self.live < self.rows)
        return per_row * self.rows + placement_bits(self, self.rows, self.columns)


def weights_without_bits(layers: list[Layer]) -> int:
    return sum((layer.rows - layer.live) * layer.fan_in for layer in layers)


class Norm(msgspec.Struct, frozen=True, array_like=True):
    """A batch norm: how many channels it has, and those of its input and output.

    If `folded`, its mean and variance are in its weight and bias.
    """

    name: Text
    entries: Count
    in_width: Count
    out_width: Count
    folded: bool

    @property
    def placement_bits(self) -> int:
        return placement_bits(self, self.entries, self.entries)


class FloatLayer(msgspec.Struct, frozen=True, array_like=True):
    """A convolution or linear layer that was left in float."""

    name: Text
    in_width: Count
    out_width: Count


class Tensor(msgspec.Struct, frozen=True, array_like=True):
    """A parameter or buffer that is not quantised; `channels_last` as of a `Layer`."""

    name: Text
    dtype: TensorType
    shape: Shape
    channels_last: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """All that the streams need to be understood.

    Attributes:
        half: whether floats are stored as float16, whatever their `dtype`.
        q_bits, stored_bits: see `size.py`.
    """

    format: str
    version: int
    half: bool
    q_bits: Large
    stored_bits: Large
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
        FileError: it is none, is of another version, its fields are not what they should be, or
            it claims sizes that make no sense.
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
        header = msgspec.json.decode(text, type=Header)
    except FileError:
        raise
    except (zlib.error, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FileError(f"the header is damaged: {first_line(error)}") from error
    _check_sizes(header)
    return header


def _check_sizes(header: Header) -> None:
    """Refuse what claims to be huge before any of it is made."""
    named: list[Layer | Norm | FloatLayer] = [
        *header.layers, *header.norms, *header.float_layers
    ]  # fmt: skip
    if sum(entry.in_width + entry.out_width for entry in named) > MAX_CHANNELS:
        raise FileError(f"it claims to have more than {MAX_CHANNELS:,} channels")
    # Sizes of 0 count as 1, for arrays without numbers have limits too.
    shapes = [layer.shape for layer in header.layers] + [t.shape for t in header.tensors]
    if sum(math.prod(max(size, 1) for size in shape) for shape in shapes) > MAX_NUMBERS:
        raise FileError(f"it claims to hold more than {MAX_NUMBERS:,} numbers")
    for layer in header.layers:
        if len(layer.shape) < 2 or layer.live > layer.rows:
            raise FileError(f"the shape of layer {layer.name} makes no sense")
    if weights_without_bits(header.layers) > MAX_WITHOUT_BITS:
        raise FileError(f"it claims to have more than {MAX_WITHOUT_BITS:,} weights without bits")
    for group in (header.layers, header.norms, header.float_layers, header.tensors):
        if len({entry.name for entry in group}) != len(group):  # type: ignore[attr-defined]
            raise FileError("the header names something twice")


def check_about(about: Any) -> About:
    """`about` as it will be read again.

    Raises:
        ValueError: a field of it is of another type than `About` says, or cannot be written.
    """
    try:
        checked = msgspec.convert(msgspec.to_builtins(about), About)
        return msgspec.json.decode(msgspec.json.encode(checked), type=About)
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"about: {first_line(error)}") from error
