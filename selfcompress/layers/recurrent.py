"""Recurrent layers with quantised weights.

Rows of the weight matrices (gates of hidden units) that lose their bits are cut and no longer
stored, but the layers still compute at full width, because the channel graph does not follow which
channel reaches which at a later step.
"""

from typing import Any, Self

from torch import nn

from selfcompress.layers.become import become
from selfcompress.layers.quantized import QuantLinear

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def matrices_of(layer: nn.Module) -> list[str]:
    """Return the names of the weight matrices of a recurrent layer or cell."""
    names = getattr(layer, "_flat_weights_names", ("weight_ih", "weight_hh"))
    return [name for name in names if name.startswith("weight")]


class QuantRecurrent(nn.Module):
    """A recurrent layer in which `QuantLinear` submodules hold the matrices, under their names."""

    @classmethod
    def from_float(cls, layer: nn.Module, bits: float, integer_bits: bool) -> Self:
        """Return a quantised layer that takes over the parameters of `layer`."""
        new: Self = become(cls, layer)
        for name in matrices_of(layer):
            matrix = new._parameters.pop(name)
            assert matrix is not None
            linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
            linear.weight = matrix
            linear.train(layer.training)
            new._modules[name] = QuantLinear.from_float(linear, bits, integer_bits)
        vars(new)["_flat_weights"] = vars(new)["_flat_weight_refs"] = []
        return new

    def to_float(self, kind: Any) -> nn.Module:
        """Return an ordinary layer of class `kind` with the quantised weights baked in."""
        new: nn.Module = become(kind, self)
        for name, part in self._parts().items():
            del new._modules[name]
            new._parameters[name] = nn.Parameter(part.dense_weight())
        first = getattr(self, "_flat_weights_names", matrices_of(self))  # in torch's order
        held = new._parameters
        vars(new)["_parameters"] = {name: held[name] for name in first} | held
        if isinstance(new, nn.RNNBase):
            new._init_flat_weights()
        return new

    def _parts(self) -> dict[str, QuantLinear]:
        """Return the `QuantLinear` submodules that hold the matrices, by the matrices' names."""
        found = {name: self._modules[name] for name in matrices_of(self)}
        return {name: part for name, part in found.items() if isinstance(part, QuantLinear)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weights = {name: part.dense_weight() for name, part in self._parts().items()}
        held: dict[str, Any] = self._parameters
        try:
            held.update(weights)  # getattr finds them before the modules of these names
            if isinstance(self, nn.RNNBase):
                self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]
            return super().forward(*args, **kwargs)
        finally:
            for name in weights:
                held.pop(name, None)
            if isinstance(self, nn.RNNBase):
                self._flat_weights = []

    def reset_parameters(self) -> None:
        """Reinitialise the weights and biases as torch does, but not bit depths and exponents."""
        assert isinstance(self.hidden_size, int)
        bound = self.hidden_size**-0.5 if self.hidden_size else 0.0
        drawn = [part.weight for part in self._parts().values()]
        for parameter in (*drawn, *self.parameters(recurse=False)):
            nn.init.uniform_(parameter, -bound, bound)

    def flatten_parameters(self) -> None:
        """Do nothing: the matrices are computed for every call, so no memory needs to be joined."""

    def _update_flat_weights(self) -> None:
        """Do nothing: forward() makes `_flat_weights` for every call."""


class QuantRNN(QuantRecurrent, nn.RNN):  # type: ignore[misc]
    """`nn.RNN` with quantised weights."""


class QuantLSTM(QuantRecurrent, nn.LSTM):  # type: ignore[misc]
    """`nn.LSTM` with quantised weights."""


class QuantGRU(QuantRecurrent, nn.GRU):  # type: ignore[misc]
    """`nn.GRU` with quantised weights."""


class QuantRNNCell(QuantRecurrent, nn.RNNCell):  # type: ignore[misc]
    """`nn.RNNCell` with quantised weights."""


class QuantLSTMCell(QuantRecurrent, nn.LSTMCell):  # type: ignore[misc]
    """`nn.LSTMCell` with quantised weights."""


class QuantGRUCell(QuantRecurrent, nn.GRUCell):  # type: ignore[misc]
    """`nn.GRUCell` with quantised weights."""
