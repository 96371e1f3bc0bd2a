"""Turn a compressed model into plain torch layers with the quantised weights baked in."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from selfcompress.convert import replace
from selfcompress.layers.attention import QuantAttention
from selfcompress.layers.batch_norms import NORM_ENTRIES, PlacedBatchNorm
from selfcompress.layers.embeddings import TiedLinear
from selfcompress.layers.kinds import EMBEDDINGS
from selfcompress.layers.own_forward import OwnForward
from selfcompress.layers.placing import place
from selfcompress.layers.quantized import QuantizedLayer
from selfcompress.layers.recurrent import QuantRecurrent, matrices_of
from selfcompress.layers.twins import TWINS, without_ours
from selfcompress.undisturbed import detached_copy, without_compile

_KINDS = {twin: kind for kind, twin in TWINS.items()}


@torch.no_grad()
def to_dense(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in ordinary layers, which needs nothing but torch.

    The copy computes what `model` computes, up to rounding. An ordinary layer computes all of its
    output channels, so rows that were cut come back as zeros where the channel had to stay, as in a
    branch that is added to a wider trunk. Where zeros would be wrong or wasteful (batch norms that
    read other channels than they compute, grouped convolutions with groups of different widths), a
    `torch.fx.GraphModule` selects and places the channels around an ordinary layer.

    Args:
        model: a model with quantised layers, in any mode; it is not changed.
    """
    model = detached_copy(without_compile(model))
    tied = {}
    parts = {
        f"{name}.{part}"
        for name, module in model.named_modules(remove_duplicate=False)
        for part in _parts(module)
    }
    made: dict[nn.Module, nn.Module] = {}  # a layer may have several names
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module not in made and name not in parts:
            new = _ordinary(module)
            if new is None:
                continue
            made[module] = new
            if isinstance(module, TiedLinear):
                tied[new] = module.embedding
        if module in made:
            replace(model, name, made[module])
    for layer, embedding in tied.items():
        layer.weight = made[embedding].weight
    return model


def _parts(module: nn.Module) -> list[str]:
    """Return the names of the submodules that are converted along with a module."""
    if isinstance(module, QuantAttention):
        return ["in_proj", "out_proj"]
    return matrices_of(module) if isinstance(module, QuantRecurrent) else []


def _ordinary(module: nn.Module) -> nn.Module | None:
    """Return a plain torch module that computes the same, or None if `module` needs no change."""
    if isinstance(module, QuantAttention):
        return module.to_float()
    if isinstance(module, QuantRecurrent):
        return module.to_float(_kind_of(module))
    if isinstance(module, PlacedBatchNorm):
        return _norm(module)
    if isinstance(module, TiedLinear):
        return without_ours(nn.Linear, module)  # type: ignore[no-any-return]
    if isinstance(module, QuantizedLayer):
        own = isinstance(module, OwnForward)  # it may do more than a convolution
        return _grouped(module) if module.grouped and not own else _layer(module)
    return None


def _kind_of(module: nn.Module) -> Any:
    """Return the class that a module had before it was replaced: torch's or the user's own."""
    kind: Any = type(module)
    return getattr(kind, "own_class", None) or next(
        _KINDS[known] for known in kind.__mro__ if known in _KINDS
    )


def _layer(layer: QuantizedLayer) -> nn.Module:
    new = without_ours(_kind_of(layer), layer)
    new.weight = nn.Parameter(layer.dense_weight())
    if layer.grouped:
        new.groups = layer.dense_groups
    if isinstance(layer, EMBEDDINGS):
        del new.bias
    return new  # type: ignore[no-any-return]


def _grouped(layer: QuantizedLayer) -> nn.Module:
    if layer.whole or not len(layer.rows):
        return _layer(layer)
    # torch wants groups of equal width: missing rows are filled with zeros.
    slots = layer.groups * layer.group_width
    core = without_ours(_kind_of(layer), layer)
    core.weight = nn.Parameter(place(layer.quantized_weight(), layer.slots, slots, 0))
    core.bias, core.in_channels, core.out_channels = None, len(layer.columns), slots
    where = torch.full((layer.out_width,), slots, device=core.weight.device)
    where[layer.rows] = layer.slots
    columns = layer.columns if len(layer.columns) < layer.in_width else None
    return _picking(core, columns, where, layer.bias, layer.channel_dim)


def _norm(norm: PlacedBatchNorm) -> nn.Module:
    core = without_ours(_kind_of(norm), norm)
    if norm.num_features == norm.in_width == norm.out_width:
        return core  # type: ignore[no-any-return]
    if norm.keeps_places and norm.can_be_folded:
        core.num_features = norm.out_width
        for name, tensor in [*core.named_parameters(), *core.named_buffers()]:
            if tensor.dim():
                wide = place(tensor, norm.rows, norm.out_width, 0)
                setattr(core, name, nn.Parameter(wide) if name in core._parameters else wide)
        return core  # type: ignore[no-any-return]
    columns = norm.columns if norm.num_features < norm.in_width else None
    where = torch.full((norm.out_width,), norm.num_features, device=norm.rows.device)
    where[norm.rows] = torch.arange(norm.num_features, device=norm.rows.device)
    return _picking(core, columns, where, None, 1, empty=not norm.num_features)


def _picking(
    core: nn.Module,
    columns: Tensor | None,
    where: Tensor,
    bias: Tensor | None,
    dim: int,
    empty: bool = False,
) -> nn.Module:
    """Return a module that selects the input channels of `core` and places its output channels.

    Args:
        core: an ordinary layer; its hooks and what a user has put on it go to the new module.
        columns: the input channels that `core` reads; None for all channels.
        where: (output channels,) the channel of core's output that each takes, or one past the last
            for zeros.
        bias: (output channels,) added at the end; None for no bias.
        dim: the dimension of the channels.
        empty: whether `core` has no channels left, so that the output is all zeros.
    """
    root, graph = nn.Module(), fx.Graph()
    root.register_buffer("where", where)
    x = graph.placeholder("input")
    if not empty and columns is not None:
        root.register_buffer("columns", columns)
        x = graph.call_method("index_select", (x, dim, graph.get_attr("columns")))
    if not empty:
        root.add_module("core", core)
        x = graph.call_module("core", (x,))
    zeros = graph.call_function(torch.zeros_like, (graph.call_method("narrow", (x, dim, 0, 1)),))
    made = zeros if empty else graph.call_function(torch.cat, ([x, zeros], dim))
    out = graph.call_method("index_select", (made, dim, graph.get_attr("where")))
    if bias is not None:
        root.register_parameter("bias", nn.Parameter(bias))
        shape = (-1,) + (1,) * (-1 - dim)
        column = graph.call_method("view", (graph.get_attr("bias"), *shape))
        out = graph.call_function(torch.add, (out, column))
    graph.output(out)
    whole = fx.GraphModule(root, graph, class_name="PickChannels").train(core.training)
    _hand_over(core, whole)
    return whole


def _hand_over(core: nn.Module, whole: nn.Module) -> None:
    """Give the hooks of `core`, and what a user has put on it, to `whole`, which replaces it."""
    fresh = vars(nn.Module())
    for name, value in list(vars(core).items()):
        if "_hook" in name:
            vars(whole)[name], vars(core)[name] = value, fresh[name]
        elif not hasattr(whole, name):
            vars(whole)[name] = value
    for held in ("_parameters", "_buffers", "_modules"):
        for name in vars(core)[held].keys() - {*NORM_ENTRIES, "num_batches_tracked"}:
            vars(whole)[held][name] = vars(core)[held].pop(name)
