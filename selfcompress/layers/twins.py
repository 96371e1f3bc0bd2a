"""Which class takes the place of which: those of torch's layers have twins, and so have users' own.

What takes the place of a layer of a user's own class is still of that class, with its methods and
whatever was put on it.
"""

import functools
import itertools
from collections.abc import Hashable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from selfcompress.layers import batch_norms, embeddings, quantized, recurrent
from selfcompress.layers.attention import QuantAttention
from selfcompress.layers.embeddings import TiedLinear
from selfcompress.layers.quantized import OwnForward, QuantizedLayer

TWINS: dict[type[nn.Module], Any] = {
    nn.Conv1d: quantized.QuantConv1d,
    nn.Conv2d: quantized.QuantConv2d,
    nn.Conv3d: quantized.QuantConv3d,
    nn.ConvTranspose1d: quantized.QuantConvTranspose1d,
    nn.ConvTranspose2d: quantized.QuantConvTranspose2d,
    nn.ConvTranspose3d: quantized.QuantConvTranspose3d,
    nn.Linear: quantized.QuantLinear,
    nn.Embedding: embeddings.QuantEmbedding,
    nn.EmbeddingBag: embeddings.QuantEmbeddingBag,
    nn.MultiheadAttention: QuantAttention,
    nn.RNN: recurrent.QuantRNN,
    nn.LSTM: recurrent.QuantLSTM,
    nn.GRU: recurrent.QuantGRU,
    nn.RNNCell: recurrent.QuantRNNCell,
    nn.LSTMCell: recurrent.QuantLSTMCell,
    nn.GRUCell: recurrent.QuantGRUCell,
    nn.BatchNorm1d: batch_norms.PlacedBatchNorm1d,
    nn.BatchNorm2d: batch_norms.PlacedBatchNorm2d,
    nn.BatchNorm3d: batch_norms.PlacedBatchNorm3d,
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


def twin_of(module: nn.Module) -> Any:
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


def of_same_class(twin: nn.Module, module: nn.Module) -> nn.Module | None:
    """`twin`, of the class of the user's module too; None if the two do not go together."""
    own = type(module)
    if own in TWINS:
        return twin
    kinds: tuple[Any, Any] = type(twin), own
    theirs = names_of_user(module).union(*map(vars, _own_classes(own)))
    if theirs & names_of_ours(kinds[0]):
        return None
    try:
        twin.__class__ = _combined(*kinds)
    except TypeError:  # with __slots__, say
        return None
    return twin


@functools.cache
def names_of_ours(twin: Hashable) -> frozenset[str]:
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
    return names - names_of_ours(kind) if twin else names


@functools.cache
def _combined(twin: Hashable, own: Hashable) -> Any:
    """`twin` for a user's own type, which is still of that type, with the methods it has."""

    def reduce(module: nn.Module, protocol: Any) -> Any:  # pickle finds no class that was made here
        return _blank, (twin, own), vars(module)

    assert isinstance(twin, type) and isinstance(own, type)
    prefix = "Placed" if issubclass(twin, batch_norms.PlacedBatchNorm) else "Quant"
    body = {"__reduce_ex__": reduce, "own_class": own}
    kinds: tuple[type, ...] = (twin, own)
    own_forward = issubclass(twin, QuantizedLayer) and _differs(own, _base_of(own), _COMPUTES)
    if own_forward and not issubclass(twin, OwnForward):
        kinds = (OwnForward, *kinds)
    return type(prefix + own.__name__, kinds, body)


def _blank(twin: Hashable, own: Hashable) -> Any:
    kind = _combined(twin, own)
    return object.__new__(kind)


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
