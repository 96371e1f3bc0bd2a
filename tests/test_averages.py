"""Averages of the weights (SWA, EMA) are cut together with the model that they average."""

# mypy: disable-error-code="no-untyped-call"

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Chain, Residual, compressor_of, kill
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn

from selfcompress import Compressor, Schedule
from selfcompress.graph.liveness import settle_statistics
from selfcompress.size import measure
from selfcompress.surgery import Plan

PLACEMENT = ("rows", "columns", "slots")
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

AVERAGES: dict[str, Callable[[nn.Module], AveragedModel]] = {
    "swa": AveragedModel,
    "ema": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "ema-buffers": lambda m: AveragedModel(
        m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True
    ),
    "ema-buffers-slow": lambda m: AveragedModel(
        m, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True
    ),
    "ema-one-by-one-buffers": lambda m: AveragedModel(
        m, avg_fn=get_ema_avg_fn(0.9), use_buffers=True
    ),
    "swa-buffers": lambda m: AveragedModel(m, use_buffers=True),
}


class Run:
    """A residual network in training, with an average of it; two such runs are bitwise equal."""

    def __init__(self, average: str, interval: int = 50) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = Residual(relu_after=False).double()
        self.compressor: Compressor = compressor_of(self.model, X, 0.0, interval=interval)
        self.optimizer = AdamW(self.compressor.weights(), lr=1e-2)
        self.average = AVERAGES[average](self.model)

    def train(self, steps: Iterable[int], after: Callable[[], None] = lambda: None) -> None:
        for i in steps:
            x = torch.randn(X.shape, generator=torch.Generator().manual_seed(i), dtype=X.dtype)
            y = self.model(x)
            self.optimizer.zero_grad()
            (y - torch.linspace(-1, 1, y.numel()).view_as(y)).square().sum().backward()
            self.optimizer.step()
            after()
            self.average.update_parameters(self.model)

    @torch.no_grad()
    def silence(self) -> None:
        """Kill rows, with batch-norm biases that make their channels 0 after the ReLUs."""
        for layer, norm, rows in (("stem.0", "stem.1", [0, 3]), ("one.0", "one.1", [1, 4])):
            kill(self.model, layer, rows)
            self.model.get_parameter(f"{norm}.bias")[rows] = -0.5
        kill(self.model, "two.0", [3, 5])
        self.model.get_parameter("two.1.bias")[[3, 5]] = 0
        settle_statistics(self.compressor.graph, self.model)

    def train_asleep(self, steps: Iterable[int], plan: Plan) -> None:
        """Train on without a cut, and hold the biases of the dead channels where they are."""
        was = {n: p.detach().clone() for n, p in self.model.named_parameters() if ".1.bias" in n}

        @torch.no_grad()
        def keep_asleep() -> None:
            for name, bias in was.items():
                for _, kept in plan.keep.get(name, []):
                    gone = torch.ones(len(bias), dtype=torch.bool)
                    gone[kept] = False
                    self.model.get_parameter(name)[gone] = bias[gone]

        self.train(steps, keep_asleep)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def check_is_of(average: AveragedModel, model: nn.Module) -> None:
    """Assert that the average has the model's shapes, widths and indices of rows and columns."""
    mine, other = tensors(average.module), tensors(model)
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert tensor.shape == other[name].shape, name
    for (name, module), twin in zip(model.named_modules(), average.module.modules(), strict=True):
        for width in ("in_width", "out_width", "groups", "group_width"):
            assert getattr(module, width, None) == getattr(twin, width, None), (name, width)
        for key in PLACEMENT:
            if hasattr(module, key):
                assert torch.equal(getattr(module, key), getattr(twin, key)), (name, key)


@pytest.mark.parametrize("average", AVERAGES)
def test_an_average_is_cut_along_and_goes_on(average: str) -> None:
    """After a cut, an average equals the kept part of the average of a run that is not cut.

    In the run that is not cut, the batch-norm biases of dead channels are held where they are.
    """
    cut, asleep = Run(average), Run(average)
    for run in (cut, asleep):
        run.train(range(4))
        run.silence()
    plan = cut.compressor.cut(cut.optimizer, averages=[cut.average])
    assert plan is not None
    check_is_of(cut.average, cut.model)
    assert cut.average.module.get_parameter("stem.0.weight").shape[0] == 4
    cut.train(range(4, 9))
    asleep.train_asleep(range(4, 9), plan)
    check_is_of(cut.average, cut.model)
    others = tensors(asleep.average.module)
    for name, tensor in tensors(cut.average.module).items():
        want = others[name]
        for dim, kept in plan.keep.get(name, []):
            want = want.index_select(dim, torch.tensor(kept))
        torch.testing.assert_close(tensor, want, rtol=1e-9, atol=1e-9, msg=name)
    update_bn([X], cut.average)
    with torch.no_grad():
        assert cut.average.eval()(X).shape == (4, 5)


def test_an_average_without_memory_computes_what_the_model_computes() -> None:
    """An EMA with a decay of 0 equals the model, also after a cut."""
    run = Run("ema")
    average = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.0), use_buffers=False)
    run.average = average
    run.train(range(3))
    run.silence()
    run.compressor.cut(run.optimizer, averages=[average])
    run.train(range(3, 6))
    with torch.no_grad():
        torch.testing.assert_close(average.eval()(X), run.model.eval()(X))


def test_where_rows_are_is_never_averaged_away() -> None:
    """With `use_buffers`, the indices of rows and columns are not averaged, whatever the decay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 300))
    x = torch.randn(2, 300)
    compressor = Compressor(model, x, 0.0, bits=4)
    averages = [
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        for decay in (0.7, 0.9, 0.99, 0.999, 0.9999)
    ]
    for _ in range(3):
        for average in averages:
            average.update_parameters(model)
    for average in averages:
        check_is_of(average, model)
        torch.testing.assert_close(average(x), model(x))
    assert not compressor.cuts


def test_a_plain_loop_with_an_average() -> None:
    torch.manual_seed(0)
    model = Residual(relu_after=False)
    compressor = compressor_of(model, X.float(), 1.0, interval=10, bit_step=0.2)
    optimizer = AdamW(compressor.weights(), lr=3e-3)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    other = copy.deepcopy(model)  # any copy of the model can be cut along with it
    for i in range(80):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        (model(x).square().mean() + compressor.penalty()).backward()
        optimizer.step()
        ema.update_parameters(model)
        compressor.step(optimizer, averages=[ema, other])
        check_is_of(ema, model)
    assert compressor.cuts >= 2
    compressor.finish([X.float()], optimizer, averages=[ema, other])
    check_is_of(ema, model)
    update_bn([X.float()], ema)
    ema.update_parameters(model)
    assert other(X.float()).shape == (4, 5)


# --- what is refused ------------------------------------------------------------------------------


def of_another_width(run: Run) -> nn.Module:
    torch.manual_seed(0)
    wide = nn.Sequential(*(nn.Linear(4, 4) for _ in range(2)))
    Compressor(wide, torch.zeros(1, 4), 0.0, bits=4)
    return AveragedModel(wide)


def of_another_network(run: Run) -> nn.Module:
    return compressor_of(Chain().double(), X).model


def of_the_float_network(run: Run) -> nn.Module:
    return AveragedModel(Residual(relu_after=False).double())


def wider(run: Run) -> nn.Module:
    """Return a network whose layers have the names of the model's, but more rows."""
    model = Residual(relu_after=False)
    model.one[0], model.one[1] = nn.Conv2d(6, 9, 3, padding=1, bias=False), nn.BatchNorm2d(9)
    model.two[0] = nn.Conv2d(9, 6, 3, padding=1, bias=False)
    return compressor_of(model.double(), X).model


def forgotten(run: Run) -> nn.Module:
    """Return an average that was not given when the model was cut."""
    old = copy.deepcopy(run.average)
    kill(run.model, "head.linear", [2])
    assert run.compressor.cut(run.optimizer, averages=[run.average])
    return old


@pytest.mark.parametrize(
    "wrong", [of_another_width, of_another_network, of_the_float_network, wider, forgotten]
)
@pytest.mark.parametrize("call", ["cut", "step"])
def test_an_average_of_another_shape_is_refused_before_anything_changes(
    wrong: Callable[[Run], nn.Module], call: str
) -> None:
    run = Run("ema", interval=1)
    run.train(range(2))
    average = wrong(run)
    run.silence()
    # A row of zeros would lose its bits in the cut.
    run.model.get_parameter("two.0.weight").data[0] = 0
    run.compressor.idle.look()

    def everything() -> Any:
        state = run.optimizer.state_dict()["state"]
        return [tensors(run.model), tensors(run.average), tensors(average), state]

    before = copy.deepcopy(everything())
    with pytest.raises(ValueError, match=r"other parameters than the model"):
        getattr(run.compressor, call)(run.optimizer, averages=[run.average, average])
    torch.testing.assert_close(everything(), before, rtol=0, atol=0)


def test_an_average_ends_in_the_models_formats_with_statistics_of_its_own() -> None:
    """An average gets the model's formats, and in `finish` batch-norm statistics of its own."""
    torch.manual_seed(0)
    x = torch.randn(256, 3, 8, 8)
    labels = x.mean((2, 3)).argmax(1)
    batches = list(zip(x.split(32), labels.split(32), strict=True))
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3),
        nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3),
    )  # fmt: skip
    schedule = Schedule(20 * len(batches))
    compressor = Compressor(model, x[:8], 0.01, bits=8, schedule=schedule, interval=20)
    optimizer = AdamW(compressor.weights(), lr=3e-3)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for inputs, targets in batches * 20:
        loss = F.cross_entropy(model(inputs), targets) + compressor.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        compressor.step(optimizer, averages=[average])
        for name, layer in compressor.layers.items():
            assert torch.equal(average.module.get_parameter(f"{name}.exponent"), layer.exponent)
    assert compressor.cuts > 0
    compressor.finish(iter(batches), optimizer, averages=[average])
    for name, tensor in tensors(model).items():
        if name.endswith(("bit_depth", "exponent")):
            assert torch.equal(tensors(average.module)[name], tensor), name
    assert measure(average.module, None, 1).stored_bits == compressor.size().stored_bits
    losses = [F.cross_entropy(network.eval()(x), labels) for network in (model, average.module)]
    assert losses[1] < 1.2 * losses[0] + 0.02
    again = copy.deepcopy(average)
    update_bn(batches, again)
    for name, buffer in again.named_buffers():
        torch.testing.assert_close(average.get_buffer(name), buffer)


def test_an_average_may_be_wider_and_must_have_the_models_shape() -> None:
    """An average may have a wider dtype than the model, but must have been cut along with it."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    compressor = Compressor(model, x, 0.0, bits=4)
    optimizer = AdamW(compressor.weights())
    average = copy.deepcopy(model).double()
    kill(model, "0", [1, 2])
    compressor.finish([x], optimizer, averages=[average])
    torch.testing.assert_close(
        average.get_buffer("1.running_mean").float(), model.get_buffer("1.running_mean")
    )
    kill(model, "3", [1])
    compressor.cut(optimizer)
    before = model.get_parameter("0.exponent").clone()
    compressor.steps = 1  # no step at which a cut is due
    with pytest.raises(ValueError, match="other parameters than the model"):
        compressor.step(optimizer, averages=[average])
    assert torch.equal(before, model.get_parameter("0.exponent"))
