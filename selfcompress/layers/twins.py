"""Find the class that replaces a layer's class (its *twin*), be that torch's or a user's own.

A twin is a class of this package that stands in for a torch class. What replaces a layer of a
user's own class is still an instance of that class, with its methods and whatever was put on it.
"""

import functools
import itertools
from collections.abc import Hashable, Iterable
from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from selfcompress.layers import batch_norms, embeddings, quantized, recurrent
from selfcompress.layers.attention import QuantAttention
from selfcompress.layers.become import become
from selfcompress.layers.own_forward import OwnForward
from selfcompress.layers.quantized import QuantizedLayer

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
"""torch's layer class → its twin, the class that replaces it."""
_COMPUTES = ("forward", "_conv_forward", "_output_padding")
"""Names of the methods that layers compute with."""
_ASKED_OTHERWISE = ("__call__", "train", "merge_masks")
"""Names of the other methods that may be called on a layer and change what it computes."""


def _differs(kind: type, base: type, methods: Iterable[str]) -> bool:
    return any(getattr(kind, name, None) is not getattr(base, name, None) for name in methods)


def _base_of(kind: type) -> Any:
    """Return the first class with a twin that `kind` is or inherits from, or None."""
    return next((known for known in kind.__mro__ if known in TWINS), None)


def twin_of(module: nn.Module) -> Any:
    """Return the twin of a layer's class, be it torch's or a user's own, or None if it has none."""
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
    """Return the user's own classes, which precede torch's in the method resolution order."""
    return list(itertools.takewhile(lambda known: known not in TWINS, kind.__mro__))


def of_same_class(twin: nn.Module, module: nn.Module) -> nn.Module | None:
    """Return `twin` as an instance of the user's class too, or None if the two clash."""
    kinds: tuple[Any, Any] = type(twin), type(module)
    own = kinds[1]
    theirs = _names(module).union(*map(vars, _own_classes(own)))
    if theirs & names_of_ours(kinds[0]):
        return None
    if own in TWINS:
        return twin
    try:
        twin.__class__ = _combined(*kinds)
    except TypeError:  # as with __slots__
        return None
    return twin


@functools.cache
def names_of_ours(twin: Hashable) -> frozenset[str]:
    """Return the names that a twin's class adds to torch's, which a user's class must not have."""
    assert isinstance(twin, type)
    ours = [kind for kind in twin.__mro__ if kind.__module__.startswith("selfcompress.")]
    torchs = next(set(dir(kind)) for kind in twin.__mro__ if kind in TWINS)
    names = {
        name for kind in ours for name in (*vars(kind), *vars(kind).get("__annotations__", ()))
    }
    # Torch's layers have these too, though their classes do not list them.
    torchs |= {"weight", "bias", "groups", "padding_mode", "out_proj", "__module__"}
    return frozenset(names | {"own_class"}) - torchs


def _names(module: nn.Module) -> set[str]:
    """Return the names of all that a module holds: attributes, parameters, buffers, modules."""
    return {*vars(module), *module._parameters, *module._buffers, *module._modules}


def without_ours(kind: Any, module: nn.Module) -> Any:
    """Return an object of class `kind` with all that `module` holds but what only twins have."""
    new, twin = become(kind, module), cast(Hashable, type(module))
    for held in (vars(new), new._parameters, new._buffers, new._modules):
        for name in names_of_ours(twin) & held.keys():
            del held[name]
    return new


@functools.cache
def _combined(twin: Hashable, own: Hashable) -> Any:
    """Return a subclass of both `twin` and the user's class `own`, with the methods of `own`."""

    def reduce(module: nn.Module, protocol: Any) -> Any:  # pickle cannot find a class made here
        return _blank, (twin, own), module.__getstate__()  # type: ignore[operator]

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
