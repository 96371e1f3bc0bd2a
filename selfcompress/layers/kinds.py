"""torch's own layers that have weights: their types, and how wide they are."""

from torch import nn

FLOAT_LAYERS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear,
)  # fmt: skip
"""The types of layers that multiply with a weight."""
EMBEDDINGS = nn.Embedding, nn.EmbeddingBag
"""Those that look vectors up in it."""


def layer_widths(layer: nn.Module) -> tuple[int, int]:
    """Channels of the input and the output of a layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, EMBEDDINGS):
        return layer.num_embeddings, layer.embedding_dim
    return layer.in_channels, layer.out_channels  # type: ignore[return-value]


def weight_shape(layer: nn.Module, ins: int, outs: int) -> list[int]:
    """The shape of the weight of one of `FLOAT_LAYERS`, were it of so many channels."""
    groups, kernel = getattr(layer, "groups", 1), getattr(layer, "kernel_size", ())
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return [ins, outs // groups, *kernel]
    return [outs, ins // groups, *kernel]
