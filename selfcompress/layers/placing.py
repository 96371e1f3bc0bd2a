"""Put channels into their places among others, or take them out, and keep the memory format."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Number of dimensions → the memory format in which channels are last."""

_FEW_GAPS = 32, 0.7  # channels, or of them all: up to so many zeros cost less than copies


def place(values: Tensor, rows: Tensor, width: int, dim: int, like: Tensor | None = None) -> Tensor:
    """Spread `values` over `width` channels: channel `rows[i]` of `dim` is values[i], others 0.

    Args:
        like: has the memory format of the result, if `values`, of a single channel, do not tell.
    """
    last = _channels_last(values, dim)
    if last is not None:
        wide = last.new_zeros((*last.shape[:-1], width)).index_copy_(-1, rows, last)
        return wide.movedim(-1, dim)
    shape = list(values.shape)
    shape[dim] = width
    return zeros(shape, values, values if like is None else like).index_copy_(dim, rows, values)


def zeros(shape: Sequence[int], of: Tensor, like: Tensor) -> Tensor:
    """Zeros of the type and memory format of one tensor, or of another if that does not tell."""
    layout = layout_of(of, like)
    return torch.empty(shape, dtype=of.dtype, device=of.device, memory_format=layout).zero_()


def layout_of(*tensors: Tensor) -> torch.memory_format:
    """The memory format of the first tensor whose strides decide it; contiguous, if none do."""
    for tensor in tensors:
        last = LAYOUTS.get(tensor.dim(), torch.contiguous_format)
        is_last = tensor.is_contiguous(memory_format=last)
        if tensor.is_contiguous() != is_last:
            return last if is_last else torch.contiguous_format
    return torch.contiguous_format


def take(values: Tensor, channels: Tensor, dim: int) -> Tensor:
    """`values` at some `channels` of `dim`."""
    last = _channels_last(values, dim)
    if last is not None:
        return last.index_select(-1, channels).movedim(-1, dim)
    return values.index_select(dim, channels)


def _channels_last(values: Tensor, dim: int) -> Tensor | None:
    """`values`, channels last, if their memory format is that: torch's indexing would change it."""
    last = values.movedim(dim, -1)
    return last if last.is_contiguous() and not values.is_contiguous() else None


def few_gaps(gaps: int, width: int) -> bool:
    """Whether filling so many of `width` channels with zeros costs less than copies around them."""
    count, share = _FEW_GAPS
    return gaps <= max(count, share * width)


class Placed(nn.Module):
    """A module that knows which channels it reads and makes.

    The indices are no buffers: an average of the model would average them too. They follow from
    the plans that were applied, so checkpoints do without them.

    Attributes:
        columns: (columns,) int64, the input channel that each column or entry reads.
        rows: (rows,) int64, the output channel that each row or entry computes.
        in_width, out_width: channels of the input and the output.
    """

    rows: Tensor
    columns: Tensor
    in_width: int
    out_width: int

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Have the indices follow the parameters to another device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in ("rows", "columns", "slots"):
            if name in vars(self):
                index = getattr(self, name)  # whole numbers, even for `model.type(torch.float64)`
                setattr(self, name, index.to(fn(index).device))
        return self
