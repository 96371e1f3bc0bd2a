"""Report which layers are quantised, which channels can be removed, and why others cannot."""

from dataclasses import dataclass

from torch import Tensor, nn

from selfcompress.graph.channels import ChannelGraph
from selfcompress.graph.ops import Kind
from selfcompress.layers.embeddings import TiedLinear
from selfcompress.layers.quantized import QuantizedLayer
from selfcompress.size import count_weights, output_channels
from selfcompress.text import aligned


@dataclass(frozen=True)
class LayerReport:
    """One layer that has weights.

    Attributes:
        kind: the name of its type.
        weights: the number of its weights now, without those shared with an earlier layer.
        quantized: whether it has a quantiser; if so, every row that loses its bits is cut out of
            its weight, whatever `removable` is.
        channels: the number of its output channels now.
        removable: how many of these can be removed from the network together with all weights that
            read them. Of the others, only the row can be cut.
        why: why it is in float, or why channels have to keep their places; else empty.
    """

    name: str
    kind: str
    weights: int
    quantized: bool
    channels: int
    removable: int
    why: str


@dataclass(frozen=True)
class Report:
    """What self-compression can do to a network, layer by layer; `str()` makes a table of it."""

    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        rows = [("layer", "type", "bits", "removable", "why not all")]
        for layer in self.layers:
            bits = "learned" if layer.quantized else "float"
            count = f"{layer.removable:,} of {layer.channels:,}"
            name = layer.name or "(the model's own)"
            rows.append((name, layer.kind, bits, count, layer.why))
        lines = aligned(rows, numbers=False)
        quantized = [layer for layer in self.layers if layer.quantized]
        total, removable = (
            sum(layer.channels for layer in self.layers),
            sum(layer.removable for layer in self.layers),
        )
        weights = sum(layer.weights for layer in self.layers)
        share = sum(layer.weights for layer in quantized) / max(1, weights)
        lines.append(
            f"{len(quantized)} of {len(self.layers)} layers are quantised, with {100 * share:.0f} "
            f"% of the weights; {removable:,} of {total:,} output channels can be removed. In "
            "quantised layers the others keep their places, but can lose all of their weights."
        )
        return "\n".join(lines)


def make_report(model: nn.Module, graph: ChannelGraph, left_in_float: dict[str, str]) -> Report:
    """Return a report on every layer of `model`.

    Args:
        left_in_float: name → reason, for the layers that were not quantised.
    """
    found = []
    seen: set[Tensor] = set()
    names = {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        quantized = isinstance(module, QuantizedLayer | TiedLinear)
        if not quantized and name not in left_in_float:
            continue
        removable, why = _removable(graph, name)
        if isinstance(module, TiedLinear):
            why = f"it shares its weight with {names[module.embedding]}"
        elif quantized and name not in graph.origin:
            why = f"its rows stay too: {why}"
        if name in left_in_float:
            node = name and any(node.module == name for node in graph.nodes)
            why = f"in float: {left_in_float[name]}" + (f"; {why}" if why and node else "")
        kind = type(module).__name__.removeprefix("Quant").removeprefix("Tied")
        weights = count_weights(module, seen)
        width = output_channels(module)
        found.append(LayerReport(name, kind, weights, quantized, width, removable, why))
    return Report(tuple(found))


def _removable(graph: ChannelGraph, name: str) -> tuple[int, str]:
    """Return how many output channels of layer `name` can be removed, and why not all."""
    for node in graph.nodes:
        if node.module == name and node.kind in (Kind.LAYER, Kind.GROUPED):
            ids = graph.ids[node.name]
            stuck = ids[graph.frozen[ids]]
            reasons = dict.fromkeys(graph.reasons[i] for i in stuck.tolist())
            return len(ids) - len(stuck), "; ".join(reasons)
    if name in graph.spoiled:
        return 0, f"{name} {graph.spoiled[name]}"
    for outside in sorted(graph.untraceable, key=len, reverse=True):
        if not outside or name.startswith(f"{outside}."):
            what = f"{outside}.forward()" if outside else "the model's forward()"
            return 0, f"it is called by {what}, which torch.fx cannot trace: " + (
                graph.untraceable[outside]
            )
    owner = name.rpartition(".")[0]
    for node in graph.nodes:
        if owner and node.module == owner:
            return 0, f"it is a part of {owner}, whose inside is not followed"
    return 0, "it is not called when the model runs"
