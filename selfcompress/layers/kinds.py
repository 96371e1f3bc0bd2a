"""Types of torch's own layers that have weights, their widths and weight shapes."""

from torch import nn

FLOAT_LAYERS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear,
)  # fmt: skip
"""Types of the layers that multiply their input with a weight."""
EMBEDDINGS = nn.Embedding, nn.EmbeddingBag
"""Types of the layers that look up vectors in their weight."""


def layer_widths(layer: nn.Module) -> tuple[int, int]:
    """Return a layer's input and output channels; of embeddings, entries and dimensions."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, EMBEDDINGS):
        return layer.num_embeddings, layer.embedding_dim
    return layer.in_channels, layer.out_channels  # type: ignore[return-value]


def weight_shape(layer: nn.Module, ins: int, outs: int) -> list[int]:
    """Return the weight's shape of one of `FLOAT_LAYERS`, if it had `ins` and `outs` channels."""
    groups, kernel = getattr(layer, "groups", 1), getattr(layer, "kernel_size", ())
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return [ins, outs // groups, *kernel]
    return [outs, ins // groups, *kernel]
