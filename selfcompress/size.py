"""How big a network is: Q bits, stored bits, parameters and multiply-accumulates, by layer.

Three sizes are told apart:

*Q bits* is what training penalises, eq. (3) + (4): Σ_l I·H·W·Σ_i b_i over the quantised layers,
with I the input channels the layer has now and b_i its integer bit depths (fractional ones where
`integer_bits=False`), plus 32 bits for every weight in float. Q is that number divided by N, the
number of weights of the *starting* network, quantised or not: those of convolutions, linear layers,
attention, embeddings and recurrent layers, and all other parameters with at least two dimensions
longer than 1. `float_bits` is 32·N.

*Stored bits* is all that running the network needs, at the width it is stored in:

    weights         for every weight of a row that has bits, the integer bit depth of the row
    formats         8 bits for the bit depth and 32 for the exponent of each such row (a file packs
                    depths into 4)
    placement       1 bit per output channel, where a layer or norm does not compute them all;
                    1 bit per input channel, where they do not read them all; 1 bit per row, where
                    some are without bits, and 1 bit per row in grouped convolutions
    everything else (biases, batch-norm weights and statistics, layers left in float, any other
                    parameter or buffer) as it is held: 32 bits for a float32; batch norms' counters
                    of batches are not needed and not counted

It is computed from the network alone, without packing anything. For a network to be saved with
`fold_norms` or `half`, it counts the numbers and widths that these leave. Q and stored bits in
percent are relative to `float_bits`.

*File bytes* is what a file of the network takes on disk: see `selfcompress.save`.

MACs are those of convolutions, linear and recurrent layers and attention's projections, as often as
they run on the example input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from selfcompress.graph.channels import ChannelGraph
from selfcompress.layers.attention import QuantAttention
from selfcompress.layers.batch_norms import PlacedBatchNorm
from selfcompress.layers.embeddings import TiedLinear
from selfcompress.layers.kinds import EMBEDDINGS, FLOAT_LAYERS, layer_widths
from selfcompress.layers.own_forward import OwnForward
from selfcompress.layers.quantized import QuantizedLayer, of_rows, quantized_layers
from selfcompress.layers.recurrent import QuantRecurrent
from selfcompress.quantizer import integer_depth
from selfcompress.text import aligned
from selfcompress.undisturbed import kept_modes

_DEPTH_BITS = 8
_EXPONENT_BITS = 32
_HALF_BITS = 16
WEIGHTED = (
    *FLOAT_LAYERS, nn.MultiheadAttention, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.RNNBase,
    nn.RNNCellBase,
)  # fmt: skip
"""Types of modules whose parameters of two or more dimensions are known to be weights."""


@dataclass(frozen=True)
class LayerSize:
    """One convolution, linear layer, or module with other parameters or buffers.

    Attributes:
        name: qualified name of the module; empty for the model's own parameters.
        channels: rows that have bits, of a quantised layer; all output channels of a float one; 0
            for other modules.
        out_width: channels of its output tensor, with or without bits; 0 for other modules.
        mean_bits: mean integer bit depth of the rows that have bits, or 0 if none has; 32 for a
            float layer.
        weights: weights of rows that have bits (of all rows of a float layer).
        q_bits, stored_bits: see the docstring of `selfcompress/size.py`.
        macs: multiply-accumulates per sample, of the rows that have bits; of all rows and columns
            in attention, recurrent layers and layers of a user's class with its own forward().
    """

    name: str
    channels: int
    out_width: int
    mean_bits: float
    weights: int
    q_bits: float
    stored_bits: int
    macs: int


@dataclass(frozen=True)
class Size:
    """The size of a network at one moment; `str()` is a table by layer.

    Attributes:
        layers: every module that adds to the size, in the model's order.
        float_bits: 32 bits for every weight of the starting network.
        parameters: numbers in all parameters that the network has now, without bit depths and
            exponents.
    """

    layers: tuple[LayerSize, ...]
    float_bits: int
    parameters: int

    @property
    def q_bits(self) -> float:
        """Eq. (4) summed over layers, in bits, with 32 for every weight in float."""
        return sum(layer.q_bits for layer in self.layers)

    @property
    def stored_bits(self) -> int:
        """All that running the network needs, in bits."""
        return sum(layer.stored_bits for layer in self.layers)

    @property
    def weights(self) -> int:
        """Number of weights that still have bits."""
        return sum(layer.weights for layer in self.layers)

    @property
    def macs(self) -> int:
        """Number of multiply-accumulates per sample."""
        return sum(layer.macs for layer in self.layers)

    @property
    def q_percent(self) -> float:
        """Q bits in percent of the starting network's 32-bit weights."""
        return 100 * self.q_bits / self.float_bits

    @property
    def stored_percent(self) -> float:
        """Stored bits in percent of the starting network's 32-bit weights."""
        return 100 * self.stored_bits / self.float_bits

    @property
    def weights_percent(self) -> float:
        """Number of weights that have bits, in percent of the starting network's weights."""
        return 100 * 32 * self.weights / self.float_bits

    def __str__(self) -> str:
        head = (
            "layer", "channels", "width", "mean bits", "weights", "Q bits", "stored bits", "MACs",
        )  # fmt: skip
        rows: list[tuple[str, ...]] = [head]
        for layer in self.layers:
            own = (f"{layer.channels:,}", f"{layer.out_width:,}", f"{layer.mean_bits:.2f}")
            own = own if layer.out_width else ("", "", "")
            rows.append((layer.name or "(the model's own)", *own, *_counts(layer)))
        rows.append(("in all", "", "", "", *_counts(self)))
        text = "\n".join(aligned(rows, numbers=True))
        return (
            f"{text}\nQ {self.q_percent:.2f} % and stored {self.stored_percent:.2f} % of "
            f"{self.float_bits:,} bits (32 per starting weight); channels: rows with bits; width: "
            "of the layer's output as it is now; mean bits: of those rows"
        )


def _counts(size: LayerSize | Size) -> tuple[str, ...]:
    counts = (size.weights, round(size.q_bits), size.stored_bits, size.macs)
    return tuple(f"{count:,}" for count in counts)


def starting_weights(model: nn.Module) -> int:
    """Return N, the number of weights of `model`, quantised or not; shared ones count once."""
    seen: set[Tensor] = set()
    return sum(count_weights(module, seen) for module in model.modules())


def count_weights(module: nn.Module, seen: set[Tensor]) -> int:
    """Return how many weights of a module are not in `seen`, and add its parameters to `seen`."""
    return _count(_weights(module), _new(module, seen))


@torch.no_grad()
def _weights(module: nn.Module) -> list[Tensor]:
    """Return a module's weights.

    For `WEIGHTED` types these are its tensors of at least two dimensions, among them those that
    parametrizations compute; for other types, its parameters with two dimensions longer than 1.
    """
    if isinstance(module, ParametrizationList):  # its parameters count with the weight they make
        return []
    if not isinstance(module, WEIGHTED):
        return [p for p in module.parameters(recurse=False) if _is_matrix(p)]
    found: list[Tensor] = list(module.parameters(recurse=False))
    if is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        with kept_modes(module):
            module.eval()  # in training mode, reading a spectral norm's weight changes it
            found += [getattr(module, name) for name in module.parametrizations]
    return [tensor for tensor in found if tensor.dim() > 1]


def _is_matrix(tensor: Tensor) -> bool:
    return sum(size > 1 for size in tensor.shape) > 1


def output_channels(module: nn.Module) -> int:
    """Return the output channels of a module of the `WEIGHTED` types, and 0 for other modules."""
    if not isinstance(module, WEIGHTED):
        return 0
    if isinstance(module, FLOAT_LAYERS):
        return layer_widths(module)[1]
    # A recurrent layer outputs its hidden state, projected to `proj_size` if that is not 0.
    names = ("embed_dim", "embedding_dim", "out_features", "proj_size", "hidden_size")
    width = next(filter(None, (getattr(module, name, 0) for name in names)), 0)
    return width * (2 if getattr(module, "bidirectional", False) else 1)


def _new(module: nn.Module, seen: set[Tensor]) -> set[Tensor]:
    """Return a module's parameters that are not in `seen`, and add them to `seen`."""
    new: set[Tensor] = {p for p in module.parameters(recurse=False) if p not in seen}
    seen |= new
    return new


def _count(weights: list[Tensor], new: set[Tensor]) -> int:
    """Return how many numbers are in `weights`, leaving out parameters that are not in `new`."""
    return sum(_numbers(w) for w in weights if w in new or not isinstance(w, nn.Parameter))


def _numbers(tensor: Tensor) -> int:
    """Return how many numbers a tensor holds; a complex element is two numbers."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def q_bits(layers: Sequence[QuantizedLayer]) -> Tensor:
    """Return eq. (4) summed over layers, in bits: a scalar with gradients to the bit depths.

    Bit depths are rounded as in the forward pass, with a straight-through gradient.
    """
    if not layers:
        return torch.zeros(())
    bits = torch.cat([layer.bit_depth for layer in layers])
    if layers[0].integer_bits:  # the same in all layers
        bits = bits + (bits.ceil() - bits).detach()
    return (bits * of_rows(layers, [layer.fan_in for layer in layers])).sum()


@torch.no_grad()
def measure(
    model: nn.Module,
    graph: ChannelGraph | None,
    weights_at_start: int,
    *,
    fold_norms: bool = False,
    half: bool = False,
) -> Size:
    """Return the size of `model` as it is now.

    Args:
        graph: its channel graph, which knows how often each weight is applied; without it all MACs
            are reported as 0.
        weights_at_start: `starting_weights` of the network before anything was cut.
        fold_norms, half: how it is to be stored; see `selfcompress.save`.
    """
    applications = graph.applications if graph else {}
    layers = []
    seen: set[Tensor] = set()
    whole = (m for m in model.modules() if isinstance(m, QuantAttention | QuantRecurrent))
    parts = {part for module in whole for part in module.children()}
    for name, module in model.named_modules():
        full = module in parts or isinstance(module, OwnForward)
        times = applications.get(name, 0)
        layer = _measure_module(name, module, times, full, fold_norms, half, seen)
        if layer.stored_bits or layer.out_width or layer.macs:
            layers.append(layer)
    quantized = quantized_layers(model).values()
    formats = {p for layer in quantized for p in (layer.bit_depth, layer.exponent)}
    parameters = sum(_numbers(p) for p in model.parameters() if p not in formats)
    return Size(tuple(layers), 32 * weights_at_start, parameters)


def _measure_module(
    name: str,
    module: nn.Module,
    applications: int,
    full: bool,
    fold_norms: bool,
    half: bool,
    seen: set[Tensor],
) -> LayerSize:
    if isinstance(module, QuantizedLayer):
        depth = integer_depth(module.bit_depth)
        live = int((depth > 0).sum())
        weights = live * module.fan_in
        counted = depth if module.integer_bits else module.bit_depth
        stored = int(depth.sum()) * module.fan_in
        stored += live * (_DEPTH_BITS + (_HALF_BITS if half else _EXPONENT_BITS))
        stored += _as_held(module.bias, half)
        stored += placement_bits(module, len(module.rows), len(module.columns))
        stored += len(module.rows) if live < len(module.rows) else 0
        stored += len(module.rows) if module.grouped else 0
        # Parameters and buffers that a user's class has besides.
        own = {module.weight, module.bias, module.bit_depth, module.exponent}
        others: list[Tensor] = [p for p in _new(module, seen) if p not in own]
        stored += sum(_as_held(t, half) for t in (*others, *module.buffers(recurse=False)))
        in_float = sum(_numbers(p) for p in others if _is_matrix(p))
        return LayerSize(
            name=name,
            channels=live,
            out_width=module.out_width,
            mean_bits=float(depth.sum()) / max(live, 1),
            weights=weights + in_float,
            q_bits=float(counted.sum()) * module.fan_in + 32.0 * in_float,
            stored_bits=stored,
            macs=(_at_full_width(module) if full else weights) * applications,
        )
    folded = fold_norms and isinstance(module, PlacedBatchNorm) and module.can_be_folded
    new = _new(module, seen)
    stored = sum(_as_held(p, half) for p in new)
    stored += sum(
        _as_held(buffer, half)
        for key, buffer in module.named_buffers(recurse=False)
        if key != "num_batches_tracked" and not folded
    )
    if isinstance(module, PlacedBatchNorm):
        stored += placement_bits(module, module.num_features, module.num_features)
    if isinstance(module, TiedLinear):
        multiplied = int(module.embedding.live_rows().sum()) * module.embedding.fan_in
        return LayerSize(name, 0, 0, 0.0, 0, 0.0, stored, multiplied * applications)
    used = _weights(module)
    if not any(weight.numel() for weight in used):
        return LayerSize(name, 0, 0, 0.0, 0, 0.0, stored, 0)
    width = output_channels(module)
    weights = _count(used, new)
    return LayerSize(
        name=name,
        channels=width,
        out_width=width,
        mean_bits=32.0,
        weights=weights,
        q_bits=32.0 * weights,
        stored_bits=stored,
        macs=sum(w.numel() for w in used) * applications,
    )


def _at_full_width(layer: QuantizedLayer) -> int:
    """Return how many weights are multiplied by a layer that computes with its `dense_weight`."""
    if isinstance(layer, EMBEDDINGS):  # it looks vectors up, and multiplies nothing else
        return int(layer.live_rows().sum()) * layer.fan_in
    kernel = layer.weight.shape[2:].numel()
    return int(layer.out_width * (layer.in_width // layer.dense_groups) * kernel)


def placement_bits(module: Any, rows: int, columns: int) -> int:
    """Return one bit per output and per input channel, unless all are computed or read."""
    out_bits: int = module.out_width if rows < module.out_width else 0
    return out_bits + (module.in_width if columns < module.in_width else 0)


def _as_held(tensor: Tensor | None, half: bool) -> int:
    if tensor is None:
        return 0
    real = tensor.dtype.to_real()
    narrow = half and real.is_floating_point
    return _numbers(tensor) * (_HALF_BITS if narrow else real.itemsize * 8)
