"""Replace the layers of a model with quantised ones."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from selfcompress.layers.attention import QuantAttention
from selfcompress.layers.embeddings import QuantEmbedding, TiedLinear
from selfcompress.layers.kinds import EMBEDDINGS, FLOAT_LAYERS, layer_widths, weight_shape
from selfcompress.layers.quantized import QuantizedLayer
from selfcompress.layers.recurrent import RECURRENT, matrices_of
from selfcompress.layers.twins import TWINS, of_same_class, twin_of
from selfcompress.size import WEIGHTED, count_weights


def quantize_layers(
    model: nn.Module,
    *,
    bits: float,
    integer_bits: bool = True,
    exclude: Iterable[str] = (),
    read_elsewhere: Iterable[str] = (),
    rewritten: Iterable[str] = (),
) -> dict[str, str]:
    """Replace layers that have weights, attention and batch norms by their twins, in place.

    A twin is the class of this package that stands in for a torch class (see `layers/twins.py`).
    The parameters stay the same objects, so an optimiser that holds them stays valid.

    Args:
        model: the network; not itself a single layer (wrap that in `nn.Sequential`).
        bits: the bit depth that every channel starts at.
        integer_bits: see `fake_quantize`.
        exclude: names of layers, or of modules that contain layers, to leave in float.
        read_elsewhere: names of layers whose weight is read outside of their own forward(), where
            it would not be quantised.
        rewritten: names of layers whose forward() changes their weight.

    Returns:
        Name → reason, for every module with weights that was left in float.

    Raises:
        ValueError: a name in `exclude` is no module of the model or the `out_proj` of a quantised
            attention, nothing is left to quantise, or the model is itself a single layer.
    """
    excluded, read_elsewhere, rewritten = tuple(exclude), set(read_elsewhere), set(rewritten)
    names = {module: name for name, module in model.named_modules()}
    every = list(model.named_modules(remove_duplicate=False))  # shared modules by all names
    for name in excluded:
        if name not in dict(every):
            raise ValueError(f"exclude: the model has no module named {name!r}")

    def under(parents: Iterable[str]) -> set[nn.Module]:
        return {m for n, m in every if any(f"{n}.".startswith(f"{p}.") for p in parents)}

    apart = under(excluded)
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    ties = _ties(model, apart | under(read_elsewhere | rewritten))
    for embedding in ties.values():
        owners[id(embedding.weight)] = 1
    left: dict[str, str] = {}
    twins: dict[nn.Module, nn.Module] = {}
    for module, name in names.items():
        attention, _, last = name.rpartition(".")
        if last == "out_proj" and isinstance(
            twins.get(model.get_submodule(attention)), QuantAttention
        ):
            if name in excluded:
                raise ValueError(f"exclude: {name} is a part of {attention}: exclude that")
            continue
        twin, new, why = twin_of(module), None, ""
        if isinstance(module, _BatchNorm) and twin and "forward" not in vars(module):
            new = of_same_class(twin.from_float(module), module)
        elif isinstance(module, WEIGHTED) and module not in ties:
            why = "it is excluded" if module in apart else _why_in_float(module, twin, owners)
            if name in read_elsewhere:
                why = why or "its weight is read past its own forward()"
            if name in rewritten:
                why = why or "its forward() changes its weight"
            if not why:
                new = of_same_class(twin.from_float(module, bits, integer_bits), module)
            if new is None:
                why = why or f"it or its class {_named(module)} has what a quantised layer needs"
        elif module not in ties and count_weights(module, set()):
            own = ", ".join(n for n, _ in module.named_parameters(recurse=False))
            why = f"its parameters ({own}) are of no known layer"
        if why:
            left[name] = why
        if new is not None:
            twins[module] = new
    for module, embedding in ties.items():
        twin = twins.get(embedding)
        if isinstance(twin, QuantEmbedding):
            assert isinstance(module, nn.Linear)
            twins[module] = TiedLinear.from_float(module, twin)
        else:
            left[names[module]] = _SHARES
    made = [part for new in twins.values() for part in new.modules()]
    if not any(isinstance(part, QuantizedLayer) for part in made):
        raise ValueError("nothing to compress: the model has no layer to quantise")
    for name, module in every:
        if module in twins:
            replace(model, name, twins[module])
    _without_fast_paths(model)
    return left


_SHARES = "it shares a parameter with another module"


def _ties(model: nn.Module, apart: set[nn.Module]) -> dict[nn.Module, nn.Module]:
    """Map each linear layer that shares its weight with just one embedding to that embedding.

    Other linear layers may share the weight too, but no module of another type.

    Args:
        apart: modules that are to be left as they are.
    """
    sharing: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            sharing.setdefault(parameter, []).append(module)
    found: dict[nn.Module, nn.Module] = {}
    for parameter, modules in sharing.items():
        embeddings = [m for m in modules if isinstance(m, nn.Embedding) and m.weight is parameter]
        layers = [m for m in modules if type(m) is nn.Linear and m.weight is parameter]
        alone = len(embeddings) == 1 and len(modules) == 1 + len(layers)
        as_they_are = any("forward" in vars(m) or m in apart for m in modules)
        if alone and not as_they_are:
            found |= dict.fromkeys(layers, embeddings[0])
    return found


def _why_in_float(module: nn.Module, twin: Any, owners: Counter[int]) -> str:
    expected = ["weight"] if isinstance(module, FLOAT_LAYERS) else []
    if isinstance(module, RECURRENT):
        expected = matrices_of(module)
    if is_parametrized(module) or not module._parameters.keys() >= set(expected):
        return "its weight is computed from other parameters"
    if twin is None:
        if isinstance(module, tuple(TWINS)):
            return f"its class {_named(module)} changes more than how it computes"
        return f"its type {type(module).__name__} is not known"
    if "forward" in vars(module):
        return "its forward() has been replaced"
    if any(parameter.is_complex() for parameter in module.parameters(recurse=False)):
        return "it computes with complex numbers"
    if isinstance(module, EMBEDDINGS) and module.sparse:
        return "its gradients are sparse"
    if isinstance(module, EMBEDDINGS) and module.max_norm is not None:
        return "its forward() changes its weight"
    if isinstance(module, FLOAT_LAYERS) and not _is_plain(module):
        return "its weight or bias is of another shape or type than torch's"
    if isinstance(module, nn.modules.conv._ConvTransposeNd) and module.groups > 1:
        return "it is a grouped transposed convolution"
    if isinstance(module, nn.MultiheadAttention) and not module._qkv_same_embed_dim:
        return "its keys or values are of another width than its queries"
    if any(owners[id(p)] > 1 for p in module.parameters(recurse=False)):
        return _SHARES
    return ""


def _is_plain(layer: nn.Module) -> bool:
    """Return whether weight and bias have the shapes that a layer's sizes imply, and are floats."""
    ins, outs = layer_widths(layer)
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    return (
        weight is not None
        and "bias" in layer._parameters
        and list(weight.shape) == weight_shape(layer, ins, outs)
        and all(p.is_floating_point() for p in (weight, bias) if p is not None)
        and (bias is None or list(bias.shape) == [outs])
    )


def _named(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _without_fast_paths(model: nn.Module) -> None:
    """Disable the fused inference of torch's transformers, which reads unquantised weights."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(part, QuantizedLayer) for part in module.modules()
        ):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the submodule `name` of `model` by `new`.

    Raises:
        ValueError: `name` is empty, which is the model itself.
    """
    if not name:
        raise ValueError("the model is itself a single layer: wrap it in nn.Sequential(...)")
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
