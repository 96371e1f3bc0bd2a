"""With every supported optimiser, training after a cut equals training without the cut.

The run without it is called `asleep`: its dead channels stay, with their biases held fixed.
"""

# mypy: disable-error-code="no-untyped-call"

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from networks import Residual, compressor_of, kill
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from selfcompress import Compressor
from selfcompress.graph.liveness import settle_statistics
from selfcompress.layers.quantized import QuantizedLayer
from selfcompress.surgery import OPTIMIZERS, Plan

Build = Callable[[Any], Optimizer]

KINDS: dict[str, Build] = {
    "sgd": lambda p: SGD(p, lr=0.02),
    "sgd-momentum": lambda p: SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-2),
    "sgd-nesterov": lambda p: SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "sgd-damped-foreach": lambda p: SGD(p, lr=0.02, momentum=0.9, dampening=0.1, foreach=True),
    "sgd-fused": lambda p: SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-2, fused=True),
    "adam": lambda p: Adam(p, lr=1e-2, weight_decay=1e-2),
    "adam-amsgrad": lambda p: Adam(p, lr=1e-2, amsgrad=True),
    "adam-foreach": lambda p: Adam(p, lr=1e-2, amsgrad=True, foreach=True),
    "adam-fused": lambda p: Adam(p, lr=1e-2, amsgrad=True, fused=True),
    "adam-tensor-lr": lambda p: Adam(p, lr=torch.tensor(1e-2)),
    "adamw": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-amsgrad": lambda p: AdamW(p, lr=1e-2, amsgrad=True),
    "adamw-foreach": lambda p: AdamW(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: AdamW(p, lr=1e-2, fused=True),
    "nadam": lambda p: NAdam(p, lr=1e-2, weight_decay=1e-2, decoupled_weight_decay=True),
    "nadam-foreach": lambda p: NAdam(p, lr=1e-2, foreach=True),
    "radam": lambda p: RAdam(p, lr=1e-2),
    "radam-foreach": lambda p: RAdam(p, lr=1e-2, foreach=True),
    "adamax": lambda p: Adamax(p, lr=1e-2),
    "adamax-foreach": lambda p: Adamax(p, lr=1e-2, foreach=True),
    "rmsprop": lambda p: RMSprop(p, lr=1e-3),
    "rmsprop-momentum": lambda p: RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "rmsprop-foreach": lambda p: RMSprop(p, lr=1e-3, momentum=0.9, foreach=True),
    "adagrad": lambda p: Adagrad(p, lr=1e-2, lr_decay=0.01, initial_accumulator_value=0.1),
    "adagrad-foreach": lambda p: Adagrad(p, lr=1e-2, foreach=True),
    "adagrad-fused": lambda p: Adagrad(p, lr=1e-2, fused=True),
}

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BEFORE, AFTER = range(3), range(3, 8)


class Run:
    """A residual network in training; two runs with the same arguments are bitwise equal."""

    def __init__(self, build: Build, groups: bool = False) -> None:
        torch.manual_seed(0)
        model = Residual(relu_after=False).double()
        self.compressor: Compressor = compressor_of(model, X, 0.0)
        self.model: nn.Module = model
        weights = self.compressor.weights()
        biases = [p for p in weights if p.dim() == 1]
        others = [p for p in weights if p.dim() > 1]
        parts: Any = [{"params": others}, {"params": biases, "lr": 5e-3}]
        self.optimizer = build(parts if groups else weights)
        self.losses: list[float] = []

    def train(self, steps: Iterable[int], after: Callable[[], None] = lambda: None) -> None:
        """Train for `steps`, with the same batches in every run, and call `after` after each."""
        self.model.train()
        for i in steps:
            x = torch.randn(X.shape, generator=torch.Generator().manual_seed(i), dtype=X.dtype)
            y = self.model(x)
            target = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
            loss = (y - target).square().sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.losses.append(float(loss.detach()))
            after()

    @torch.no_grad()
    def silence(self) -> None:
        """Kill rows of the stem, inside the branch and at its end; channel 3 dies on both paths."""
        for layer, norm, rows in (("stem.0", "stem.1", [0, 3]), ("one.0", "one.1", [1, 4])):
            kill(self.model, layer, rows)
            self.model.get_parameter(f"{norm}.bias")[rows] = -0.5
        kill(self.model, "two.0", [3, 5])
        self.model.get_parameter("two.1.bias")[[3, 5]] = 0
        settle_statistics(self.compressor.graph, self.model)

    def cut(self) -> Plan:
        plan = self.compressor.cut(self.optimizer)
        assert plan is not None
        assert {"stem.0.weight", "one.1.bias", "two.1.bias", "head.linear.weight"} <= (
            plan.keep.keys()
        )
        return plan

    def train_asleep(self, plan: Plan, after: Callable[[], None] = lambda: None) -> None:
        """Train on without a cut, with the biases held fixed that `plan` would cut."""
        was = {n: p.detach().clone() for n, p in self.model.named_parameters() if ".1.bias" in n}

        @torch.no_grad()
        def keep_asleep() -> None:
            for name, bias in was.items():
                for _, kept in plan.keep.get(name, []):
                    gone = torch.ones(len(bias), dtype=torch.bool)
                    gone[kept] = False
                    self.model.get_parameter(name)[gone] = bias[gone]
            after()

        self.train(AFTER, keep_asleep)


def select(tensor: Tensor, plan: Plan, name: str) -> Tensor:
    for dim, kept in plan.keep.get(name, []):
        tensor = tensor.index_select(dim, torch.tensor(kept, dtype=torch.int64))
    return tensor


def check_survivors(cut: Run, asleep: Run, plan: Plan) -> None:
    """Check that what a cut kept (weights, statistics, optimiser state) is as in `asleep`."""
    other = dict(asleep.model.named_parameters())
    for name, parameter in cut.model.named_parameters():
        want = select(other[name], plan, name)
        torch.testing.assert_close(parameter, want, rtol=1e-9, atol=1e-9, msg=name)
        for key, value in cut.optimizer.state.get(parameter, {}).items():
            want = asleep.optimizer.state[other[name]][key]
            if isinstance(value, Tensor) and value.dim():
                assert value.shape == parameter.shape
                want = select(want, plan, name)
            torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-9, msg=f"{name} {key}")
    buffers = dict(asleep.model.named_buffers())
    for name, buffer in cut.model.named_buffers():
        if "running" in name:
            want = select(buffers[name], plan, name)
            torch.testing.assert_close(buffer, want, rtol=1e-9, atol=1e-9, msg=name)


def test_every_supported_optimizer_is_tried() -> None:
    assert {type(build([nn.Parameter(torch.zeros(1))])) for build in KINDS.values()} == set(
        OPTIMIZERS
    )


@pytest.mark.parametrize("name", KINDS)
def test_training_goes_on_as_if_the_dead_were_only_asleep(name: str) -> None:
    cut, asleep = Run(KINDS[name]), Run(KINDS[name])
    for run in (cut, asleep):
        run.train(BEFORE)
        run.silence()
    start = {n: p.detach().clone() for n, p in cut.model.named_parameters()}
    plan = cut.cut()
    held = {id(p) for group in cut.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in cut.compressor.weights()}
    cut.train(AFTER)
    asleep.train_asleep(plan)
    assert cut.losses == pytest.approx(asleep.losses, rel=1e-9)
    check_survivors(cut, asleep, plan)
    for layer, module in cut.model.named_modules():
        if isinstance(module, QuantizedLayer):
            was = select(start[f"{layer}.weight"], plan, f"{layer}.weight")
            assert (module.weight - was).abs().max() > 1e-6, f"{layer} does not train"


@pytest.mark.parametrize("name", ["sgd-momentum", "adamw-fused", "rmsprop-momentum", "nadam"])
def test_several_parameter_groups_stay_apart(name: str) -> None:
    cut, asleep = Run(KINDS[name], groups=True), Run(KINDS[name], groups=True)
    for run in (cut, asleep):
        run.train(BEFORE)
        run.silence()
    groups = list(cut.optimizer.param_groups)
    plan = cut.cut()
    assert all(a is b for a, b in zip(groups, cut.optimizer.param_groups, strict=True))
    assert all(p.dim() > 1 for p in groups[0]["params"])
    assert all(p.dim() == 1 for p in groups[1]["params"])
    cut.train(AFTER)
    asleep.train_asleep(plan)
    check_survivors(cut, asleep, plan)


# --- schedules ------------------------------------------------------------------------------------


def plateau(optimizer: Optimizer) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.9)


SCHEDULES: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "one-cycle": lambda o: OneCycleLR(o, 0.02, total_steps=10),
    "cosine": lambda o: CosineAnnealingLR(o, 10),
    "plateau": plateau,
    "lambda": lambda o: LambdaLR(o, lambda step: 0.9**step),
    "sequential": lambda o: SequentialLR(
        o, [LambdaLR(o, lambda step: 0.2 * (step + 1)), CosineAnnealingLR(o, 6)], milestones=[4]
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw", "rmsprop", "adam-tensor-lr"])
def test_schedules_go_on(name: str, schedule: str) -> None:
    """Learning-rate schedulers keep acting on the optimiser's parameter groups after a cut."""
    runs = Run(KINDS[name]), Run(KINDS[name])
    schedulers = [SCHEDULES[schedule](run.optimizer) for run in runs]
    rates: list[list[float]] = [[], []]

    def after(i: int) -> Callable[[], None]:
        def step() -> None:
            scheduler = schedulers[i]
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(runs[i].losses[-1])
            else:
                scheduler.step()
            rates[i].append(float(runs[i].optimizer.param_groups[0]["lr"]))

        return step

    for i, run in enumerate(runs):
        run.train(BEFORE, after(i))
        run.silence()
    (group,) = runs[0].optimizer.param_groups
    plan = runs[0].cut()
    assert runs[0].optimizer.param_groups == [group] and runs[0].optimizer.param_groups[0] is group
    assert schedulers[0].optimizer is runs[0].optimizer
    runs[0].train(AFTER, after(0))
    runs[1].train_asleep(plan, after(1))
    assert rates[0] == rates[1]
    assert len(set(rates[0][len(BEFORE) :])) > 1
    check_survivors(runs[0], runs[1], plan)


# --- what is refused ------------------------------------------------------------------------------


class MySGD(SGD):
    """A user's subclass of SGD, which may keep anything in its state."""


REFUSED: dict[str, Build] = {
    "ASGD": ASGD, "LBFGS": LBFGS, "Adadelta": Adadelta, "Rprop": Rprop,
    "MySGD": lambda p: MySGD(p, lr=0.1),
}  # fmt: skip


def everything(compressor: Compressor, optimizer: Optimizer) -> Any:
    """Return a copy of everything that a step or a cut could change."""
    tensors = {n: t.detach() for n, t in compressor.model.named_parameters()}
    tensors |= dict(compressor.model.named_buffers())
    formats = compressor.formats.adam.state_dict()["state"]
    return copy.deepcopy((tensors, optimizer.state_dict()["state"], formats, compressor.steps))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("call", ["step", "cut"])
def test_other_optimizers_are_refused_before_anything_changes(name: str, call: str) -> None:
    run = Run(REFUSED[name])
    loss = run.model(X).square().sum() + run.compressor.penalty()
    loss.backward()
    if name != "LBFGS":
        run.optimizer.step()
    run.silence()
    parameters = [id(p) for p in run.model.parameters()]
    before = everything(run.compressor, run.optimizer)
    with pytest.raises(TypeError, match=rf"\b{name} is not supported.*SGD, Adam, AdamW"):
        getattr(run.compressor, call)(run.optimizer)
    assert [id(p) for p in run.model.parameters()] == parameters
    torch.testing.assert_close(everything(run.compressor, run.optimizer), before, rtol=0, atol=0)
    assert not run.compressor.graph.removed.any()
    assert run.compressor.cuts == 0


@pytest.mark.parametrize("name", REFUSED)
def test_they_are_refused_when_a_state_is_loaded(name: str) -> None:
    """load_state_dict() refuses unsupported optimisers before it changes anything."""
    saved, run = Run(KINDS["sgd"]), Run(REFUSED[name])
    saved.silence()
    saved.cut()
    state = saved.compressor.state_dict(saved.optimizer) | {"optimizer_type": name}
    before = everything(run.compressor, run.optimizer)
    with pytest.raises(TypeError, match=name):
        run.compressor.load_state_dict(state, run.optimizer)
    torch.testing.assert_close(everything(run.compressor, run.optimizer), before, rtol=0, atol=0)
