"""Self-compression in your own training loop: `Compressor`, the library's main class."""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from selfcompress.convert import quantize_layers
from selfcompress.first_run import expect_samples, observe_float, observe_quantised, warn_of_idle
from selfcompress.formats import FIT_INTERVAL, FormatStepper
from selfcompress.graph.connection import Connection
from selfcompress.graph.fast_widths import fast_multiple
from selfcompress.graph.follow import channel_graph
from selfcompress.graph.liveness import analyse, settle_statistics
from selfcompress.graph.planner import plan_cut
from selfcompress.idle_rows import IdleRows
from selfcompress.inputs import Inputs, batch_size, batches_like, moved_with, place_of
from selfcompress.layers.quantized import QuantizedLayer, quantized_layers, weights_of
from selfcompress.lingering_biases import LingeringBiases, clear_lingering
from selfcompress.quantizer import MAX_BITS
from selfcompress.reestimate import reestimate
from selfcompress.report import Report, make_report
from selfcompress.restore import plan_towards, require_same_kind, require_same_order
from selfcompress.schedule import Schedule
from selfcompress.size import Size, measure, q_bits, starting_weights
from selfcompress.size_path import SizePath
from selfcompress.surgery import Plan, apply_plan, check_optimizer
from selfcompress.undisturbed import detached_copy, without_compile
from selfcompress.verify import check_cut, snapshot

_WORTH_RECOMPILING = 0.05  # with torch.compile in use, cut only if this share of parameters goes
_MISSED = 1.05  # warn when the size or the number of steps exceeds the one asked for by over 5 %


class Compressor:
    """Quantise a model in place and shrink it while your own loop trains it.

    Every output channel of a quantised layer has a bit depth and an exponent. Channels that lose
    all their bits are cut out of the model and the optimiser's state during training.

    Example:
        schedule = selfcompress.Schedule(steps=epochs * len(loader))
        compressor = selfcompress.Compressor(model, example_input, gamma=0.01, schedule=schedule)
        optimizer = torch.optim.AdamW(compressor.weights(), lr=1e-3)
        for epoch in range(epochs):
            for x, y in loader:
                loss = F.cross_entropy(model(x), y) + compressor.penalty()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                compressor.step(optimizer)
        compressor.finish(loader, optimizer)

    Args:
        model: the network. Its convolutions, linear and recurrent layers, embeddings and attention
            are replaced by quantised versions that hold the same parameter objects. It may be
            trained already: with `bits=8` it starts as accurate as it was.
        example_input: a batch that the model accepts, on the model's device; a tuple holds several
            positional arguments. It is used to trace the model and to check every cut, so a few
            real inputs serve best. With more than one sample, its batch size also shows which
            dimension of each layer's input, if any, counts samples.
        gamma: γ of eq. (2), the weight of the size in the loss: the larger, the smaller and less
            accurate the network. May be assigned at any time (`compressor.gamma = ...`), for a
            schedule of your own.
        stored_percent: the size to end at, as `size().stored_percent` reports it; give this or
            `gamma`. γ is then set automatically until the schedule ends the penalty, and a value
            assigned to it does not last. Needs a `schedule`, and a model that `copy.deepcopy` can
            copy.
        bits: the bit depth that every channel starts at.
        integer_bits: round bit depths up to whole bits in the forward pass, so that the sizes
            reported can be stored. False is the paper's fractional bit depth.
        exclude: names of layers, or of modules that contain layers, to leave in float. Their
            weights count as 32 bits each.
        min_channels: the least number of rows (output channels) with bits in every layer; a layer
            that has fewer keeps all. With 0 a whole residual branch may go, but a layer without
            which the output would not depend on the input keeps one row.
        interval: number of steps between two cuts. Once torch.compile has compiled anything, a cut
            waits until it removes 5 % of the parameters, because torch recompiles after it.
        bit_step: the largest change of a bit depth in one step, in bits; it is 8 times as large
            for a channel that is given up. At 0.01 such a channel loses 4 bits within about 30
            steps, and a channel that needs fewer bits loses one within 50. None is the schedule's
            `bit_step`, or 0.01 without a schedule.
        schedule: the course of the penalty in a training of known length. Without one, the full
            γ applies from the first step on.
        multiple: for speed, keep as many dead channels until `finish` as make the widths of
            tensors, where possible, multiples of this number or what they were at the start. Above
            1, batch norms and depthwise convolutions also keep the same channels in input and
            output if few differ. Dead channels that are kept have no weights or norm entries; a
            bias may remain, which nothing reads. None is 16 if the weight of a convolution is in
            channels_last, where other widths are slow, else 1.

    Attributes:
        model: the compressed model (not the wrapper that torch.compile returns).
        layers: its quantised layers by name.
        left_in_float: name → reason, for every module with weights that is not quantised.
        steps: number of calls of `step` so far.
        cuts: number of cuts so far.
        frozen: whether bit depths and exponents are no longer stepped.

    Raises:
        ValueError: an argument is out of range; both or neither of `gamma` and `stored_percent`
            are given; the model cannot reach `stored_percent`, or cannot be copied for it; a name
            in `exclude` does not exist; the model does not accept `example_input`, has lazy layers
            without shapes, has nothing to quantise, or is compressed already; torch.distributed
            runs several processes.
        TypeError: `model` is not an `nn.Module`.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Inputs,
        gamma: float | None = None,
        *,
        stored_percent: float | None = None,
        bits: float = 8,
        integer_bits: bool = True,
        exclude: Iterable[str] = (),
        min_channels: int = 0,
        interval: int = 50,
        bit_step: float | None = None,
        schedule: Schedule | None = None,
        multiple: int | None = None,
    ) -> None:
        if not isinstance(schedule, Schedule | None):
            raise ValueError(f"schedule must be a selfcompress.Schedule, not {schedule!r}")
        if (gamma is None) == (stored_percent is None):
            raise ValueError("give either gamma or stored_percent, the size to end at")
        if stored_percent is not None and not 0 < stored_percent < math.inf:
            raise ValueError(f"stored_percent must be a number above 0, not {stored_percent}")
        if stored_percent is not None and schedule is None:
            raise ValueError("stored_percent needs a schedule")
        if not 0 < bits <= MAX_BITS:
            raise ValueError(f"bits must be above 0 and at most {MAX_BITS}, not {bits}")
        if integer_bits and bits != int(bits):
            raise ValueError(f"bits must be a whole number unless integer_bits=False, not {bits}")
        if bit_step is not None and not bit_step > 0:
            raise ValueError(f"bit_step must be above 0, not {bit_step}")
        if min_channels < 0:
            raise ValueError(f"min_channels must be at least 0, not {min_channels}")
        if interval < 1:
            raise ValueError(f"interval must be at least 1 step, not {interval}")
        if multiple is not None and multiple < 1:
            raise ValueError(f"multiple must be at least 1 channel, not {multiple}")
        _require_one_process()
        exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.gamma = 0.0 if gamma is None else gamma
        self.multiple = multiple
        self.model = model = without_compile(model)
        self.example_input = example_input
        self.schedule = schedule
        self.bits = bits
        self.interval = interval
        self.frozen = False
        # Options that loading a state does not restore; `load_state_dict` warns where they differ.
        self._asked: dict[str, Any] = {
            "schedule": None if schedule is None else repr(schedule),
            "stored_percent": None if stored_percent is None else float(stored_percent),
            "gamma": None if gamma is None else float(gamma),
            "bits": float(bits),
            "integer_bits": bool(integer_bits),
            "exclude": sorted(exclude),
            "min_channels": int(min_channels),
            "bit_step": None if bit_step is None else float(bit_step),
        }
        self.steps = 0
        self.cuts = 0
        if quantized_layers(model):
            raise ValueError("the model is compressed already: build a fresh one")
        lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
        if lazy:
            raise ValueError(f"{lazy[0]} has no shape yet (a lazy layer): run the model once first")
        observed = observe_float(model, example_input)
        self.starting_weights = starting_weights(model)
        self.left_in_float = quantize_layers(
            model,
            bits=bits,
            integer_bits=integer_bits,
            exclude=exclude,
            read_elsewhere=observed.read_elsewhere,
            rewritten=observed.rewritten,
        )
        self.layers = quantized_layers(model)
        observed = observe_quantised(model, example_input)
        expect_samples(self.layers, observed, batch_size(example_input))
        self.graph = channel_graph(model, example_input, observed)
        warn_of_idle(model, self.graph, self.layers, observed)
        if bit_step is None:
            bit_step = 0.01 if schedule is None else schedule.bit_step
        self._norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
        self._place = place_of(model)  # that example_input is for
        self.formats = FormatStepper(
            self.layers,
            self.starting_weights,
            bits,
            bit_step,
            told_apart=batch_size(example_input) > 1,
        )
        self.lingering = LingeringBiases(self.graph, model)
        self.connection = Connection(self.graph, self.layers, min_channels)
        traced = {n: layer for n, layer in self.layers.items() if n in self.graph.origin}
        self.idle = IdleRows(traced)
        # Sets γ if a size is asked for: here in stored bits; train.py puts one in bytes here.
        self.path = None if stored_percent is None else self._path_to(stored_percent)

    def _path_to(self, stored_percent: float) -> SizePath | None:
        """Return the path to a size in stored bits, or warn and return None if it is reached."""
        assert self.schedule is not None
        self.schedule = dataclasses.replace(self.schedule, rise=False)  # the path raises γ
        try:
            start = self.size()
            smallest = measure(self.smallest(), None, self.starting_weights)
        except TypeError as error:
            raise ValueError(
                f"stored_percent needs a model that copy.deepcopy can copy, which failed: {error}"
            ) from error
        target, least = stored_percent / 100 * start.float_bits, smallest.stored_bits
        if target < least:
            largest = max(smallest.layers, key=lambda layer: layer.stored_bits).name
            largest = largest or "the model's own parameters"
            raise ValueError(
                f"stored_percent={stored_percent:g} is less than the network can have: what is in "
                "float or frozen and the rows that have to stay store "
                f"{100 * least / start.float_bits:.3g} %, most of it in {largest}. "
                "Layers that you will thaw: freeze them after making the Compressor"
            )
        if target >= start.stored_bits:
            warnings.warn(
                f"stored_percent={stored_percent:g} has no effect: the network has "
                f"{start.stored_percent:.3g} % at its {self.bits:g} starting bits",
                stacklevel=3,
            )
            return None
        return SizePath(
            target,
            least,
            start,
            self.schedule,
            self.formats,
            measure=lambda: self._stored_bits(self.preview(settled=True)),
        )

    def _stored_bits(self, model: nn.Module) -> int:
        return measure(model, None, self.starting_weights).stored_bits

    @property
    def gamma(self) -> float:
        """γ of eq. (2), before the schedule scales it; may be assigned."""
        return self._gamma

    @gamma.setter
    def gamma(self, value: float) -> None:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"gamma must be a number ≥ 0, not {value}")
        self._gamma = float(value)

    @property
    def price(self) -> float:
        """γ at the current step: `gamma` times the fraction that the schedule applies."""
        return self.gamma * (1.0 if self.schedule is None else self.schedule.share(self.steps))

    def _least_bits(self) -> float:
        return 2.0 if self.schedule is None else self.schedule.least_bits(self.steps, self.bits)

    def weights(self) -> list[nn.Parameter]:
        """Return the parameters for your optimiser: all but the bit depths and exponents."""
        return weights_of(self.model)

    def penalty(self) -> Tensor:
        """Return the scalar γ·Q of eq. (2) and (3), at the current γ, to add to the task's loss.

        Add it as it is: its gradient shows what the whole loss was multiplied with.
        """
        penalty = self.price / self.starting_weights * q_bits(list(self.layers.values()))
        if penalty.requires_grad:
            penalty.register_hook(self._came_back)
        return penalty

    def _came_back(self, gradient: Tensor) -> None:
        """Note the loss scale, and batch norms' modes: in backward() they are those of training."""
        self._note_eval_norms()
        self.formats.note_loss_scale(gradient)

    def _note_eval_norms(self) -> None:
        self.graph.eval_norms = {name for name, norm in self._norms.items() if not norm.training}

    def step(self, optimizer: Optimizer, averages: Sequence[nn.Module] = ()) -> Plan | None:
        """Step bit depths and exponents, and every `interval` steps cut dead channels.

        Call it once after every `optimizer.step()`.

        Args:
            optimizer: the optimiser of all trainable weights, whose state is cut with the model.
            averages: copies of the model to cut along with it, such as an `AveragedModel`. They
                are given the model's bit depths and exponents, which must not be averaged.

        Returns:
            The plan that was applied, or None if nothing was cut.

        Raises:
            TypeError: the optimiser's state cannot be cut; nothing has been changed.
            ValueError: the optimiser does not hold all trainable weights, an average has other
                parameters than the model, or modules or parameters of the model were replaced
                since the Compressor was made; nothing has been changed.
            CutError: a cut changed what the network computes; the model stays cut.
            FloatingPointError: a parameter of a quantised layer was not finite at a cut.
        """
        due = (self.steps + 1) % self.interval == 0
        if self.steps == 0 or due:
            self._require_cuttable(optimizer)
        self._require_alike(averages)
        if not self.frozen:
            gamma = None if self.path is None else self.path.gamma(self.steps)
            if gamma is not None:
                self.gamma = gamma
            fit = (self.steps + 1) % FIT_INTERVAL == 0
            self.formats.step(self.price, self._least_bits(), self.connection.least_rows(), fit=fit)
            self._keep_alike(averages)
        self.steps += 1
        if self.schedule is not None and self.steps == math.ceil(_MISSED * self.schedule.steps) + 1:
            warnings.warn(
                f"the schedule was of {self.schedule.steps} steps, but training goes on: give "
                "Schedule the number of all steps, epochs * len(loader)",
                stacklevel=2,
            )
        if self.schedule is not None and self.schedule.ended(self.steps) and not self.frozen:
            self.freeze()
            if self.path is not None:  # its sizes count lingering biases as zero
                self.lingering.look()
        self.lingering.shrink()
        self.idle.update()
        if not due:
            return None
        return self._cut(optimizer, averages, patient=_compiled_anything())

    def cut(
        self, optimizer: Optimizer | None = None, averages: Sequence[nn.Module] = ()
    ) -> Plan | None:
        """Cut all channels that are dead now out of the model and the optimiser's state.

        Rows that quantised to zero at every step since the last cut lose their bits first. Dead
        channels that are kept for speed stay until `finish` (see `multiple`).

        Args:
            optimizer, averages: as in `step`; without an optimiser, only the model is cut.

        Returns:
            The plan that was applied, or None if there was nothing to cut.

        Raises:
            TypeError, ValueError, CutError, FloatingPointError: as in `step`.
        """
        return self._cut(optimizer, averages)

    @torch.no_grad()
    def _cut(
        self,
        optimizer: Optimizer | None,
        averages: Sequence[nn.Module],
        patient: bool = False,
    ) -> Plan | None:
        """Do what `cut` does; if `patient`, only if the plan is worth recompiling the model."""
        self._require_cuttable(optimizer)
        self._require_alike(averages)
        self._require_finite()
        self.idle.give_up()
        self.connection.keep()
        self._keep_alike(averages)
        settle_statistics(self.graph, self.model)
        multiple = self.multiple or fast_multiple(self.model)
        plan = plan_cut(self.graph, self.model, analyse(self.graph, self.model), multiple)
        worth_it = not patient or _worth_recompiling(plan, self.model)
        if plan and worth_it:
            self._follow_model()
            before = snapshot(self.model, self.example_input)
            self._apply(plan, optimizer)
            for average in averages:
                apply_plan(plan, _averaged(average))
            self.cuts += 1
            # Past its limit of recompilations torch would silently go on without compiling.
            if _compiled_anything():
                torch.compiler.reset()
            check_cut(self.model, self.example_input, before, plan)
        self.lingering.look()
        self.idle.look()
        return plan if plan and worth_it else None

    @torch.no_grad()
    def _keep_alike(self, averages: Iterable[nn.Module]) -> None:
        """Copy the model's bit depths and exponents to `averages`, where they would lag behind."""
        for average in map(_averaged, averages):
            for name, layer in self.layers.items():
                twin = average.get_submodule(name)
                assert isinstance(twin, QuantizedLayer)
                twin.bit_depth.copy_(layer.bit_depth)
                twin.exponent.copy_(layer.exponent)

    @torch.no_grad()
    def preview(self, *, settled: bool = False) -> nn.Module:
        """Return a copy of the model from which all that has no bits now has been cut.

        Args:
            settled: in the copy, set lingering biases (see `lingering_biases.py`) to zero first,
                as training will have done in the end.
        """
        model = detached_copy(self.model, {id(self): self})  # a model may hold its compressor
        settle_statistics(self.graph, model)
        if settled:
            clear_lingering(self.graph, model)
        apply_plan(plan_cut(self.graph, model, analyse(self.graph, model)), model)
        return model

    @torch.no_grad()
    def smallest(self) -> nn.Module:
        """Return a copy of the model with only the rows that the output and `min_channels` need.

        Layers whose weight is frozen keep their rows. Lingering biases are zero, as in
        `preview(settled=True)`.
        """
        formats = [p for m in self.layers.values() for p in (m.bit_depth, m.exponent)]
        before = [p.clone() for p in formats]
        try:
            for layer in self.layers.values():
                if layer.weight.requires_grad:  # else its rows are never judged, and stay
                    layer.bit_depth.zero_()
            self.connection.keep()
            return self.preview(settled=True)
        finally:
            for parameter, value in zip(formats, before, strict=True):
                parameter.copy_(value)

    def freeze(self) -> None:
        """Stop stepping bit depths and exponents for good; dead channels are still cut."""
        if self.frozen:
            return
        self.frozen = True
        self.formats.retire()

    def finish(
        self,
        loader: Iterable[Any],
        optimizer: Optimizer | None = None,
        averages: Sequence[nn.Module] = (),
    ) -> None:
        """End the training: freeze, cut a last time, and re-estimate batch-norm statistics.

        This cut and later ones keep no dead channels for speed (`multiple` becomes 1). Running
        statistics lag behind while bit depths and exponents change, so those of the final network
        are averaged over `loader`. Batch norms that were in eval mode at the last backward() keep
        theirs.

        Args:
            loader: batches (x, ...), ((x, ...), ...) or x to average over. If `example_input` is a
                tuple, the first items of a batch are taken, as many as the tuple has.
            optimizer: the optimiser, if training is to go on: the cut replaces parameters, and an
                optimiser that is not given here keeps the old ones.
            averages: copies of the model to cut and re-estimate along with it, as in `step`. They
                may then be evaluated and saved like the model.

        Raises:
            TypeError, ValueError, CutError, FloatingPointError: as in `step` and `reestimate`.
        """
        if self.schedule is not None and not self.frozen:
            warnings.warn(
                f"the schedule is of {self.schedule.steps} steps, and compressor.step() was called "
                f"{self.steps} times: the network is larger than it was to be",
                stacklevel=2,
            )
        self._require_cuttable(optimizer)
        self._require_alike(averages)
        self.freeze()
        self.multiple = 1
        self.idle.look()
        self.cut(optimizer, averages)
        self.reestimate(loader, averages)
        if self.path is not None and self._asked["stored_percent"] is not None:
            self._warn_if_missed(self.path.target)

    def _warn_if_missed(self, target: float) -> None:
        """Warn if the network stores over 5 % more than the `target`, in stored bits."""
        size = self.size()
        if size.stored_bits > _MISSED * target:
            warnings.warn(
                f"the network stores {size.stored_percent:.3g} %, not the "
                f"{100 * target / size.float_bits:.3g} % asked for: train for more steps",
                stacklevel=3,
            )

    def reestimate(self, loader: Iterable[Any], averages: Sequence[nn.Module] = ()) -> None:
        """Re-estimate the batch-norm statistics of the model and `averages`, as `finish` does.

        Call it before an evaluation in the middle of training: while bit depths and exponents
        change, running statistics lag behind.

        Args:
            loader, averages: as in `finish`.

        Raises:
            ValueError: `loader` has no batches though there are norms that need some, or a batch
                is of an unsupported type.
        """
        models = [self.model, *map(_averaged, averages)]
        # Modes are noted in backward(), which may not have run yet.
        if self.model.training and not self.graph.eval_norms:
            self._note_eval_norms()
        self._follow_model()
        reestimate(models, batches_like(self.example_input, loader), self.graph.eval_norms)
        for model in models:
            settle_statistics(self.graph, model, measured=True)

    def report(self) -> Report:
        """Return, by layer, whether it is quantised, how many channels can go, and if not, why."""
        return make_report(self.model, self.graph, self.left_in_float)

    def __str__(self) -> str:
        return str(self.report())

    def size(self, *, fold_norms: bool = False, half: bool = False) -> Size:
        """Return all the sizes of the model as it is now, in total and by layer.

        Args:
            fold_norms, half: how it is to be stored; see `selfcompress.save`.
        """
        return measure(
            self.model, self.graph, self.starting_weights, fold_norms=fold_norms, half=half
        )

    def __reduce__(self) -> NoReturn:
        """Refuse `copy.deepcopy` and pickle: hooks of the copy would be those of the original."""
        raise TypeError(
            "a Compressor cannot be copied or pickled: give its state_dict() to a fresh one, and "
            "do not keep it in a model that is to be copied"
        )

    def state_dict(self, optimizer: Optimizer | None = None) -> dict[str, Any]:
        """Return the state of the cut model, the compressor and, if given, the optimiser.

        Returns:
            A dict of tensors and plain values, for `load_state_dict`.

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
            "columns": {n: torch.from_numpy(c.copy()) for n, c in self.graph.columns.items()},
            "formats": self.formats.state_dict(),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "optimizer_type": type(optimizer).__name__,
            "lingering": dict(self.lingering.positions),
            "idle": self.idle.still(),
            "gamma": self.gamma,
            "frozen": self.frozen,
            "steps": self.steps,
            "cuts": self.cuts,
            "eval_norms": sorted(self.graph.eval_norms),
            "path": None if self.path is None else self.path.state_dict(),
            "asked": dict(self._asked),
        }

    def load_state_dict(self, state: dict[str, Any], optimizer: Optimizer | None = None) -> None:
        """Cut a freshly built model to the shape of the saved one, and load all that was saved.

        γ becomes what it was when saved, unless this compressor was made with another `gamma`. All
        other options stay those of this compressor; warnings name those that differ, except
        `interval` and `multiple`, which are not saved.

        Args:
            state: what `state_dict` returned, perhaps in another process.
            optimizer: of the type that was saved, over `weights()` in the same order.

        Raises:
            RuntimeError: this compressor has taken a step or cut its model already.
            ValueError: the state is of another model, or does not fit the optimiser given.
            TypeError: the optimiser's state cannot be cut.
        """
        if self.graph.removed.any() or self.steps:
            raise RuntimeError("load_state_dict needs a freshly built model and compressor")
        if optimizer is not None:
            if state["optimizer"] is None:
                raise ValueError("the state holds no optimiser: save state_dict(optimizer)")
            check_optimizer(optimizer)
            require_same_kind(state, optimizer)
        plan = plan_towards(state, self.graph, self.model)
        if optimizer is not None:
            require_same_order(state, optimizer, self.model)
        self._apply(plan, optimizer)
        self.model.load_state_dict(state["model"])
        self.formats.load_state_dict(state["formats"])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
        self.lingering.load(state["lingering"])
        self.idle.load(state["idle"])
        self.graph.eval_norms = set(state.get("eval_norms", ()))
        if state["asked"].get("gamma", self._asked["gamma"]) == self._asked["gamma"]:
            self.gamma = state["gamma"]
        if self.path is not None and state["path"]:
            self.path.load_state_dict(state["path"])
        self.steps, self.cuts = state["steps"], state["cuts"]
        if state["frozen"]:
            self.freeze()
        for name, value in self._asked.items():
            saved = state["asked"].get(name, value)
            if saved != value:
                warnings.warn(
                    f"the saved training had {name}={saved}, this one has {value}", stacklevel=2
                )

    def _apply(self, plan: Plan, optimizer: Optimizer | None) -> None:
        optimizers = [self.formats.adam] + ([] if optimizer is None else [optimizer])
        apply_plan(plan, self.model, optimizers)
        self.graph.shrink(plan.removed, plan.silent, plan.rows, plan.columns)
        if not self.frozen:
            self.formats.watch()

    def _follow_model(self) -> None:
        """Move and cast `example_input` as the model was since the last call."""
        place = place_of(self.model)
        self.example_input = moved_with(self.example_input, self._place, place)
        self._place = place

    def _require_cuttable(self, optimizer: Optimizer | None) -> None:
        _require_one_process()
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for name, module in (*self.layers.items(), *self._norms.items()):
            if modules.get(name) is not module:
                raise ValueError(
                    f"{name} is not the module that it was when the Compressor was made: replace "
                    "or wrap modules before that"
                )
        for name, layer in self.layers.items():
            if not self.frozen and not self.formats.watches(layer):
                raise ValueError(
                    f"{name}.weight, or its bit depth or exponent, is another parameter than when "
                    "the Compressor was made: replace it before that, or copy values into it"
                )
        if optimizer is not None:
            check_optimizer(optimizer)
            self._require_all_weights(optimizer)

    def _require_alike(self, averages: Sequence[nn.Module]) -> None:
        if not averages:
            return
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        for average in averages:
            if {n: p.shape for n, p in _averaged(average).named_parameters()} != shapes:
                raise ValueError(
                    "an average has other parameters than the model: make it after the "
                    "Compressor, and give it to every step, cut and finish"
                )

    def _require_all_weights(self, optimizer: Optimizer) -> None:
        """Refuse an optimiser that lacks trainable weights: cuts replace them in this one alone."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        names = {id(p): name for name, p in self.model.named_parameters()}
        for parameter in self.weights():
            if parameter.requires_grad and id(parameter) not in held:
                raise ValueError(
                    f"the optimiser does not hold {names[id(parameter)]}, which is trainable: use "
                    "one optimiser for all of weights() and give it to every step, cut and finish, "
                    "or freeze the parameter with requires_grad_(False)"
                )

    def _require_finite(self) -> None:
        finite = [
            torch.stack([p.isfinite().all() for p in layer.parameters()]).all()
            for layer in self.layers.values()
        ]
        for name, holds in zip(self.layers, torch.stack(finite).tolist(), strict=True):
            if not holds:
                raise FloatingPointError(
                    f"the weights or formats of layer {name} are not finite: training has diverged "
                    "(try a smaller learning rate)"
                )


def _averaged(model: nn.Module) -> nn.Module:
    """Return the model inside an `AveragedModel` or inside what torch.compile returned."""
    return without_compile(model.module if isinstance(model, AveragedModel) else model)


def _require_one_process() -> None:
    """Refuse a training that torch.distributed has spread over several processes."""
    distributed = torch.distributed
    started = distributed.is_available() and distributed.is_initialized()
    if started and distributed.get_world_size() > 1:
        raise ValueError(
            "training in several processes (torch.distributed) is not supported: each would cut "
            "channels of its own choice"
        )


def _compiled_anything() -> bool:
    return bool(torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0)


def _worth_recompiling(plan: Plan, model: nn.Module) -> bool:
    """Return whether `plan` cuts enough parameters to pay for recompiling the model."""
    before = after = 0
    for name, parameter in model.named_parameters():
        size, kept = parameter.numel(), 1.0
        for dim, indices in plan.keep.get(name, []):
            kept *= len(indices) / parameter.shape[dim]
        before, after = before + size, after + round(size * kept)
    return after <= (1 - _WORTH_RECOMPILING) * before
