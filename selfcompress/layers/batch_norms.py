"""Batch norms that can lose channels.

A channel can be cut from a residual branch while the trunk, to which the branch is added, still has
it. The branch's norm then has no entry for that channel and outputs zero in its place.
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfcompress.layers.become import become
from selfcompress.layers.placing import Placed, few_gaps, place, take


class PlacedBatchNorm(Placed, _BatchNorm):
    """A batch norm over some of its input's channels, with zeros for the other output channels.

    Attributes:
        columns: (entries,) the input channel that each entry normalises.
        rows: (entries,) the output channel that each entry computes.
        keeps_places: whether input and output are equally wide, and every entry's channel has the
            same index in both.
    """

    keeps_places: bool

    @classmethod
    def from_float(cls, norm: _BatchNorm) -> Self:
        """Return a placed batch norm that takes over the parameters and statistics of `norm`."""
        new: Self = become(cls, norm)
        every = norm.running_mean if norm.running_mean is not None else norm.weight
        where = every.device if every is not None else None
        new.columns = torch.arange(norm.num_features, device=where)
        new.rows = torch.arange(norm.num_features, device=where)
        new.in_width = new.out_width = norm.num_features
        new.keeps_places = True
        return new

    @property
    def can_be_folded(self) -> bool:
        """Whether its tensors can be folded into a scale and a shift per channel (eval mode)."""
        return self.weight is not None and self.bias is not None and self.running_var is not None

    def forward(self, input: Tensor) -> Tensor:
        x = input
        if self.num_features == 0:
            return x.new_zeros((x.shape[0], self.out_width, *x.shape[2:]))
        gaps = self.in_width - self.num_features
        if gaps:
            # momentum=None (a plain average over batches, as `update_bn` takes it) is rare, so it
            # is left to the general path below.
            usual = self.can_be_folded and self.track_running_stats and self.momentum is not None
            if usual and self.keeps_places and few_gaps(gaps, self.in_width):
                return self._among_zeros(x)
            x = take(x, self.columns, 1)
        out: Tensor = super().forward(x)
        if self.num_features < self.out_width:
            out = place(out, self.rows, self.out_width, 1)
        return out

    def _among_zeros(self, x: Tensor) -> Tensor:
        """Normalise all channels of `x`, with zero weight and bias for those without an entry."""
        mean, var, count = self.running_mean, self.running_var, self.num_batches_tracked
        assert mean is not None and var is not None and count is not None
        assert self.momentum is not None
        entries = (mean, var, self.weight, self.bias)
        wide_mean, wide_var, weight, bias = (place(e, self.rows, self.in_width, 0) for e in entries)
        out = F.batch_norm(
            x, wide_mean, wide_var, weight, bias, self.training, self.momentum, self.eps
        )
        if self.training:
            count.add_(1)
            mean.copy_(wide_mean[self.rows])
            var.copy_(wide_var[self.rows])
        return out


class PlacedBatchNorm1d(PlacedBatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` that can lose channels."""


class PlacedBatchNorm2d(PlacedBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` that can lose channels."""


class PlacedBatchNorm3d(PlacedBatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d` that can lose channels."""


NORM_ENTRIES = ("running_mean", "running_var", "weight", "bias")
"""Names of a batch norm's per-channel tensors, in the order of `F.batch_norm`'s arguments."""


def recount(module: nn.Module, tensor: Tensor) -> None:
    """Set the channel count of a PReLU or a batch norm that was not replaced to `len(tensor)`."""
    if isinstance(module, nn.PReLU):
        module.num_parameters = len(tensor)
    elif isinstance(module, _BatchNorm) and not isinstance(module, PlacedBatchNorm):
        module.num_features = len(tensor)
