"""Export to ONNX, with weights as small integers and a scale for each channel.

The graph is that of the dense copy (`to_dense`), simplified by torch's exporter, which also folds
batch norms into the convolutions in front of them. In place of a quantised layer's float weight the
file has its integers (int4 if all of a layer's fit, else int8 or int16) and a DequantizeLinear node
with one float32 scale per channel: 2^e, times the factor of a batch norm that was folded in.

This makes the *file* small; memory and speed depend on the runtime. ONNX Runtime 1.32 on a CPU
keeps the integers in memory, dequantises those of convolutions anew at every call, and multiplies
matrices with activations rounded to 8 bits (`MatMulNBits`). With its session option
`session.disable_quant_qdq` set to 1 it dequantises once, when it loads: then weights are float32 in
memory, calls are faster, and logits differ from ours by rounding alone.
"""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from selfcompress.convert import replace
from selfcompress.dense import to_dense
from selfcompress.disk import write_atomically
from selfcompress.inputs import Inputs, positional
from selfcompress.layers.quantized import quantized_layers
from selfcompress.text import first_line
from selfcompress.undisturbed import without_compile

if TYPE_CHECKING:
    from onnx import GraphProto, TensorProto

OPSET = 21  # the first with int4
_ROUNDING = 1e-5  # largest error of integer times scale, relative to a channel's largest weight


class ExportError(RuntimeError):
    """The network cannot be exported; the message says why in one line."""


def export_onnx(
    model: nn.Module,
    example_input: Inputs,
    path: str | os.PathLike[str],
    *,
    notes: dict[str, str] | None = None,
) -> int:
    """Write `model` as an ONNX file for any batch size and return the file's size in bytes.

    Needs `pip install 'selfcompress[onnx]'`. A single output is called "logits".

    Args:
        model: with or without quantised layers; it is exported in eval mode and in float32, and
            not changed.
        example_input: a batch of at least two samples; a tuple holds several inputs. The first
            dimension of every tensor is that of the batch.
        notes: key → text, to be kept in the file's metadata.

    Raises:
        ExportError: torch cannot export the model, the model depends on the size of the batch, or a
            package is missing.
        OSError: the file cannot be written.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise ExportError(f"{error.name} is missing: pip install 'selfcompress[onnx]'") from error
    model = without_compile(model)
    dense = to_dense(model).eval().float()
    for name, module in list(dense.named_modules()):
        if type(module) is nn.AdaptiveMaxPool2d and module.output_size in (1, (1, 1)):
            replace(dense, name, _GlobalMax())
    inputs = pytree.tree_map_only(
        Tensor, lambda t: t.float() if t.is_floating_point() else t, positional(example_input)
    )
    batch = torch.export.Dim("batch")
    shapes = pytree.tree_map(lambda leaf: {0: batch} if isinstance(leaf, Tensor) else None, inputs)
    with torch.no_grad():
        returned = dense(*inputs)
    single = sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(returned)) == 1
    try:
        with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
            warnings.simplefilter("ignore")  # torch's, about its own internals
            program = torch.onnx.export(
                dense,
                (*inputs, {}),  # torch takes a dict that comes last for keyword arguments
                dynamo=True,
                dynamic_shapes=shapes,
                output_names=["logits"] if single else None,
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # whatever torch.export does not support
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__  # the outer errors are about torch's own steps
        reason = first_line(cause)
        raise ExportError(f"torch cannot export the model to ONNX: {reason}") from error
    assert program is not None
    network = program.model_proto
    for given in network.graph.input:
        batch_of = given.type.tensor_type.shape.dim[:1]
        if batch_of and not batch_of[0].dim_param:
            raise ExportError(
                f"the model goes by the size of the batch, which the file would have fixed at "
                f"{batch_of[0].dim_value} (a loop over the batch, chunk, or int(x.shape[0]))"
            )
    _strip(network.graph)
    _quantise(network.graph, _weights(model, dense))
    for key, text in (notes or {}).items():
        network.metadata_props.add(key=key, value=text)
    onnx.checker.check_model(network, full_check=True)
    content = network.SerializeToString()
    write_atomically(Path(path), content)
    return len(content)


class _GlobalMax(nn.Module):
    """`nn.AdaptiveMaxPool2d(1)`, which the exporter of torch 2.11 does not support."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax((-2, -1), keepdim=True)


@dataclass(frozen=True)
class _Weight:
    """A quantised weight in the shape that it has in the dense copy.

    Attributes:
        dense: the float weight.
        integers: of the same shape.
        row_dim: the dimension that counts output channels, each of which has its own step.
    """

    dense: np.ndarray
    integers: np.ndarray
    row_dim: int

    @property
    def transposed(self) -> "_Weight":
        return _Weight(self.dense.T, self.integers.T, self.dense.ndim - 1 - self.row_dim)


@torch.no_grad()
def _weights(model: nn.Module, dense: nn.Module) -> dict[str, _Weight]:
    """Return the quantised weights of `model` by their names in the dense copy."""
    parameters = dict(dense.named_parameters(remove_duplicate=False))
    found = {}
    for name, layer in quantized_layers(model).items():
        places, width = layer.rows, layer.out_width
        at = f"{name}.weight"
        if f"{name}.core.weight" in parameters:  # a grouped convolution within a GraphModule
            at = f"{name}.core.weight"
            places, width = layer.slots, layer.groups * layer.group_width
        elif at not in parameters:
            # Attention has in_proj_weight; the parts of a recurrent layer have the weights' names.
            at = f"{name}_weight" if f"{name}_weight" in parameters else name
        steps = layer.exponent.new_ones(width).index_copy(0, places, torch.exp2(layer.exponent))
        weight = parameters[at]
        column = [-1 if dim == layer.row_dim else 1 for dim in range(weight.dim())]
        integers = (weight / steps.view(column)).round().to(torch.int32)
        found[at] = _Weight(
            weight.float().numpy(force=True), integers.numpy(force=True), layer.row_dim
        )
    return found


def _strip(graph: "GraphProto") -> None:
    """Remove source locations and intermediate types, as the former can outweigh the weights."""
    for node in graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
    for value in (*graph.input, *graph.output, *graph.initializer):
        del value.metadata_props[:]
    del graph.value_info[:]


def _quantise(graph: "GraphProto", weights: dict[str, _Weight]) -> None:
    """Replace float weights by integers, scales and a DequantizeLinear node for each."""
    from onnx import helper, numpy_helper

    # The exporter renames weights that it transposes for a matrix product.
    turned = {w.dense.T.tobytes(): w.transposed for w in weights.values() if w.dense.ndim == 2}
    # Or it gives a shared weight the name that it has in another layer.
    turned |= {w.dense.tobytes(): w for w in weights.values()}
    nodes = []
    for initializer in list(graph.initializer):
        values = numpy_helper.to_array(initializer)
        weight = weights.get(initializer.name) or turned.get(values.tobytes())
        if weight is None or weight.integers.shape != values.shape:
            continue
        scaled = _scales(values, weight)
        if scaled is None:
            continue
        integers, scales = scaled
        name = initializer.name
        graph.initializer.remove(initializer)
        graph.initializer.append(_integer_tensor(f"{name}.integers", integers))
        graph.initializer.append(numpy_helper.from_array(scales, f"{name}.scale"))
        nodes.append(
            helper.make_node(
                "DequantizeLinear",
                [f"{name}.integers", f"{name}.scale"],
                [name],
                axis=weight.row_dim,
            )
        )
    whole = [*nodes, *graph.node]
    del graph.node[:]
    graph.node.extend(whole)


def _scales(values: np.ndarray, weight: _Weight) -> tuple[np.ndarray, np.ndarray] | None:
    """Return integers and a scale per channel whose products are `values`, or None.

    A batch norm may have been folded into `values`. None is returned if the products differ from
    them by more than `_ROUNDING`, or if there are no weights.
    """
    by_row = np.moveaxis(weight.integers, weight.row_dim, 0)
    by_row = by_row.reshape(len(by_row), -1)
    wanted = np.moveaxis(values, weight.row_dim, 0).reshape(by_row.shape)
    if by_row.size == 0:
        return None
    largest = np.abs(by_row).argmax(1)[:, None]
    integer = np.take_along_axis(by_row, largest, 1)[:, 0]
    value = np.take_along_axis(wanted, largest, 1)[:, 0]
    scales = np.where(integer == 0, 1.0, value / np.where(integer == 0, 1, integer))
    scales = scales.astype(np.float32)
    off = np.abs(by_row * scales[:, None] - wanted).max(1)
    if (off > _ROUNDING * np.abs(wanted).max(1)).any():
        return None
    # Batch norms can make scales negative, which not every runtime expects.
    signs = np.where(scales < 0, -1, 1)
    column = [-1 if dim == weight.row_dim else 1 for dim in range(values.ndim)]
    return weight.integers * signs.reshape(column), np.abs(scales)


def _integer_tensor(name: str, integers: np.ndarray) -> "TensorProto":
    """Return an ONNX tensor of int4, int8 or int16, whichever is the narrowest that fits."""
    from ml_dtypes import int4
    from onnx import numpy_helper

    low, high = int(integers.min()), int(integers.max())
    kind: type = int4 if low >= -8 and high <= 7 else np.int8
    kind = kind if low >= -128 and high <= 127 else np.int16
    return numpy_helper.from_array(np.ascontiguousarray(integers.astype(kind)), name)
