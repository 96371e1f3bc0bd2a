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
from selfcompress.look import without_compile
from selfcompress.quantizer import MAX_BITS, integer_depth, quantized_integers
from selfcompress.size import measure


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    about: h.About | None = None,
    *,
    fold_norms: bool = False,
    half: bool = False,
) -> int:
    """Write `model` to `path`, whole or not at all; the size of the file, in bytes.

    Everything the network needs is in it but its code: `load` has it built first. Read in a fresh
    process, it computes the same logits bit for bit, unless `fold_norms` or `half` is set.

    Args:
        model: with or without quantised layers; it stays as it is.
        about: what else to note: class names, normalisation, γ, accuracy, how to build it.
        fold_norms: keep of every batch norm its two coefficients instead of mean, variance,
            weight and bias. For evaluation alone.
        half: store floats, the exponents among them, as float16.

    Raises:
        ValueError: something is not finite (perhaps for float16 only), of a type that cannot be
            stored, or beyond the limits in `header.py`; nothing has been written.
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
    """What `save` writes.

    Args:
        entropy_coding: code integers by how often they occur, where that is shorter.
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
    """The integers of the rows of each bit depth."""
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
    """Which output channels there are rows or entries for, and which inputs they read."""
    parts = [np.zeros(0, bool)]
    for indices, width in ((module.rows, module.out_width), (module.columns, module.in_width)):
        assert bool((indices.diff() > 0).all())  # surgery keeps their order
        if len(indices) < width:
            parts.append(np.isin(np.arange(width), indices.numpy(force=True)))
    return np.concatenate(parts)


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([*parts, np.zeros(0, dtype)])


def _packed(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits, bitorder="little")


def _nibbles(depths: np.ndarray) -> np.ndarray:
    """(n,) bit depths from 1 to 16 → half as many bytes."""
    low = np.append(depths - 1, np.zeros(len(depths) % 2, np.uint8))
    packed: np.ndarray = low[0::2] | (low[1::2] << 4)
    return packed


def _other_tensors(
    model: nn.Module,
    layers: dict[str, QuantizedLayer],
    norms: dict[str, PlacedBatchNorm],
    folded: set[str],
) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers that are not quantised, as they are to be stored."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not is_stored(name, layers, folded):
            continue
        owner, _, key = name.rpartition(".")
        if owner in folded:
            scale, shift = _folded(norms[owner])
            tensor = scale if key == "weight" else shift
        yield name, tensor


def _folded(norm: PlacedBatchNorm) -> tuple[Tensor, Tensor]:
    """The coefficients of y = scale · x + shift, which the norm is in evaluation."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


def _by_type(tensors: dict[str, Tensor], half: bool) -> dict[str, Tensor]:
    """All tensors of a type one after the other, flat, by the type's name."""
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
    """Refuse NaN and, but in buffers, where masks are made of it, infinity."""
    for name, tensor in model.named_parameters():
        # The largest absolute value is infinite or NaN if any is.
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
    """By its strides: `is_contiguous` takes kernels of one pixel for both."""
    layout = LAYOUTS.get(tensor.dim())
    if layout is None or not tensor.numel():
        return False
    ordinary, other = (
        torch.empty(tensor.shape, device="meta", memory_format=memory_format).stride()
        for memory_format in (torch.contiguous_format, layout)
    )
    return tensor.stride() == other != ordinary
