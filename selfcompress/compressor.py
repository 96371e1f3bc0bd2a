"""Self-compression for a training loop of your own.

compressor = selfcompress.Compressor(model, example_input, gamma=0.01)
optimizer = torch.optim.AdamW(compressor.weights(), lr=1e-3)
for x, y in loader:
    loss = F.cross_entropy(model(x), y) + compressor.penalty()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    compressor.step(optimizer)
compressor.finish(loader)
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from selfcompress.follow import channel_graph
from selfcompress.formats import FIT_INTERVAL, TASK_SHARE, FormatStepper
from selfcompress.layers import quantize_layers, quantized_layers
from selfcompress.liveness import analyse, settle_statistics
from selfcompress.modes import kept_modes
from selfcompress.quantizer import MAX_BITS, fit_exponent
from selfcompress.size import Size, measure, q_bits, starting_weights
from selfcompress.surgery import Plan, apply_plan, check_optimizer, make_plan, plan_cut
from selfcompress.trace import reads_elsewhere
from selfcompress.verify import compare, snapshot

_BIAS_STEP = 0.01  # how far one step drives a dead row's bias to zero: the L1 loss's proximal step
_CHECK_TOLERANCE = 1e-4  # of the output's scale: well above float32 rounding, far below a mistake


class Compressor:
    """Quantises a model in place and shrinks it while somebody else's loop trains it.

    Args:
        model: the network; its convolutions and linear layers are replaced by quantised twins
            that hold the same parameter objects.
        example_input: a batch the model accepts, on its device, to trace it and to check cuts
            with; a few real images serve best.
        gamma: γ of eq. (2), the price of the size: accuracy against bits. May be assigned to at
            any time (`compressor.gamma = ...`), for a schedule. Loss scaling, as of a GradScaler,
            is not undone.
        bits: the bit depth that every channel starts at.
        integer_bits: round bit depths up in the forward pass, so that sizes can be stored. False
            is the paper's fractional bit depth.
        exclude: names of layers (or of modules that contain layers) to leave in float. They
            count at 32 bits a weight.
        interval: steps between two cuts.
        bit_step: the largest step of a bit depth, in bits: 0.01 lets an unneeded channel of 4
            bits go within about 200 steps (a row whose integer depth changes moves on by half).

    Raises:
        ValueError: γ is negative or not a number, `bits` or `interval` is out of range, a name in
            `exclude` does not exist, the model does not accept `example_input`, has nothing to
            quantise, or is compressed already.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor,
        gamma: float,
        *,
        bits: float = 4,
        integer_bits: bool = True,
        exclude: Iterable[str] = (),
        interval: int = 50,
        bit_step: float = 0.01,
    ) -> None:
        if not 0 < bits <= MAX_BITS:
            raise ValueError(f"bits must be above 0 and at most {MAX_BITS}, not {bits}")
        if integer_bits and bits != int(bits):
            raise ValueError(f"bits must be a whole number unless integer_bits=False, not {bits}")
        if interval < 1:
            raise ValueError(f"interval must be at least 1 step, not {interval}")
        self.gamma = gamma
        self.model = model
        self.example_input = example_input
        self.interval = interval
        self.frozen = False
        self.steps = 0
        if quantized_layers(model):
            raise ValueError("the model is compressed already: build a fresh one")
        read_elsewhere = _reads_elsewhere(model, example_input)
        self.starting_weights = starting_weights(model)
        self.left_in_float = quantize_layers(
            model,
            bits=bits,
            integer_bits=integer_bits,
            exclude=exclude,
            read_elsewhere=read_elsewhere,
        )
        self.layers = quantized_layers(model)
        self.graph = channel_graph(model, example_input, read_elsewhere)
        self.formats = FormatStepper(self.layers, self.starting_weights, bit_step)
        self._lingering: dict[str, Tensor] = {}
        self._idle = self._zero_rows()

    @property
    def gamma(self) -> float:
        """γ of eq. (2)."""
        return self._gamma

    @gamma.setter
    def gamma(self, value: float) -> None:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"gamma must be a number ≥ 0, not {value}")
        self._gamma = float(value)

    def weights(self) -> list[nn.Parameter]:
        """The parameters for the user's optimiser: all but the bit depths and exponents."""
        formats = {id(p) for m in self.layers.values() for p in (m.bit_depth, m.exponent)}
        return [p for p in self.model.parameters() if id(p) not in formats]

    def penalty(self) -> Tensor:
        """γ·Q of eq. (2) and (3), to be added to the task's loss: a scalar.

        Its gradient is that of γ·Q over `formats.TASK_SHARE`; see there.
        """
        bits = q_bits(self.model)
        pressed = bits.detach() + (bits - bits.detach()) / TASK_SHARE
        return self.gamma / self.starting_weights * pressed

    def step(self, optimizer: Optimizer) -> Plan | None:
        """Step bit depths and exponents; every `interval` steps, cut what died.

        Call it after `optimizer.step()`.

        Returns:
            The plan that was applied, if something was cut.

        Raises:
            TypeError: the optimiser's state cannot be cut; nothing has been changed.
            ValueError: it does not hold all trainable weights; nothing has been changed.
            CutError: a cut changed what the network computes; the model stays cut.
            FloatingPointError: a weight or its format is no longer finite.
        """
        if self.steps == 0:
            check_optimizer(optimizer)
            self._require_all_weights(optimizer)
        self.steps += 1
        if not self.frozen:
            self.formats.step(fit=self.steps % FIT_INTERVAL == 0)
            self._keep_connected()
        self._shrink_lingering_biases()
        self._update_idle()
        if self.steps % self.interval:
            return None
        return self.cut(optimizer)

    @torch.no_grad()
    def cut(self, optimizer: Optimizer | None = None) -> Plan | None:
        """Cut what is dead now out of the model and the optimiser's state.

        Rows that quantised to zero at every step since the last cut lose their bits first.

        Returns:
            The plan that was applied, or None if there was nothing to cut.
        """
        if optimizer is not None:
            check_optimizer(optimizer)
        self._require_finite()
        for name, idle in self._idle.items():
            self.layers[name].bit_depth[idle] = 0
        self._keep_connected()
        settle_statistics(self.graph, self.model)
        plan = plan_cut(self.graph, self.model, analyse(self.graph, self.model))
        if plan:
            before = snapshot(self.model, self.example_input)
            self._apply(plan, optimizer)
            compare(before, snapshot(self.model, self.example_input), plan, _CHECK_TOLERANCE)
        device = self.example_input.device
        self._lingering = {
            name: torch.from_numpy(positions).to(device)
            for name, positions in analyse(self.graph, self.model).lingering.items()
        }
        self._idle = self._zero_rows()
        return plan or None

    def freeze(self) -> None:
        """Bit depths and exponents stay as they are from now on; dead channels still go."""
        self.frozen = True
        for layer in self.layers.values():
            layer.bit_depth.requires_grad_(False)
            layer.exponent.requires_grad_(False)

    def finish(self, loader: Iterable[Any], optimizer: Optimizer | None = None) -> None:
        """End of training: freeze, cut a last time, and re-estimate batch-norm statistics.

        While formats move, running statistics lag behind; those of the final network are
        averaged anew over `loader`, which gives batches (x, ...) or x. Only an optimiser that is
        given here can train the network on: of any other the cut parameters are the old ones.
        """
        self.freeze()
        self._idle = self._zero_rows()
        self.cut(optimizer)
        with kept_modes(self.model):
            update_bn(loader, self.model, device=self.example_input.device)
        settle_statistics(self.graph, self.model)

    def size(self) -> Size:
        """All the sizes of the model as it is now."""
        return measure(self.model, self.graph, self.starting_weights)

    def state_dict(self, optimizer: Optimizer | None = None) -> dict[str, Any]:
        """The cut model, its formats and, if given, its optimiser, as tensors and plain values.

        Raises:
            ValueError: the optimiser does not hold the model's weights as they are now.
        """
        if optimizer is not None:
            self._require_all_weights(optimizer)
        return {
            "model": self.model.state_dict(),
            "removed": torch.from_numpy(self.graph.removed.copy()),
            "silent": torch.from_numpy(self.graph.silent.copy()),
            "rows": {n: torch.from_numpy(r.copy()) for n, r in self.graph.origin.items()},
            "formats": self.formats.adam.state_dict(),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "optimizer_type": type(optimizer).__name__,
            "lingering": dict(self._lingering),
            "idle": dict(self._idle),
            "gamma": self.gamma,
            "frozen": self.frozen,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any], optimizer: Optimizer | None = None) -> None:
        """Cut a freshly built model to the saved one's shape, and load all that was saved.

        Args:
            state: what `state_dict` returned, perhaps in another process.
            optimizer: of the type that was saved, over `weights()` in the same order.

        γ becomes the saved one.

        Raises:
            RuntimeError: this compressor has cut its model already.
            ValueError: the state is of another model, or holds no optimiser though one is given.
        """
        if self.graph.removed.any() or self.steps:
            raise RuntimeError("load_state_dict needs a freshly built model and compressor")
        if optimizer is not None:
            if state["optimizer"] is None:
                raise ValueError("the state holds no optimiser: save state_dict(optimizer)")
            check_optimizer(optimizer)
            self._require_same_kind(state, optimizer)
        plan = self._plan_towards(state)
        self._apply(plan, optimizer)
        self.model.load_state_dict(state["model"])
        self.formats.adam.load_state_dict(state["formats"])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
        device = self.example_input.device
        self._lingering = {n: t.to(device) for n, t in state["lingering"].items()}
        self._idle = {n: t.to(device) for n, t in state["idle"].items()}
        self.gamma = state["gamma"]
        self.steps = state["steps"]
        if state["frozen"]:
            self.freeze()

    def _require_same_kind(self, state: dict[str, Any], optimizer: Optimizer) -> None:
        if state["optimizer_type"] != type(optimizer).__name__:
            raise ValueError(
                f"the state holds {state['optimizer_type']}, not {type(optimizer).__name__}"
            )
        saved = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
        if saved != [len(group["params"]) for group in optimizer.param_groups]:
            raise ValueError("the saved optimiser has other parameter groups")

    def _plan_towards(self, state: dict[str, Any]) -> Plan:
        """The plan that turns this uncut model into the saved one; all checks come before."""
        removed, silent, rows = state["removed"].numpy(), state["silent"].numpy(), state["rows"]
        if removed.shape != self.graph.removed.shape or rows.keys() != self.graph.origin.keys():
            raise ValueError("the saved state is of another model: its channels do not match")
        fits = all((kept < len(self.graph.origin[name])).all() for name, kept in rows.items())
        if not fits or state["model"].keys() != self.model.state_dict().keys():
            raise ValueError("the saved state is of another model: its layers do not match")
        kept = {name: r.numpy() for name, r in rows.items()}
        plan = make_plan(self.graph, self.model, removed, silent, kept)
        for name, tensor in self.model.state_dict().items():
            shape = list(tensor.shape)
            for dim, kept in plan.keep.get(name, []):
                shape[dim] = len(kept)
            saved = state["model"].get(name)
            if saved is None or list(saved.shape) != shape:
                raise ValueError(f"the saved state is of another model: {name} does not match")
        return plan

    def _apply(self, plan: Plan, optimizer: Optimizer | None) -> None:
        optimizers = [self.formats.adam] + ([] if optimizer is None else [optimizer])
        apply_plan(plan, self.model, optimizers)
        self.graph.remove(plan.removed)
        self.graph.silent[plan.silent] = True
        for name, kept in plan.rows.items():
            self.graph.origin[name] = self.graph.origin[name][np.array(kept, dtype=np.int64)]
        self.formats.watch()

    @torch.no_grad()
    def _keep_connected(self) -> None:
        """Let no layer die whole without which the output would not depend on the input."""
        alive = [layer.live_rows().any() for layer in self.layers.values()]
        dead: set[str] = set()
        for (name, layer), is_alive in zip(
            self.layers.items(), torch.stack(alive).tolist(), strict=True
        ):
            # An empty layer lost its rows in a cut, so the network is connected without it.
            if not is_alive and len(layer.rows):
                if self.graph.connected(dead | {name} | self._empty()):
                    dead.add(name)
                else:
                    strongest = layer.weight_by_row().flatten(1).norm(dim=1).argmax()
                    layer.bit_depth[strongest] = 2  # one bit has no level above zero
                    one = slice(int(strongest), int(strongest) + 1)
                    weight = layer.weight_by_row()[one]
                    layer.exponent[one] = fit_exponent(weight, layer.bit_depth[one])

    def _empty(self) -> set[str]:
        return {name for name, layer in self.layers.items() if len(layer.rows) == 0}

    @torch.no_grad()
    def _shrink_lingering_biases(self) -> None:
        for name, positions in self._lingering.items():
            bias = self.model.get_parameter(name)
            bias[positions] = F.softshrink(bias[positions], _BIAS_STEP)

    @torch.no_grad()
    def _zero_rows(self) -> dict[str, Tensor]:
        """By layer, the rows that have bits and yet quantise to nothing but zeros."""
        found = {}
        for name, layer in self.layers.items():
            if name in self.graph.origin:
                found[name] = (layer.zero_rows() & layer.live_rows()).nonzero().flatten()
        return found

    @torch.no_grad()
    def _update_idle(self) -> None:
        """Forget the rows that have come back to life since the last cut."""
        for name, idle in self._idle.items():
            if len(idle):
                self._idle[name] = idle[self.layers[name].zero_rows(among=idle)]

    def _require_all_weights(self, optimizer: Optimizer) -> None:
        """A parameter in another optimiser would stop learning, silently, at its first cut."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        names = {id(p): name for name, p in self.model.named_parameters()}
        for parameter in self.weights():
            if parameter.requires_grad and id(parameter) not in held:
                raise ValueError(
                    f"the optimiser does not hold {names[id(parameter)]}, which is trainable: use "
                    "one optimiser for all of weights(), or freeze it with requires_grad_(False)"
                )

    def _require_finite(self) -> None:
        for name, layer in self.layers.items():
            if not all(p.isfinite().all() for p in layer.parameters()):
                raise FloatingPointError(
                    f"the weights or formats of layer {name} are not finite: training has diverged"
                )


def _reads_elsewhere(model: nn.Module, example_input: Tensor) -> set[str]:
    """Run the float model once; a wrong input is told apart here from one we cannot trace."""
    try:
        return reads_elsewhere(model, example_input)
    except Exception as error:  # whatever the user's forward() does
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ValueError(f"the model does not accept example_input: {reason}") from error
