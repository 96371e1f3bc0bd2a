"""Choose every row's bit depth by what it is worth, and learn its exponent.

γ must mean the same in everybody's training loop, so the formats are stepped here and not by the
user's optimiser: clipping, weight decay, schedules and optimisers of the weights never see them.

*What a row is worth.* By how much the loss would rise without the row, to second order, with
Fisher's estimate of the curvature and rows' weights taken one by one:

    worth = ½ · E_samples[ Σ_j (g_j · w_j)² ]

g is the gradient of weight w, its mean square over samples B times the one over batches of B
images. (The straight-through gradient of a bit depth is no such measure: it sees saturated weights
alone, and what it sees has a mean of zero once the weights have been trained.)

*Bit depth.* With b bits, rounding leaves about `ROUNDING`·4^-b of a row's energy as noise, which
does that share of the harm. One bit more takes away 2 ln2 · ROUNDING·4^-b · worth and costs
γ·I·H·W/N by eq. (2) to (4). Where they are equal is the depth the row wants, half a log2 of the
ratio. A row that wants less than one bit is given up. This is the minimum of the loss of eq. (2)
that the bit depths are to find, without the noise of a descent to it.

*Not all at once.* The estimate is local, of one row with all others in place, and it vanishes with
the gradient: before anything is learnt, and when all training data are, every row looks worthless.
That they are needed after all shows when some are gone, and when all are it is too late. So the
rows that a layer is giving up hold `AT_ONCE` of its bits, the least wanted of them; the others
wait. (Without that, networks under a constant γ collapse.)

*Share of the task.* The curvature overstates what a row is worth, as it holds all other weights
still; in training they make up for it. So the task's part counts `TASK_SHARE`.

*Step.* A bit depth moves towards what is wanted by no more than a step at a time; a row that is
given up moves faster, and turns around if it is wanted again on the way. Its integer depth falls
by one as its exponent rises by one, so that fewer bits mean a coarser grid and not a narrower one,
and it starts in the middle of the new depth; at the border it would flicker between the two.

*No row of one bit.* With a single bit a weight is 0 or -2^e, never positive. Half as many rows of
two bits are worth more, so a row that falls below two bits loses both. (Left alone, most rows of a
network under pressure end at one bit.)

*Exponents* are learned by the straight-through gradient of eq. (1), by Adam, and every few steps
fitted anew to the weights: in a short run the weights grow and shrink faster than steps small
enough to be harmless can follow.
"""

import math
import operator
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from selfcompress.layers import QuantizedLayer
from selfcompress.quantizer import fit_exponent, integer_depth

ROUNDING = 2.4  # the energy that rounding to b bits takes from normal weights is this times 4^-b
TASK_SHARE = 0.1  # of what the task says that a row is worth; see above
GIVING_UP = 8  # times the largest step is how fast the bits of an unwanted row go
AT_ONCE = 0.2  # of a layer's bits are given up at a time, or one row
EXPONENT_STEP = 0.1  # the largest step of an exponent, in units of that of a bit depth
BETAS = (0.9, 0.99)  # of Adam's averages
FIT_INTERVAL = 20  # steps between two fits of the exponents


class FormatStepper:
    """Collects what every layer's rows are worth and their exponents' gradients, and steps both.

    Args:
        layers: the quantised layers by name.
        starting_weights: N of eq. (3).
        most_bits: that a row may want.
        bit_step: the largest step of a bit depth, in bits, short of changing its integer depth.
    """

    def __init__(
        self,
        layers: dict[str, QuantizedLayer],
        starting_weights: int,
        most_bits: float,
        bit_step: float,
    ) -> None:
        self.layers = layers
        self.starting_weights = starting_weights
        self.most_bits = most_bits
        # What rows are worth is averaged over about the steps that one bit takes.
        self.memory = 1 - min(bit_step, 0.5)
        # Adam steps the exponents alone. The bit depths are in it for what is kept about them
        # (the average worth of their rows), which is cut and saved with its state.
        depths = [layer.bit_depth for layer in layers.values()]
        exponents = [layer.exponent for layer in layers.values()]
        self.adam = torch.optim.Adam(
            [
                {"params": depths, "lr": bit_step},
                {"params": exponents, "lr": EXPONENT_STEP * bit_step},
            ],
            betas=BETAS,
        )
        self._squares: dict[QuantizedLayer, Tensor] = {}  # (rows,) Σ (g·w)² of this step
        self._collected: dict[nn.Parameter, Tensor] = {}  # gradients of exponents
        self._loss_scale: Tensor | None = None
        self._penalties = 0
        self._hooks: list[RemovableHandle] = []
        self.watch()

    def watch(self) -> None:
        """Collect from the parameters that the layers have now; call again after a cut."""
        self._forget()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._watched = self._trainable()
        for layer in self.layers.values():
            for parameter, collect in (
                (layer.exponent, self._collect),
                (layer.bit_depth, self._drop),
                (layer.weight, self._square_of(layer)),
            ):
                if parameter.requires_grad:
                    hook = parameter.register_post_accumulate_grad_hook(collect)
                    self._hooks.append(hook)

    def _trainable(self) -> list[bool]:
        return [layer.weight.requires_grad for layer in self.layers.values()]

    def _expected(self) -> bool:
        """Whether there are weights whose gradients should have been seen."""
        return any(map(operator.and_, self._watched, self._trainable()))

    def _forget(self) -> None:
        self._squares.clear()
        self._collected.clear()
        self._loss_scale, self._penalties = None, 0

    def _collect(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        # A batch that the user's loop skips for its infinite loss must not linger here.
        gradient = parameter.grad.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        parameter.grad = None
        if parameter in self._collected:
            gradient = gradient + self._collected[parameter]
        self._collected[parameter] = gradient

    @staticmethod
    def _drop(parameter: Tensor) -> None:
        parameter.grad = None

    def _square_of(self, layer: QuantizedLayer) -> Callable[[Tensor], None]:
        def square(weight: Tensor) -> None:
            if weight.grad is None:  # compiled, an empty weight has none
                return
            # What batches accumulated in turn is all there by the last of them.
            product = layer.by_row(weight.grad * weight.detach()).float()
            # Not flattened first: in channels_last that would be a copy.
            self._squares[layer] = product.square().sum(list(range(1, product.dim())))

        return square

    def note_loss_scale(self, gradient: Tensor) -> None:
        """Remember the gradient that came back to the penalty: what the loss was multiplied with.

        It is 1 unless a GradScaler or the averaging of accumulated batches multiplied the loss.
        """
        self._loss_scale = gradient + (0 if self._loss_scale is None else self._loss_scale)
        self._penalties += 1

    @torch.no_grad()
    def step(self, gamma: float, least_bits: float, *, fit: bool) -> None:
        """Step all formats from what was collected since the last step; maybe `fit` exponents.

        Args:
            gamma: γ of eq. (2); without the penalty in the loss, bit depths stay.
            least_bits: that a row has unless it has none.
        """
        layers = list(self.layers.values())
        # Rows of all layers in one tensor: a GPU takes as long for a layer's as for all of them.
        depth = torch.cat([layer.bit_depth for layer in layers])
        before = integer_depth(depth)
        scale, finite = self._scale_and_finite()
        usable = math.isfinite(scale) and scale > 0
        # An example of one sample does not tell whose rows are tokens; the fewest are samples.
        called = [layer.samples for layer in layers if layer.samples]
        samples = min(called, default=1) * max(1, self._penalties)
        if self._penalties and gamma > 0 and not self._squares and self._expected():
            warnings.warn(
                "no gradient of a weight was seen since the last step, by which to judge channels: "
                "they are collected as loss.backward() runs",
                stacklevel=3,
            )
        if usable:
            if finite:
                for layer, squares in self._squares.items():
                    self._remember(layer, squares * (0.5 * samples / scale**2))
            for exponent, gradient in self._collected.items():
                exponent.grad = gradient / scale
        if self._penalties and gamma > 0:
            depth = self._moved(depth, gamma, least_bits)
        self._forget()
        if self._trainable() != self._watched:  # the user has frozen or thawed layers
            self.watch()
        self.adam.step()
        self.adam.zero_grad()
        if layers[0].integer_bits:
            depth, finer = _settled(depth, before)
            for layer, change in self._by_layer(finer):
                layer.exponent.add_(change)
        for layer, part in self._by_layer(depth):
            layer.bit_depth.copy_(part)
            if fit and layer.integer_bits:
                layer.exponent.copy_(fit_exponent(layer.weight_by_row(), layer.bit_depth))

    def _by_layer(self, rows: Tensor) -> Iterator[tuple[QuantizedLayer, Tensor]]:
        """Every layer and its part of a tensor of all layers' rows."""
        sizes = [len(layer.bit_depth) for layer in self.layers.values()]
        return zip(self.layers.values(), rows.split(sizes), strict=True)

    def _scale_and_finite(self) -> tuple[float, bool]:
        """What the loss was multiplied with, and whether all gradients of weights are finite.

        Read together, as a GPU is waited for whenever something is read.
        """
        read = [torch.cat(list(self._squares.values())).sum()] if self._squares else []
        if self._loss_scale is not None:
            read.append(self._loss_scale.float())
        values = torch.stack(read).tolist() if read else []
        scale = 1.0 if self._loss_scale is None else values.pop()
        return scale, all(map(math.isfinite, values))

    def _remember(self, layer: QuantizedLayer, worth: Tensor) -> None:
        """Average what rows are worth over steps."""
        state = self.adam.state[layer.bit_depth]
        if not state:
            state["worth"], state["step"] = torch.zeros_like(layer.bit_depth), torch.zeros(())
        state["worth"].lerp_(worth.to(layer.bit_depth), 1 - self.memory)
        state["step"] += 1

    @torch.no_grad()
    def wanted(self, gamma: float) -> Tensor:
        """(rows of all layers,) the bit depths, not rounded, that they are worth at a price.

        Below 1, none, and the less the less a row is worth, down to minus infinity. A layer that
        nothing is known about, as its weight is frozen, wants what it has.
        """
        depth = torch.cat([layer.bit_depth for layer in self.layers.values()])
        if gamma <= 0:
            return depth
        ratio = torch.cat([self._ratio(layer, gamma) for layer in self.layers.values()])
        wanted = (0.5 * torch.log2(ratio)).clamp(max=self.most_bits)
        return torch.where(ratio.isnan(), depth, wanted)

    def _ratio(self, layer: QuantizedLayer, gamma: float) -> Tensor:
        """(rows,) what the bit after none would be worth, over its price; NaN where unknown."""
        state = self.adam.state.get(layer.bit_depth)
        if not state or layer.fan_in == 0:
            return torch.full_like(layer.bit_depth, math.nan)
        price = gamma * layer.fan_in / self.starting_weights
        averaged = 1 - self.memory ** float(state["step"])
        ratio: Tensor = state["worth"] * (
            2 * math.log(2) * ROUNDING * TASK_SHARE / (averaged * price)
        )
        return ratio

    def _moved(self, depth: Tensor, gamma: float, least_bits: float) -> Tensor:
        """(rows of all layers,) the bit depths a step nearer to what is wanted."""
        step = self.adam.param_groups[0]["lr"]
        wanted = self.wanted(gamma)
        # In the middle of the depths that round up to `least_bits`.
        target = wanted.clamp(min=least_bits - 0.5, max=self.most_bits)
        change = (target - depth).clamp(-step, step)
        sizes = [len(part) for _, part in self._by_layer(depth)]
        change = change.masked_fill(_given_up(wanted, depth, sizes), -GIVING_UP * step)
        # Zero bits is the floor. A row that has none has no gradient to say what it is worth.
        return torch.where(depth > 0, (depth + change).clamp(min=0), depth)


def _settled(depth: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """(rows,) bit depths along with their integer depths, and how far those fell from `before`."""
    whole = integer_depth(depth)
    whole = whole.masked_fill((whole == 1) & (before > 1), 0.0)  # but it may start at one bit
    middle = (whole - 0.5).clamp(min=0)
    return torch.where(whole == before, depth, middle), before - whole


def _given_up(wanted: Tensor, depth: Tensor, sizes: list[int]) -> Tensor:
    """(rows,) which rows are to lose all bits, given what they want and have.

    Args:
        sizes: how many of the rows are the first layer's, the second's, and so on.
    """
    device = depth.device
    repeats = torch.tensor(sizes).to(device, non_blocking=True)  # a GPU is not waited for
    index = torch.arange(len(sizes), device=device).repeat_interleave(
        repeats, output_size=len(depth)
    )
    order = wanted.argsort(stable=True)
    order = order[index[order].argsort(stable=True)]  # layer by layer, the least wanted first
    bits, index = integer_depth(depth)[order].long(), index[order]
    of_layer = bits.new_zeros(len(sizes)).index_add(0, index, bits)
    # What the rows of its layer before it hold: the first may always go, however much it has.
    ahead = bits.cumsum(0) - bits - (of_layer.cumsum(0) - of_layer)[index]
    first = ahead <= AT_ONCE * of_layer[index]
    return (wanted < 1) & torch.zeros_like(first).scatter(0, order, first)
