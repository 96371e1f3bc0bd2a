"""`nn.MultiheadAttention` with quantised projections.

Rows of the projections that lose their bits are cut and no longer stored, but attention still
computes at full width, because the channel graph does not follow which channels the heads mix.
"""

from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from selfcompress.layers.become import become
from selfcompress.layers.quantized import QuantLinear


class QuantAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose `in_proj` and `out_proj` are `QuantLinear` layers.

    Attributes:
        in_proj: (embedding → 3 · embedding) the projections of query, key and value, stacked.
    """

    in_proj: QuantLinear
    out_proj: QuantLinear  # type: ignore[assignment]

    @classmethod
    def from_float(cls, layer: nn.MultiheadAttention, bits: float, integer_bits: bool) -> Self:
        """Return a quantised attention that takes over the parameters of `layer`."""
        new: Self = become(cls, layer)
        projection = nn.Linear(layer.embed_dim, 3 * layer.embed_dim, bias=False, device="meta")
        projection.weight, projection.bias = layer.in_proj_weight, layer.in_proj_bias
        new.in_proj = QuantLinear.from_float(projection, bits, integer_bits)
        new.out_proj = QuantLinear.from_float(layer.out_proj, bits, integer_bits)
        new.in_proj_weight = new.in_proj_bias = None  # type: ignore[assignment]
        return new

    def to_float(self) -> nn.MultiheadAttention:
        """Return an ordinary attention layer with the quantised weights baked in."""
        new: nn.MultiheadAttention = become(nn.MultiheadAttention, self)
        del new._modules["in_proj"]
        new.in_proj_weight = nn.Parameter(self.in_proj.dense_weight())
        new.in_proj_bias = self.in_proj.bias  # type: ignore[assignment]
        new.out_proj = NonDynamicallyQuantizableLinear(
            self.embed_dim, self.embed_dim, self.out_proj.bias is not None, device="meta"
        )
        new.out_proj.weight = nn.Parameter(self.out_proj.dense_weight())
        new.out_proj.bias = self.out_proj.bias  # type: ignore[assignment]
        return new

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batch_first = self.batch_first and query.dim() == 3
        if batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        # torch wants both masks to have the same dtype.
        key_padding_mask, attn_mask = (
            F._canonical_mask(mask, "mask", None, "", query.dtype, check_other=False)
            for mask in (key_padding_mask, attn_mask)
        )
        out, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj.dense_weight(),
            self.in_proj.bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.dense_weight(),
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return (out.transpose(0, 1) if batch_first else out), weights
