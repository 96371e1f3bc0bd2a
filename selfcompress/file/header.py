"""The file format of a packed network: its header, and how the other streams are laid out.

The file is a safetensors file of a few one-dimensional tensors, here called streams:

    header          uint8   CRC-32 (4 bytes, lowest first), then a `Header` as JSON, compressed
                            with zlib
    bits            uint8   three sections, each padded to whole bytes: bit depths, placement,
                            and the integers as `integers.py` encodes them
    float32, int64 …        all other numbers, one stream for each dtype they are stored in: first
                            the exponents of the rows that have bits, layer by layer, then the
                            header's tensors in their order, each in row-major order (of a complex
                            number the real part, then the imaginary one)

Empty streams are left out. The CRC-32 is that of the compressed JSON followed, for every other
stream in the order of their names, by its name, a semicolon and its content.

In the JSON, a `Layer`, `Norm`, `FloatLayer` or `Tensor` is an array of its fields in the order
below; the other structures are objects. Layers come in the order of `Header.layers`, and the rows
of a layer in the order of their output channels. The lowest bit of a byte comes first.

*Bit depths*: 4 bits, the bit depth minus 1, for every row that has bits, layer by layer.

*Placement*: for every layer, one bit per output channel (is there a row for it?) unless there are
rows for all; one per input channel (is it read?) unless all are; one per row (does it start a new
group?) if the convolution is grouped, whose columns are divided evenly among its groups, in order;
and one per row (has it bits?) unless all have. Then, for every batch norm, the first two of these.

*Integers*: every group of integers holds the rows of one bit depth of a layer; groups come layer by
layer, smallest depth first. A row's integers are in the order of the other dimensions of
`Layer.shape`. A weight is its integer times 2^exponent; rows without bits are 0.

Only the header names layers and tensors, and nothing in a file is ever executed or imported.
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
"""Most numbers (weights and elements of other tensors) that one network may have."""

MAX_CHANNELS = 2**24
"""Most input and output channels that all layers and batch norms may have together."""

MAX_WITHOUT_BITS = 2**26
"""Most weights in rows without bits: they take memory when loaded, but nothing in the file."""

_MAX_HEADER = 2**23  # bytes, after decompression

Count = Annotated[int, Meta(ge=0, le=MAX_NUMBERS)]
Large = Annotated[int, Meta(ge=0, le=2**62)]
Shape = Annotated[list[Count], Meta(max_length=8)]
Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]

# Text of untrusted files is shown on terminals and in one-line messages: no control characters.
Text = Annotated[str, Meta(pattern=r"\A[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z")]

FloatType = Literal["float64", "float32", "float16", "bfloat16"]
NumberType = Literal[FloatType, "int64", "int32", "int16", "int8", "uint8", "bool"]
"""The types of numbers that a file can hold, by their names in torch."""

TensorType = Literal[NumberType, "complex128", "complex64"]
"""The types of tensors; complex ones are held as pairs of floats, real and imaginary part."""


class FileError(ValueError):
    """A file is not a packed network, is damaged or does not fit the model (one-line message)."""


class Architecture(msgspec.Struct, frozen=True, omit_defaults=True):
    """The arguments of `models.build`, from which the starting network can be made."""

    name: Text
    classes: Annotated[int, Meta(ge=1, le=10**6)]
    width: Annotated[int, Meta(ge=1, le=10**6)] | None
    image_size: Annotated[int, Meta(ge=1, le=10**5)]


class About(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Optional information about a network, stored in its file; every field can be left out.

    Attributes:
        architecture: the starting network that `load` builds; without it `load` needs a model.
        class_names: the names of the classes, in the order of the logits.
        mean, std: the normalisation of images, by colour channel, for values from 0 to 1.
        image_size: pixels on a side of the square images it was trained on.
        dataset: name of the data it was trained on.
        dataset_kind: train.py's --dataset.
        gamma: γ of eq. (2).
        seed, epochs: those of the training.
        test_accuracy: from 0 to 1.
        starting_weights: N of eq. (3).
        channels_at_start, macs_at_start: layer → output channels and multiply-accumulates per
            sample of the starting network.
        macs: layer → multiply-accumulates per sample of the stored network.
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
        shape: shape of its weight, without the rows and columns that were cut.
        row_dim: the dimension of `shape` that counts rows (1 in transposed convolutions and
            embeddings).
        in_width, out_width: number of channels of its input and output.
        columns: number of input channels that it reads (of all groups together).
        live: number of rows that have bits.
        grouped: whether it was a grouped convolution at the start.
        dtype, exponent_dtype: the dtypes of its weight and of its bit depths and exponents.
        channels_last: whether its weight's memory format is channels_last.
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
    """A batch norm: how many channels it normalises, and how many its input and output have.

    If `folded`, its weight and bias are those of y = weight · x + bias, which it computes in
    evaluation, and its running mean and variance are not stored.
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
    """A parameter or buffer that is not quantised; `channels_last` as in `Layer`."""

    name: Text
    dtype: TensorType
    shape: Shape
    channels_last: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is needed to interpret the streams.

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
    """Decode what `to_bytes` returned, and check it.

    Raises:
        FileError: `data` is no header or one of another version, a field has another type than it
            should, or the sizes that it claims make no sense.
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
    """Raise FileError for excessive or impossible sizes, before anything is allocated for them."""
    named: list[Layer | Norm | FloatLayer] = [
        *header.layers, *header.norms, *header.float_layers
    ]  # fmt: skip
    if sum(entry.in_width + entry.out_width for entry in named) > MAX_CHANNELS:
        raise FileError(f"it claims to have more than {MAX_CHANNELS:,} channels")
    # Sizes of 0 count as 1: the other sizes of an array without elements are limited too.
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
    """Return `about` as it will be read back from a file.

    Raises:
        ValueError: a field has another type than `About` says, or cannot be written.
    """
    try:
        checked = msgspec.convert(msgspec.to_builtins(about), About)
        return msgspec.json.decode(msgspec.json.encode(checked), type=About)
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"about: {first_line(error)}") from error
