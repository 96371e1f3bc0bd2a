"""`Compressor` in a plain training loop: it compresses, cuts exactly, saves and resumes."""

# mypy: disable-error-code="no-untyped-call"

import copy
import itertools
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Chain, Grouped, Residual, Untraceable, block, compressor_of, count, kill
from networks import outputs as outputs_of
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from models.resnet9 import ResNet9
from selfcompress import Compressor, CutError, Schedule
from selfcompress.graph.connection import connected
from selfcompress.graph.planner import plan_cut
from selfcompress.layers.quantized import quantized_layers

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def batches(steps: int, classes: int = 5, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of a problem that can be learnt: one noisy pattern per class."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randn(classes, 3, 8, 8, generator=generator)
    for _ in range(steps):
        y = torch.randint(classes, (size,), generator=generator)
        yield patterns[y] + 0.5 * torch.randn(size, 3, 8, 8, generator=generator), y


def one_step(compressor: Compressor, optimizer: Optimizer, x: Tensor, y: Tensor) -> float:
    """Run the README's loop body once and return the loss of the task."""
    task = F.cross_entropy(compressor.model(x), y)
    loss = task + compressor.penalty()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    compressor.step(optimizer)
    return float(task.detach())


def started(steps: int = 0, lr: float = 3e-3, **options: Any) -> tuple[Compressor, Optimizer]:
    """Return the compressor and optimiser of a residual network after some training steps.

    Unless `options` say otherwise, it loses bits fast.
    """
    torch.manual_seed(0)
    model = Residual(relu_after=False)
    options = {"bits": 4, "gamma": 0.002, "interval": 10, "bit_step": 0.03} | options
    compressor = Compressor(model, X, **options)
    optimizer = AdamW(compressor.weights(), lr=lr)
    for x, y in batches(steps):
        one_step(compressor, optimizer, x, y)
    return compressor, optimizer


def depths(compressor: Compressor) -> dict[str, Tensor]:
    return {name: m.bit_depth.detach().clone() for name, m in compressor.layers.items()}


def test_a_plain_loop_learns_and_compresses() -> None:
    compressor, optimizer = started(lr=2e-2, gamma=0.0, bit_step=0.01)
    start, losses = compressor.size(), []
    rows = {name: len(layer.rows) for name, layer in compressor.layers.items()}
    for i, (x, y) in enumerate(batches(300)):
        if i == 100:
            compressor.gamma = 0.001
        # Only the training kills rows; once enough are gone it goes on without a penalty.
        if compressor.size().parameters < 0.8 * start.parameters:
            compressor.gamma = 0.0
        losses.append(one_step(compressor, optimizer, x, y))
    end = compressor.size()
    assert any(len(layer.rows) < rows[name] for name, layer in compressor.layers.items())
    formats = sum(2 * len(layer.rows) for layer in compressor.layers.values())
    assert end.parameters == count(compressor.model) - formats
    assert end.parameters < 0.8 * start.parameters
    assert end.q_bits < 0.8 * start.q_bits
    assert end.macs < start.macs
    assert end.stored_bits < start.stored_bits
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_pressure_alone_never_disconnects_the_network() -> None:
    """However high γ is, the output still depends on the input."""
    compressor, _ = started(300, gamma=30.0, bit_step=0.3)
    y = compressor.model.eval()(torch.cat([X, 2 * X]))
    assert (y[:4] - y[4:]).abs().max() > 0
    assert compressor.size().weights < 200
    dead = {name for name, layer in compressor.layers.items() if not layer.live_rows().any()}
    assert connected(compressor.graph, dead)


@pytest.mark.parametrize("min_channels", [0, 2])
def test_at_no_step_is_the_output_cut_off(min_channels: int) -> None:
    """Every layer keeps `min_channels` live rows, and at least one if the output depends on it."""
    torch.manual_seed(0)
    model = Residual(relu_after=False)
    compressor = Compressor(
        model, X, 1e6, min_channels=min_channels, interval=10**9, bit_step=0.5, bits=4
    )
    optimizer = SGD(compressor.weights(), lr=0.01)
    for x, y in batches(40):
        one_step(compressor, optimizer, x, y)
        live = {name: int(layer.live_rows().sum()) for name, layer in compressor.layers.items()}
        assert live["stem.0"] and live["head.linear"] and min(live.values()) >= min_channels
    branch = {"one.0": min_channels, "two.0": min_channels}  # the branch may lose all rows
    assert live == {"stem.0": max(1, min_channels), "head.linear": max(1, min_channels)} | branch


@pytest.mark.parametrize("build", [Grouped, Untraceable])
def test_layers_that_cannot_be_cut_do_not_disconnect_it_either(
    build: Callable[[], nn.Module],
) -> None:
    """If all rows of all layers die, `keep` gives at least one row of each layer its bits back."""
    model = build()
    if build is Untraceable:
        with pytest.warns(UserWarning, match="cannot trace"):
            compressor = Compressor(model, X, 1.0, bits=4)
    else:
        compressor = Compressor(model, X, 1.0, bits=4)
    for name, layer in compressor.layers.items():
        kill(model, name, range(len(layer.bit_depth)))
    compressor.connection.keep()
    assert all(layer.live_rows().any() for layer in compressor.layers.values())


# --- gradients of the formats ---------------------------------------------------------------------


def test_no_optimizer_or_clipping_ever_sees_the_formats_gradients() -> None:
    compressor, _ = started(gamma=0.01)
    model = compressor.model
    formats = [p for m in compressor.layers.values() for p in (m.bit_depth, m.exponent)]
    before = [p.detach().clone() for p in formats]
    greedy = SGD(model.parameters(), lr=10.0, weight_decay=0.1)
    for x, y in batches(3):
        (F.cross_entropy(model(x), y) + 1e6 * compressor.penalty()).backward()
        assert all(p.grad is None for p in formats)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        assert norm < 1e3  # with the penalty's gradients it would be in the millions
        greedy.step()
    assert all(torch.equal(p, was) for p, was in zip(formats, before, strict=True))
    compressor.step(greedy)
    assert not any(torch.equal(p, was) for p, was in zip(formats, before, strict=True))


def test_after_a_cut_the_formats_are_still_stepped_and_nobody_sees_their_gradients() -> None:
    compressor, optimizer = started(3, gamma=0.1)
    for name in compressor.layers:
        kill(compressor.model, name, [0] if name != "head.linear" else [])
    assert compressor.cut(optimizer)
    before = depths(compressor)
    for x, y in batches(3):
        optimizer.zero_grad()
        (F.cross_entropy(compressor.model(x), y) + compressor.penalty()).backward()
        for layer in compressor.layers.values():
            assert layer.bit_depth.grad is None
            assert layer.exponent.grad is None
        compressor.step(optimizer)
    assert all((depth < before[name]).any() for name, depth in depths(compressor).items())


@pytest.mark.filterwarnings("ignore:no gradient of a weight")
def test_accumulated_gradients_step_the_formats_as_their_sum() -> None:
    results = []
    for parts in (1, 4):
        compressor, optimizer = started(gamma=0.1)
        for _ in range(parts):
            (compressor.penalty() / parts).backward()
        compressor.step(optimizer)
        results.append(torch.cat(list(depths(compressor).values())))
    torch.testing.assert_close(results[0], results[1])


def test_weights_are_all_but_the_formats() -> None:
    compressor, _ = started()
    names = {id(p): n for n, p in compressor.model.named_parameters()}
    given = {names[id(p)] for p in compressor.weights()}
    assert not any(n.endswith(("bit_depth", "exponent")) for n in given)
    assert len(given) == len(names) - 2 * len(compressor.layers)


def test_the_parameters_stay_those_of_the_model() -> None:
    model = Chain()
    weight = model.a[0].weight
    Compressor(model, X, 0.01, bits=4)
    assert model.a[0].weight is weight


def test_rows_pass_over_one_bit_unless_they_start_there() -> None:
    for bits in (3, 1):
        compressor, optimizer = started(bits=bits, min_channels=3)
        seen: set[float] = set()
        for x, y in batches(60):
            one_step(compressor, optimizer, x, y)
            seen |= {d for depth in depths(compressor).values() for d in depth.ceil().tolist()}
        assert seen >= {0, min(bits, 2)}  # rows died, and those that were kept alive have two bits
        assert (1 in seen) == (bits == 1)


# --- cuts -----------------------------------------------------------------------------------------


def test_a_cut_leaves_modes_statistics_and_random_state() -> None:
    compressor, optimizer = started(5)
    model = compressor.model
    model.train()
    model.get_submodule("one.1").eval()
    kill(model, "one.0", [1, 2])
    modes = {n: m.training for n, m in model.named_modules()}
    random = torch.get_rng_state()
    norms = {n: b.clone() for n, b in model.named_buffers() if "running" in n or "num_" in n}
    plan = compressor.cut(optimizer)
    assert plan
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), random)
    for name, was in norms.items():
        now = model.get_buffer(name)
        every = list(range(now.numel()))
        kept = plan.keep.get(name, [(0, every)])[0][1]
        if name.startswith("one.1.running"):  # the dead rows' statistics are set to the constant's
            now = now[[i for i, row in enumerate(kept) if row not in (1, 2)]]
            kept = [0, 3, 4]
        assert torch.equal(now, was[kept] if was.dim() else was), name


def test_a_wrong_cut_is_noticed_and_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(graph: Any, model: nn.Module, alive: Any, multiple: int) -> Any:
        alive.rows["two.0"][0] = False
        return plan_cut(graph, model, alive, multiple)

    monkeypatch.setattr("selfcompress.compressor.plan_cut", too_much)
    compressor, optimizer = started()
    # A row that is missing from `two` is noticed in the layer that reads it.
    with pytest.raises(CutError, match=r"head\.linear"):
        compressor.cut(optimizer)


def test_a_wrong_cut_names_a_linear_layer_over_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(graph: Any, model: nn.Module, alive: Any, multiple: int) -> Any:
        alive.rows["1"][4] = False
        return plan_cut(graph, model, alive, multiple)

    monkeypatch.setattr("selfcompress.compressor.plan_cut", too_much)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    compressor = Compressor(model, torch.randn(2, 3, 8), 0.01, bits=4)
    with pytest.raises(CutError, match="layer 3"):
        compressor.cut()


@pytest.mark.parametrize("revived", [False, True])
def test_a_row_of_zeros_dies_only_after_a_whole_interval(revived: bool) -> None:
    """A row that quantises to zeros loses its bits only if it did so all through an interval."""
    compressor, optimizer = started(gamma=0.0, interval=5)
    layer = compressor.layers["one.0"]

    def zero() -> None:
        with torch.no_grad():
            layer.weight[2] = 0.1 * 2 ** layer.exponent[2]

    def steps(n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            compressor.step(optimizer)

    zero()
    assert (layer.quantized_weight()[2] == 0).all()
    steps(5)  # it was zero all through this interval, but not tracked at its start
    assert len(layer.weight) == 5
    assert layer.bit_depth[2] > 0
    steps(2)
    if revived:
        with torch.no_grad():
            layer.weight[2] = 2 ** (layer.exponent[2] + 1)
        steps(1)
        zero()
    steps(2)
    assert len(layer.weight) == 5
    steps(1)
    assert len(layer.weight) == (5 if revived else 4)


def test_biases_that_hold_a_dead_channel_land_on_exactly_zero_and_it_goes() -> None:
    """Lingering biases shrink by 0.01 per step to exactly 0; then their channels are cut."""
    compressor, optimizer = started(gamma=0.0)
    model = compressor.model
    with torch.no_grad():
        model.get_parameter("two.1.bias").copy_(torch.tensor([0.5, -0.055, 0.033, 0.5, 0.5, 0.5]))
    kill(model, "two.0", [1, 2])
    compressor.cut(optimizer)
    assert len(model.get_parameter("two.1.bias")) == 5  # -0.055 is 0 after the ReLU
    where = 1
    seen = []
    for _ in range(4):
        optimizer.zero_grad()
        compressor.step(optimizer)
        seen.append(model.get_parameter("two.1.bias")[where].item())
    assert seen == pytest.approx([0.023, 0.013, 0.003, 0.0], abs=1e-6)
    assert seen[-1] == 0
    others = model.get_parameter("two.1.bias")[[0, 2, 3, 4]]
    assert (others == 0.5).all()
    compressor.cut(optimizer)
    assert len(model.get_parameter("two.1.bias")) == 4


def test_unsupported_optimizers_are_refused_before_anything_changes() -> None:
    compressor, _ = started(gamma=1.0)
    optimizer = Adadelta(compressor.weights(), lr=1e-3)
    (compressor.model(X).sum() + compressor.penalty()).backward()
    before = copy.deepcopy(compressor.model.state_dict())
    for refused in (compressor.step, compressor.cut):
        with torch.no_grad():
            compressor.layers["one.0"].weight[2] = 0
            before["one.0.weight"][2] = 0
        compressor.idle.look()
        with pytest.raises(TypeError, match="Adadelta"):
            refused(optimizer)
        torch.testing.assert_close(compressor.model.state_dict(), before, rtol=0, atol=0)


def test_a_loss_that_is_not_finite_is_reported() -> None:
    compressor, optimizer = started(interval=5)

    def train_on_nan() -> None:
        for _ in range(5):
            loss = compressor.model(X).sum() * math.nan + compressor.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            compressor.step(optimizer)

    with pytest.raises(FloatingPointError, match="not finite"):
        train_on_nan()


def test_a_skipped_batch_leaves_no_trace() -> None:
    """A batch that is skipped because its loss is not finite does not change later steps."""
    found = []
    for skipped in (True, False):
        compressor, optimizer = started()
        if skipped:
            (compressor.model(X).sum() * math.nan).backward()  # and no step
            optimizer.zero_grad()
        for x, y in batches(3):
            assert math.isfinite(one_step(compressor, optimizer, x, y))
        exponents = [layer.exponent.detach() for layer in compressor.layers.values()]
        found.append(torch.cat([*depths(compressor).values(), *exponents]))
    assert torch.equal(*found)
    assert found[0].isfinite().all()


def test_without_the_penalty_in_the_loss_nothing_presses() -> None:
    """Without the penalty in the loss, bit depths do not fall as they do with it."""
    mean = []
    for with_penalty in (True, False):
        compressor, optimizer = started(gamma=0.3, bits=8)
        for x, y in batches(40):
            loss = F.cross_entropy(compressor.model(x), y)
            optimizer.zero_grad()
            (loss + with_penalty * compressor.penalty()).backward()
            optimizer.step()
            compressor.step(optimizer)
        mean.append(compressor.size().q_percent)
    assert mean[0] < 0.9 * mean[1]


def test_weights_in_a_second_optimizer_are_refused() -> None:
    compressor, _ = started(gamma=0.01)
    first, *rest = compressor.weights()
    with pytest.raises(ValueError, match="does not hold"):
        compressor.step(SGD(rest, lr=0.1))
    first.requires_grad_(False)
    compressor.step(SGD(rest, lr=0.1))


def test_training_goes_on_after_finish_with_the_optimizer() -> None:
    compressor, optimizer = started(5, gamma=0.0)
    kill(compressor.model, "one.0", [0])
    compressor.model.get_parameter("one.1.bias").data[0] = -1.0
    compressor.finish([X], optimizer)
    before = [p.detach().clone() for p in compressor.weights()]
    for x, y in batches(2):
        one_step(compressor, optimizer, x, y)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in compressor.weights()}
    assert any(not torch.equal(a, b) for a, b in zip(before, compressor.weights(), strict=True))


# --- freeze and finish ----------------------------------------------------------------------------


def test_frozen_formats_stay_and_dead_channels_still_go() -> None:
    compressor, optimizer = started(30, gamma=0.0)
    compressor.freeze()
    kill(compressor.model, "two.0", [0])
    formats = {n: (m.bit_depth.clone(), m.exponent.clone()) for n, m in compressor.layers.items()}
    weight = compressor.model.get_parameter("stem.0.weight").detach().clone()
    rows = {n: len(m.rows) for n, m in compressor.layers.items()}
    for x, y in batches(25):
        one_step(compressor, optimizer, x, y)
    for name, (bit_depth, exponent) in formats.items():
        layer = compressor.layers[name]
        if len(layer.rows) == rows[name]:
            assert torch.equal(layer.bit_depth, bit_depth)
            assert torch.equal(layer.exponent, exponent)
        assert set(layer.bit_depth.tolist()) <= set(bit_depth.tolist())
    assert len(compressor.layers["two.0"].rows) < rows["two.0"]
    now = compressor.model.get_parameter("stem.0.weight")
    assert now.shape != weight.shape or not torch.equal(now, weight)


def test_finish_estimates_the_statistics_of_the_final_network() -> None:
    compressor, _ = started(30)
    model = compressor.model
    loader = [(x, y) for x, y in batches(4, size=64)]
    compressor.finish(loader)
    # Averaged over equal batches, the mean is that of all images at once.
    seen: list[Tensor] = []
    handle = model.get_submodule("stem.0").register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    with torch.no_grad():
        model.eval()(torch.cat([x for x, _ in loader]))
    handle.remove()
    norm = model.get_submodule("stem.1")
    mean = seen[0].mean((0, 2, 3))[norm.columns]  # type: ignore[index]
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
    assert compressor.frozen


def test_finish_cuts_all_that_is_zero_and_leaves_modes() -> None:
    compressor, _ = started(5)
    model = compressor.model
    with torch.no_grad():
        compressor.layers["one.0"].weight[1] = 0
        model.get_parameter("one.1.bias")[1] = -1
    model.train()
    model.get_submodule("stem.1").eval()
    modes = {n: m.training for n, m in model.named_modules()}
    compressor.finish([x for x, _ in batches(2)])
    assert len(compressor.layers["one.0"].rows) == 4
    assert {n: m.training for n, m in model.named_modules()} == modes
    model.eval()
    compressor.finish([x for x, _ in batches(2)])
    assert not any(m.training for m in model.modules())


def test_dead_rows_and_training_agree_in_evaluation_after_finish() -> None:
    """After `finish`, a network with dead rows computes the same in training and evaluation."""
    torch.manual_seed(0)
    model = Chain(bias=True)
    compressor = compressor_of(model, X, 0.01)
    kill(model, "a.0", [0, 1, 2])
    with torch.no_grad():
        model.get_parameter("a.1.bias")[:3] = 0.7
    (x, _), *_ = batches(1, size=64)
    compressor.finish([x])
    # On the batch that the statistics were measured on, both modes compute (almost) the same.
    torch.testing.assert_close(
        outputs_of(model, x, False), outputs_of(model, x, True), rtol=1e-2, atol=1e-2
    )


# --- state ----------------------------------------------------------------------------------------

FRESH_PROCESS = textwrap.dedent(
    """
    import sys
    sys.path[:0] = sys.argv[2:]
    import torch
    from test_compressor import X, batches, one_step, started

    torch.set_num_threads(1)
    saved = torch.load(sys.argv[1] + "/saved.pt", weights_only=True)
    compressor, optimizer = started(gamma=1.0)
    torch.manual_seed(123)
    compressor.load_state_dict(saved, optimizer)
    compressor.model.eval()
    with torch.no_grad():
        y = compressor.model(X)
    compressor.model.train()
    for batch in batches(23):
        one_step(compressor, optimizer, *batch)
    torch.save({"y": y, "state": compressor.state_dict(optimizer)}, sys.argv[1] + "/went_on.pt")
    """
)


def test_a_fresh_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    compressor, optimizer = started(145, gamma=1.0)
    assert compressor.graph.removed.any()
    torch.save(compressor.state_dict(optimizer), tmp_path / "saved.pt")
    model = compressor.model
    model.eval()
    with torch.no_grad():
        y = model(X)
    model.train()
    for batch in batches(23):
        one_step(compressor, optimizer, *batch)
    here = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(tmp_path), str(here), str(here.parent)],
        check=True,
    )
    other = torch.load(tmp_path / "went_on.pt", weights_only=True)
    assert torch.equal(other["y"], y)
    mine = compressor.state_dict(optimizer)
    for part in ("model", "removed", "rows", "formats", "optimizer", "lingering", "idle"):
        torch.testing.assert_close(other["state"][part], mine[part], rtol=0, atol=0, msg=part)
    for part in ("gamma", "frozen", "steps"):
        assert other["state"][part] == mine[part]


def test_rows_that_wait_for_the_end_of_their_interval_are_saved() -> None:
    """A checkpoint has the rows that are tracked as quantising to zeros."""
    compressor, optimizer = started(3)
    compressor.idle.load({"one.0": torch.tensor([2]), "two.0": torch.tensor([0, 1])})
    other, other_optimizer = started()
    other.load_state_dict(compressor.state_dict(optimizer), other_optimizer)
    torch.testing.assert_close(other.idle.still(), compressor.idle.still())


def test_state_of_a_frozen_compressor_loads_frozen() -> None:
    compressor, optimizer = started(30)
    compressor.freeze()
    state = copy.deepcopy(compressor.state_dict(optimizer))
    other, other_optimizer = started()
    other.load_state_dict(state, other_optimizer)
    assert other.frozen
    before = depths(other)
    for x, y in batches(12):
        one_step(other, other_optimizer, x, y)
    for name, depth in depths(other).items():
        assert set(depth.tolist()) <= set(before[name].tolist())


def test_a_network_of_rounded_widths_trains_like_any_other() -> None:
    """With `multiple` 4, widths are rounded up to 4, but training goes as with exact widths."""

    def trained(multiple: int) -> tuple[Compressor, Optimizer]:
        compressor, optimizer = started(gamma=0.0, multiple=multiple)
        for index, batch in enumerate(batches(60)):
            if index == 15:
                for layer, live in (("stem.0", 3), ("two.0", 2), ("one.0", 3)):
                    kill(compressor.model, layer, slice(live, None))
            one_step(compressor, optimizer, *batch)
        return compressor, optimizer

    (rounded, optimizer), (exact, _) = trained(4), trained(1)
    found = {n: layer.out_width for n, layer in rounded.layers.items() if n != "head.linear"}
    smaller = {n: layer.out_width for n, layer in exact.layers.items() if n != "head.linear"}
    assert set(found.values()) == {4}
    assert all(found[n] >= smaller[n] for n in found)
    assert found != smaller
    assert rounded.size().parameters == exact.size().parameters
    for name, depth in depths(rounded).items():
        assert torch.equal(depth, depths(exact)[name])
    torch.testing.assert_close(
        outputs_of(rounded.model, X, False), outputs_of(exact.model, X, False), rtol=0, atol=1e-4
    )
    # Loading a checkpoint keeps the rounded widths; `finish` makes them exact.
    other, other_optimizer = started(multiple=4)
    other.load_state_dict(rounded.state_dict(optimizer), other_optimizer)
    assert {n: layer.out_width for n, layer in other.layers.items() if n in found} == found
    for compressor in (other, exact):
        compressor.finish([X])
    shapes = [{n: p.shape for n, p in c.model.named_parameters()} for c in (other, exact)]
    assert shapes[0] == shapes[1]
    assert [m.out_width for m in other.layers.values()] == [
        m.out_width for m in exact.layers.values()
    ]


def test_what_a_float_layer_reads_is_not_kept_to_round_a_width_up() -> None:
    # A float layer computes with all channels that are kept, so biases of dead ones would count.
    model = nn.Sequential(
        nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 4)
    )
    compressor = Compressor(model, torch.randn(8, 6), 0.0, exclude=["4"], multiple=8, bits=4)
    with torch.no_grad():
        for name in ("0", "2"):
            compressor.layers[name].bit_depth[11:] = 0
            compressor.layers[name].bias[11:] = 0  # type: ignore[index]
    compressor.cut()
    assert [layer.out_width for layer in compressor.layers.values()] == [16, 11]


def test_widths_are_rounded_up_to_no_more_than_there_were() -> None:
    model = nn.Sequential(
        nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4)
    )
    compressor = Compressor(model, torch.randn(8, 6), 0.0, multiple=8, bits=4)
    with torch.no_grad():
        for name, live in (("0", 3), ("2", 17)):
            compressor.layers[name].bit_depth[live:] = 0
            compressor.layers[name].bias[live:] = 0  # type: ignore[index]
    compressor.cut()
    assert [layer.out_width for layer in compressor.layers.values()] == [8, 20, 4]


def widths(a: int, b: int) -> nn.Module:
    return nn.Sequential(block(3, a), block(a, b), nn.Conv2d(b, 5, 1))


def with_buffer() -> nn.Module:
    model = widths(6, 4)
    model.register_buffer("more", torch.zeros(3))
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda: widths(5, 4), lambda: widths(7, 4), lambda: widths(4, 6), with_buffer, Chain,
        lambda: nn.Sequential(block(3, 6, bias=True), block(6, 4), nn.Conv2d(4, 5, 1)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("was_cut", [False, True])
def test_state_of_another_model_is_refused_and_nothing_changes(
    build: Callable[[], nn.Module], was_cut: bool
) -> None:
    saved = compressor_of(build(), X)
    if was_cut:
        first = next(iter(saved.layers))
        kill(saved.model, first, [0, 1])
        saved.cut()
    compressor = compressor_of(widths(6, 4), X)
    before = copy.deepcopy(compressor.model.state_dict())
    parameters = [id(p) for p in compressor.model.parameters()]
    with pytest.raises(ValueError, match="another model"):
        compressor.load_state_dict(saved.state_dict())
    assert [id(p) for p in compressor.model.parameters()] == parameters
    torch.testing.assert_close(compressor.model.state_dict(), before, rtol=0, atol=0)


def test_state_is_loaded_into_fresh_compressors_only() -> None:
    compressor, optimizer = started(12)
    with pytest.raises(RuntimeError, match="freshly built"):
        compressor.load_state_dict(compressor.state_dict(optimizer), optimizer)


def test_a_missing_optimizer_state_is_named() -> None:
    compressor, _ = started(12)
    other, optimizer = started()
    with pytest.raises(ValueError, match="no optimiser"):
        other.load_state_dict(compressor.state_dict(), optimizer)


# --- bad arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [-0.01, math.nan, math.inf])
def test_bad_gammas_are_refused(gamma: float) -> None:
    model = Chain()
    with pytest.raises(ValueError, match="gamma"):
        Compressor(model, X, gamma, bits=4)
    compressor = Compressor(Chain(), X, 0.01, bits=4)
    with pytest.raises(ValueError, match="gamma"):
        compressor.gamma = gamma
    assert compressor.gamma == 0.01


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"gamma": -1.0}, "gamma"), ({"exclude": ("b.9",)}, "b.9"), ({"bits": 0}, "bits"),
        ({"bits": 17}, "bits"), ({"interval": 0}, "interval"), ({"multiple": 0}, "multiple"),
        ({"bit_step": 0.0}, "bit_step"),
        ({"exclude": ("a", "b", "head")}, "nothing to compress"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_and_the_model_stays(options: dict[str, Any], named: str) -> None:
    model = Chain()
    with pytest.raises(ValueError, match=named):
        Compressor(model, X, **{"gamma": 0.01} | options)
    assert not quantized_layers(model)


def test_excluded_layers_stay_float() -> None:
    model = Chain()
    compressor = Compressor(model, X, 0.01, exclude=["head", "b.0"], bits=4)
    assert set(compressor.layers) == {"a.0"}
    assert type(model.b[0]) is nn.Conv2d


# --- whole trainings (a small ResNet-9 on digits) -------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    """Return the digits as (images, 3, 8, 8) from -1 to 1, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.from_numpy(data.images).float()[:, None].expand(-1, 3, -1, -1) / 8 - 1
    return x.contiguous(), torch.from_numpy(data.target)


Recipe = Callable[[Compressor, int], tuple[Optimizer, LRScheduler, float]]


def sgd_cosine(compressor: Compressor, steps: int) -> tuple[Optimizer, LRScheduler, float]:
    optimizer = SGD(compressor.weights(), 0.1, 0.9, nesterov=True, weight_decay=5e-4)
    return optimizer, CosineAnnealingLR(optimizer, steps), math.inf


def adamw_one_cycle(compressor: Compressor, steps: int) -> tuple[Optimizer, LRScheduler, float]:
    optimizer = AdamW(compressor.weights(), lr=1e-3, weight_decay=0.05)
    return optimizer, OneCycleLR(optimizer, 5e-3, total_steps=steps + 1), math.inf


def clipped(compressor: Compressor, steps: int) -> tuple[Optimizer, LRScheduler, float]:
    return (*sgd_cosine(compressor, steps)[:2], 0.5)


def trained(
    gamma: float,
    width: int,
    steps: int,
    recipe: Recipe = adamw_one_cycle,
    batch: int = 128,
    scheduled: bool = True,
) -> tuple[Compressor, float]:
    """Train a ResNet-9 on digits; return its compressor and its accuracy on these images."""
    torch.manual_seed(0)
    x, y = digits()
    schedule = Schedule(steps) if scheduled else None
    model = ResNet9(width=width)
    compressor = Compressor(model, x[:8], gamma, bits=8, interval=25, schedule=schedule)
    optimizer, scheduler, clip = recipe(compressor, steps)
    model.train()
    for _ in range(steps):
        some = torch.randint(len(x), (batch,))
        loss = F.cross_entropy(model(x[some]), y[some]) + compressor.penalty()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        compressor.step(optimizer)
    compressor.finish(x.split(256))
    with torch.no_grad():
        accuracy = (model.eval()(x).argmax(1) == y).float().mean().item()
    size = compressor.size()
    print(
        f"gamma {gamma} width {width} {recipe.__name__}: Q {size.q_percent:.2f} %, "
        f"stored {size.stored_percent:.2f} %, weights {size.weights_percent:.1f} %, "
        f"accuracy {accuracy:.3f}"
    )
    return compressor, accuracy


@pytest.mark.slow
def test_gamma_means_the_same_under_any_optimizer_schedule_and_clipping() -> None:
    stored = []
    for recipe in (sgd_cosine, adamw_one_cycle, clipped):
        compressor, accuracy = trained(0.01, 8, 400, recipe)
        assert accuracy > 0.9
        stored.append(compressor.size().stored_bits)
    assert max(stored) <= 1.2 * min(stored)


@pytest.mark.slow
def test_gamma_leaves_a_working_network_of_any_width() -> None:
    # The task needs a smaller share of a wider network.
    found = [trained(0.01, width, 400) for width in (8, 64)]
    assert all(accuracy > 0.9 for _, accuracy in found)
    narrow, wide = (compressor.size() for compressor, _ in found)
    assert 100 > 10 * narrow.q_percent > 10 * wide.q_percent
    assert wide.q_bits > narrow.q_bits / 2


@pytest.mark.slow
def test_two_decades_of_gamma_fall_three_fold_and_none_collapses() -> None:
    """From γ = 0.001 to 0.1, stored bits fall to a third or less, and accuracy stays above 0.9."""
    found = [trained(gamma, 16, 400) for gamma in np.geomspace(0.001, 0.1, 5).tolist()]
    assert all(accuracy > 0.9 for _, accuracy in found)
    stored = [compressor.size().stored_bits for compressor, _ in found]
    assert all(b < a for a, b in itertools.pairwise(stored))
    assert stored[0] >= 3 * stored[-1]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [sgd_cosine, adamw_one_cycle])
def test_a_network_pressed_from_the_first_step_does_not_collapse(recipe: Recipe) -> None:
    """Without a schedule, the penalty acts from the first step; accuracy stays above 0.95."""
    # Once all digits are learnt, the estimated worth of every row is almost nothing.
    for gamma in (0.001, 0.01, 0.1):
        _, accuracy = trained(gamma, 16, 400, recipe, scheduled=False)
        assert accuracy > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0.003, 0.03])
def test_a_very_short_run_does_not_collapse(gamma: float) -> None:
    assert trained(gamma, 16, 44)[1] > 0.9


# --- mistakes that are refused --------------------------------------------------------------------


def test_an_input_the_model_does_not_accept_is_told_before_anything_changes() -> None:
    model = Residual(relu_after=False)
    before = list(model.modules())
    with pytest.raises(ValueError, match="does not accept example_input"):
        Compressor(model, torch.randn(2, 5, 8, 8), 0.1, bits=4)
    assert list(model.modules()) == before


def test_a_compressed_model_is_not_compressed_again() -> None:
    model = Residual(relu_after=False)
    Compressor(model, X, 0.1, bits=4)
    with pytest.raises(ValueError, match="compressed already"):
        Compressor(model, X, 0.1, bits=4)


def test_an_optimizer_left_behind_by_a_cut_is_not_saved() -> None:
    """`state_dict` refuses an optimiser that was not given when the model was cut."""
    compressor, optimizer = started(5, gamma=0.0)
    kill(compressor.model, "one.0", [0])
    compressor.model.get_parameter("one.1.bias").data[0] = -1.0
    compressor.finish([X])  # without the optimiser
    with pytest.raises(ValueError, match="does not hold"):
        compressor.state_dict(optimizer)
    compressor.state_dict()
