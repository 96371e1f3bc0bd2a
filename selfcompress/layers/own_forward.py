"""Quantised layers that run the forward() of the class they were made from."""

from typing import Any

import torch.fx
from torch import Tensor, nn

from selfcompress.layers.quantized import QuantizedLayer


def _is_followed(value: Any) -> bool:
    return isinstance(value, torch.fx.Proxy) and hasattr(value.tracer, "shows_parameters")


class OwnForward(QuantizedLayer):
    """Mixin for the twin of a layer class, mostly a user's, whose own forward() has to run.

    That forward() runs unchanged, and sees the tensor that `dense_weight` returns as `weight`.

    Attributes:
        own_class: the class whose forward() runs.
    """

    own_class: type[nn.Module]
    _shows = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward: Any = self.own_class.forward
        given = (*args, *kwargs.values())
        # Our tracer has to see the parameter; and in a recursive call the weight is there already.
        if self._shows or any(_is_followed(value) for value in given):
            return forward(self, *args, **kwargs)
        first = next((value for value in given if isinstance(value, Tensor)), None)
        if first is not None:
            self._note_samples(first)
        # The weight goes into `_parameters`, where torch.compile looks for it.
        held: dict[str, Any] = self._parameters
        weight, groups = held["weight"], self.groups if self.grouped else 1
        try:
            self._shows, held["weight"] = True, self.dense_weight()
            if self.grouped:
                self.groups = self.dense_groups
            return forward(self, *args, **kwargs)
        finally:
            self._shows, held["weight"] = False, weight
            if self.grouped:
                self.groups = groups
