"""Torch layers that quantise their own weight.

A *row* is the weights of one output channel. A row that loses its bits computes zeros, and is cut
out of the layer soon after. Rows that were cut leave gaps in the output, so each layer records
which output channels its rows compute (`rows`) and places the results there; every other output
channel is exactly the bias, or 0. In the same way it records which input channels it reads
(`columns`).

If there are few gaps, they are filled with zeros in the weight, which is small. If there are many,
input channels are selected and output channels placed, so that nothing is computed for the gaps.
Grouped convolutions always do the latter, unless they are depthwise (see `QuantConv`).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from selfcompress.layers.become import become
from selfcompress.layers.kinds import layer_widths
from selfcompress.layers.placing import Placed, few_gaps, place, take, zeros
from selfcompress.quantizer import fake_quantize, fit_exponent, integer_depth


def of_rows(layers: "Sequence[QuantizedLayer]", values: Iterable[float]) -> Tensor:
    """Repeat each layer's value for all of its rows: (rows of all `layers`, in order,) float32."""
    counts = [len(layer.bit_depth) for layer in layers]
    each = torch.tensor([float(value) for value in values], dtype=torch.float32, device="cpu")
    repeats = torch.tensor(counts, device="cpu")
    values_of_rows = each.repeat_interleave(repeats, output_size=sum(counts))
    # Non-blocking, so as not to wait for the GPU; CUDA has read the source when this returns.
    return values_of_rows.to(layers[0].bit_depth.device, non_blocking=True)


class QuantizedLayer(Placed):
    """Base of all quantised layers: a weight whose rows have learnable formats.

    `rows` in the shapes below are those that have not been cut, with bits (`live_rows`) or without.

    Attributes:
        weight: (rows, fan-in ...) float weight before quantisation; rows and fan-in are swapped in
            transposed convolutions and embeddings, see `row_dim`.
        bias: (output channels,) or None; a channel without a row outputs exactly its bias.
        bit_depth, exponent: (rows,) the format of each row. They are parameters, but belong
            to the compressor: it collects their gradients as they arrive and steps them itself.
        rows: (rows,) the output channel that each row computes.
        columns: (columns,) the input channel that each column of the weight reads; of a grouped
            convolution, the input channels of each group, one group after the other.
        groups: of a convolution, the number of groups that still have rows (1 if none has).
        slots: (rows,) int64, group · `group_width` + index within the group. This and the next two
            are there in grouped convolutions only; `QuantConv` explains them by an example.
        group_width: the number of rows in the widest group.
        at_start: (input channels, output channels, groups) before anything was cut.
        keeps_places: whether it is a depthwise convolution, input and output are equally wide, and
            each row reads and computes the channel of the same index.
        samples: the number of samples in the last batch; 0 if that is not known, or once a
            gradient of the batch has been collected.
        batch_dim: the dimension of the input that counts samples; None if no dimension does.
        repeats: how many entries of that dimension belong to each sample.
        row_dim, fan_in_dim: the dimensions of the weight that count rows and input channels.
        channel_dim: the dimension of inputs and outputs that counts channels, from the end.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    bit_depth: nn.Parameter
    exponent: nn.Parameter
    groups: int
    slots: Tensor
    group_width: int
    at_start: tuple[int, int, int]
    keeps_places = False
    integer_bits: bool
    samples = 0
    batch_dim: int | None = 0
    repeats = 1
    row_dim = 0
    fan_in_dim = 1
    channel_dim = -1

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Apply `fn` as `nn.Module` does, but never cast bit depths or exponents to half precision.

        There a bit depth could round down.
        """
        formats = [vars(self)["_parameters"].get(name) for name in ("bit_depth", "exponent")]

        def apply(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            half = moved.is_floating_point() and moved.element_size() < 4
            if half and any(tensor is parameter for parameter in formats):
                return tensor.to(moved.device)
            return moved

        return super()._apply(apply, recurse)

    @classmethod
    def from_float(cls, layer: nn.Module, bits: float, integer_bits: bool) -> Self:
        """Return a quantised layer with all that the float `layer` holds, at `bits` bits."""
        new: Self = become(cls, layer)
        new._give_formats(bits, integer_bits)
        return new

    def _give_formats(self, bits: float, integer_bits: bool) -> None:
        """Give every row its initial bit depth, exponent and output channel."""
        # In the middle of the depths that round up to `bits`, so that no small move in either
        # direction changes the integer depth.
        start = bits - 0.5 if integer_bits else bits
        where = self.weight.device
        bit_depth = torch.full((self.out_width,), float(start), device=where)
        self.bit_depth = nn.Parameter(bit_depth)
        self.exponent = nn.Parameter(fit_exponent(self.weight_by_row(), bit_depth))
        self.rows = torch.arange(self.out_width, device=where)
        self.columns = torch.arange(self.in_width, device=where)
        self.integer_bits = integer_bits

    def expect(self, shape: torch.Size, batch: int) -> None:
        """Find which dimension counts samples, from an input's `shape` at `batch` > 1 samples."""
        sizes = self._in_front(shape)
        self.batch_dim = next((dim for dim, size in enumerate(sizes) if size == batch), None)

    def expect_rows(self, shape: torch.Size, batch: int) -> None:
        """Take the first dimension as that of samples, if its size is a multiple of `batch`.

        Needed where no layer's input has a dimension of size `batch`, as when samples and tokens
        share one; `shape` is that of an input with `batch` samples.
        """
        rows = self._in_front(shape)[:1]
        if rows and rows[0] and rows[0] % batch == 0:
            self.batch_dim, self.repeats = 0, rows[0] // batch

    def _in_front(self, shape: torch.Size) -> torch.Size:
        """Return the sizes of the dimensions in front of the channels, for an input of `shape`."""
        return shape[: max(0, len(shape) + self.channel_dim)]

    @property
    def out_width(self) -> int:  # type: ignore[override]
        """Number of output channels, whether or not a row computes them."""
        return layer_widths(self)[1]

    @property
    def in_width(self) -> int:  # type: ignore[override]
        """Number of input channels, whether or not they are read."""
        return layer_widths(self)[0]

    @property
    def grouped(self) -> bool:
        """Whether it started as a grouped convolution; if not, every row reads every column."""
        return hasattr(self, "slots")

    @property
    def fan_in(self) -> int:
        """Weights per row: I·H·W in eq. (4)."""
        return self.weight_by_row().shape[1:].numel()

    def weight_by_row(self) -> Tensor:
        """Return the weight with rows first: (rows, fan-in ...)."""
        return self.by_row(self.weight)

    def by_row(self, weight: Tensor) -> Tensor:
        """Return `weight`, a tensor of the layer's weight's shape, with rows first."""
        return weight.transpose(0, 1) if self.row_dim else weight

    def live_rows(self) -> Tensor:
        """Return which rows still have bits: (rows,) bool."""
        return integer_depth(self.bit_depth) > 0

    def quantized_weight(self) -> Tensor:
        """Return the weight that the network computes with, in the shape of `weight`.

        It has no gradient with respect to the bit depths, as none is needed (see `formats.py`).
        """
        bit_depth = self.bit_depth.detach()
        weight = fake_quantize(
            self.weight_by_row(), bit_depth, self.exponent, integer_bits=self.integer_bits
        )
        return weight.transpose(0, 1) if self.row_dim else weight

    def dense_weight(self) -> Tensor:
        """Return the quantised weight at full width, with zeros for missing rows and columns."""
        weight = self.quantized_weight()
        if len(self.rows) < self.out_width:
            weight = place(weight, self.rows, self.out_width, self.row_dim)
        if len(self.columns) < self.in_width:
            weight = place(weight, self.columns, self.in_width, self.fan_in_dim)
        return weight

    @property
    def row_groups(self) -> Tensor:
        """The group of each row of a grouped convolution, (rows,) int64."""
        return self.slots // self.group_width

    @property
    def dense_groups(self) -> int:
        """The number of groups of an ordinary convolution with `dense_weight` as its weight.

        It is `groups` if the layer is `whole`; `out_width` for a depthwise convolution that
        `keeps_places`; the number at the start if input and output have lost no channels since;
        else 1.
        """
        if not self.grouped:
            return 1
        if self.whole:
            return self.groups
        if self.keeps_places:
            return self.out_width
        ins, outs, groups = self.at_start
        return groups if (ins, outs) == (self.in_width, self.out_width) else 1

    @property
    def whole(self) -> bool:
        """Whether no row or column is missing, and all groups are equally wide."""
        every = len(self.rows) == self.out_width and len(self.columns) == self.in_width
        return every and (not self.grouped or len(self.rows) == self.groups * self.group_width)

    def zero_rows(self, among: Tensor | slice = slice(None)) -> Tensor:
        """Return which rows of `among` quantise to nothing but zeros: (rows in `among`,) bool."""
        quantized = fake_quantize(
            self.weight_by_row()[among],
            self.bit_depth[among],
            self.exponent[among],
            integer_bits=self.integer_bits,
        )
        return (quantized == 0).flatten(1).all(1)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, **kwargs: Any) -> Tensor:
        """Compute the convolution or product itself; `kwargs` are forward()'s arguments after x."""
        raise NotImplementedError

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = input
        self._note_samples(x)
        if not self.rows.numel():
            out = self._nothing(x, *args, **kwargs)
            return out if self.bias is None else self.add_bias(out)
        weight = self.quantized_weight()
        if self.columns.numel() < self.in_width:
            if not self.grouped and few_gaps(self.in_width - len(self.columns), self.in_width):
                weight = place(weight, self.columns, self.in_width, self.fan_in_dim)
            else:
                x = take(x, self.columns, self.channel_dim)
        if self.rows.numel() < self.out_width:
            if self.grouped or not few_gaps(self.out_width - len(self.rows), self.out_width):
                values = self.compute(x, weight, None, *args, **kwargs)
                like = input if self.channel_dim == -3 else None  # 2d convolutions only
                out = place(values, self.rows, self.out_width, self.channel_dim, like=like)
                return out if self.bias is None else self.add_bias(out)
            weight = place(weight, self.rows, self.out_width, self.row_dim)
        return self.compute(x, weight, self.bias, *args, **kwargs)

    def _note_samples(self, x: Tensor) -> None:
        if not torch.is_grad_enabled():  # an evaluation between forward() and backward()
            return
        dim = self.batch_dim
        self.samples = 0 if dim is None or dim >= x.dim() else x.shape[dim] // self.repeats

    def add_bias(self, out: Tensor) -> Tensor:
        """Return `out` plus the bias of each channel."""
        assert self.bias is not None
        over_space = (1,) * (-1 - self.channel_dim)
        return out + self.bias.to(out.dtype).view(-1, *over_space)

    def _nothing(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the zeros that a layer without rows outputs, before the bias."""
        # torch's convolutions do not run without rows; one row on the meta device gives the shape.
        row = self.weight.new_empty((1, 1, *self.weight.shape[2:]), device="meta")
        narrow = x.narrow(self.channel_dim, 0, 1).to("meta", row.dtype)
        shape = list(self.compute(narrow, row, None, *args, **kwargs).shape)
        shape[self.channel_dim] = self.out_width
        return zeros(shape, x, x) if self.channel_dim == -3 else x.new_zeros(shape)


_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {-2: F.conv1d, -3: F.conv2d, -4: F.conv3d}
# By `channel_dim`.


class QuantConv(QuantizedLayer):
    """A convolution of 1, 2 or 3 dimensions, possibly grouped.

    What a grouped convolution records of its groups, by the example of `nn.Conv2d(6, 6, 1,
    groups=3)`. Each of its groups has two rows: those of group 0 read input channels 0 and 1 and
    compute output channels 0 and 1, and so on. Rows 1, 2 and 3 lose their bits and are cut, while
    input and output keep their 6 channels each. Group 1 has no rows then, and is dropped:

                        before              after
        weight          (6, 2, 1, 1)        (3, 2, 1, 1)
        rows            [0, 1, 2, 3, 4, 5]  [0, 4, 5]     output channel of each row
        columns         [0, 1, 2, 3, 4, 5]  [0, 1, 4, 5]  input channels, group after group
        groups          3                   2             groups that have rows
        row_groups      [0, 0, 1, 1, 2, 2]  [0, 1, 1]     group of each row
        group_width     2                   2             rows of the widest group
        slots           [0, 1, 2, 3, 4, 5]  [0, 2, 3]     row_groups · group_width + index in group
        at_start        (6, 6, 3)           (6, 6, 3)     input channels, output channels, groups
        whole           True                False         nothing missing, groups equally wide
        keeps_places    False               False         True in depthwise convolutions only
        dense_groups    3                   3             `dense_weight` is (6, 2, 1, 1) both times

    torch computes groups of equal width only. So `compute` places the 3 rows at their slots among
    groups · group_width = 4 rows (slot 1 is zero), and takes the output channels at these slots.
    """

    padding_mode: str

    def _give_formats(self, bits: float, integer_bits: bool) -> None:
        super()._give_formats(bits, integer_bits)
        if self.groups > 1:
            self.slots = torch.arange(self.out_width, device=self.weight.device)
            self.group_width = self.out_width // self.groups
            self.at_start = self.in_width, self.out_width, self.groups
            self.keeps_places = len(set(self.at_start)) == 1

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        gaps = self.out_width - self.rows.numel()
        usual = self.keeps_places and self.padding_mode == "zeros"
        if not usual or gaps in (0, self.out_width) or not few_gaps(gaps, self.out_width):
            return super().forward(input, *args, **kwargs)
        # Filling the few gaps with zero rows costs less than to select the channels that are read
        # and to place those that are computed.
        self._note_samples(input)
        weight = place(self.quantized_weight(), self.rows, self.out_width, 0)
        shape = self.stride, self.padding, self.dilation
        convolve = _CONVOLUTIONS[self.channel_dim]
        return convolve(input, weight, self.bias, *shape, self.out_width)

    def dense_weight(self) -> Tensor:
        """Return the quantised weight at full width, if grouped for `dense_groups` groups."""
        if not self.grouped:
            return super().dense_weight()
        weight = self.quantized_weight()
        if self.whole:
            return weight
        reads = self.in_width // self.dense_groups
        if not len(self.rows):
            return weight.new_zeros(self.out_width, reads, *weight.shape[2:])
        columns = self.columns.view(self.groups, -1)[self.row_groups]  # that each row reads
        first = self.rows // (self.out_width // self.dense_groups) * reads
        index = columns - first[:, None]
        index = index.view(*index.shape, *[1] * (weight.dim() - 2)).expand_as(weight)
        wide = weight.new_zeros(len(weight), reads, *weight.shape[2:])
        return place(wide.scatter(1, index, weight), self.rows, self.out_width, 0)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, **kwargs: Any) -> Tensor:
        slots = self.groups * self.group_width if self.grouped else 0
        if not 0 < self.rows.numel() < slots:
            return self._conv_forward(x, weight, bias)
        # torch wants groups of equal width: missing rows are filled with zeros, and their outputs
        # dropped.
        out = self._conv_forward(x, place(weight, self.slots, slots, 0), None)
        out = take(out, self.slots, self.channel_dim)
        return out if bias is None else self.add_bias(out)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = super()._conv_forward(x, weight, bias)  # type: ignore[misc]
        return out


class QuantConv1d(QuantConv, nn.Conv1d):  # type: ignore[misc]
    """`nn.Conv1d` with a bit depth and an exponent per output channel."""

    channel_dim = -2


class QuantConv2d(QuantConv, nn.Conv2d):  # type: ignore[misc]
    """`nn.Conv2d` with a bit depth and an exponent per output channel."""

    channel_dim = -3


class QuantConv3d(QuantConv, nn.Conv3d):  # type: ignore[misc]
    """`nn.Conv3d` with a bit depth and an exponent per output channel."""

    channel_dim = -4


class QuantConvTranspose(QuantConv):
    """A transposed convolution without groups; its weight is (input channels, rows, ...)."""

    row_dim = 1
    fan_in_dim = 0
    _function: Any  # F.conv_transpose1d, 2d or 3d

    def compute(  # type: ignore[override]
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output_size: list[int] | None = None,
    ) -> Tensor:
        space = -1 - self.channel_dim
        shape = self.stride, self.padding, self.kernel_size
        extra = self._output_padding(x, output_size, *shape, space, self.dilation)  # type: ignore[operator]
        out: Tensor = type(self)._function(
            x, weight, bias, self.stride, self.padding, extra, 1, self.dilation
        )
        return out


class QuantConvTranspose1d(QuantConvTranspose, nn.ConvTranspose1d):  # type: ignore[misc]
    """`nn.ConvTranspose1d` with a bit depth and an exponent per output channel."""

    channel_dim = -2
    _function = staticmethod(F.conv_transpose1d)


class QuantConvTranspose2d(QuantConvTranspose, nn.ConvTranspose2d):  # type: ignore[misc]
    """`nn.ConvTranspose2d` with a bit depth and an exponent per output channel."""

    channel_dim = -3
    _function = staticmethod(F.conv_transpose2d)


class QuantConvTranspose3d(QuantConvTranspose, nn.ConvTranspose3d):  # type: ignore[misc]
    """`nn.ConvTranspose3d` with a bit depth and an exponent per output channel."""

    channel_dim = -4
    _function = staticmethod(F.conv_transpose3d)


class QuantLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` with a bit depth and an exponent per output channel."""

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, **kwargs: Any) -> Tensor:
        return F.linear(x, weight, bias)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the quantised layers of `model` by name, in the order of `named_modules`."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of `model`, all but the bit depths and exponents."""
    layers = quantized_layers(model).values()
    formats = {id(p) for layer in layers for p in (layer.bit_depth, layer.exponent)}
    return [p for p in model.parameters() if id(p) not in formats]
