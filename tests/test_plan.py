"""Plans are plain data, which can be printed and applied to other copies of a model in turn."""

# mypy: disable-error-code="no-untyped-call"

import copy
import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from networks import NETWORKS, Cut, kill, prepare
from torch import Tensor, nn
from torch.optim import AdamW

from selfcompress import Compressor
from selfcompress.convert import quantize_layers
from selfcompress.layers.quantized import quantized_layers
from selfcompress.surgery import Plan, apply_plan


@torch.no_grad()
def kill_some(cut: Cut, seed: int) -> None:
    """Kill half of the rows of every layer; layers' biases become 0, and those of norms ≤ 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, layer in quantized_layers(cut.model).items():
        rows = len(layer.rows)
        dead = torch.randperm(rows, generator=generator)[: rows // 2]
        kill(cut.model, name, dead)
        if layer.bias is not None:
            layer.bias.zero_()
    for norm in cut.model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.bias is not None:
            norm.bias.copy_(-norm.bias.abs())


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def check_equal(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(tensors(one), tensors(other), rtol=0, atol=0)
    for (name, a), b in zip(one.named_modules(), other.modules(), strict=True):
        plain = {k: v for k, v in vars(a).items() if isinstance(v, (int, bool))}
        assert plain == {k: vars(b)[k] for k in plain}, name
    for training in (False, True):
        y, want = (copy.deepcopy(m).train(training)(x) for m in (one, other))
        assert torch.equal(y, want)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_plan_replays_on_a_fresh_quantised_copy(name: str) -> None:
    cut = prepare(name, torch.float64)
    build, exclude = NETWORKS[name]
    fresh = build()
    quantize_layers(fresh, bits=8, exclude=exclude)
    fresh.double()
    kill_some(cut, 0)
    cut.settle()
    fresh.load_state_dict(cut.model.state_dict())
    plan = cut.plan()
    assert plan
    json.dumps(asdict(plan))  # raises an error if there is anything but plain data
    before = copy.deepcopy(plan)
    cut.apply(plan)
    apply_plan(plan, fresh)
    assert plan == before
    check_equal(fresh, cut.model, cut.x)


@pytest.mark.parametrize("name", NETWORKS)
def test_two_plans_one_after_the_other(name: str) -> None:
    cut = prepare(name, torch.float64)
    replayed = copy.deepcopy(cut.model)
    plans = []
    for seed in range(2):
        kill_some(cut, seed)
        cut.settle()
        plan = cut.plan()
        cut.apply(plan)
        plans.append(plan)
        # A plan changes shapes; the values that have changed since are copied.
        apply_plan(plan, replayed)
        replayed.load_state_dict(cut.model.state_dict())
        check_equal(replayed, cut.model, cut.x)
    fresh = prepare(name, torch.float64).model
    for plan in plans:
        apply_plan(plan, fresh)
    fresh.load_state_dict(cut.model.state_dict())
    check_equal(fresh, cut.model, cut.x)


def test_the_plans_that_a_compressor_returns_replay() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    models = [NETWORKS["residual"][0]() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    compressor, other = (Compressor(m, x, 1.0, interval=10, bit_step=0.2) for m in models)
    optimizer = AdamW(compressor.weights(), lr=3e-3)
    plans = []
    for _ in range(100):
        optimizer.zero_grad()
        (compressor.model(x).square().mean() + compressor.penalty()).backward()
        optimizer.step()
        plan = compressor.step(optimizer)
        if plan is not None:
            plans.append(plan)
    assert len(plans) == compressor.cuts >= 2
    for plan in plans:
        apply_plan(plan, other.model)
    other.model.load_state_dict(compressor.model.state_dict())
    check_equal(other.model, compressor.model, x)


def test_a_plan_reads_well() -> None:
    cut = prepare("chain")
    assert str(cut.plan()) == "nothing to cut"
    assert not cut.plan()
    kill(cut.model, "a.0", [1, 4])
    cut.model.get_parameter("a.1.bias").data[[1, 4]] = -1.0
    lines = str(cut.plan()).splitlines()
    assert "a.0.weight: keeps 4 of dim 0" in lines
    assert "b.0.weight: keeps 4 of dim 1" in lines
    assert len(lines) == len(cut.plan().keep)
    # A channel that was kept to round a width up has no weights or entries left to be cut later.
    cut.apply(cut.plan(multiple=6))
    assert cut.plan()
    assert (
        str(cut.plan()) == "4 channels that nothing was left of"
    )  # two before the norm, two behind


def test_an_empty_plan_changes_nothing() -> None:
    cut = prepare("residual")
    before = copy.deepcopy(cut.model)
    apply_plan(Plan(), cut.model)
    apply_plan(cut.plan(), cut.model)
    check_equal(cut.model, before, cut.x)


def of_a_wider_network(cut: Cut) -> nn.Module:
    model = copy.deepcopy(cut.model)
    wide = nn.Sequential(nn.Conv2d(6, 9, 3, padding=1, bias=False))
    quantize_layers(wide, bits=8)
    model.get_submodule("one").register_module("0", wide[0])
    return model


def cut_already(cut: Cut) -> nn.Module:
    model = copy.deepcopy(cut.model)
    apply_plan(cut.plan(), model)
    return model


def cut_otherwise(cut: Cut) -> nn.Module:
    other = prepare("residual")
    kill(other.model, "one.0", [0])
    other.cut()
    return other.model


UNFIT: dict[str, Any] = {
    "another": lambda cut: prepare("flat").model,
    "float": lambda cut: NETWORKS["residual"][0](),
    "bare": lambda cut: nn.Sequential(nn.Linear(2, 2)),
    "wider": of_a_wider_network,
    "cut already": cut_already,
    "cut otherwise": cut_otherwise,
}


@pytest.mark.parametrize("rows", [[0, 2], [3, 4]])
@pytest.mark.parametrize("kind", UNFIT)
def test_a_plan_on_a_model_that_it_does_not_fit_is_refused_and_nothing_changes(
    kind: str, rows: list[int]
) -> None:
    cut = prepare("residual")
    kill(cut.model, "one.0", rows)
    cut.model.get_parameter("one.1.bias").data[rows] = -1.0
    cut.settle()
    model = UNFIT[kind](cut)
    plan = cut.plan()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    sum(p.sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    parameters = {n: id(p) for n, p in model.named_parameters()}
    before = copy.deepcopy([tensors(model), optimizer.state_dict()["state"]])
    with pytest.raises(ValueError, match="fit"):
        apply_plan(plan, model, [optimizer])
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    now = [tensors(model), optimizer.state_dict()["state"]]
    torch.testing.assert_close(now, before, rtol=0, atol=0)
