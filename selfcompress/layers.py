"""Torch layers that quantise their own weight, and how to put them into a model and take them out.

A quantised layer keeps only the rows that still have bits. Rows that were cut leave a gap in the
output, so each layer remembers which output channels its rows compute (`rows`) and places them
there; every other output channel is exactly the bias, or 0. Batch norms get the same ability: in
a residual branch a channel can be gone while the trunk it is added to still carries it.
"""

from collections.abc import Iterable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """What `QuantConv2d` and `QuantLinear` share: a weight of live rows with learnable formats.

    Attributes:
        weight: (live rows, fan-in ...) float weight behind the quantiser.
        bias: (output channels,) or None; a channel without a row outputs exactly its bias.
        bit_depth, exponent: (live rows,) the format of each row. They are parameters, but belong
            to the compressor: it collects their gradients as they arrive and steps them itself.
        rows: (live rows,) int64, the output channel that each row computes.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    bit_depth: nn.Parameter
    exponent: nn.Parameter
    rows: Tensor
    integer_bits: bool
    channel_dim: int

    def adopt(self, layer: nn.Module, bits: float, integer_bits: bool) -> Self:
        """Take over the parameters (the same objects) and mode of an ordinary layer."""
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        self.weight = weight
        self.bias = layer.bias  # type: ignore[assignment]
        # In the middle of the depths that round up to `bits`, so that neither direction is a step.
        start = bits - 0.5 if integer_bits else bits
        bit_depth = torch.full((weight.shape[0],), float(start), device=weight.device)
        self.bit_depth = nn.Parameter(bit_depth)
        self.exponent = nn.Parameter(fit_exponent(weight, bit_depth))
        self.register_buffer("rows", torch.arange(weight.shape[0], device=weight.device))
        self.integer_bits = integer_bits
        return self.train(layer.training)

    @property
    def out_width(self) -> int:
        """Channels of the output, with or without a row behind them."""
        raise NotImplementedError

    @property
    def fan_in(self) -> int:
        """Weights per row: I·H·W in eq. (4)."""
        return self.weight.shape[1:].numel()

    def live_rows(self) -> Tensor:
        """(rows,) bool: the rows that still have bits."""
        return integer_depth(self.bit_depth) > 0

    def quantized_weight(self) -> Tensor:
        """The weight that the network computes with, in the shape of `weight`."""
        return fake_quantize(
            self.weight, self.bit_depth, self.exponent, integer_bits=self.integer_bits
        )

    def zero_rows(self, among: Tensor | slice = slice(None)) -> Tensor:
        """(rows in `among`,) bool: the rows that quantise to nothing but zeros."""
        quantized = fake_quantize(
            self.weight[among],
            self.bit_depth[among],
            self.exponent[among],
            integer_bits=self.integer_bits,
        )
        return (quantized == 0).flatten(1).all(1)

    def linear_map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution or matrix product itself."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.rows.numel() == self.out_width:
            return self.linear_map(x, self.quantized_weight(), self.bias)
        if self.rows.numel():
            values = self.linear_map(x, self.quantized_weight(), None)
            out = place(values, self.rows, self.out_width, self.channel_dim)
        else:
            # Convolutions without rows are not to be had; one on the meta device tells the shape.
            row = self.weight.new_empty((1, *self.weight.shape[1:]), device="meta")
            shape = list(self.linear_map(x.to("meta", row.dtype), row, None).shape)
            shape[self.channel_dim] = self.out_width
            out = x.new_zeros(shape)
        if self.bias is None:
            return out
        over_space = (1,) * (-1 - self.channel_dim)
        return out + self.bias.to(out.dtype).view(-1, *over_space)


class QuantConv2d(QuantizedLayer, nn.Conv2d):  # type: ignore[misc]
    """`nn.Conv2d` with a bit depth and an exponent per output channel."""

    channel_dim = -3

    @property
    def out_width(self) -> int:
        return self.out_channels

    def linear_map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = self._conv_forward(x, weight, bias)
        return out

    @classmethod
    def from_float(cls, layer: nn.Conv2d, bits: float, integer_bits: bool) -> Self:
        """A quantised layer that takes over the parameters of `layer`."""
        new = cls(**_conv_options(layer), device="meta")
        return new.adopt(layer, bits, integer_bits)


class QuantLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` with a bit depth and an exponent per output channel."""

    channel_dim = -1

    @property
    def out_width(self) -> int:
        return self.out_features

    def linear_map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    @classmethod
    def from_float(cls, layer: nn.Linear, bits: float, integer_bits: bool) -> Self:
        """A quantised layer that takes over the parameters of `layer`."""
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        return new.adopt(layer, bits, integer_bits)


class PlacedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over some channels of its input, placed among zeros in its output.

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
    def from_float(cls, norm: nn.BatchNorm2d) -> Self:
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
        out = super().forward(x)
        if self.num_features < self.out_width:
            out = place(out, self.rows, self.out_width, 1)
        return out


def quantize_layers(
    model: nn.Module, *, bits: float, integer_bits: bool = True, exclude: Iterable[str] = ()
) -> None:
    """Replace, in place, every `nn.Conv2d`, `nn.Linear` and `nn.BatchNorm2d` by its twin here.

    The parameters stay the same objects, so an optimiser that holds them goes on holding them.
    Subclasses are left as they are: what else they do is not known.

    Args:
        model: the network; not itself a single layer (wrap that in `nn.Sequential`).
        bits: the bit depth every channel starts at.
        integer_bits: see `fake_quantize`.
        exclude: names of layers, or of modules that contain layers, to leave in float.

    Raises:
        ValueError: a name in `exclude` is no module of the model, or nothing is left to quantise.
    """
    excluded = tuple(exclude)
    names = {name for name, _ in model.named_modules()}
    for name in excluded:
        if name not in names:
            raise ValueError(f"exclude: the model has no module named {name!r}")
    twins: dict[nn.Module, nn.Module] = {}
    replacements: list[tuple[str, nn.Module]] = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        new: nn.Module
        if module in twins:
            new = twins[module]
        elif type(module) is nn.BatchNorm2d:
            new = PlacedBatchNorm2d.from_float(module)
        elif any(name == e or name.startswith(e + ".") for e in excluded):
            continue
        elif type(module) is nn.Conv2d:
            new = QuantConv2d.from_float(module, bits, integer_bits)
        elif type(module) is nn.Linear:
            new = QuantLinear.from_float(module, bits, integer_bits)
        else:
            continue
        twins[module] = new
        replacements.append((name, new))
    if not any(isinstance(new, QuantizedLayer) for _, new in replacements):
        raise ValueError("nothing to compress: the model has no nn.Conv2d or nn.Linear to quantise")
    for name, new in replacements:
        _replace(model, name, new)


@torch.no_grad()
def restore_layers(model: nn.Module) -> None:
    """Take the quantised layers out again, in place: ordinary layers, quantised weights baked in.

    Output channels without a row come back as rows of zeros. Batch norms that have lost channels
    stay `PlacedBatchNorm2d`.
    """
    for name, module in list(model.named_modules()):
        new: nn.Module
        if isinstance(module, QuantConv2d):
            new = nn.Conv2d(**_conv_options(module), device="meta")
        elif isinstance(module, QuantLinear):
            new = nn.Linear(
                module.in_features, module.out_features, module.bias is not None, device="meta"
            )
        elif isinstance(module, PlacedBatchNorm2d) and (
            module.num_features == module.in_width == module.out_width
        ):
            new = nn.BatchNorm2d(**_norm_options(module), device="meta")
            new._parameters.update(module._parameters)
            new._buffers.update({k: module._buffers[k] for k in new._buffers})
        else:
            continue
        if isinstance(module, QuantizedLayer):
            values = module.quantized_weight()
            new.weight = nn.Parameter(place(values, module.rows, module.out_width, 0))
            new.bias = module.bias
        _replace(model, name, new.train(module.training))


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantised layers of `model` by name, in the order of `named_modules`."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def _conv_options(layer: nn.Conv2d) -> dict[str, Any]:
    """The constructor's arguments of a convolution like `layer`."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    same = {name: getattr(layer, name) for name in (*names, "groups", "padding_mode")}
    return same | {"bias": layer.bias is not None}


def _norm_options(norm: nn.BatchNorm2d) -> dict[str, Any]:
    """The constructor's arguments of a batch norm like `norm`."""
    names = ("num_features", "eps", "momentum", "affine", "track_running_stats")
    return {name: getattr(norm, name) for name in names}


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    if not name:
        raise ValueError("the model is itself a single layer: wrap it in nn.Sequential(...)")
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
