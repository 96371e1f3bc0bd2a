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
import statistics
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from selfcompress.layers.quantized import QuantizedLayer, of_rows
from selfcompress.quantizer import fit_exponent, integer_depth
from selfcompress.replay import Replay, addresses

ROUNDING = 2.4  # the energy that rounding to b bits takes from normal weights is this times 4^-b
TASK_SHARE = 0.1  # of what the task says that a row is worth; see above
GIVING_UP = 8  # times the largest step is how fast the bits of an unwanted row go
AT_ONCE = 0.2  # of a layer's bits are given up at a time, or one row
EXPONENT_STEP = 0.1  # the largest step of an exponent, in units of that of a bit depth
BETAS = (0.9, 0.99)  # of Adam's averages
FIT_INTERVAL = 20  # steps between two fits of the exponents
LEAST_WANTED = -1e9  # of a row that has bits, where rows are put in order


@dataclass
class Collected:
    """What the gradients of one step say of formats, by layer.

    Attributes:
        norms: (rows,) √(Σ (g·w)²).
        samples: how many the gradient is of, batches that were accumulated together; 0 if that
            cannot be told.
        exponents: (rows,) the gradients of the exponents.
    """

    norms: dict[QuantizedLayer, Tensor] = field(default_factory=dict)
    samples: dict[QuantizedLayer, int] = field(default_factory=dict)
    exponents: dict[QuantizedLayer, Tensor] = field(default_factory=dict)


class Pressure(NamedTuple):
    """What the penalty says of rows, (rows of all layers,) each.

    Attributes:
        price: of a bit.
        layer_of: the number of the row's layer.
        least_rows: how many rows of that layer keep bits.
    """

    price: Tensor
    layer_of: Tensor
    least_rows: Tensor


class FormatStepper:
    """Collects what every layer's rows are worth and their exponents' gradients, and steps both.

    Args:
        layers: the quantised layers by name.
        starting_weights: N of eq. (3).
        most_bits: that a row may want.
        bit_step: the largest step of a bit depth, in bits, short of changing its integer depth.
        told_apart: whether layers know which of their inputs' dimensions counts samples.

    Attributes:
        collected: since the last step. Who replays what was recorded of a step puts here what it
            was at the recording.
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
        self.collected = Collected()
        self._loss_scale: Tensor | None = None  # None: no penalty has come back since the last step
        self._penalised = False  # whether one ever has
        self._gradients: dict[QuantizedLayer, weakref.ref[Tensor]] = {}  # that were collected from
        self._hooks: list[RemovableHandle] = []
        self._replays = [Replay(partial(self._compute, fit)) for fit in (False, True)]
        self.watch()

    def watch(self) -> None:
        """Collect from the parameters that the layers have now; call again after a cut."""
        self.stop()
        for layer in self.layers.values():
            for parameter, collect in (
                (layer.exponent, self._gradient_of(layer)),
                (layer.bit_depth, self._drop),
                (layer.weight, self._norm_of(layer)),
            ):
                self._hooks.append(_hooked(parameter, collect))

    def stop(self) -> None:
        """Collect nothing any more, until `watch` is called again."""
        self._forget()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def retire(self) -> None:
        """Formats stay as they are: collect nothing, and have them never keep a gradient again.

        A loop that freezes and thaws its model as a whole (a GAN's) thaws them too.
        """
        self.stop()
        for layer in self.layers.values():
            for parameter in (layer.bit_depth, layer.exponent):
                _hooked(parameter, self._drop)
                parameter.requires_grad_(False)

    def _forget(self) -> None:
        self.collected = Collected()
        self._loss_scale = None
        self._gradients = {}

    def _gradient_of(self, layer: QuantizedLayer) -> Callable[[Tensor], None]:
        def collect(exponent: Tensor) -> None:
            gradient, exponent.grad = exponent.grad, None
            assert gradient is not None
            exponents = self.collected.exponents
            if layer in exponents:  # what is not finite must not spread
                gradient = _finite(gradient) + _finite(exponents[layer])
            exponents[layer] = gradient

        return collect

    @staticmethod
    def _drop(parameter: Tensor) -> None:
        parameter.grad = None

    def _norm_of(self, layer: QuantizedLayer) -> Callable[[Tensor], None]:
        def collect(weight: Tensor) -> None:
            if weight.grad is None:  # compiled, an empty weight has none
                return
            # What batches accumulated in turn is all there by the last of them.
            product = layer.by_row(weight.grad * weight.detach())
            # Not flattened first: in channels_last that would be a copy.
            over_row = list(range(1, product.dim()))
            wide = torch.promote_types(product.dtype, torch.float32)
            norm = torch.linalg.vector_norm(product, dim=over_row, dtype=wide)
            self.collected.norms[layer] = norm.float()
            # A second backward() through the same forward() adds no samples.
            samples, layer.samples = layer.samples, 0
            known = self._gradients.get(layer)
            if known is not None and known() is weight.grad:  # else it began anew
                samples += self.collected.samples[layer]
            self.collected.samples[layer] = samples
            self._gradients[layer] = weakref.ref(weight.grad)

        return collect

    @property
    def judged(self) -> bool:
        """Whether anything is known of what rows are worth."""
        return any("worth" in kept for kept in self.adam.state.values())

    def state_dict(self) -> dict[str, Any]:
        """All that is known of rows, as tensors and plain values, the same on every device."""
        state = self.adam.state_dict()
        groups = [group | {"capturable": False} for group in state["param_groups"]]
        return state | {"param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned, perhaps on another device."""
        on_gpu = any(layer.bit_depth.is_cuda for layer in self.layers.values())
        groups = [group | {"capturable": on_gpu} for group in state["param_groups"]]
        self.adam.load_state_dict(state | {"param_groups": groups})
        for kept in self.adam.state.values():
            if "worth" in kept:  # Adam leaves its counts of steps where they were saved
                kept["step"] = kept["step"].to(kept["worth"])

    def note_loss_scale(self, gradient: Tensor) -> None:
        """Remember the gradient that came back to the penalty: what the loss was multiplied with.

        It is 1 unless a GradScaler or the averaging of accumulated batches multiplied the loss.
        """
        # Has the loop thrown away what it had, an attack's gradients or a batch's that it skips?
        # What is known of weights will be replaced, as their own gradients are.
        if all(layer.weight.grad is None for layer in self.layers.values()):
            self.collected.exponents.clear()
            self._loss_scale = None
        self._loss_scale = gradient + (0 if self._loss_scale is None else self._loss_scale)
        self._penalised = True

    @torch.no_grad()
    def step(
        self, gamma: float, least_bits: float, least_rows: Sequence[int], *, fit: bool
    ) -> None:
        """Step all formats from what was collected since the last step; maybe `fit` exponents.

        Nothing is read here, as a GPU would have to be waited for; and rows of all layers are in
        one tensor, as it takes as long for those of one layer as for all of them.

        Args:
            gamma: γ of eq. (2); without the penalty in the loss, bit depths stay.
            least_bits: that a row has unless it has none.
            least_rows: that keep bits in each layer.
        """
        layers = list(self.layers.values())
        collected, depth = self.collected, layers[0].bit_depth
        moves = self._loss_scale is not None and gamma > 0
        # A loop may freeze what it has trained before it comes here, as a GAN's does.
        trained = {x for x in layers if x.weight.requires_grad or x in collected.norms}
        if collected.norms:
            able = any(layer.bit_depth.requires_grad for layer in layers)
            if gamma > 0 and able and not self._penalised:
                warnings.warn(
                    "compressor.penalty() was not in the loss: without it no channel loses bits",
                    stacklevel=4,
                )
        elif moves and trained:
            warnings.warn(
                "no gradient of a weight was seen since the last step, by which to judge channels: "
                "they are collected as loss.backward() runs",
                stacklevel=4,
            )
        self.adam.zero_grad()  # of layers that have been thawed, which nobody has collected
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

    def _version(self, fit: bool) -> object:
        """Of what a step reads and writes beside what it is given."""
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
        """All that a step computes.

        Args:
            norms, exponents: as they were collected.
            scale: what the loss was multiplied with, a scalar.
            numbers: (2,) half the number of samples, and the least that a bit depth is moved to.
            pressure: None: bit depths stay.
            trained: of every layer, whether it is; others stay as they are.
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
        """The number of samples that gradients are of, in one batch or in several."""
        called = sorted(count for count in self.collected.samples.values() if count)
        if not called:
            return 1
        # Where samples cannot be told from tokens, the smallest count is that of samples. Else the
        # most frequent is: an expert, or a head for what has a label, sees some of them.
        return statistics.mode(called) if self.told_apart else called[0]

    def _remember(
        self, norms: dict[QuantizedLayer, Tensor], half_samples: Tensor, scale: Tensor
    ) -> None:
        """Average what rows are worth over steps, of the layers whose gradients were seen.

        Steps whose gradients are not all finite do not count.
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
        """(rows of all layers,) the bit depths, not rounded, that they are worth at a price.

        Below 1, none, and the less the less a row is worth, down to minus infinity. A layer that
        nothing is known about, as its weight was frozen or is empty, wants what it has.
        """
        depth = torch.cat([layer.bit_depth for layer in self.layers.values()])
        return self._wanted(depth, self._prices(gamma)) if gamma > 0 else depth

    def _prices(self, gamma: float) -> Tensor:
        """(rows of all layers,) what a bit costs."""
        layers = list(self.layers.values())
        return of_rows(layers, [gamma * layer.fan_in / self.starting_weights for layer in layers])

    def _wanted(self, depth: Tensor, price: Tensor) -> Tensor:
        worth, steps = [], []
        for layer in self.layers.values():
            state = self.adam.state.get(layer.bit_depth) or _nothing_seen(layer)
            worth.append(state["worth"])
            steps.append(state["step"].expand_as(state["worth"]))
        averaged = 1 - self.memory ** torch.cat(steps)
        first_bit = 2 * math.log(2) * ROUNDING * TASK_SHARE * torch.cat(worth)
        wanted = 0.5 * torch.log2(first_bit / averaged / price)
        # 0 / 0: no gradient was seen, or none that was finite, or there is no weight.
        return torch.where(wanted.isnan(), depth, wanted.clamp(max=self.most_bits))

    def _moved(self, depth: Tensor, least: Tensor, pressure: Pressure) -> Tensor:
        """(rows of all layers,) the bit depths a step nearer to what is wanted."""
        step = self.adam.param_groups[0]["lr"]
        wanted = self._wanted(depth, pressure.price)
        # The least is in the middle of the depths that round up to it.
        target = wanted.maximum(least).clamp(max=self.most_bits)
        change = (target - depth).clamp(-step, step)
        layer_of, least_rows = pressure.layer_of.long(), pressure.least_rows.long()
        given_up = _given_up(wanted, depth, layer_of, least_rows, len(self.layers))
        change = change.masked_fill(given_up, -GIVING_UP * step)
        # Zero bits is the floor. A row that has none has no gradient to say what it is worth.
        return torch.where(depth > 0, (depth + change).clamp(min=0), depth)


def _hooked(parameter: Tensor, collect: Callable[[Tensor], None]) -> RemovableHandle:
    """Have `collect` called with every gradient, of a parameter that is thawed later too."""
    trainable = parameter.requires_grad
    parameter.requires_grad_(True)  # else it would take no hook
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(collect)
    parameter.requires_grad_(trainable)
    return handle


def _nothing_seen(layer: QuantizedLayer) -> dict[str, Tensor]:
    """What is kept about the worth of a layer's rows: the average, and of how many steps.

    Adam, which loads it, asks for the latter by this name.
    """
    return {"worth": torch.zeros_like(layer.bit_depth), "step": layer.bit_depth.new_zeros(())}


def _finite(gradient: Tensor) -> Tensor:
    """Zero what is not finite: a batch that the user's loop skips for its loss must not linger."""
    return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _settled(depth: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """(rows,) bit depths, in the middle of their integer depth if that is new, and its fall."""
    whole = integer_depth(depth)
    whole = whole.masked_fill((whole == 1) & (before > 1), 0.0)  # but it may start at one bit
    middle = (whole - 0.5).clamp(min=0)
    return torch.where(whole == before, depth, middle), before - whole


def _given_up(
    wanted: Tensor, depth: Tensor, layer_of: Tensor, least: Tensor, layers: int
) -> Tensor:
    """(rows of all layers,) which are to lose all bits, given what they want and have.

    Args:
        layer_of: (rows of all layers,) int64, ascending: the number of each row's layer.
        least: of the same shape: how many rows of that layer keep bits.
        layers: how many there are, those without rows too.
    """
    # Layer by layer, in the order in which rows go: those without bits, then the least wanted.
    order = wanted.clamp(min=LEAST_WANTED).masked_fill(depth <= 0, -math.inf).argsort(stable=True)
    order = order[layer_of[order].argsort(stable=True)]
    bits = integer_depth(depth)[order].long()
    bits_of = bits.new_zeros(layers).index_add(0, layer_of, bits)
    rows_of = bits.new_zeros(layers).index_add(0, layer_of, torch.ones_like(bits))
    # What the rows of its layer before it hold: the first may always go, however much it has.
    bits_before = bits.cumsum(0) - bits - (bits_of.cumsum(0) - bits_of)[layer_of]
    rows_after = rows_of.cumsum(0)[layer_of] - 1 - torch.arange(len(bits), device=bits.device)
    goes = (bits_before <= AT_ONCE * bits_of[layer_of]) & (rows_after >= least)
    return (wanted < 1) & torch.zeros_like(goes).scatter(0, order, goes)
