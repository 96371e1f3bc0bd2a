"""Networks that are compiled with torch.compile train and are cut as in eager mode."""

# mypy: disable-error-code="no-untyped-call"

import logging
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from networks import Chain, Residual, compressor_of, kill
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import SGD, AdamW, Optimizer

from selfcompress import Compressor
from selfcompress.size import q_bits

# In double precision, because training with rounded weights makes small differences grow.
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
# What is compiled, the model or a part of it, and when: before or after the compressor is made.
HOW = (
    "before", "in one graph", "after", "method before", "method after", "a part before",
    "a part after",
)  # fmt: skip
QUICK = ("before",)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reset what torch.compile has compiled and counted, before and after every test."""
    # While pytest captures logs, torch logs all that it compiles, which takes most of the time.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    counters.clear()


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """Make torch fail at its limit of recompilations, where it would go on without compiling."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


class Counting:
    """A backend of torch.compile that counts how often it compiled, and ran what it compiled."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.backend: Any = torch._dynamo.lookup_backend(backend)
        self.compiled = self.ran = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.compiled += 1
        run = self.backend(graph, inputs)

        def counted(*args: Any) -> Any:
            self.ran += 1
            return run(*args)

        return counted


def started(
    how: str, backend: Any, build: Callable[[], nn.Module] = lambda: Residual(False), **options: Any
) -> tuple[Compressor, Callable[[Tensor], Tensor]]:
    """Return a compressor, and the callable that is to be called in its training loop.

    Args:
        how: one of HOW, or anything else to compile nothing.
    """
    torch.manual_seed(0)
    model = build().double()
    options = {"gamma": 0.1, "interval": 10, "bit_step": 0.1} | options
    if how in ("before", "in one graph"):
        run = torch.compile(model, backend=backend, fullgraph=how == "in one graph")
        return compressor_of(cast(nn.Module, run), X, **options), run
    if how == "method before":
        model.compile(backend=backend)
    if how == "a part before":
        model.one = torch.compile(cast(nn.Module, model.one), backend=backend)  # type: ignore[assignment]
    compressor = compressor_of(model, X, **options)
    if how == "after":
        return compressor, torch.compile(compressor.model, backend=backend)
    if how == "method after":
        model.compile(backend=backend)
    if how == "a part after":
        model.get_submodule("one").compile(backend=backend)
    return compressor, model


def step(compressor: Compressor, run: Any, optimizer: Optimizer, i: int) -> Tensor:
    """Do a training step on the batch of seed `i`, short of `compressor.step`; return the loss."""
    x = torch.randn(X.shape, generator=torch.Generator().manual_seed(i), dtype=X.dtype)
    loss: Tensor = (run(x) - torch.linspace(-1, 1, 5)).square().mean() + compressor.penalty()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def patience() -> None:
    """Compile something, so that small cuts are delayed in an eager run as in a compiled one."""
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))


@torch.no_grad()
def silence(compressor: Compressor, block: str, rows: list[int]) -> None:
    """Kill rows of a block, with batch-norm biases that make their channels 0 after its ReLU."""
    inside = getattr(compressor.model, block)
    inside = getattr(inside, "_orig_mod", inside)  # a part may be compiled on its own
    inside[0].bit_depth[rows] = 0
    inside[1].bias[rows] = -1.0


def trained(how: str, backend: Any) -> tuple[Compressor, list[Tensor], list[str]]:
    """Train for 40 steps, killing rows twice; return the losses and the plans of the cuts too."""
    compressor, run = started(how, backend, gamma=1e-5)
    optimizer = AdamW(compressor.weights(), lr=3e-3)
    losses, plans = [], []
    for i in range(40):
        if i == 14:
            silence(compressor, "one", [0, 3])
        if i == 24:
            silence(compressor, "one", [1])
        losses.append(step(compressor, run, optimizer, i))
        plan = compressor.step(optimizer)
        if plan is not None:
            plans.append(str(plan).replace("_orig_mod.", ""))
    assert len(plans) == compressor.cuts >= 2
    return compressor, losses, plans


def check_equal_to_eager(how: str, backend: Any, tolerance: float) -> None:
    compiled, losses, plans = trained(how, backend)
    patience()
    eager, wanted, eager_plans = trained("not at all", None)
    torch.testing.assert_close(losses, wanted, rtol=tolerance, atol=tolerance)
    assert plans == eager_plans
    for (name, p), q in zip(
        compiled.model.named_parameters(), eager.model.parameters(), strict=True
    ):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    "how", [how if how in QUICK else pytest.param(how, marks=pytest.mark.slow) for how in HOW]
)
def test_a_compiled_run_equals_the_eager_one(how: str) -> None:
    backend = Counting()
    check_equal_to_eager(how, backend, 1e-6)
    assert backend.ran >= 40


@pytest.mark.slow
@pytest.mark.parametrize("how", ["before", "method after"])
def test_a_run_with_inductor_equals_the_eager_one(how: str) -> None:
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8))
    except Exception as error:  # a missing compiler may raise anything
        pytest.skip(f"inductor does not work here: {error}")
    backend = Counting("inductor")
    check_equal_to_eager(how, backend, 1e-6)
    assert backend.ran >= 40


def wide() -> nn.Module:
    model = Chain(bias=True)
    model.a = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    model.b[0] = nn.Conv2d(16, 7, 3, padding=1)
    return model


@torch.no_grad()
def drop_first(compressor: Compressor) -> None:
    """Kill the first row of the hidden layer of `perceptron`."""
    hidden = compressor.layers["1"]
    hidden.bit_depth[0] = 0
    assert hidden.bias is not None
    hidden.bias[0] = 0


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 5))


@pytest.mark.parametrize(
    "how",
    [
        "before",
        *(pytest.param(h, marks=pytest.mark.slow) for h in ("in one graph", "method after")),
    ],
)
def test_the_model_is_compiled_anew_after_each_of_many_cuts(how: str) -> None:
    """After more than 8 cuts, a model is still compiled.

    torch gives up after 8 recompilations of one function, and would run it eagerly.
    """
    results = []
    backend = Counting("eager")
    for each in (how, "not at all"):
        compressor, run = started(each, backend, perceptron, gamma=0.0)
        optimizer = SGD(compressor.weights(), lr=0.01, momentum=0.9)
        losses = []
        for i in range(10):
            if i:
                drop_first(compressor)
                assert compressor.cut(optimizer)
                assert compressor.model.get_parameter("3.weight").shape[1] == 16 - i
            compiled, ran = backend.compiled, backend.ran
            for j in range(2):
                losses.append(step(compressor, run, optimizer, 2 * i + j))
            if each == how:
                assert backend.compiled == compiled + 1
                assert backend.ran == ran + 2
            else:
                assert backend.compiled == compiled
        assert compressor.cuts == 9
        results.append(losses)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["before", "method before", "method after"])
def test_looking_at_the_model_compiles_nothing(how: str) -> None:
    """Tracing, comparing before and after a cut, and measuring run the model eagerly."""
    backend = Counting("eager")
    compressor, run = started(how, backend, perceptron, gamma=0.0)
    assert backend.compiled == 0
    optimizer = SGD(compressor.weights(), lr=0.01)
    step(compressor, run, optimizer, 0)
    compiled = backend.compiled
    assert compiled > 0
    drop_first(compressor)
    assert compressor.cut(optimizer)
    compressor.size()
    compressor.report()
    assert backend.compiled == compiled


def test_a_part_that_was_compiled_in_place_is_traced() -> None:
    model = Residual(relu_after=False).double()
    model.one.compile(backend="eager")
    compressor = compressor_of(model, X)
    assert not compressor.graph.untraceable
    kill(model, "one.0", slice(2))
    assert compressor.cut()
    assert len(compressor.layers["one.0"].rows) == 3
    with torch.no_grad():
        assert model(X).shape == (8, 5) and counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("how", ["not at all", "before", "in one graph"])
def test_small_cuts_wait_while_something_is_compiled(how: str) -> None:
    compressor, run = started(how, Counting("eager"), wide, gamma=0.0, interval=2)
    optimizer = SGD(compressor.weights(), lr=0.0)
    step(compressor, run, optimizer, 0)
    kill(compressor.model, "head.linear", [0])  # 7 of 1,500 parameters
    assert compressor.step(optimizer) is None
    assert (compressor.step(optimizer) is None) == (how != "not at all")
    silence(compressor, "a", [3])  # and 92 more; the next cut is due at the second step
    assert compressor.step(optimizer) is None
    plan = compressor.step(optimizer)
    assert plan is not None
    assert len(compressor.layers["head.linear"].rows) == 4
    assert len(compressor.layers["a.0"].rows) == 15


@pytest.mark.parametrize("request_cut", ["cut", "finish"])
def test_what_waited_is_cut_on_request(request_cut: str) -> None:
    """`cut` and `finish` make a small cut that `step` has delayed."""
    compressor, run = started("before", Counting("eager"), wide, gamma=0.0, interval=2)
    optimizer = SGD(compressor.weights(), lr=0.0)
    step(compressor, run, optimizer, 0)
    kill(compressor.model, "head.linear", [0])
    for _ in range(4):
        assert compressor.step(optimizer) is None
    if request_cut == "cut":
        assert compressor.cut(optimizer)
    else:
        compressor.finish([X], optimizer)
    assert compressor.cuts == 1
    assert len(compressor.layers["head.linear"].rows) == 4


def test_the_size_can_be_taken_in_a_compiled_loss() -> None:
    """`q_bits` can be compiled into one graph."""
    compressor, _ = started("after", "eager")
    counting = Counting("eager")
    layers = list(compressor.layers.values())
    compiled = torch.compile(lambda: 1 + q_bits(layers), backend=counting)
    assert compiled() == 1 + q_bits(layers)
    assert counting.compiled == counting.ran == 1  # in one graph
