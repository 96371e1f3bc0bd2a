"""Step bit depths and exponents from their own gradients, outside of the user's optimiser.

γ must mean the same in everybody's training loop, so the gradients of the formats are taken away
as soon as autograd has accumulated them: clipping, weight decay, schedules and optimisers of the
weights never see them. What is done with them then:

*Direction.* A row's bit depth is stepped at a fixed range 2^(e+b-1): when its integer depth falls
by one its exponent rises by one, so that fewer bits mean a coarser grid and not a narrower one.
The gradient along that direction is ∂/∂b - ∂/∂e. A row that changes its integer depth starts in
the middle of the new one; at the border it would flicker between the two. (Fractional depths move
alone, as in the paper.)

*No row of one bit.* With a single bit a weight is 0 or -2^e, never positive. Half as many rows of
two bits are worth more, so a row that falls below two bits loses both, and one that comes back
gets two. (Left alone, most rows of a network under pressure end at one bit.)

*Exponents* are learned, and every few steps fitted anew to the weights: in a short run the weights
grow and shrink faster than steps small enough to be harmless can follow.

*Units.* The gradient of a bit depth is multiplied by N / (I·H·W), which turns the penalty's part
of it, γ·I·H·W/N, into γ itself, for a first layer of 27 weights a row as for a last one of 4,608.
So γ bites alike in networks of any width.

*Share of the task.* What a bit is worth to the task is overstated by its partial derivative,
which holds all other weights still; in training they make up for it. So against the penalty the
task's part counts `TASK_SHARE`: `Compressor.penalty` has the value γ·Q and 1/TASK_SHARE times
its gradient. Bits are decided as if γ were that much larger. (In width-16 runs on digits at the
literal rate, ten times the γ more than halved Q and left the training loss the same to three
digits: bits had stayed that nothing was lost without.)

*Step.* Adam (the paper's choice), whose learning rate bounds every step. Its ε makes the speed at
which an unneeded channel loses its bits grow with γ instead of switching from none to full.
"""

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from selfcompress.layers import QuantizedLayer
from selfcompress.quantizer import MAX_BITS, fit_exponent, integer_depth

TASK_SHARE = 0.1  # of the task's gradient of a bit depth; see above
EPSILON = 0.01  # the gradient, in units of γ, that moves a bit depth by half of the largest step
EXPONENT_STEP = 0.1  # the largest step of an exponent, in units of that of a bit depth
BETAS = (0.9, 0.99)  # of Adam's averages
FIT_INTERVAL = 20  # steps between two fits of the exponents


class FormatStepper:
    """Collects the gradients of every layer's bit depths and exponents, and steps them.

    Args:
        layers: the quantised layers by name.
        starting_weights: N of eq. (3).
        bit_step: the largest step of a bit depth, in bits, short of changing its integer depth.
    """

    def __init__(
        self,
        layers: dict[str, QuantizedLayer],
        starting_weights: int,
        bit_step: float,
    ) -> None:
        self.layers = layers
        self.starting_weights = starting_weights
        depths = [layer.bit_depth for layer in layers.values()]
        exponents = [layer.exponent for layer in layers.values()]
        self.adam = torch.optim.Adam(
            [
                {"params": depths, "lr": bit_step, "eps": EPSILON},
                {"params": exponents, "lr": EXPONENT_STEP * bit_step},
            ],
            betas=BETAS,
        )
        self._collected: dict[nn.Parameter, Tensor] = {}
        self._loss_scale: Tensor | None = None
        self._hooks: list[RemovableHandle] = []
        self.watch()

    def watch(self) -> None:
        """Collect from the parameters that the layers have now; call again after a cut."""
        self._collected.clear()
        self._loss_scale = None
        for hook in self._hooks:
            hook.remove()
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._collect)
            for layer in self.layers.values()
            for parameter in (layer.bit_depth, layer.exponent)
            if parameter.requires_grad
        ]

    def _collect(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        # A batch that the user's loop skips for its infinite loss must not linger here.
        gradient = parameter.grad.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        parameter.grad = None
        if parameter in self._collected:
            gradient = gradient + self._collected[parameter]
        self._collected[parameter] = gradient

    def note_loss_scale(self, gradient: Tensor) -> None:
        """Remember the gradient that came back to the penalty: what the loss was multiplied with.

        It is 1 unless a GradScaler or the averaging of accumulated batches multiplied the loss.
        """
        self._loss_scale = gradient + (0 if self._loss_scale is None else self._loss_scale)

    def _undo_loss_scale(self) -> None:
        if self._loss_scale is not None:
            usable = self._loss_scale.isfinite() & (self._loss_scale > 0)
            scale = torch.where(usable, self._loss_scale, 1.0)
            self._collected = {p: g / scale.to(g) for p, g in self._collected.items()}
        self._loss_scale = None

    @torch.no_grad()
    def step(self, *, fit: bool) -> None:
        """Step all formats from what was collected since the last step; maybe `fit` exponents."""
        self._undo_loss_scale()
        depths = [integer_depth(layer.bit_depth) for layer in self.layers.values()]
        for layer in self.layers.values():
            exponent_grad = self._collected.pop(layer.exponent, None)
            depth_grad = self._collected.pop(layer.bit_depth, None)
            layer.exponent.grad = exponent_grad
            if depth_grad is None:
                continue
            if exponent_grad is not None and layer.integer_bits:
                depth_grad = depth_grad - exponent_grad
            per_weight = self.starting_weights / max(1, layer.fan_in)
            layer.bit_depth.grad = depth_grad * (TASK_SHARE * per_weight)
        self.adam.step()
        self.adam.zero_grad()
        for layer, depth in zip(self.layers.values(), depths, strict=True):
            # Zero bits is the floor: a negative bit depth would take time to come back from.
            layer.bit_depth.clamp_(0, MAX_BITS)
            if layer.integer_bits:
                self._settle(layer, depth, fit)

    def _settle(self, layer: QuantizedLayer, before: Tensor, fit: bool) -> None:
        """Move exponents and bit depths of a layer along with its integer depths."""
        depth = integer_depth(layer.bit_depth)
        one = (depth == 1) & (before != 1)  # a row stays at one bit only if it started there
        depth = torch.where(one, torch.where(before > 1, 0.0, 2.0), depth)
        layer.exponent.add_(before - depth)
        middle = (depth - 0.5).clamp(min=0)
        layer.bit_depth.copy_(torch.where(depth == before, layer.bit_depth, middle))
        if fit:
            layer.exponent.copy_(fit_exponent(layer.weight_by_row(), layer.bit_depth))
