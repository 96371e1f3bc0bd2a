"""Choose every row's bit depth by what the row is worth to the task, and learn its exponent.

γ must mean the same in every training loop, so the formats (bit depths and exponents) are stepped
here and not by the user's optimiser: gradient clipping, weight decay, learning-rate schedules and
the choice of optimiser do not act on them.

*Worth of a row.* By how much the loss would rise without the row, to second order, with Fisher's
estimate of the curvature and each of the row's weights on its own:

    worth = ½ · E_samples[ Σ_j (g_j · w_j)² ]

g_j is the gradient of weight w_j for one sample. Its mean square over samples is taken to be B
times its mean square over batches of B samples. (The straight-through gradient of a bit depth is
no such measure: only saturated weights contribute, and their contributions have a mean of zero
once the weights have been trained.)

*Bit depth.* With b bits, rounding leaves about `ROUNDING`·4^-b of a row's energy as noise, which
does that share of the harm. One more bit removes 2 ln2 · ROUNDING·4^-b · worth of it and costs
γ·I·H·W/N by eq. (2) to (4). The two are equal at the depth that the row *wants*, which is half the
log2 of 2 ln2 · ROUNDING · worth over that cost. A row that wants less than one bit is *given up*.
The wanted depths minimise the loss of eq. (2), without the noise of a gradient descent to them.

*Not all at once.* The estimate is local (one row, with all others in place), and it vanishes with
the gradient: before anything is learnt, and once all training data are, every row looks worthless.
That rows are needed after all shows when some of them are gone, and when all are, it is too late.
So a layer gives up at any time only its least wanted rows, which hold about `AT_ONCE` of its bits;
the others wait. (Without that, networks under a constant γ collapse.)

*Share of the task.* The curvature overstates what a row is worth, because it holds all other
weights fixed, while in training they make up for the row. So worth is scaled by `TASK_SHARE`.

*Step.* A bit depth moves towards the wanted one by at most one step at a time; a row that is given
up moves faster, and turns around if it is wanted again on the way. When the integer depth falls by
one, the exponent rises by one, so that fewer bits mean a coarser grid and not a narrower range. The
bit depth is then set to the middle of the new integer depth; at the border it would flicker.

*No row of one bit.* With a single bit a weight is 0 or -2^e, never positive. Half as many rows of
two bits are worth more, so a row that falls below two bits loses both. (Otherwise most rows of a
network under a large γ end at one bit.)

*Exponents* are learnt by Adam from the straight-through gradient of eq. (1), and every few steps
fitted anew to the weights: in a short run the weights grow and shrink faster than exponent steps
that are small enough to be harmless can follow.
"""

import math
import operator
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from selfcompress.layers.quantized import QuantizedLayer, of_rows
from selfcompress.quantizer import fit_exponent, integer_depth
from selfcompress.replay import Replay, addresses

ROUNDING = 2.4  # rounding normal weights to b bits makes noise of this times 4^-b of their energy
TASK_SHARE = 0.1  # factor on the worth of a row ("Share of the task" above)
GIVING_UP = 8  # a row that is given up loses bits at this many times the largest step
AT_ONCE = 0.2  # fraction of a layer's bits that may be given up at a time (one row at the least)
EXPONENT_STEP = 0.1  # the largest step of an exponent, as a fraction of that of a bit depth
BETAS = (0.9, 0.99)  # of Adam, which steps the exponents
FIT_INTERVAL = 20  # steps between two fits of the exponents to the weights
LEAST_WANTED = -1e9  # floor of wanted depths in sorting: rows without bits, at -inf, come first


@dataclass
class Collected:
    """What the gradients of one step tell about formats, by layer.

    Attributes:
        norms: layer → (rows,) √(Σ (g·w)²), with g the gradient of weight w.
        samples: layer → number of samples that its gradient is of, summed over accumulated batches;
            0 if that is not known.
        exponents: layer → (rows,) gradients of its exponents.
    """

    norms: dict[QuantizedLayer, Tensor] = field(default_factory=dict)
    samples: dict[QuantizedLayer, int] = field(default_factory=dict)
    exponents: dict[QuantizedLayer, Tensor] = field(default_factory=dict)


class Pressure(NamedTuple):
    """What a step needs to move bit depths; each tensor is (rows of all layers,).

    Attributes:
        price: what one bit of the row adds to the penalty, γ·I·H·W/N.
        layer_of: the index of the row's layer.
        least_rows: the least number of rows of that layer that keep bits.
    """

    price: Tensor
    layer_of: Tensor
    least_rows: Tensor


class FormatStepper:
    """Estimate what rows are worth from their gradients, and step bit depths and exponents.

    Args:
        layers: the quantised layers by name.
        starting_weights: N of eq. (3).
        most_bits: the largest bit depth that a row may want.
        bit_step: the largest step of a bit depth, in bits, for a row that is not given up; a row
            whose integer depth changes moves on to the middle of the new one.
        told_apart: whether layers know which dimension of their inputs counts samples.

    Attributes:
        collected: what gradient hooks have collected since the last step. A loop that replays a
            CUDA graph of forward and backward, where no hooks run, must assign what was collected
            while the graph was recorded.
    """

    def __init__(
        self,
        layers: dict[str, QuantizedLayer],
        starting_weights: int,
        most_bits: float,
        bit_step: float,
        told_apart: bool,
    ) -> None:
        self.layers = layers
        self.starting_weights = starting_weights
        self.most_bits = most_bits
        self.told_apart = told_apart
        # Decay of the EMA of worth: it spans about as many steps as a change by one bit takes.
        self.memory = 1 - min(bit_step, 0.5)
        # Adam steps only the exponents: bit depths have no gradient. They are in it so that the
        # average worth of rows, kept as their state, is cut and saved like any optimiser's.
        depths = [layer.bit_depth for layer in layers.values()]
        exponents = [layer.exponent for layer in layers.values()]
        self.adam = torch.optim.Adam(
            [
                {"params": depths, "lr": bit_step},
                {"params": exponents, "lr": EXPONENT_STEP * bit_step},
            ],
            betas=BETAS,
        )
        self.collected = Collected()
        # Of the penalties since the last step; None if none was differentiated.
        self._loss_scale: Tensor | None = None
        self._penalised = False  # whether any penalty has been differentiated yet
        self._hooks: list[RemovableHandle] = []
        self._watched: dict[QuantizedLayer, tuple[nn.Parameter, ...]] = {}
        self._replays = [Replay(partial(self._compute, fit)) for fit in (False, True)]
        self.watch()

    def watch(self) -> None:
        """Hook the layers' current parameters; call it again after a cut, which replaces them."""
        self.stop()
        for layer in self.layers.values():
            self._watched[layer] = layer.weight, layer.bit_depth, layer.exponent
            collectors = self._norm_of(layer), self._drop, self._gradient_of(layer)
            for parameter, collect in zip(self._watched[layer], collectors, strict=True):
                self._hooks.append(_hooked(parameter, collect))

    def watches(self, layer: QuantizedLayer) -> bool:
        """Return whether gradients are collected from the parameters that `layer` has now."""
        now = layer.weight, layer.bit_depth, layer.exponent
        return all(map(operator.is_, now, self._watched[layer]))

    def stop(self) -> None:
        """Drop what was collected and remove all hooks, until `watch` is called again."""
        self._forget()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def retire(self) -> None:
        """Stop collecting for good, freeze the formats, and drop any gradient that they get.

        They can still get one: a loop that freezes and thaws the whole model, such as a GAN's,
        thaws the formats too.
        """
        self.stop()
        for layer in self.layers.values():
            for parameter in (layer.bit_depth, layer.exponent):
                _hooked(parameter, self._drop)
                parameter.requires_grad_(False)

    def _forget(self) -> None:
        self.collected = Collected()
        self._loss_scale = None

    def _gradient_of(self, layer: QuantizedLayer) -> Callable[[Tensor], None]:
        def collect(exponent: Tensor) -> None:
            gradient, exponent.grad = exponent.grad, None
            assert gradient is not None
            exponents = self.collected.exponents
            if layer in exponents:  # of another batch: one that is not finite must not spoil both
                gradient = _finite(gradient) + _finite(exponents[layer])
            exponents[layer] = gradient

        return collect

    @staticmethod
    def _drop(parameter: Tensor) -> None:
        parameter.grad = None

    def _norm_of(self, layer: QuantizedLayer) -> Callable[[Tensor], None]:
        def collect(weight: Tensor) -> None:
            if weight.grad is None:  # under torch.compile an empty weight has no gradient
                return
            # With accumulated batches this runs after each one; the last has the whole gradient.
            product = layer.by_row(weight.grad * weight.detach())
            # Reduce without flattening, which would copy a channels_last tensor.
            over_row = list(range(1, product.dim()))
            wide = torch.promote_types(product.dtype, torch.float32)
            norm = torch.linalg.vector_norm(product, dim=over_row, dtype=wide)
            self.collected.norms[layer] = norm.float()
            # Taken, not read: a second backward() through the same forward() adds no samples.
            samples, layer.samples = layer.samples, 0
            self.collected.samples[layer] = self.collected.samples.get(layer, 0) + samples

        return collect

    @property
    def judged(self) -> bool:
        """Whether the worth of any layer's rows has been estimated yet."""
        return any("worth" in kept for kept in self.adam.state.values())

    def state_dict(self) -> dict[str, Any]:
        """Return Adam's state and the worth of rows as tensors and plain values for any device."""
        state = self.adam.state_dict()
        groups = [group | {"capturable": False} for group in state["param_groups"]]
        return state | {"param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned, perhaps on another device."""
        on_gpu = any(layer.bit_depth.is_cuda for layer in self.layers.values())
        groups = [group | {"capturable": on_gpu} for group in state["param_groups"]]
        self.adam.load_state_dict(state | {"param_groups": groups})
        for kept in self.adam.state.values():
            if "worth" in kept:  # Adam does not move step counts to the parameter's device
                kept["step"] = kept["step"].to(kept["worth"])

    def note_loss_scale(self, gradient: Tensor) -> None:
        """Add up the gradient of the penalty, which is what the loss was multiplied with.

        It is 1 unless a GradScaler or the averaging of accumulated batches multiplied the loss.
        """
        # No weight has a gradient: the loop has discarded those that there were (of an adversarial
        # attack, or of a batch that it skips), so what was collected from them does not count.
        if all(layer.weight.grad is None for layer in self.layers.values()):
            self._forget()
        self._loss_scale = gradient + (0 if self._loss_scale is None else self._loss_scale)
        self._penalised = True

    @torch.no_grad()
    def step(
        self, gamma: float, least_bits: float, least_rows: Sequence[int], *, fit: bool
    ) -> None:
        """Step all formats from what was collected since the last step.

        No tensor's values are read here, because that would wait for the GPU. The rows of all
        layers are in one tensor, because kernels take as long for one layer as for all of them.

        Args:
            gamma: γ of eq. (2). If it is 0 or no penalty was in the loss, bit depths stay.
            least_bits: the smallest bit depth of a row that is not given up.
            least_rows: for each layer, the least number of rows that keep bits.
            fit: whether to fit exponents anew to the weights too.
        """
        layers = list(self.layers.values())
        collected, depth = self.collected, layers[0].bit_depth
        self._follow(depth)
        moves = self._loss_scale is not None and gamma > 0
        # A loop may freeze layers again before this step, as a GAN's does: count those with norms.
        trained = {x for x in layers if x.weight.requires_grad or x in collected.norms}
        if collected.norms:
            able = any(layer.bit_depth.requires_grad for layer in layers)
            if gamma > 0 and able and not self._penalised:
                warnings.warn(
                    "compressor.penalty() was not in the loss: without it no channel loses bits",
                    stacklevel=4,
                )
        elif gamma > 0 and trained and (moves or not self._penalised):
            warnings.warn(
                "no gradient of a weight was seen since the last step, by which to judge channels: "
                "they are collected as loss.backward() runs",
                stacklevel=4,
            )
        self.adam.zero_grad()  # gradients of thawed layers that no hook has collected
        halved = 0.5 * self._samples()
        numbers = torch.tensor([halved, least_bits - 0.5], dtype=torch.float32, device="cpu")
        pressure = None
        if moves:
            layer_of = of_rows(layers, range(len(layers)))
            pressure = Pressure(self._prices(gamma), layer_of, of_rows(layers, least_rows))
        for group in self.adam.param_groups:
            group["capturable"] = depth.is_cuda
        self._replays[fit](
            lambda: self._version(fit),
            collected.norms,
            {layer: g for layer, g in collected.exponents.items() if layer in trained},
            depth.new_ones(()) if self._loss_scale is None else self._loss_scale,
            numbers.to(depth.device, non_blocking=True),
            pressure,
            tuple(layer in trained for layer in layers),
        )
        self._forget()

    def _follow(self, depth: nn.Parameter) -> None:
        """Move and cast what is kept about rows, if the model was moved or cast.

        Args:
            depth: the bit depths of any layer.
        """
        kept = self.adam.state.get(depth, {}).get("worth", depth)
        if (kept.device, kept.dtype) != (depth.device, depth.dtype):
            self.load_state_dict(self.state_dict())  # which does it

    def _version(self, fit: bool) -> object:
        """Return the addresses of the tensors that `_compute` uses besides its arguments.

        A recorded CUDA graph is valid for as long as they do not change.
        """
        layers = self.layers.values()
        formats = [p for layer in layers for p in (layer.bit_depth, layer.exponent)]
        kept = [tensor for state in self.adam.state.values() for tensor in state.values()]
        return addresses([*formats, *kept, *(layer.weight for layer in layers if fit)])

    def _compute(
        self,
        fit: bool,
        norms: dict[QuantizedLayer, Tensor],
        exponents: dict[QuantizedLayer, Tensor],
        scale: Tensor,
        numbers: Tensor,
        pressure: Pressure | None,
        trained: tuple[bool, ...],
    ) -> None:
        """Do the tensor computations of `step`, which are recorded as a CUDA graph on a GPU.

        Args:
            norms, exponents: as in `Collected`.
            scale: scalar; what the loss was multiplied with.
            numbers: (2,) half the number of samples, and the smallest bit depth to move to, which
                is in the middle of those that round up to `least_bits`.
            pressure: None if bit depths stay.
            trained: for each layer, whether it is trained; others keep their formats.
        """
        layers = list(self.layers.values())
        sizes = [len(layer.bit_depth) for layer in layers]
        depth = torch.cat([layer.bit_depth for layer in layers])
        before = integer_depth(depth)
        half_samples, least = numbers
        if norms:
            self._remember(norms, half_samples, scale)
        if exponents:
            gradients = _finite(torch.cat(list(exponents.values())) / scale)
            parts = gradients.split([len(layer.exponent) for layer in exponents])
            for layer, part in zip(exponents, parts, strict=True):
                layer.exponent.grad = part.to(layer.exponent)
        if pressure is not None:
            moved = self._moved(depth, least, pressure)
            sides = zip(moved.split(sizes), depth.split(sizes), trained, strict=True)
            depth = torch.cat([new if moves else old for new, old, moves in sides])
        self.adam.step()
        self.adam.zero_grad()
        if layers[0].integer_bits:
            depth, fallen = _settled(depth, before)
            torch._foreach_add_([layer.exponent for layer in layers], fallen.split(sizes))
        torch._foreach_copy_([layer.bit_depth for layer in layers], depth.split(sizes))
        if fit and layers[0].integer_bits:
            for layer, moves in zip(layers, trained, strict=True):
                if moves:
                    layer.exponent.copy_(fit_exponent(layer.weight_by_row(), layer.bit_depth))

    def _samples(self) -> int:
        """Return the number of samples that the gradients are of; 1 if it is not known."""
        called = sorted(count for count in self.collected.samples.values() if count)
        if not called:
            return 1
        # Where samples cannot be told from tokens, the smallest count is that of samples. Otherwise
        # take the most frequent: an expert, or a head for labelled inputs, sees only some samples.
        return statistics.mode(called) if self.told_apart else called[0]

    def _remember(
        self, norms: dict[QuantizedLayer, Tensor], half_samples: Tensor, scale: Tensor
    ) -> None:
        """Update the average worth of rows, for the layers whose gradients were collected.

        A step whose gradients are not all finite is left out of the average.
        """
        states = [self.adam.state[layer.bit_depth] for layer in norms]
        for layer, state in zip(norms, states, strict=True):
            if not state:
                state.update(_nothing_seen(layer))
        worth = (torch.cat(list(norms.values())) / scale).square() * half_samples
        finite = worth.isfinite().all() & scale.isfinite()
        so_far = torch.cat([state["worth"] for state in states])
        now = worth.to(so_far).where(finite, so_far).split([len(n) for n in norms.values()])
        kept = [state["worth"] for state in states]
        ends = [part.to(old) for part, old in zip(now, kept, strict=True)]
        torch._foreach_lerp_(kept, ends, 1 - self.memory)
        counts = [state["step"] for state in states]
        torch._foreach_add_(counts, [finite.to(count) for count in counts])

    @torch.no_grad()
    def wanted(self, gamma: float) -> Tensor:
        """Return the unrounded bit depths that rows want at `gamma`, (rows of all layers,).

        A value below 1 means no bits, and falls with the row's worth down to minus infinity. A
        layer of unknown worth, whose weight is frozen or empty, wants its current bit depths.
        """
        depth = torch.cat([layer.bit_depth for layer in self.layers.values()])
        return self._wanted(depth, self._prices(gamma)) if gamma > 0 else depth

    def _prices(self, gamma: float) -> Tensor:
        """Return what one bit of each row adds to the penalty, (rows of all layers,)."""
        layers = list(self.layers.values())
        return of_rows(layers, [gamma * layer.fan_in / self.starting_weights for layer in layers])

    def _wanted(self, depth: Tensor, price: Tensor) -> Tensor:
        worth, steps = [], []
        for layer in self.layers.values():
            state = self.adam.state.get(layer.bit_depth) or _nothing_seen(layer)
            worth.append(state["worth"])
            steps.append(state["step"].expand_as(state["worth"]))
        averaged = 1 - self.memory ** torch.cat(steps)  # bias correction, as in Adam
        first_bit = 2 * math.log(2) * ROUNDING * TASK_SHARE * torch.cat(worth)
        wanted = 0.5 * torch.log2(first_bit / averaged / price)
        # NaN from 0 / 0: no gradient, or no finite one, was seen, or the weight is empty.
        return torch.where(wanted.isnan(), depth, wanted.clamp(max=self.most_bits))

    def _moved(self, depth: Tensor, least: Tensor, pressure: Pressure) -> Tensor:
        """Return the bit depths after one step towards the wanted ones, (rows of all layers,)."""
        step = self.adam.param_groups[0]["lr"]
        wanted = self._wanted(depth, pressure.price)
        target = wanted.maximum(least).clamp(max=self.most_bits)
        change = (target - depth).clamp(-step, step)
        layer_of, least_rows = pressure.layer_of.long(), pressure.least_rows.long()
        given_up = _given_up(wanted, depth, layer_of, least_rows, len(self.layers))
        change = change.masked_fill(given_up, -GIVING_UP * step)
        # A row at zero bits stays there: it has no gradient that would show what it is worth.
        return torch.where(depth > 0, (depth + change).clamp(min=0), depth)


def _hooked(parameter: Tensor, collect: Callable[[Tensor], None]) -> RemovableHandle:
    """Have `collect` called after every gradient of a parameter, even one that is thawed later."""
    trainable = parameter.requires_grad
    parameter.requires_grad_(True)  # torch refuses hooks on a frozen parameter
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(collect)
    parameter.requires_grad_(trainable)
    return handle


def _nothing_seen(layer: QuantizedLayer) -> dict[str, Tensor]:
    """Return an empty record of a layer's rows: their average worth, and of how many steps.

    The number of steps is called "step" because Adam needs that name when it loads the record.
    """
    return {"worth": torch.zeros_like(layer.bit_depth), "step": layer.bit_depth.new_zeros(())}


def _finite(gradient: Tensor) -> Tensor:
    """Return `gradient` with non-finite values as 0: a skipped batch must not affect others."""
    return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _settled(depth: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Move bit depths whose integer depth has changed to the middle of the new one.

    Args:
        depth: (rows,) bit depths after a step.
        before: (rows,) integer depths before it.

    Returns:
        The (rows,) bit depths, and by how much the (rows,) integer depths have fallen.
    """
    whole = integer_depth(depth)
    whole = whole.masked_fill((whole == 1) & (before > 1), 0.0)  # a row that started at 1 bit stays
    middle = (whole - 0.5).clamp(min=0)
    return torch.where(whole == before, depth, middle), before - whole


def _given_up(
    wanted: Tensor, depth: Tensor, layer_of: Tensor, least: Tensor, layers: int
) -> Tensor:
    """Return which rows are to lose all their bits now, (rows of all layers,) bool.

    Args:
        wanted, depth: (rows of all layers,) the bit depths that rows want and have.
        layer_of: (rows of all layers,) int64, ascending: the index of each row's layer.
        least: (rows of all layers,) int64: the least number of rows of that layer that keep bits.
        layers: the number of layers, including those without rows.
    """
    # Sort by layer, then in the order in which rows go: those without bits, then the least wanted.
    order = wanted.clamp(min=LEAST_WANTED).masked_fill(depth <= 0, -math.inf).argsort(stable=True)
    order = order[layer_of[order].argsort(stable=True)]
    bits = integer_depth(depth)[order].long()
    bits_of = bits.new_zeros(layers).index_add(0, layer_of, bits)
    rows_of = bits.new_zeros(layers).index_add(0, layer_of, torch.ones_like(bits))
    # Bits of the rows before it in its layer: 0 for the first, which may go however many it has.
    bits_before = bits.cumsum(0) - bits - (bits_of.cumsum(0) - bits_of)[layer_of]
    rows_after = rows_of.cumsum(0)[layer_of] - 1 - torch.arange(len(bits), device=bits.device)
    goes = (bits_before <= AT_ONCE * bits_of[layer_of]) & (rows_after >= least)
    return (wanted < 1) & torch.zeros_like(goes).scatter(0, order, goes)
