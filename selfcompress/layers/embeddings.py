"""Embeddings that quantise their weight, and output layers that share it."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfcompress.layers.become import become
from selfcompress.layers.own_forward import OwnForward
from selfcompress.layers.placing import place
from selfcompress.layers.quantized import QuantizedLayer
from selfcompress.quantizer import fake_quantize


class _Lookup(QuantizedLayer):
    """Base of quantised embeddings: a row is a dimension of the vectors, the input is indices."""

    row_dim = 1
    fan_in_dim = 0

    def _give_formats(self, bits: float, integer_bits: bool) -> None:
        self.register_parameter("bias", None)
        super()._give_formats(bits, integer_bits)

    def _in_front(self, shape: torch.Size) -> torch.Size:
        return shape


class QuantEmbedding(_Lookup, nn.Embedding):  # type: ignore[misc]
    """`nn.Embedding` with a bit depth and an exponent per row, a dimension of its vectors."""

    def forward(self, input: Tensor) -> Tensor:
        few = input.numel() < self.num_embeddings and not self.scale_grad_by_freq
        if not few or not self.rows.numel():
            return super().forward(input)
        # Fewer vectors are looked up than there are: quantise only those.
        self._note_samples(input)
        read = self.compute(input, self.weight, None)
        rows = read.reshape(-1, len(self.rows)).t()
        bit_depth, exponent = self.bit_depth.detach(), self.exponent
        rows = fake_quantize(rows, bit_depth, exponent, integer_bits=self.integer_bits)
        read = rows.t().reshape(read.shape)
        if self.padding_idx is not None:  # its vector gets no gradient
            read = torch.where((input == self.padding_idx)[..., None], read.detach(), read)
        whole = len(self.rows) == self.out_width
        return read if whole else place(read, self.rows, self.out_width, self.channel_dim)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, **kwargs: Any) -> Tensor:
        return F.embedding(x, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)

    def _nothing(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.weight.new_zeros((*x.shape, self.out_width))


class QuantEmbeddingBag(OwnForward, _Lookup, nn.EmbeddingBag):  # type: ignore[misc]
    """`nn.EmbeddingBag` with a bit depth and an exponent per row, a dimension of its vectors."""

    own_class = nn.EmbeddingBag


class TiedLinear(nn.Linear):
    """`nn.Linear` without a weight of its own, which uses the quantised weight of an embedding.

    Attributes:
        embedding: the layer whose weight is used; it is not registered as a submodule.
    """

    embedding: QuantEmbedding

    @classmethod
    def from_float(cls, layer: nn.Linear, embedding: QuantEmbedding) -> Self:
        """Return the replacement for `layer`, which shares its weight with an embedding."""
        new: Self = become(cls, layer)
        del new._parameters["weight"]
        vars(new)["embedding"] = embedding
        return new

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter as `nn.Module` does, except for the weight, which stays tied.

        Tying the embedding's weight again has no effect.

        Raises:
            ValueError: `param` is given as the weight, but is not that of the embedding.
        """
        tied = vars(self).get("embedding") if name == "weight" else None
        if tied is None:
            super().register_parameter(name, param)
        elif param is not tied.weight:
            raise ValueError(
                "this layer has the quantised weight of an embedding, and takes no other"
            )

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The embedding's quantised weight, (output channels, dimensions of the embedding)."""
        return self.embedding.dense_weight()
