"""Put quantised layers into a model."""

import functools
import itertools
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from selfcompress import layers, recurrent
from selfcompress.attention import QuantAttention
from selfcompress.layers import (
    EMBEDDINGS,
    FLOAT_LAYERS,
    OwnForward,
    QuantEmbedding,
    QuantizedLayer,
    TiedLinear,
    layer_widths,
)
from selfcompress.recurrent import RECURRENT, matrices_of
from selfcompress.size import WEIGHTED, count_weights

TWINS: dict[type[nn.Module], Any] = {
    nn.Conv1d: layers.QuantConv1d,
    nn.Conv2d: layers.QuantConv2d,
    nn.Conv3d: layers.QuantConv3d,
    nn.ConvTranspose1d: layers.QuantConvTranspose1d,
    nn.ConvTranspose2d: layers.QuantConvTranspose2d,
    nn.ConvTranspose3d: layers.QuantConvTranspose3d,
    nn.Linear: layers.QuantLinear,
    nn.Embedding: layers.QuantEmbedding,
    nn.EmbeddingBag: layers.QuantEmbeddingBag,
    nn.MultiheadAttention: QuantAttention,
    nn.RNN: recurrent.QuantRNN,
    nn.LSTM: recurrent.QuantLSTM,
    nn.GRU: recurrent.QuantGRU,
    nn.RNNCell: recurrent.QuantRNNCell,
    nn.LSTMCell: recurrent.QuantLSTMCell,
    nn.GRUCell: recurrent.QuantGRUCell,
    nn.BatchNorm1d: layers.PlacedBatchNorm1d,
    nn.BatchNorm2d: layers.PlacedBatchNorm2d,
    nn.BatchNorm3d: layers.PlacedBatchNorm3d,
}
"""Layer type → its twin."""
_COMPUTES = ("forward", "_conv_forward", "_output_padding")
"""The methods that layers compute with."""
_ASKED_OTHERWISE = ("__call__", "train", "merge_masks")
"""What else may be called of a layer, and change what it computes."""


def _differs(kind: type, base: type, methods: Iterable[str]) -> bool:
    return any(getattr(kind, name, None) is not getattr(base, name, None) for name in methods)


def _base_of(kind: type) -> Any:
    """The type of torch's that a user's own is a kind of; None if that has no twin."""
    return next((known for known in kind.__mro__ if known in TWINS), None)


def _twin_of(module: nn.Module) -> Any:
    """The twin of a layer's type, also of a user's own; None if there is none."""
    kind = type(module)
    base = _base_of(kind)
    if base is None or is_parametrized(module):
        return None
    if kind is not base:
        if base is nn.MultiheadAttention or _differs(kind, base, _ASKED_OTHERWISE):
            return None
        if issubclass(base, _BatchNorm) and _differs(kind, base, _COMPUTES):
            return None
        if any("__init_subclass__" in vars(own) for own in _own_classes(kind)):
            return None
    return TWINS[base]


def _own_classes(kind: type) -> list[type]:
    """The classes of a user's own that lie in front of torch's."""
    return list(itertools.takewhile(lambda known: known not in TWINS, kind.__mro__))


def _of_same_class(twin: nn.Module, module: nn.Module) -> nn.Module | None:
    """`twin`, of the class of the user's module too; None if the two do not go together."""
    own = type(module)
    if own in TWINS:
        return twin
    kinds: tuple[Any, Any] = type(twin), own
    theirs = names_of_user(module).union(*map(vars, _own_classes(own)))
    if theirs & _names_of_ours(kinds[0]):
        return None
    try:
        twin.__class__ = _combined(*kinds)
    except TypeError:  # with __slots__, say
        return None
    return twin


@functools.cache
def _names_of_ours(twin: Hashable) -> frozenset[str]:
    """The names that a twin's class has beside torch's, where a user's would be in the way."""
    assert isinstance(twin, type)
    ours = [kind for kind in twin.__mro__ if kind.__module__.startswith("selfcompress.")]
    torchs = next(set(dir(kind)) for kind in twin.__mro__ if kind in TWINS)
    names = {
        name for kind in ours for name in (*vars(kind), *vars(kind).get("__annotations__", ()))
    }
    return frozenset(names | {"own_class"}) - torchs - {"weight", "bias", "groups", "__module__"}


@functools.cache
def _names_of_torch(base: Hashable) -> frozenset[str]:
    """The names that an object of torch's own type holds something under."""
    assert isinstance(base, type)
    sizes = 2
    if issubclass(base, _BatchNorm | nn.modules.conv._ConvNd):
        sizes = 1 if issubclass(base, _BatchNorm) else 3
    plain = base(*[1] * sizes, device="meta")
    return frozenset(name for held in _held(plain) for name in held)


def names_of_user(module: nn.Module) -> set[str]:
    """What a user has put on a layer or batch norm, or on what has taken its place."""
    kind: Any = type(module)
    names = {name for held in _held(module) for name in held} - _names_of_torch(_base_of(kind))
    names -= {*getattr(module, "_flat_weights_names", ())}  # of as many layers as it has
    twin = issubclass(kind, (*TWINS.values(), TiedLinear))
    return names - _names_of_ours(kind) if twin else names


@functools.cache
def _combined(twin: Hashable, own: Hashable) -> Any:
    """`twin` for a user's own type, which is still of that type, with the methods it has."""

    def reduce(module: nn.Module, protocol: Any) -> Any:  # pickle finds no class that was made here
        return _blank, (twin, own), vars(module)

    assert isinstance(twin, type) and isinstance(own, type)
    prefix = "Placed" if issubclass(twin, layers.PlacedBatchNorm) else "Quant"
    body = {"__reduce_ex__": reduce, "own_class": own}
    kinds: tuple[type, ...] = (twin, own)
    if issubclass(twin, QuantizedLayer) and _differs(own, _base_of(own), _COMPUTES):
        kinds = (OwnForward, *kinds)
    return type(prefix + own.__name__, kinds, body)


def _blank(twin: Hashable, own: Hashable) -> Any:
    kind = _combined(twin, own)
    return object.__new__(kind)


def quantize_layers(
    model: nn.Module,
    *,
    bits: float,
    integer_bits: bool = True,
    exclude: Iterable[str] = (),
    read_elsewhere: Iterable[str] = (),
    rewritten: Iterable[str] = (),
) -> dict[str, str]:
    """Replace, in place, layers with weights, attention and batch norms by their twins.

    The parameters stay the same objects, so an optimiser that holds them goes on holding them.

    Args:
        model: the network; not itself a single layer (wrap that in `nn.Sequential`).
        bits: the bit depth every channel starts at.
        integer_bits: see `fake_quantize`.
        exclude: names of layers, or of modules that contain layers, to leave in float.
        read_elsewhere: names of layers whose weight is read past their own forward(), where a
            quantiser inside of the layer would not be seen.
        rewritten: names of layers whose forward() changes their weight.

    Returns:
        name → why, for every module with weights that was left in float.

    Raises:
        ValueError: a name in `exclude` is no module of the model, or nothing is left to quantise.
    """
    excluded, read_elsewhere, rewritten = tuple(exclude), set(read_elsewhere), set(rewritten)
    names = {name for name, _ in model.named_modules()}
    for name in excluded:
        if name not in names:
            raise ValueError(f"exclude: the model has no module named {name!r}")
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    ties = _ties(model, {*excluded, *read_elsewhere, *rewritten})
    for embedding in ties.values():
        owners[id(embedding.weight)] = 1
    left: dict[str, str] = {}
    attentions: set[str] = set()
    twins: dict[nn.Module, nn.Module] = {}
    tied: list[tuple[str, nn.Module]] = []
    replacements: list[tuple[str, nn.Module]] = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        attention, _, last = name.rpartition(".")
        if last == "out_proj" and attention in attentions:
            if name in excluded:
                raise ValueError(f"exclude: {name} is a part of {attention}: exclude that")
            continue
        if module not in twins:
            twin = _twin_of(module)
            if (
                isinstance(module, _BatchNorm)
                and twin is not None
                and "forward" not in vars(module)
            ):
                norm = _of_same_class(twin.from_float(module), module)
                if norm is None:
                    continue
                twins[module] = norm
            elif module in ties:
                tied.append((name, module))
                continue
            elif isinstance(module, WEIGHTED):
                why = _why_in_float(name, module, twin, excluded, owners)
                if name in read_elsewhere:
                    why = why or "its weight is read past its own forward()"
                if name in rewritten:
                    why = why or "its forward() changes its weight"
                if why:
                    left[name] = why
                    continue
                layer = _of_same_class(twin.from_float(module, bits, integer_bits), module)
                if layer is None:
                    left[name] = f"its class {_named(module)} has what a quantised layer needs"
                    continue
                twins[module] = layer
            else:
                if name not in left and count_weights(module, set()):
                    left[name] = "its parameters are of no known layer"
                continue
        if isinstance(module, nn.MultiheadAttention):
            attentions.add(name)
        replacements.append((name, twins[module]))
    for name, module in tied:
        twin = twins.get(ties[module])
        if not isinstance(twin, QuantEmbedding):
            left[name] = _SHARES
            continue
        if module not in twins:
            assert isinstance(module, nn.Linear)
            twins[module] = TiedLinear.from_float(module, twin)
        replacements.append((name, twins[module]))
    if not any(part for new in twins.values() for part in new.modules() if _is_quantised(part)):
        raise ValueError("nothing to compress: the model has no layer to quantise")
    for old, new in twins.items():
        keep_hooks(old, new)
        kind: Any = type(new)
        keep_noted(old, new, names_of_user(old) - _names_of_ours(kind))
    for name, new in replacements:
        replace(model, name, new)
    _without_fast_paths(model)
    return left


def _is_quantised(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLayer)


_SHARES = "it shares a parameter with another module"


def _ties(model: nn.Module, apart: set[str]) -> dict[nn.Module, nn.Module]:
    """Linear layers that share their weight with one embedding, and nobody else → that.

    Args:
        apart: names of modules that are to be left as they are.
    """
    sharing: dict[nn.Parameter, list[nn.Module]] = {}
    names = {module: name for name, module in model.named_modules()}
    for module in names:
        for parameter in module.parameters(recurse=False):
            sharing.setdefault(parameter, []).append(module)
    found: dict[nn.Module, nn.Module] = {}
    for parameter, modules in sharing.items():
        embeddings = [m for m in modules if isinstance(m, nn.Embedding) and m.weight is parameter]
        layers = [m for m in modules if type(m) is nn.Linear and m.weight is parameter]
        alone = len(embeddings) == 1 and len(modules) == 1 + len(layers)
        as_they_are = any(
            "forward" in vars(m) or any(f"{names[m]}.".startswith(f"{n}.") for n in apart)
            for m in modules
        )
        if alone and not as_they_are:
            found |= dict.fromkeys(layers, embeddings[0])
    return found


def _why_in_float(
    name: str,
    module: nn.Module,
    twin: Any,
    excluded: tuple[str, ...],
    owners: Counter[int],
) -> str:
    if any(name == e or name.startswith(e + ".") for e in excluded):
        return "it is excluded"
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
    """Whether a layer has the weight and bias that its sizes ask for, in floating point."""
    ins, outs = layer_widths(layer)
    shape = [outs, ins // getattr(layer, "groups", 1), *getattr(layer, "kernel_size", ())]
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        shape[:2] = [ins, outs // layer.groups]
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    return (
        weight is not None
        and "bias" in layer._parameters
        and list(weight.shape) == shape
        and all(p.is_floating_point() for p in (weight, bias) if p is not None)
        and (bias is None or list(bias.shape) == [outs])
    )


def _named(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def keep_hooks(old: nn.Module, new: nn.Module) -> None:
    """Have the user's hooks on a layer called for what replaces it."""
    for key, value in vars(old).items():
        if "_hook" in key:  # and whether those of backward are full
            vars(new)[key] = value


def keep_noted(old: nn.Module, new: nn.Module, names: Iterable[str]) -> None:
    """Have what replaces a layer hold what the user has put on that under these `names`."""
    for name in names:
        for held, into in zip(_held(old), _held(new), strict=True):
            if name in held:
                into[name] = held[name]


def _held(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Its attributes, and where torch keeps its parameters, buffers and submodules."""
    return vars(module), module._parameters, module._buffers, module._modules


def _without_fast_paths(model: nn.Module) -> None:
    """Keep torch's transformer layers off their fused inference, which reads weights raw."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(part, QuantizedLayer) for part in module.modules()
        ):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the module `name` is."""
    if not name:
        raise ValueError("the model is itself a single layer: wrap it in nn.Sequential(...)")
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
