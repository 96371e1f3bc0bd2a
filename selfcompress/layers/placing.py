"""Scatter channels into a wider tensor or select some of them, keeping the memory format."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Number of dimensions → the memory format in which channels come last."""

# Up to this many channels, or up to this share of all, computing with zeros costs less than copies.
_FEW_GAPS = 32, 0.7


def place(values: Tensor, rows: Tensor, width: int, dim: int, like: Tensor | None = None) -> Tensor:
    """Scatter `values` into `width` channels: channel `rows[i]` of `dim` is values[i], others 0.

    Args:
        like: has the memory format of the result, if that of `values` is ambiguous, as with a
            single channel. None is `values`.
    """
    last = _channels_last(values, dim)
    if last is not None:
        wide = last.new_zeros((*last.shape[:-1], width)).index_copy_(-1, rows, last)
        return wide.movedim(-1, dim)
    shape = list(values.shape)
    shape[dim] = width
    return zeros(shape, values, values if like is None else like).index_copy_(dim, rows, values)


def zeros(shape: Sequence[int], of: Tensor, like: Tensor) -> Tensor:
    """Return zeros with the dtype, device and memory format of `of` (of `like`, if ambiguous)."""
    layout = layout_of(of, like)
    return torch.empty(shape, dtype=of.dtype, device=of.device, memory_format=layout).zero_()


def layout_of(*tensors: Tensor) -> torch.memory_format:
    """Return the memory format of the first tensor whose strides decide it, else contiguous."""
    for tensor in tensors:
        last = LAYOUTS.get(tensor.dim(), torch.contiguous_format)
        is_last = tensor.is_contiguous(memory_format=last)
        if tensor.is_contiguous() != is_last:
            return last if is_last else torch.contiguous_format
    return torch.contiguous_format


def take(values: Tensor, channels: Tensor, dim: int) -> Tensor:
    """Return `values` at the indices `channels` of dimension `dim`."""
    last = _channels_last(values, dim)
    if last is not None:
        return last.index_select(-1, channels).movedim(-1, dim)
    return values.index_select(dim, channels)


def _channels_last(values: Tensor, dim: int) -> Tensor | None:
    """Return `values` with `dim` moved last if they lie so in memory, else None.

    torch's indexing would change that memory format.
    """
    last = values.movedim(dim, -1)
    return last if last.is_contiguous() and not values.is_contiguous() else None


def few_gaps(gaps: int, width: int) -> bool:
    """Return whether computing `gaps` of `width` channels as zeros costs less than copying."""
    count, share = _FEW_GAPS
    return gaps <= max(count, share * width)


class Placed(nn.Module):
    """A module that records which input channels it reads and which output channels it computes.

    The indices are not buffers, because an average of the model would average them too. They follow
    from the plans that were applied, so checkpoints do not need them.

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
        """Apply `fn` as `nn.Module` does, and move the indices to the parameters' device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in ("rows", "columns", "slots"):
            if name in vars(self):
                index = getattr(self, name)  # stays int64, even for `model.type(torch.float64)`
                setattr(self, name, index.to(fn(index).device))
        return self
