"""Torch layers that quantise their own weight, and how to put them into a model and take them out.

A quantised layer keeps only the rows that still have bits. Rows that were cut leave a gap in the
output, so each layer remembers which output channels its rows compute (`rows`) and places them
there; every other output channel is exactly the bias, or 0. In the same way it remembers which
input channels it reads (`columns`). Batch norms get the same abilities: in a residual branch a
channel can be gone while the trunk it is added to still carries it.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfcompress.quantizer import fake_quantize, fit_exponent, integer_depth


def place(values: Tensor, rows: Tensor, width: int, dim: int) -> Tensor:
    """Spread `values` over `width` channels: channel `rows[i]` of `dim` is values[i], others 0."""
    shape = list(values.shape)
    shape[dim] = width
    layout = torch.contiguous_format
    if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    wide = torch.empty(shape, dtype=values.dtype, device=values.device, memory_format=layout)
    return wide.zero_().index_copy(dim, rows, values)


class QuantizedLayer(nn.Module):
    """What all quantised layers share: a weight of live rows with learnable formats.

    Attributes:
        weight: (live rows, fan-in ...) float weight behind the quantiser; rows and fan-in change
            places in transposed convolutions, see `row_dim`.
        bias: (output channels,) or None; a channel without a row outputs exactly its bias.
        bit_depth, exponent: (live rows,) the format of each row. They are parameters, but belong
            to the compressor: it collects their gradients as they arrive and steps them itself.
        rows: (live rows,) int64, the output channel that each row computes.
        columns: (columns,) int64, the input channel that each column of the weight reads; of a
            grouped convolution, what its groups read, one after the other.
        row_dim, fan_in_dim: the dimensions of the weight that count rows and input channels.
        channel_dim: the dimension of inputs and outputs that counts channels, from the end.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    bit_depth: nn.Parameter
    exponent: nn.Parameter
    rows: Tensor
    columns: Tensor
    integer_bits: bool
    row_dim = 0
    fan_in_dim = 1
    channel_dim = -1

    def adopt(self, layer: nn.Module, bits: float, integer_bits: bool) -> Self:
        """Take over the parameters (the same objects) and mode of an ordinary layer."""
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        self.weight = weight
        self.bias = layer.bias  # type: ignore[assignment]
        # In the middle of the depths that round up to `bits`, so that neither direction is a step.
        start = bits - 0.5 if integer_bits else bits
        bit_depth = torch.full((self.out_width,), float(start), device=weight.device)
        self.bit_depth = nn.Parameter(bit_depth)
        self.exponent = nn.Parameter(fit_exponent(self.weight_by_row(), bit_depth))
        self.register_buffer("rows", torch.arange(self.out_width, device=weight.device))
        self.register_buffer("columns", torch.arange(self.in_width, device=weight.device))
        self.integer_bits = integer_bits
        return self.train(layer.training)

    @property
    def out_width(self) -> int:
        """Channels of the output, with or without a row behind them."""
        raise NotImplementedError

    @property
    def in_width(self) -> int:
        """Channels of the input."""
        raise NotImplementedError

    @property
    def fan_in(self) -> int:
        """Weights per row: I·H·W in eq. (4)."""
        return self.weight_by_row().shape[1:].numel()

    def weight_by_row(self) -> Tensor:
        """(live rows, fan-in ...): the weight, rows first."""
        return self.weight.transpose(0, 1) if self.row_dim else self.weight

    def live_rows(self) -> Tensor:
        """(rows,) bool: the rows that still have bits."""
        return integer_depth(self.bit_depth) > 0

    def quantized_weight(self) -> Tensor:
        """The weight that the network computes with, in the shape of `weight`."""
        weight = fake_quantize(
            self.weight_by_row(), self.bit_depth, self.exponent, integer_bits=self.integer_bits
        )
        return weight.transpose(0, 1) if self.row_dim else weight

    def zero_rows(self, among: Tensor | slice = slice(None)) -> Tensor:
        """(rows in `among`,) bool: the rows that quantise to nothing but zeros."""
        quantized = fake_quantize(
            self.weight_by_row()[among],
            self.bit_depth[among],
            self.exponent[among],
            integer_bits=self.integer_bits,
        )
        return (quantized == 0).flatten(1).all(1)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        """The convolution or matrix product itself; `args` are those of forward() beyond x."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        if self.rows.numel() and self.columns.numel() < self.in_width:
            x = x.index_select(self.channel_dim, self.columns)
        if self.rows.numel() == self.out_width:
            return self.compute(x, self.quantized_weight(), self.bias, *args)
        if self.rows.numel():
            values = self.compute(x, self.quantized_weight(), None, *args)
            out = place(values, self.rows, self.out_width, self.channel_dim)
        else:
            out = self._nothing(x, *args)
        if self.bias is None:
            return out
        over_space = (1,) * (-1 - self.channel_dim)
        return out + self.bias.to(out.dtype).view(-1, *over_space)

    def _nothing(self, x: Tensor, *args: Any) -> Tensor:
        """The zeros that a layer without rows outputs."""
        # Layers without rows are not to be had; one row on the meta device tells the shape.
        row = self.weight.new_empty((1, 1, *self.weight.shape[2:]), device="meta")
        narrow = x.narrow(self.channel_dim, 0, 1).to("meta", row.dtype)
        shape = list(self.compute(narrow, row, None, *args).shape)
        shape[self.channel_dim] = self.out_width
        return x.new_zeros(shape)


class _QuantConv(QuantizedLayer):
    """A convolution of 1, 2 or 3 dimensions, perhaps grouped.

    Attributes:
        groups: groups that still have rows (1 if there are none).
        slots: (live rows,) int64, group · `group_width` + index within the group: where each row
            would be if all groups were as wide as the widest; of grouped convolutions only.
        group_width: rows of the widest group.
    """

    in_channels: int
    out_channels: int
    groups: int
    slots: Tensor
    group_width: int

    @property
    def out_width(self) -> int:
        return self.out_channels

    @property
    def in_width(self) -> int:
        return self.in_channels

    @property
    def grouped(self) -> bool:
        """Whether the convolution was grouped at the start."""
        return "slots" in self._buffers

    @classmethod
    def from_float(cls, layer: nn.Module, bits: float, integer_bits: bool) -> Self:
        """A quantised layer that takes over the parameters of `layer`."""
        new = cls(**_conv_options(layer), device="meta").adopt(layer, bits, integer_bits)
        if new.groups > 1:
            new.register_buffer("slots", torch.arange(new.out_channels, device=new.weight.device))
            new.group_width = new.out_channels // new.groups
        return new

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        slots = self.groups * self.group_width if self.grouped else 0
        if not 0 < self.rows.numel() < slots:
            return self._conv_forward(x, weight, bias)
        # torch wants groups of equal width: the missing rows are zeros, and taken out again.
        assert bias is None
        out = self._conv_forward(x, place(weight, self.slots, slots, 0), None)
        return out.index_select(self.channel_dim, self.slots)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = super()._conv_forward(x, weight, bias)  # type: ignore[misc]
        return out


class QuantConv1d(_QuantConv, nn.Conv1d):  # type: ignore[misc]
    """`nn.Conv1d` with a bit depth and an exponent per output channel."""

    channel_dim = -2


class QuantConv2d(_QuantConv, nn.Conv2d):  # type: ignore[misc]
    """`nn.Conv2d` with a bit depth and an exponent per output channel."""

    channel_dim = -3


class QuantConv3d(_QuantConv, nn.Conv3d):  # type: ignore[misc]
    """`nn.Conv3d` with a bit depth and an exponent per output channel."""

    channel_dim = -4


class _QuantConvTranspose(_QuantConv):
    """A transposed convolution, not grouped: (input channels, rows, ...) is its weight."""

    row_dim = 1
    fan_in_dim = 0
    conv: Any  # F.conv_transpose1d, 2d or 3d

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        space = -1 - self.channel_dim
        shape = self.stride, self.padding, self.kernel_size
        extra = self._output_padding(x, *(args or (None,)), *shape, space, self.dilation)  # type: ignore[operator]
        out: Tensor = type(self).conv(
            x, weight, bias, self.stride, self.padding, extra, 1, self.dilation
        )
        return out


class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):  # type: ignore[misc]
    """`nn.ConvTranspose1d` with a bit depth and an exponent per output channel."""

    channel_dim = -2
    conv = staticmethod(F.conv_transpose1d)


class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):  # type: ignore[misc]
    """`nn.ConvTranspose2d` with a bit depth and an exponent per output channel."""

    channel_dim = -3
    conv = staticmethod(F.conv_transpose2d)


class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):  # type: ignore[misc]
    """`nn.ConvTranspose3d` with a bit depth and an exponent per output channel."""

    channel_dim = -4
    conv = staticmethod(F.conv_transpose3d)


class QuantLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` with a bit depth and an exponent per output channel."""

    @property
    def out_width(self) -> int:
        return self.out_features

    @property
    def in_width(self) -> int:
        return self.in_features

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        return F.linear(x, weight, bias)

    @classmethod
    def from_float(cls, layer: nn.Linear, bits: float, integer_bits: bool) -> Self:
        """A quantised layer that takes over the parameters of `layer`."""
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        return new.adopt(layer, bits, integer_bits)


class PlacedBatchNorm(_BatchNorm):
    """A batch norm over some channels of its input, placed among zeros in its output.

    Attributes:
        columns: (entries,) int64, the input channel that each entry normalises.
        rows: (entries,) int64, the output channel that each entry computes.
        in_width, out_width: channels of the input and the output.
    """

    columns: Tensor
    rows: Tensor
    in_width: int
    out_width: int

    @classmethod
    def from_float(cls, norm: _BatchNorm) -> Self:
        """A placed batch norm that takes over the parameters and statistics of `norm`."""
        new = cls(**_norm_options(norm), device="meta")
        new._parameters.update(norm._parameters)
        new._buffers.update(norm._buffers)
        every = norm.running_mean if norm.running_mean is not None else norm.weight
        where = every.device if every is not None else None
        new.register_buffer("columns", torch.arange(norm.num_features, device=where))
        new.register_buffer("rows", torch.arange(norm.num_features, device=where))
        new.in_width = new.out_width = norm.num_features
        return new.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.num_features == 0:
            return x.new_zeros((x.shape[0], self.out_width, *x.shape[2:]))
        if self.num_features < self.in_width:
            x = x.index_select(1, self.columns)
        out: Tensor = super().forward(x)
        if self.num_features < self.out_width:
            out = place(out, self.rows, self.out_width, 1)
        return out


class PlacedBatchNorm1d(PlacedBatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` that can lose channels."""


class PlacedBatchNorm2d(PlacedBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` that can lose channels."""


class PlacedBatchNorm3d(PlacedBatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d` that can lose channels."""


_TWINS: dict[type[nn.Module], Any] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
    nn.Linear: QuantLinear,
    nn.BatchNorm1d: PlacedBatchNorm1d,
    nn.BatchNorm2d: PlacedBatchNorm2d,
    nn.BatchNorm3d: PlacedBatchNorm3d,
}
"""Layer type → its twin here. Subclasses are left as they are: what else they do is not known."""

PLACEMENT = ("rows", "columns", "slots")
"""The buffers that say where rows and columns are."""

FLOAT_LAYERS = tuple(kind for kind in _TWINS if not issubclass(kind, _BatchNorm))
"""The types of layers whose weights make up N of eq. (3)."""


def quantize_layers(
    model: nn.Module,
    *,
    bits: float,
    integer_bits: bool = True,
    exclude: Iterable[str] = (),
    read_elsewhere: Iterable[str] = (),
) -> dict[str, str]:
    """Replace, in place, convolutions, linear layers and batch norms by their twins here.

    The parameters stay the same objects, so an optimiser that holds them goes on holding them.

    Args:
        model: the network; not itself a single layer (wrap that in `nn.Sequential`).
        bits: the bit depth every channel starts at.
        integer_bits: see `fake_quantize`.
        exclude: names of layers, or of modules that contain layers, to leave in float.
        read_elsewhere: names of layers whose weight is read past their own forward(), where a
            quantiser inside of the layer would not be seen.

    Returns:
        name → why, for every convolution and linear layer that was left in float.

    Raises:
        ValueError: a name in `exclude` is no module of the model, or nothing is left to quantise.
    """
    excluded, read_elsewhere = tuple(exclude), set(read_elsewhere)
    names = {name for name, _ in model.named_modules()}
    for name in excluded:
        if name not in names:
            raise ValueError(f"exclude: the model has no module named {name!r}")
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    left: dict[str, str] = {}
    twins: dict[nn.Module, nn.Module] = {}
    replacements: list[tuple[str, nn.Module]] = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        twin = _TWINS.get(type(module))
        if module not in twins:
            if isinstance(module, FLOAT_LAYERS):
                why = _why_in_float(name, module, excluded, read_elsewhere, owners)
                if why:
                    left[name] = why
                    continue
                twins[module] = twin.from_float(module, bits, integer_bits)
            elif twin is not None:
                twins[module] = twin.from_float(module)
            else:
                continue
        replacements.append((name, twins[module]))
    if not any(isinstance(new, QuantizedLayer) for new in twins.values()):
        raise ValueError("nothing to compress: the model has no layer to quantise")
    for name, new in replacements:
        _replace(model, name, new)
    _without_fast_paths(model)
    return left


def _why_in_float(
    name: str,
    module: nn.Module,
    excluded: tuple[str, ...],
    read_elsewhere: set[str],
    owners: Counter[int],
) -> str:
    if any(name == e or name.startswith(e + ".") for e in excluded):
        return "it is excluded"
    if type(module) not in _TWINS:
        return f"its type {type(module).__name__} is not known"
    if isinstance(module, nn.modules.conv._ConvTransposeNd) and module.groups > 1:
        return "it is a grouped transposed convolution"
    if name in read_elsewhere:
        return "its weight is read past its own forward()"
    if any(owners[id(p)] > 1 for p in module.parameters(recurse=False)):
        return "it shares a parameter with another module"
    return ""


def _without_fast_paths(model: nn.Module) -> None:
    """Keep torch's transformer layers off their fused inference, which reads weights raw."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(part, QuantizedLayer) for part in module.modules()
        ):
            module.activation_relu_or_gelu = 0


@torch.no_grad()
def restore_layers(model: nn.Module) -> None:
    """Take the quantised layers out again, in place: ordinary layers, quantised weights baked in.

    Output channels without a row come back as rows of zeros. Batch norms that have lost channels
    stay `PlacedBatchNorm`; grouped convolutions that have lost rows come back ungrouped.
    """
    kinds = {twin: kind for kind, twin in _TWINS.items()}
    for name, module in list(model.named_modules()):
        new: nn.Module
        if isinstance(module, _QuantConv | QuantLinear):
            new = _dense(module, kinds[type(module)])
        elif isinstance(module, PlacedBatchNorm) and (
            module.num_features == module.in_width == module.out_width
        ):
            new = kinds[type(module)](**_norm_options(module), device="meta")
            new._parameters.update(module._parameters)
            new._buffers.update({k: module._buffers[k] for k in new._buffers})
        else:
            continue
        _replace(model, name, new.train(module.training))


def _dense(layer: _QuantConv | QuantLinear, kind: Any) -> nn.Module:
    values = layer.quantized_weight()
    if isinstance(layer, QuantLinear):
        options: dict[str, Any] = {"in_features": layer.in_width, "out_features": layer.out_width}
        options["bias"] = layer.bias is not None
    else:
        options = _conv_options(layer)
        if layer.grouped and len(layer.rows) < layer.out_width:
            options["groups"] = 1
            per_group = layer.columns.view(layer.groups, -1)
            read = per_group[layer.slots // layer.group_width]  # (rows, input channels per group)
            index = read.view(*read.shape, *[1] * (values.dim() - 2)).expand_as(values)
            wide = values.new_zeros(len(values), layer.in_width, *values.shape[2:])
            values = wide.scatter(1, index, values)
    if not getattr(layer, "grouped", False):
        values = place(values, layer.columns, layer.in_width, layer.fan_in_dim)
    new: nn.Module = kind(**options, device="meta")
    new.weight = nn.Parameter(place(values, layer.rows, layer.out_width, layer.row_dim))
    new.bias = layer.bias
    return new


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantised layers of `model` by name, in the order of `named_modules`."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def _conv_options(layer: Any) -> dict[str, Any]:
    """The constructor's arguments of a convolution like `layer`."""
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"]
    names += ["groups", "padding_mode"]
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        names.append("output_padding")
    return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}


def _norm_options(norm: _BatchNorm) -> dict[str, Any]:
    """The constructor's arguments of a batch norm like `norm`."""
    names = ("num_features", "eps", "momentum", "affine", "track_running_stats")
    return {name: getattr(norm, name) for name in names}


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    if not name:
        raise ValueError("the model is itself a single layer: wrap it in nn.Sequential(...)")
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
