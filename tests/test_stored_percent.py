"""`stored_percent` in a user's own loop: the size is reached, also after a resume, or refused."""

# mypy: disable-error-code="no-untyped-call"

import copy
import itertools
import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Residual, Untraceable, block, kill
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from models import build
from selfcompress import Compressor, Schedule
from selfcompress.size_path import SizePath

STEPS = 300
CLASSES = 5


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        block(3, 24), block(24, 48), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(48, CLASSES)
    )


def batches(steps: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of a problem that can be learnt: one noisy pattern per class."""
    patterns = torch.randn(CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        y = torch.randint(CLASSES, (32,), generator=generator)
        yield patterns[y] + 0.5 * torch.randn(32, 3, 8, 8, generator=generator), y


def example() -> Tensor:
    return next(batches(1))[0]


def started(
    percent: float, model: nn.Module | None = None, **options: Any
) -> tuple[Compressor, Optimizer]:
    options = {"schedule": Schedule(STEPS)} | options
    model = net() if model is None else model
    compressor = Compressor(model, example(), stored_percent=percent, bits=8, **options)
    return compressor, AdamW(compressor.weights(), lr=3e-3)


def train(
    compressor: Compressor, optimizer: Optimizer, first: int, last: int, scale: float = 1.0
) -> list[float]:
    """Take steps `first` to `last` of a plain loop, and return γ after each of them."""
    gammas = []
    for x, y in list(batches(STEPS))[first:last]:
        task = scale * F.cross_entropy(compressor.model(x), y)
        loss = task + compressor.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        compressor.step(optimizer)
        gammas.append(compressor.gamma)
    return gammas


@pytest.mark.parametrize("percent", [10.0, 2.0])
def test_a_plain_loop_ends_in_the_size_asked_for(percent: float) -> None:
    compressor, optimizer = started(percent)
    gammas = train(compressor, optimizer, 0, STEPS)
    assert set(gammas[: STEPS // 10]) == {0.0}
    assert len(set(gammas)) > 50
    compressor.finish(list(batches(8, seed=2)), optimizer)
    assert 0.95 * percent <= compressor.size().stored_percent <= 1.01 * percent
    x, y = next(batches(1, seed=3))
    assert (compressor.model.eval()(x).argmax(1) == y).float().mean() > 0.9


class Mlp(nn.Module):
    """Two hidden layers with biases and no norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.out = nn.Linear(192, 64), nn.Linear(64, 64), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.two(self.one(x.flatten(1)).relu()).relu())
        return y


class Keeping(Mlp):
    """Keeps its output in a list with the gradient history, which copy.deepcopy refuses."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.seen = [y]
        return y


def test_a_model_may_keep_what_it_computes() -> None:
    compressor, optimizer = started(4.0, Keeping())
    train(compressor, optimizer, 0, STEPS // 4)
    assert compressor.gamma > 0


# Cuts come every 50 steps, or not before the end: dead rows leave biases behind then too.
@pytest.mark.parametrize("interval", [50, 10**6])
def test_biases_that_are_left_behind_do_not_count(interval: int) -> None:
    compressor, optimizer = started(2.0, Mlp(), interval=interval)
    train(compressor, optimizer, 0, STEPS)
    compressor.finish(list(batches(2, seed=2)), optimizer)
    assert 1.8 <= compressor.size().stored_percent <= 2.04


@pytest.mark.parametrize("scale", [1e-4, pytest.param(1e4, marks=pytest.mark.slow)])
def test_the_scale_of_the_loss_does_not_matter(scale: float) -> None:
    compressor, optimizer = started(4.0)
    train(compressor, optimizer, 0, STEPS, scale)
    assert 3.7 <= compressor.size().stored_percent <= 4.1


def test_a_layer_that_is_frozen_now_and_then_does_not_make_others_pay() -> None:
    """γ must not rise because a layer keeps its size while it is frozen."""
    compressor, optimizer = started(6.0, Mlp())
    for first in range(0, STEPS, 20):
        compressor.layers["one"].requires_grad_(first % 40 == 0)
        train(compressor, optimizer, first, first + 20)
    assert compressor.gamma < 1
    assert 5.4 <= compressor.size().stored_percent <= 6.6
    assert all(int(layer.live_rows().sum()) >= 5 for layer in compressor.layers.values())


def test_gamma_on_the_path_is_what_presses() -> None:
    """The γ of the path applies in full; the schedule does not raise it a second time."""
    compressor, optimizer = started(4.0)
    train(compressor, optimizer, 0, STEPS // 4)
    assert compressor.price == compressor.gamma > 0


def test_without_any_gradient_there_is_no_gamma_yet() -> None:
    compressor, optimizer = started(4.0, schedule=Schedule(STEPS, begin=0), integer_bits=False)
    gammas = train(compressor, optimizer, 0, 30)
    assert gammas[0] == 0
    assert 0 < max(gammas) < 1


def test_a_size_that_is_missed_is_told() -> None:
    compressor, optimizer = started(3.0, schedule=Schedule(20))
    train(compressor, optimizer, 0, 20)
    with pytest.warns(UserWarning, match=r"the network stores .* %, not the 3 % asked for"):
        compressor.finish(list(batches(2)), optimizer)


def test_training_goes_on_alike_after_a_resume() -> None:
    whole, optimizer = started(4.0)
    gammas = train(whole, optimizer, 0, STEPS)
    at = STEPS // 2 + 3  # a step at which nothing is measured or set
    half, optimizer = started(4.0)
    train(half, optimizer, 0, at)
    other, other_optimizer = started(4.0)
    other.load_state_dict(copy.deepcopy(half.state_dict(optimizer)), other_optimizer)
    assert train(other, other_optimizer, at, STEPS) == gammas[at:]
    assert other.size() == whole.size()


def test_a_state_of_a_run_with_gamma_starts_the_path_where_it_is() -> None:
    """With a state saved under `gamma`, the path starts at the size that the network has then."""
    saved = Compressor(net(), example(), 0.01, bits=8, schedule=Schedule(STEPS))
    optimizer: Optimizer = AdamW(saved.weights(), lr=3e-3)
    train(saved, optimizer, 0, STEPS // 4)
    compressor, other = started(4.0)
    with pytest.warns(UserWarning, match=r"had stored_percent=None, this one has 4\.0"):
        compressor.load_state_dict(saved.state_dict(optimizer), other)
    train(compressor, other, STEPS // 4, STEPS)
    assert 3.6 <= compressor.size().stored_percent <= 4.1


def test_the_schedule_of_the_user_stays_as_it_is() -> None:
    schedule = Schedule(STEPS)
    started(4.0, schedule=schedule)
    assert schedule == Schedule(STEPS)


@pytest.mark.parametrize("percent", [0.0, -1.0, math.nan, math.inf])
def test_impossible_sizes_are_refused(percent: float) -> None:
    with pytest.raises(ValueError, match="stored_percent must be a number above 0"):
        started(percent)


def test_either_gamma_or_a_size_is_given() -> None:
    for gamma, percent in ((None, None), (0.01, 3.0)):
        with pytest.raises(ValueError, match="either gamma or stored_percent"):
            Compressor(net(), example(), gamma, stored_percent=percent)


def test_a_size_needs_time_to_be_reached() -> None:
    with pytest.raises(ValueError, match="stored_percent needs a schedule"):
        started(3.0, schedule=None)


def test_a_size_below_the_smallest_is_refused_and_tells_it() -> None:
    with pytest.raises(ValueError, match=r"stored_percent=0\.01 is less .* store .* %") as error:
        started(0.01)
    least = float(str(error.value).split("store ")[1].split(" ")[0])
    compressor, _ = started(1.01 * least)  # the size named in the message is accepted
    smallest = compressor.smallest()
    parameters = {n: p.shape for n, p in smallest.named_parameters() if n.endswith("weight")}
    assert parameters["0.0.weight"] == (1, 3, 3, 3)
    assert parameters["1.0.weight"] == (1, 1, 3, 3)
    with pytest.raises(ValueError, match="less"):
        started(0.99 * least)


def test_a_size_above_that_at_the_start_has_no_effect() -> None:
    with pytest.warns(
        UserWarning, match="no effect: the network has [23][0-9].* % at its 8 starting"
    ):
        compressor, optimizer = started(50.0)
    before = compressor.size()
    assert set(train(compressor, optimizer, 0, STEPS)) == {0.0}
    assert compressor.size().q_bits == before.q_bits


def test_the_smallest_network_has_no_biases_of_dead_rows() -> None:
    smallest = Compressor(Mlp(), example(), 0.01).smallest()
    assert {n: p.shape[0] for n, p in smallest.named_parameters() if n.endswith("bias")} == {
        "one.bias": 1, "two.bias": 1, "out.bias": CLASSES,
    }  # fmt: skip


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = Mlp()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"copy.deepcopy can copy, which failed: .*lock"):
        started(3.0, model)


@pytest.mark.parametrize("build", [net, lambda: Residual(relu_after=False), Untraceable])
@pytest.mark.filterwarnings("ignore:torch.fx cannot trace")
def test_the_smallest_network_is_a_copy(build: Any) -> None:
    x = example()
    compressor = Compressor(build(), x, 0.01, min_channels=2)
    before = copy.deepcopy(compressor.model.state_dict())
    smallest = compressor.smallest()
    assert all(layer.live_rows().sum() >= 2 for layer in compressor.layers.values())
    torch.testing.assert_close(compressor.model.state_dict(), before, rtol=0, atol=0)
    for name, module in smallest.named_modules():
        if name in compressor.layers:
            assert int((module.bit_depth > 0).sum()) == min(2, len(compressor.layers[name].rows))
    with torch.no_grad():
        y = smallest.eval()(torch.cat([x, 2 * x]))
    assert (y[: len(x)] - y[len(x) :]).abs().max() > 0


def test_a_settled_preview_is_what_biases_on_their_way_to_zero_will_leave() -> None:
    """preview(settled=True) is the network after training has driven lingering biases to zero."""
    model = Residual(relu_after=False)
    compressor = Compressor(model, example(), 0.0)
    optimizer = SGD(compressor.weights(), lr=0.0)
    with torch.no_grad():
        model.get_parameter("two.1.bias").fill_(0.5)
    kill(model, "two.0", [1, 2])
    compressor.cut(optimizer)

    def entries(network: nn.Module) -> int:
        return len(network.get_parameter("two.1.bias"))

    assert entries(compressor.preview()) == 6
    settled = compressor.preview(settled=True)
    assert entries(settled) == 4
    assert (model.get_parameter("two.1.bias") == 0.5).all()
    for _ in range(60):
        optimizer.zero_grad()
        compressor.step(optimizer)
    compressor.cut(optimizer)
    assert entries(compressor.model) == 4
    torch.testing.assert_close(compressor.model.state_dict(), settled.state_dict())


@pytest.mark.parametrize("size", [5_000.0, 20_000.0, 50_000.0])
def test_gamma_is_the_smallest_that_leads_to_a_size(size: float) -> None:
    compressor, optimizer = started(4.0)
    train(compressor, optimizer, 0, STEPS // 4)
    path = compressor.path
    assert isinstance(path, SizePath)
    gamma = path._gamma_for(size)
    assert path._rough_size(gamma) <= size < path._rough_size(0.99 * gamma)


def test_what_is_planned_falls_from_the_start_to_the_target_and_stays() -> None:
    compressor, optimizer = started(4.0)
    start = compressor.size().stored_bits
    train(compressor, optimizer, 0, STEPS // 5)
    path = compressor.path
    assert path is not None and path.start == start
    planned = [path._planned(i / 20) for i in range(30)]
    assert planned == sorted(planned, reverse=True)
    assert planned[0] == start
    assert planned[20:] == [path.target] * 10
    shares = [after / before for before, after in itertools.pairwise(planned)]
    assert shares == sorted(shares)  # the size falls somewhat faster at first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "image_size", "epochs", "percent"),
    [
        ("resnet9", 8, 20, 3.0), ("resnet9", 8, 20, 0.3), ("resnet20", 8, 20, 2.0),
        ("torchvision:mobilenet_v3_small", 32, 12, 1.0), ("vit", 8, 20, 8.0),
    ],
)  # fmt: skip
def test_a_size_is_reached_by_any_network(
    name: str, image_size: int, epochs: int, percent: float
) -> None:
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None].expand(-1, 3, -1, -1) / 8 - 1
    images, labels = F.interpolate(images, size=image_size), torch.from_numpy(data.target)
    train_set = TensorDataset(images[:1437], labels[:1437])
    torch.manual_seed(0)
    loader = DataLoader(train_set, batch_size=64, shuffle=True, drop_last=True)
    model = build(name, 10, 32 if name == "vit" else 16, image_size)
    compressor = Compressor(
        model,
        images[:16],
        stored_percent=percent,
        bits=8,
        schedule=Schedule(epochs * len(loader)),
    )
    optimizer = AdamW(compressor.weights(), lr=1e-3)
    scheduler = OneCycleLR(optimizer, 3e-3, total_steps=epochs * len(loader))
    for _ in range(epochs):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y) + compressor.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            compressor.step(optimizer)
    compressor.finish(loader, optimizer)
    with torch.no_grad():
        accuracy = (model.eval()(images[1437:]).argmax(1) == labels[1437:]).float().mean()
    stored = compressor.size().stored_percent
    print(f"{name} {percent} %: stored {stored:.3f} %, accuracy {accuracy:.4f}")
    assert 0.95 * percent <= stored <= 1.01 * percent
    assert accuracy > 0.8
