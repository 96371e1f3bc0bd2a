"""What each operation does to channels: tables of the modules and functions that are understood.

An operation that is in no table freezes the channels that it reads and makes: they are never
removed.
"""

import builtins
import operator
from collections.abc import Hashable
from enum import Enum, auto
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth, stochastic_depth


class Kind(Enum):
    """What an operation does to the channels it reads, and to one whose value is constant."""

    INPUT = auto()  # an input of a traced module: its channels are frozen
    PARAMETER = auto()  # a tensor of the model, one channel per element
    LAYER = auto()  # reads all its input channels, makes new ones; also an unquantised layer
    GROUPED = auto()  # a grouped convolution: each of its rows reads the channels of its group
    NORM = auto()  # batch norm: makes one new channel per channel read
    OWN_NORM = auto()  # a batch norm of a user's class: keeps the channels, has an entry for each
    ELEMENTWISE = auto()  # keeps the channels; a constant stays one, perhaps of another value
    SPATIAL = auto()  # keeps the channels; only a zero stays constant (average pooling, dropout)
    ADD = auto()  # ties the channels of its operands together; also subtraction, maximum, minimum
    MUL = auto()  # the same as ADD, and a zero in one operand makes a zero
    MOVE = auto()  # nothing is computed: elements move, repeat or disappear (view, cat, chunk)
    OPAQUE = auto()  # not understood: freezes what it reads and what it makes
    OUTPUT = auto()  # the outputs of a traced module: freezes what it reads


WITH_ROWS = (Kind.LAYER, Kind.GROUPED, Kind.NORM)
"""Kinds whose modules compute every output channel by a row or entry of its own, or not at all."""

ELEMENTWISE_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.PReLU,
    nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign,
    nn.LogSigmoid, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.Threshold, nn.Identity,
)  # fmt: skip

# How many of the last dimensions an operation works on; None is all but the first two.
_SPATIAL_MODULES: dict[type[nn.Module], int | None] = {
    nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3,
    nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3,
    nn.AdaptiveMaxPool1d: 1, nn.AdaptiveMaxPool2d: 2, nn.AdaptiveMaxPool3d: 3,
    nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3,
    nn.LPPool1d: 1, nn.LPPool2d: 2, nn.LPPool3d: 3,
    nn.ZeroPad1d: 1, nn.ZeroPad2d: 2, nn.ZeroPad3d: 3,
    nn.ReflectionPad1d: 1, nn.ReflectionPad2d: 2, nn.ReflectionPad3d: 3,
    nn.ReplicationPad1d: 1, nn.ReplicationPad2d: 2, nn.ReplicationPad3d: 3,
    nn.Upsample: None, nn.UpsamplingNearest2d: 2, nn.UpsamplingBilinear2d: 2,
    nn.Dropout: 0, nn.Dropout1d: 0, nn.Dropout2d: 0, nn.Dropout3d: 0, StochasticDepth: 0,
}  # fmt: skip
_SPATIAL_FUNCTIONS: dict[Any, int | None] = {
    F.max_pool1d: 1, F.max_pool2d: 2, F.max_pool3d: 3,
    torch.max_pool1d: 1, torch.max_pool2d: 2, torch.max_pool3d: 3,
    F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3,
    F.adaptive_max_pool1d: 1, F.adaptive_max_pool2d: 2, F.adaptive_max_pool3d: 3,
    F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2, F.adaptive_avg_pool3d: 3,
    F.interpolate: None, F.upsample: None,
    F.dropout: 0, F.dropout1d: 0, F.dropout2d: 0, F.dropout3d: 0, torch.dropout: 0,
    stochastic_depth: 0,
}  # fmt: skip

_INSTANCE_NORMS: dict[type[nn.Module], int] = {
    nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3,
}  # fmt: skip
_REDUCTIONS = {torch.mean, torch.sum, torch.amax, torch.amin}
_EXTREMES = {
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    F.max_pool1d, F.max_pool2d, F.max_pool3d,
    torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d, torch.amax, torch.amin,
}  # fmt: skip

_ELEMENTWISE_FUNCTIONS: set[Any] = {
    F.relu, F.relu_, F.relu6, F.leaky_relu, F.gelu, F.silu, F.mish, F.elu, F.celu, F.selu,
    F.hardtanh, F.hardswish, F.hardsigmoid, F.sigmoid, F.tanh, F.softplus, F.softsign,
    F.logsigmoid, F.tanhshrink, F.hardshrink, F.softshrink, F.threshold,
    torch.relu, torch.relu_, torch.tanh, torch.sigmoid, torch.neg, torch.abs, torch.exp, torch.erf,
    torch.sqrt, torch.rsqrt, torch.square, torch.clamp, torch.pow, torch.sin, torch.cos,
    torch.log1p, torch.clone, operator.neg, operator.pow, operator.abs,
}  # fmt: skip
_ADDS: set[Any] = {
    operator.add, operator.iadd, torch.add, operator.sub, operator.isub, torch.sub,
    torch.maximum, torch.minimum,
}  # fmt: skip
_MULS: set[Any] = {operator.mul, operator.imul, torch.mul, torch.multiply}
_DIVISIONS: set[Any] = {operator.truediv, operator.itruediv, torch.div, torch.true_divide}

JOINS: set[Any] = {torch.cat, torch.concat, torch.concatenate, torch.stack}
"""Moves that read several tensors."""
_MOVES: set[Any] = JOINS | {
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.swapaxes, torch.swapdims,
    torch.movedim, torch.moveaxis, torch.chunk, torch.split, torch.tensor_split, torch.unbind,
    torch.squeeze, torch.unsqueeze, torch.narrow, torch.select, torch.roll, torch.flip,
    torch.unflatten, torch.tile,
    torch.repeat_interleave, torch.t, torch.broadcast_to, torch.pixel_shuffle,
    torch.pixel_unshuffle, torch.channel_shuffle, F.pixel_shuffle, F.pixel_unshuffle,
    operator.getitem,
}  # fmt: skip
_MOVE_MODULES = (
    nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
)  # fmt: skip

CASTS = {"contiguous", "float", "double", "half", "bfloat16", "to", "type_as", "detach"}
# Tensor methods that are named differently from the function above that does the same.
_METHODS: dict[str, Any] = {
    "view": torch.reshape, "expand": torch.broadcast_to, "repeat": torch.tile,
    "relu_": torch.relu_, "sigmoid_": torch.sigmoid, "tanh_": torch.tanh, "clamp_": torch.clamp,
    "neg_": torch.neg, "pow_": torch.pow, "add_": torch.add, "sub_": torch.sub, "mul_": torch.mul,
    "div_": torch.div, "abs_": torch.abs, "exp_": torch.exp,
}  # fmt: skip

SIZE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda"}
"""Attributes of a tensor that do not depend on its values."""
_SIZE_METHODS = {"size", "dim", "ndimension", "numel", "nelement"}
_TYPES = {"dtype", "device", "is_cuda", "is_floating_point", "is_complex", "is_tensor"}
_SIZED_BY_VALUES = {
    "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount",
    "repeat_interleave", "one_hot", "nms", "batched_nms", "tensor_split",
}  # fmt: skip


def taken(number: Any, kind: str) -> Any:
    """Convert `number` with a builtin; in a trace, mark that forward() depends on the result.

    Args:
        kind: "bool", "int", "float" or "len".
    """
    return getattr(builtins, kind)(number)


def reads_sizes(node: torch.fx.Node) -> bool:
    """Return whether a node reads nothing but the sizes or the type of a tensor."""
    if node.op == "call_method" and node.target in _SIZE_METHODS:
        return True
    sizes = node.op == "call_function" and (
        (node.target is getattr and node.args[1] in SIZE_ATTRIBUTES)
        or node.target in (len, isinstance, taken, torch.numel)
    )
    return sizes or reads_type(node)


def reads_type(node: torch.fx.Node) -> bool:
    """Return whether a node reads the dtype, device or type of a tensor: no cut changes these."""
    if node.target is getattr:
        return node.args[1] in _TYPES
    calls = node.op in ("call_function", "call_method")
    return calls and getattr(node.target, "__name__", node.target) in _TYPES


def sized_by_values(node: torch.fx.Node, whole: list[Tensor]) -> bool:
    """Return whether the sizes of what a node makes may depend on the values of what it reads.

    Args:
        whole: the tensors of integers or bools that it reads, which may count or pick elements.
    """
    name = getattr(node.target, "__name__", node.target)
    if name == "where":
        return len(node.args) + len(node.kwargs) < 3
    picks = name == "getitem" and any(tensor.dtype == torch.bool for tensor in whole)
    return name in _SIZED_BY_VALUES or picks or any(not tensor.dim() for tensor in whole)


_KINDS: dict[Any, Kind] = (
    dict.fromkeys(_ELEMENTWISE_FUNCTIONS, Kind.ELEMENTWISE)
    | dict.fromkeys([*_SPATIAL_FUNCTIONS, *_REDUCTIONS, F.pad], Kind.SPATIAL)
    | dict.fromkeys(_ADDS, Kind.ADD)
    | dict.fromkeys(_MULS | _DIVISIONS, Kind.MUL)
    | dict.fromkeys(_MOVES, Kind.MOVE)
)


def function_of(node: torch.fx.Node) -> Any:
    """Return the function that `node` calls; for a method, the function that does the same."""
    if node.op != "call_method":
        return node.target
    name = str(node.target)
    return _METHODS.get(name) or getattr(torch, name, None) or getattr(F, name, None)


def adds_number(node: torch.fx.Node) -> bool:
    """Return whether an ELEMENTWISE node adds a number, or takes the larger or smaller one."""
    return node.op in ("call_function", "call_method") and function_of(node) in _ADDS


def kind_of_call(node: torch.fx.Node, tensors: int) -> Kind:
    """Return the kind of a function or method call that reads `tensors` different tensors."""
    if node.op == "call_method" and node.target in CASTS:
        return Kind.ELEMENTWISE
    if node.target is getattr:
        return Kind.MOVE if node.args[1] in ("T", "mT") else Kind.OPAQUE
    function = function_of(node)
    kind = _KINDS.get(function, Kind.OPAQUE) if isinstance(function, Hashable) else Kind.OPAQUE
    if kind in (Kind.ADD, Kind.MUL) and tensors == 1:
        return Kind.ELEMENTWISE  # the other operand is a number, or the same tensor
    if function in _DIVISIONS or (kind is Kind.ELEMENTWISE and tensors > 1):
        return Kind.OPAQUE  # tensor / tensor, tensor ** tensor, clamp between tensors
    return kind


def kind_of_module(module: nn.Module) -> Kind:
    """Return the kind of a module without rows; of layers, norms and unknown ones it is OPAQUE."""
    if type(module) in ELEMENTWISE_MODULES:
        return Kind.ELEMENTWISE
    if isinstance(module, _MOVE_MODULES):
        return Kind.MOVE
    if type(module) in _SPATIAL_MODULES or _is_plain_instance_norm(module):
        return Kind.SPATIAL
    return Kind.OPAQUE


def _is_plain_instance_norm(module: nn.Module) -> bool:
    return type(module) in _INSTANCE_NORMS and not (module.affine or module.track_running_stats)


def worked_on(
    node: torch.fx.Node, module: nn.Module | None, rank: int, arguments: tuple[Any, dict[str, Any]]
) -> set[int] | None:
    """Return the dimensions that a SPATIAL operation mixes; None if it cannot be followed.

    Args:
        rank: number of dimensions of its input.
        arguments: (args, kwargs) of the call without its first tensor, as plain values.
    """
    args, kwargs = arguments
    if module is not None:
        last = _INSTANCE_NORMS.get(type(module), _SPATIAL_MODULES.get(type(module)))
    elif function_of(node) in _REDUCTIONS:
        dims = args[0] if args else kwargs.get("dim")
        if dims is None or not rank:
            return None
        listed = dims if isinstance(dims, tuple | list) else [dims]
        return {dim % rank for dim in listed}
    elif function_of(node) is F.pad:
        pads, *rest = args if args else (kwargs.get("pad", ()),)
        mode = rest[0] if rest else kwargs.get("mode", "constant")
        value = rest[1] if len(rest) > 1 else kwargs.get("value")
        if mode == "constant" and value not in (None, 0):
            return None
        last = len(pads) // 2
    else:
        last = _SPATIAL_FUNCTIONS[function_of(node)]
    return set(range(rank - last, rank)) if last is not None else set(range(2, rank))


def picks_extremes(node: torch.fx.Node, module: nn.Module | None) -> bool:
    """Return whether a SPATIAL operation takes a maximum or minimum: a constant stays the same."""
    return (function_of(node) if module is None else type(module)) in _EXTREMES


WRITES = "writes"
"""Key in a node's `meta`: whether a module that is not traced into writes to its first operand."""


def is_in_place(node: torch.fx.Node, module: nn.Module | None) -> bool:
    """Return whether the operation changes its first operand."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    name = str(getattr(node.target, "__name__", ""))
    # operator.iadd and its like; torch.relu_; F.relu(x, inplace=True) by position or by name.
    if getattr(node.target, "__module__", "") == "_operator":
        return name.startswith("i") and name[1:] in vars(operator)
    return name.endswith("_") or node.kwargs.get("inplace") is True or _flag_at_end(node)


def _flag_at_end(node: torch.fx.Node) -> bool:
    """Return whether an activation or dropout is given `inplace=True` as its last argument."""
    acts = function_of(node) in _ELEMENTWISE_FUNCTIONS or "dropout" in str(node.target)
    return acts and len(node.args) > 1 and node.args[-1] is True


def may_alias(node: torch.fx.Node, kind: Kind, module: nn.Module | None) -> bool:
    """Return whether the result may be the first operand itself or a view of it."""
    passes = isinstance(module, nn.Identity) or "ropout" in type(module).__name__
    passes |= isinstance(module, StochasticDepth) or function_of(node) is stochastic_depth
    cast = node.op == "call_method" and node.target in CASTS
    return kind is Kind.MOVE or passes or cast or "dropout" in str(node.target)
