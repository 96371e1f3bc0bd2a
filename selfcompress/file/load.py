"""Load a packed file: cut the starting network to the file's shapes and fill in its numbers."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from selfcompress.convert import quantize_layers
from selfcompress.file import header as h
from selfcompress.file.read import Contents, LayerContents, read
from selfcompress.file.streams import DTYPES, is_stored
from selfcompress.layers.batch_norms import NORM_ENTRIES, PlacedBatchNorm, recount
from selfcompress.layers.kinds import EMBEDDINGS, FLOAT_LAYERS, weight_shape
from selfcompress.layers.placing import LAYOUTS, Placed
from selfcompress.layers.quantized import QuantizedLayer, quantized_layers
from selfcompress.layers.recurrent import RECURRENT, matrices_of
from selfcompress.surgery import Wiring, rewire
from selfcompress.text import first_line
from selfcompress.undisturbed import without_compile


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Load the network in the file at `path`, in eval mode.

    Args:
        model: the starting network as its constructor made it, with any weights; it is
            quantised, cut and filled in place. None builds one of the package `models` if the
            file names one.

    Returns:
        `model`, or the network that was built, which is on the CPU.

    Raises:
        FileError: the file is not a packed network, is damaged, or does not fit `model`, which
            is then unchanged.
        OSError: the file cannot be read.
    """
    return load_described(path, model)[0]


def load_described(
    path: str | os.PathLike[str], model: nn.Module | None = None
) -> tuple[nn.Module, h.About]:
    """Load as `load` does; return the network and the information about it in the file."""
    contents = read(path)
    model = None if model is None else without_compile(model)
    try:
        return set_up(contents, model), contents.header.about
    except h.FileError as error:
        raise h.FileError(f"{path}: {error}") from error


@torch.no_grad()
def set_up(contents: Contents, model: nn.Module | None = None) -> nn.Module:
    """Return the network that `contents` describes; `model` and errors are as for `load`."""
    if model is None:
        model = _build(contents.header.about.architecture)
    header = contents.header
    skeleton = _without_numbers(model, {})
    _quantize(skeleton, header)
    _check(contents, skeleton)
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    _drop_weights(model, header)
    _quantize(model, header)
    for layer in header.layers:
        module = model.get_submodule(layer.name)
        assert isinstance(module, QuantizedLayer)
        _fill_layer(module, layer, contents.layers[layer.name], device)
    for norm in header.norms:
        module = model.get_submodule(norm.name)
        assert isinstance(module, PlacedBatchNorm)
        rows, columns = (indices.tolist() for indices in contents.norms[norm.name])
        _wire(module, Wiring(norm.in_width, norm.out_width, rows, columns), device)
        if norm.folded:
            dtype = contents.tensors[f"{norm.name}.weight"].dtype
            module.running_mean = torch.zeros(norm.entries, dtype=dtype, device=device)
            module.running_var = torch.full_like(module.running_mean, 1 - module.eps)
    for entry in header.float_layers:
        wiring = Wiring(entry.in_width, entry.out_width, rows=[])
        rewire(model.get_submodule(entry.name), wiring)
    _fill_tensors(model, contents, device)
    _require_numbers(model)
    return model.eval()


def _build(architecture: h.Architecture | None) -> nn.Module:
    """Build the starting network that a file names, on the meta device (without memory)."""
    if architecture is None:
        raise h.FileError(
            "it does not say how to build its network: give the starting model (a "
            "command: --model package.module:callable)"
        )
    try:
        from models import build  # the example networks, which are not part of the library
    except Exception as error:  # it is missing, or another package of that name fails
        raise h.FileError(
            f"its network is {architecture.name} of the package 'models', which cannot be imported "
            f"({first_line(error)}): go where the folder models/ is, or give the starting model"
        ) from error
    try:
        with torch.device("meta"):
            return build(
                architecture.name, architecture.classes, architecture.width, architecture.image_size
            )
    except Exception as error:  # constructors raise many types for invalid arguments
        raise h.FileError(f"its network cannot be built ({first_line(error)})") from error


def _without_numbers(original: Any, copies: dict[int, Any]) -> Any:
    """Copy a model to the meta device, to try changes on; all that is not a tensor is shared.

    Args:
        original: the model; in recursive calls a submodule, a parameter, a buffer or None.
        copies: the copies made so far, by the `id` of the original, so that shared parts stay
            shared.
    """
    if original is None or id(original) in copies:
        return copies.get(id(original))
    if isinstance(original, Tensor):
        if is_lazy(original):
            raise h.FileError("the model does not know its shapes yet: run it once, then load")
        new = torch.empty_like(original, device="meta")
        if isinstance(original, nn.Parameter):
            new = nn.Parameter(new, original.requires_grad)
        copies[id(original)] = new
        return new
    module = copies[id(original)] = object.__new__(type(original))
    vars(module).update(vars(original))
    for kind in ("_parameters", "_buffers", "_modules"):
        own = {name: _without_numbers(part, copies) for name, part in vars(original)[kind].items()}
        vars(module)[kind] = own
    return module


def _drop_weights(model: nn.Module, header: h.Header) -> None:
    """Move weights that will be replaced to the meta device, where no exponents are fitted."""
    empty: dict[Tensor | None, nn.Parameter] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for layer in header.layers:
        module, key = _place_in_float(modules, layer.name)
        assert module is not None
        weight = module.get_parameter(key)
        empty[weight] = nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
    for module in model.modules():  # an output layer may share an embedding's weight
        held = module._parameters
        held.update({name: empty[p] for name, p in held.items() if p in empty})


def _place_in_float(modules: Mapping[str, nn.Module], name: str) -> tuple[nn.Module | None, str]:
    """Return the float module that owns a quantised layer's weight, and the name of that weight."""
    parent, _, last = name.rpartition(".")
    owner = modules.get(parent)
    if isinstance(owner, nn.MultiheadAttention) and last == "in_proj":
        return owner, "in_proj_weight"
    if isinstance(owner, RECURRENT) and last in matrices_of(owner):
        return owner, last
    return modules.get(name), "weight"


def _quantize(model: nn.Module, header: h.Header) -> None:
    """Quantise those layers of `model` that the header lists, and no others."""
    if quantized_layers(model):
        raise h.FileError("the model is compressed already: build a fresh one")
    if not header.layers:
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    quantised = {_place_in_float(modules, layer.name)[0] for layer in header.layers}
    shared = {module.weight for module in quantised if isinstance(module, nn.Embedding)}
    exclude = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (*FLOAT_LAYERS, *EMBEDDINGS, *RECURRENT, nn.MultiheadAttention))
        and module not in quantised
        and module._parameters.get("weight") not in shared
    ]
    try:
        quantize_layers(model, bits=1, exclude=exclude)
    except ValueError as error:
        raise h.FileError(f"it does not fit the model: {first_line(error)}") from error


def _check(contents: Contents, model: nn.Module) -> None:
    """Raise FileError if a file does not fit `model`, whose layers are quantised already."""
    header = contents.header
    modules = dict(model.named_modules())
    _same_names("quantised layer", header.layers, quantized_layers(model))
    norms = {n: m for n, m in modules.items() if isinstance(m, PlacedBatchNorm)}
    _same_names("batch norm", header.norms, norms)
    in_float = {
        n: m
        for n, m in modules.items()
        if isinstance(m, FLOAT_LAYERS) and not isinstance(m, QuantizedLayer)
    }
    _same_names("layer in float", header.float_layers, in_float)
    for layer in header.layers:
        module = modules[layer.name]
        assert isinstance(module, QuantizedLayer)
        if not _fits(layer, contents.layers[layer.name], module):
            raise h.FileError(
                f"it does not fit the model: layer {layer.name} has the shape {layer.shape}, which "
                f"is no part of {list(module.weight.shape)}"
            )
    for norm in header.norms:
        module = norms[norm.name]
        widths = norm.entries, norm.in_width, norm.out_width
        foldable = module.running_mean is not None and module.weight is not None
        if max(widths) > module.num_features or (norm.folded and not foldable):
            raise h.FileError(f"it does not fit the model: batch norm {norm.name} is another")
    folded = {norm.name for norm in header.norms if norm.folded}
    layers = {layer.name for layer in header.layers}
    expected = {
        name: tensor
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if is_stored(name, layers, folded)
    }
    _same_names("tensor", header.tensors, expected)
    shapes = _known_shapes(header, modules)
    for entry in header.tensors:
        tensor, stored = expected[entry.name], contents.tensors[entry.name]
        floats = tensor.is_floating_point()
        if stored.is_floating_point() != floats or not (floats or stored.dtype == tensor.dtype):
            raise h.FileError(f"it does not fit the model: {entry.name} is of another type")
        smaller = stored.dim() == tensor.dim() and all(
            ours <= theirs for ours, theirs in zip(stored.shape, tensor.shape, strict=True)
        )
        if not smaller or shapes.get(entry.name, entry.shape) != entry.shape:
            raise h.FileError(f"it does not fit the model: {entry.name} has another shape")


def _known_shapes(header: h.Header, modules: dict[str, nn.Module]) -> dict[str, list[int]]:
    """Return, by tensor name, the shapes that follow from the widths in the header."""
    shapes = {f"{layer.name}.bias": [layer.out_width] for layer in header.layers}
    for norm in header.norms:
        for key in NORM_ENTRIES:
            shapes[f"{norm.name}.{key}"] = [norm.entries]
    for entry in header.float_layers:
        module: Any = modules[entry.name]
        if "weight" in module._parameters:  # otherwise it is computed from other parameters
            widths = weight_shape(module, entry.in_width, entry.out_width)[:2]
            # In a user's own class the kernel may have another size than its attributes say.
            shapes[f"{entry.name}.weight"] = [*widths, *module.weight.shape[2:]]
        shapes[f"{entry.name}.bias"] = [entry.out_width]
    return shapes


def _same_names(what: str, ours: Sequence[Any], theirs: Mapping[str, Any]) -> None:
    odd = {entry.name for entry in ours} ^ theirs.keys()
    if odd:
        name = min(odd)
        where = "only the model" if name in theirs else "only the file"
        raise h.FileError(f"it does not fit the model: {where} has a {what} {name}")


def _fits(entry: h.Layer, contents: LayerContents, module: QuantizedLayer) -> bool:
    """Whether cutting `module` could have given the shape and channels in the file."""
    if (entry.row_dim, entry.grouped) != (module.row_dim, module.grouped):
        return False
    kernel = list(module.weight.shape[2:])
    if entry.shape[2:] != kernel or len(entry.shape) != module.weight.dim():
        return False
    reads = entry.shape[module.fan_in_dim]
    if contents.groups is not None:
        count = int(contents.groups.max(initial=0)) + 1
        widest = int(np.bincount(contents.groups).max(initial=0))
        reads *= count if entry.rows else 0
        if count > module.groups or widest > module.group_width:
            return False
        if entry.shape[1] > module.weight.shape[1]:
            return False
    return (
        reads == entry.columns <= entry.in_width <= module.in_width
        and entry.rows <= entry.out_width <= module.out_width
    )


def _fill_layer(
    module: QuantizedLayer, entry: h.Layer, contents: LayerContents, device: torch.device
) -> None:
    """Give a quantised layer the weight, formats, rows and columns in the file."""
    dtype = DTYPES[entry.dtype]
    step = torch.exp2(contents.exponents.to(torch.promote_types(dtype, torch.float32)))
    by_row = torch.from_numpy(contents.values).to(step.dtype) * step[:, None]
    shape = [entry.rows, *(s for dim, s in enumerate(entry.shape) if dim != entry.row_dim)]
    by_row = by_row.to(dtype).view(shape)
    weight = by_row.transpose(0, 1) if entry.row_dim else by_row
    if not weight.is_contiguous() or entry.channels_last:
        weight = _laid_out(weight, entry.channels_last)
    exponents = contents.exponents.clone()
    depths = torch.from_numpy(contents.depths).to(exponents.dtype)
    for name, tensor in (("weight", weight), ("bit_depth", depths), ("exponent", exponents)):
        trainable = module.get_parameter(name).requires_grad
        module.register_parameter(name, nn.Parameter(tensor.to(device), trainable))
    groups = None if contents.groups is None else contents.groups.tolist()
    rows, columns = contents.rows.tolist(), contents.columns.tolist()
    _wire(module, Wiring(entry.in_width, entry.out_width, rows, columns, groups), device)


def _wire(module: Placed, wiring: Wiring, device: torch.device) -> None:
    for name in ("rows", "columns", "slots"):
        if name in vars(module):
            setattr(module, name, torch.zeros(0, dtype=torch.int64, device=device))
    rewire(module, wiring)


def _laid_out(tensor: Tensor, channels_last: bool) -> Tensor:
    """Copy `tensor` in channels_last or contiguous format, on which rounding in sums may depend."""
    layout = LAYOUTS.get(tensor.dim()) if channels_last else None
    return tensor.clone(memory_format=layout or torch.contiguous_format)


def _fill_tensors(model: nn.Module, contents: Contents, device: torch.device) -> None:
    """Replace stored parameters and buffers by the file's, in all modules that share them."""
    old: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    old |= dict(model.named_buffers(remove_duplicate=False))
    new: dict[int, Tensor] = {}
    for entry in contents.header.tensors:
        copy = _laid_out(contents.tensors[entry.name], entry.channels_last)
        new[id(old[entry.name])] = copy.to(device)
    for name, tensor in old.items():
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        if key == "num_batches_tracked":
            setattr(module, key, torch.zeros((), dtype=torch.int64, device=device))
        elif id(tensor) in new and isinstance(tensor, nn.Parameter):
            filled = new[id(tensor)]
            if not isinstance(filled, nn.Parameter):
                filled = new[id(tensor)] = nn.Parameter(filled, tensor.requires_grad)
            module.register_parameter(key, filled)
            recount(module, filled)
        elif id(tensor) in new:
            setattr(module, key, new[id(tensor)])
            recount(module, new[id(tensor)])


def _require_numbers(model: nn.Module) -> None:
    """Raise FileError if a tensor is still on the meta device, since the file does not hold it."""
    for name, module in model.named_modules():
        held = [*vars(module).values(), *module._parameters.values(), *module._buffers.values()]
        if any(isinstance(value, Tensor) and value.is_meta for value in held):
            raise h.FileError(f"{name} has tensors that no file holds: give the starting model")
