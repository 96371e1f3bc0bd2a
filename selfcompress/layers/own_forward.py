"""Quantised layers of users' own classes that have a forward() of their own."""

from typing import Any

import torch.fx
from torch import Tensor, nn

from selfcompress.layers.quantized import QuantizedLayer


def _is_followed(value: Any) -> bool:
    return isinstance(value, torch.fx.Proxy) and hasattr(value.tracer, "shows_parameters")


class OwnForward(QuantizedLayer):
    """What a quantised layer of a user's class adds to its twin if that has a forward() of its own.

    That forward() goes on as it is written, and sees as `weight` what `dense_weight` gives.

    Attributes:
        own_class: the user's.
    """

    own_class: type[nn.Module]
    _shows = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward: Any = self.own_class.forward
        given = (*args, *kwargs.values())
        # Our tracer is to see the parameter; and what calls itself is shown the weight already.
        if self._shows or any(_is_followed(value) for value in given):
            return forward(self, *args, **kwargs)
        first = next((value for value in given if isinstance(value, Tensor)), None)
        if first is not None:
            self._note_samples(first)
        # What is shown is put where torch.compile knows it to be looked for.
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
