"""Recognise F.linear, F.conv2d, F.embedding and the like, called in a user's own forward()."""

import operator
from dataclasses import dataclass
from typing import Any

import torch.fx
import torch.nn.functional as F
from torch import nn

from selfcompress.graph.ops import CASTS, reads_type

PRODUCTS: dict[Any, type[nn.Module]] = {
    F.linear: nn.Linear, F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d,
    F.conv_transpose1d: nn.ConvTranspose1d, F.conv_transpose2d: nn.ConvTranspose2d,
    F.conv_transpose3d: nn.ConvTranspose3d,
}  # fmt: skip
"""Function by which a layer multiplies with its weight → the type of layer."""
LOOKUPS: dict[Any, type[nn.Module]] = {
    F.embedding: nn.Embedding, F.embedding_bag: nn.EmbeddingBag,
}  # fmt: skip
"""Function by which a layer looks vectors up in its weight → the type of layer."""


@dataclass(frozen=True)
class Product:
    """The arguments of a convolution, a matrix product, or a lookup in an embedding.

    Attributes:
        layer: the type of layer that computes with this function.
        input, weight, bias: the nodes that are its arguments; of a weight or bias that is cast to
            another dtype first, the node before the casts.
        groups: the number of groups of a convolution, else 1.
    """

    layer: type[nn.Module]
    input: Any
    weight: Any
    bias: Any
    groups: int


def product_of(node: torch.fx.Node) -> Product | None:
    """Return the arguments of a node that calls one of `PRODUCTS` or `LOOKUPS`; else None."""
    layer = (PRODUCTS | LOOKUPS).get(node.target) if node.op == "call_function" else None
    if layer is None:
        return None

    def given(name: str, index: int, default: Any = None) -> Any:
        return node.kwargs.get(name, node.args[index] if len(node.args) > index else default)

    weight = _before_casts(given("weight", 1))
    bias = None if node.target in LOOKUPS else _before_casts(given("bias", 2))
    groups = 1 if node.target in LOOKUPS or layer is nn.Linear else given("groups", 6, 1)
    return Product(layer, given("input", 0), weight, bias, groups)


def weight_of(node: torch.fx.Node) -> torch.fx.Node | None:
    """Return the node that reads the model's tensor which `node` has as its weight, if it has."""
    product = product_of(node)
    weight = product.weight if product else None
    is_models = isinstance(weight, torch.fx.Node) and weight.op == "get_attr"
    return weight if is_models else None


def _before_casts(value: Any) -> Any:
    while isinstance(value, torch.fx.Node) and value.op == "call_method" and value.target in CASTS:
        value = value.args[0]
    return value


def is_only_multiplied(tensor: torch.fx.Node, rank: int) -> bool:
    """Return whether a tensor of the model is read as weight or bias of products alone.

    Its type, and of its `rank` sizes those of the kernel, may be read too: no cut changes them.
    """
    return all(
        reads_type(user)
        or _reads_kernel(user, rank)
        or (user.target in CASTS and is_only_multiplied(user, rank))
        or ((product := product_of(user)) is not None and product.input is not tensor)
        for user in tensor.users
    )


def _reads_kernel(node: torch.fx.Node, rank: int) -> bool:
    """Return whether a node reads sizes of a weight of `rank` dimensions, but not the first two."""
    if node.target in ("dim", "ndimension") or (node.target is getattr and node.args[1] == "ndim"):
        return True
    kernel = set(range(2, rank))
    if node.target == "size" and len(node.args) > 1:
        return {node.args[1] % rank} <= kernel  # type: ignore[operator]
    if node.target != "size" and not (node.target is getattr and node.args[1] == "shape"):
        return False
    picked = [
        range(rank)[user.args[1]] if user.target is operator.getitem else range(rank)  # type: ignore[index]
        for user in node.users
    ]
    return all({*([dims] if isinstance(dims, int) else dims)} <= kernel for dims in picked)
