"""Write a network into a packed file."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfcompress.disk import write_atomically
from selfcompress.file import header as h
from selfcompress.file import integers
from selfcompress.file.streams import DTYPES, checksum, is_stored, representable, stored_dtype
from selfcompress.layers.batch_norms import PlacedBatchNorm
from selfcompress.layers.kinds import FLOAT_LAYERS, layer_widths
from selfcompress.layers.placing import LAYOUTS, Placed
from selfcompress.layers.quantized import QuantizedLayer, quantized_layers
from selfcompress.quantizer import MAX_BITS, integer_depth, quantized_integers
from selfcompress.size import measure
from selfcompress.undisturbed import without_compile


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    about: h.About | None = None,
    *,
    fold_norms: bool = False,
    half: bool = False,
) -> int:
    """Write `model` to `path` atomically and return the size of the file in bytes.

    The file holds everything that the network needs except its code, so `load` needs the starting
    network built first. Loaded in a fresh process, the network computes the same logits bit for
    bit, unless `fold_norms` or `half` is set.

    Args:
        model: the network, with or without quantised layers; it is not changed.
        about: further information to store: class names, normalisation, γ, accuracy, how to build
            the network.
        fold_norms: store a scale and a shift per channel of each batch norm instead of mean,
            variance, weight and bias. The file is then for evaluation only.
        half: store floats, including exponents, as float16.

    Raises:
        ValueError: a number is not finite (perhaps only in float16), a dtype or format cannot be
            stored, or a limit in `header.py` is exceeded; nothing has been written.
        OSError: the file cannot be written.
    """
    model = without_compile(model)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if fold_norms and norms and not any(isinstance(norm, PlacedBatchNorm) for norm in norms):
        warnings.warn(
            "fold_norms has no effect: it is for batch norms of a Compressor's model", stacklevel=2
        )
    content = pack(model, about, fold_norms=fold_norms, half=half)
    write_atomically(Path(path), content)
    return len(content)


@torch.no_grad()
def pack(
    model: nn.Module,
    about: h.About | None = None,
    *,
    fold_norms: bool = False,
    half: bool = False,
    entropy_coding: bool = True,
) -> bytes:
    """Return the bytes that `save` writes; arguments and ValueError are those of `save`.

    Args:
        entropy_coding: entropy-code the integers where that is shorter.
    """
    model = without_compile(model)
    layers = quantized_layers(model)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, PlacedBatchNorm)}
    folded = {n for n, norm in norms.items() if fold_norms and norm.can_be_folded}
    _require_finite(model)
    tensors = dict(_other_tensors(model, layers, norms, folded))
    size = measure(model, None, 1, fold_norms=fold_norms, half=half)
    header = h.Header(
        format=h.FORMAT,
        version=h.VERSION,
        half=half,
        q_bits=round(size.q_bits),
        stored_bits=size.stored_bits,
        layers=[_layer(name, layer) for name, layer in layers.items()],
        norms=[
            h.Norm(name, m.num_features, m.in_width, m.out_width, name in folded)
            for name, m in norms.items()
        ],
        float_layers=[
            h.FloatLayer(name, *layer_widths(module))
            for name, module in model.named_modules()
            if isinstance(module, FLOAT_LAYERS) and not isinstance(module, QuantizedLayer)
        ],
        tensors=[_tensor(name, tensor) for name, tensor in tensors.items()],
        about=h.check_about(about or h.About()),
    )
    text = h.to_bytes(header)
    try:
        h.from_bytes(text)
    except h.FileError as error:
        raise ValueError(f"no file could be read that holds this model: {error}") from error
    depths: list[np.ndarray] = []
    groups: list[integers.Group] = []
    exponents: dict[str, Tensor] = {}
    for name, layer in layers.items():
        _require_formats(name, layer)
        depth = integer_depth(layer.bit_depth)
        depths.append(depth[depth > 0].to(torch.uint8).numpy(force=True))
        groups += _groups(layer)
        exponents[f"{name}.exponent"] = layer.exponent[depth > 0]
    placement = [*map(_layer_placement, layers.values()), *map(_placement, norms.values())]
    bits = [
        _nibbles(_joined(depths, np.uint8)),
        _packed(_joined(placement, bool)),
        integers.encode(groups, entropy_coding),
    ]
    streams = {
        "bits": torch.from_numpy(np.concatenate(bits)),
        **_by_type(exponents | tensors, half),
    }
    streams = {name: stream for name, stream in streams.items() if stream.numel()}
    text = checksum(text, streams) + text
    return safetensors.torch.save(
        {"header": torch.frombuffer(bytearray(text), dtype=torch.uint8), **streams}
    )


def _layer(name: str, layer: QuantizedLayer) -> h.Layer:
    return h.Layer(
        name=name,
        shape=list(layer.weight.shape),
        row_dim=layer.row_dim,
        in_width=layer.in_width,
        out_width=layer.out_width,
        columns=len(layer.columns),
        live=int(layer.live_rows().sum()),
        grouped=layer.grouped,
        dtype=_dtype(name, layer.weight),  # type: ignore[arg-type]
        exponent_dtype=_dtype(name, layer.exponent),  # type: ignore[arg-type]
        channels_last=_is_channels_last(layer.weight),
    )


def _tensor(name: str, tensor: Tensor) -> h.Tensor:
    return h.Tensor(name, _dtype(name, tensor), list(tensor.shape), _is_channels_last(tensor))


def _groups(layer: QuantizedLayer) -> Iterator[integers.Group]:
    """Yield each bit depth of a layer, in ascending order, with the integers of its rows."""
    depth = integer_depth(layer.bit_depth)
    values = quantized_integers(
        layer.weight_by_row(), layer.bit_depth, layer.exponent, integer_bits=layer.integer_bits
    )
    for bits in depth[depth > 0].unique().tolist():
        yield int(bits), values[depth == bits].numpy(force=True).ravel()


def _layer_placement(layer: QuantizedLayer) -> np.ndarray:
    parts = [_placement(layer)]
    if layer.grouped:
        group = layer.row_groups.numpy(force=True)
        parts.append(np.diff(group, prepend=-1) > 0)
    live = layer.live_rows().numpy(force=True)
    if not live.all():
        parts.append(live)
    return np.concatenate(parts)


def _placement(module: Placed) -> np.ndarray:
    """Return the bits for which output channels have a row or entry, and which inputs are read."""
    parts = [np.zeros(0, bool)]
    for indices, width in ((module.rows, module.out_width), (module.columns, module.in_width)):
        assert bool((indices.diff() > 0).all())  # cuts keep their order
        if len(indices) < width:
            parts.append(np.isin(np.arange(width), indices.numpy(force=True)))
    return np.concatenate(parts)


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([*parts, np.zeros(0, dtype)])


def _packed(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits, bitorder="little")


def _nibbles(depths: np.ndarray) -> np.ndarray:
    """Pack (n,) bit depths from 1 to 16 two to a byte, the first in the low bits."""
    low = np.append(depths - 1, np.zeros(len(depths) % 2, np.uint8))
    packed: np.ndarray = low[0::2] | (low[1::2] << 4)
    return packed


def _other_tensors(
    model: nn.Module,
    layers: dict[str, QuantizedLayer],
    norms: dict[str, PlacedBatchNorm],
    folded: set[str],
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value to store of every parameter and buffer that is not quantised."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not is_stored(name, layers, folded):
            continue
        owner, _, key = name.rpartition(".")
        if owner in folded:
            scale, shift = _folded(norms[owner])
            tensor = scale if key == "weight" else shift
        yield name, tensor


def _folded(norm: PlacedBatchNorm) -> tuple[Tensor, Tensor]:
    """Return scale and shift of y = scale · x + shift, which the norm computes in evaluation."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


def _by_type(tensors: dict[str, Tensor], half: bool) -> dict[str, Tensor]:
    """Return, by the name of each stored dtype, its tensors flattened and concatenated."""
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        stored = stored_dtype(tensor.dtype, half)
        real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        flat = real.detach().cpu().to(stored).flatten()
        if real.is_floating_point() and flat.isfinite().sum() < real.isfinite().sum():
            raise ValueError(f"{name} has values too large for float16: save it with half=False")
        parts.setdefault(_dtype(name, flat), []).append(flat)
    return {name: torch.cat(flats) for name, flats in parts.items()}


def _dtype(name: str, tensor: Tensor) -> h.TensorType:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"{name} is of type {dtype}, which cannot be stored")
    return dtype  # type: ignore[return-value]


def _require_finite(model: nn.Module) -> None:
    """Raise ValueError for NaN, and for infinity in parameters (masks in buffers may use it)."""
    for name, tensor in model.named_parameters():
        # The largest absolute value is infinite or NaN if any value is.
        if tensor.numel() and not torch.linalg.vector_norm(tensor, torch.inf).isfinite():
            raise ValueError(f"{name} is not finite")
    for name, buffer in model.named_buffers():
        if (buffer.is_floating_point() or buffer.is_complex()) and buffer.isnan().any():
            raise ValueError(f"{name} is not a number in places")


def _require_formats(name: str, layer: QuantizedLayer) -> None:
    depth = integer_depth(layer.bit_depth)
    if ((layer.bit_depth < 0) | (depth > MAX_BITS)).any():
        raise ValueError(f"the bit depths of layer {name} are not all from 0 to {MAX_BITS}")
    live = depth > 0
    if not representable(depth[live], layer.exponent[live], layer.weight.dtype):
        raise ValueError(f"the exponents of layer {name} are out of the range of its weights")


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether the strides are channels_last; `is_contiguous` cannot tell for 1 × 1 kernels."""
    layout = LAYOUTS.get(tensor.dim())
    if layout is None or not tensor.numel():
        return False
    ordinary, other = (
        torch.empty(tensor.shape, device="meta", memory_format=memory_format).stride()
        for memory_format in (torch.contiguous_format, layout)
    )
    return tensor.stride() == other != ordinary
