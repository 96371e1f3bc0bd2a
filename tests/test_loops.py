"""Ways to write a training loop that once led to wrong networks, most of them without an error."""

import copy
import io
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Residual, block, compressor_of
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel
from torchvision.models.feature_extraction import create_feature_extractor

from selfcompress import Compressor, Schedule, to_dense
from selfcompress.inputs import Place, moved_with
from selfcompress.layers.quantized import QuantizedLayer

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def kill(compressor: Compressor) -> None:
    """Take all bits from every third row of every layer."""
    for layer in compressor.layers.values():
        with torch.no_grad():
            layer.bit_depth[::3] = 0


def one_step(compressor: Compressor, optimizer: torch.optim.Optimizer, x: Tensor = X) -> None:
    loss = compressor.model(x).square().mean() + compressor.penalty()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    compressor.step(optimizer)


def sgd(compressor: Compressor) -> SGD:
    return SGD(compressor.weights(), lr=0.01, momentum=0.9)


# --- batch norms in eval mode during training -----------------------------------------------------


class Frozen(Residual):
    """A residual network whose own train() keeps its batch norms in eval mode."""

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


def frozen(way: str) -> tuple[Compressor, SGD]:
    """Return a compressor after one step with batch norms in eval mode.

    Args:
        way: what sets that mode: the model's own "train()", or the training "loop".
    """
    torch.manual_seed(0)
    model = (Frozen if way == "train()" else Residual)(relu_after=True).double()
    compressor = compressor_of(model, X.double(), 0.0, bits=8)
    optimizer = SGD(compressor.weights(), lr=0.0)
    model.train()
    if way == "loop":
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    one_step(compressor, optimizer, X.double())
    return compressor, optimizer


@pytest.mark.parametrize("way", ["train()", "loop"])
def test_a_cut_behind_frozen_norms_is_exact(way: str) -> None:
    compressor, optimizer = frozen(way)
    kill(compressor)
    before = compressor.model(X.double())
    for _ in range(2):
        compressor.cut(optimizer)
        torch.testing.assert_close(compressor.model(X.double()), before, rtol=1e-9, atol=1e-9)
    evaluated = compressor.model.eval()(X.double())
    torch.testing.assert_close(evaluated, before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", ["train()", "loop"])
def test_frozen_norms_keep_their_statistics_to_the_end(way: str) -> None:
    compressor, optimizer = frozen(way)
    before = compressor.model(X.double())
    compressor.model.eval()
    compressor.finish([X.double()], optimizer)
    torch.testing.assert_close(compressor.model(X.double()), before, rtol=1e-9, atol=1e-9)


def test_frozen_norms_keep_their_statistics_in_another_process() -> None:
    compressor, optimizer = frozen("loop")
    before = compressor.model(X.double())
    fresh = Compressor(Residual(relu_after=True).double(), X.double(), 0.0, bits=8)
    fresh.load_state_dict(compressor.state_dict(optimizer), SGD(fresh.weights(), lr=0.0))
    fresh.finish([X.double()])
    after = fresh.model.eval()(X.double())
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


def test_training_goes_on_smoothly_behind_frozen_norms() -> None:
    """A dead row's bias is still trained: the norm behind it must not scale up its gradient."""
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1)
    model: Any = nn.Sequential(*parts)
    nn.init.ones_(model[1].bias)
    compressor = Compressor(model, X, 0.0, bits=8)
    optimizer = SGD(compressor.weights(), lr=0.1)
    model[1].eval()
    one_step(compressor, optimizer)
    kill(compressor)
    compressor.cut(optimizer)
    for _ in range(4):
        one_step(compressor, optimizer)
        assert model[0].bias.grad.abs().max() < 0.5


class Other(nn.BatchNorm2d):
    """A batch norm of a user's own class."""


def test_norms_of_other_types_are_held_too() -> None:
    """finish() keeps the statistics of batch norms of users' classes that are in eval mode."""
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), Other(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    compressor = Compressor(model, X, 0.0, bits=8)
    before = model[1].running_mean.clone()
    model[1].eval()
    one_step(compressor, sgd(compressor))
    compressor.finish([X + 1])
    assert torch.equal(model[1].running_mean, before)


def test_an_error_in_the_loader_leaves_the_statistics() -> None:
    model: Any = nn.Sequential(block(3, 4))
    compressor = Compressor(model, X, 0.0, bits=8)
    before = model[0][1].running_mean.clone()
    with pytest.raises(ValueError, match="batches must be"):
        compressor.reestimate([X, None])
    assert torch.equal(model[0][1].running_mean, before)
    assert model[0][1].momentum == 0.1


def test_statistics_are_averaged_over_all_batches_alike() -> None:
    """All batches count the same; the momentum of norms and the training mode are restored."""
    model: Any = nn.Sequential(block(3, 4), nn.Flatten(), nn.Linear(256, 2))
    compressor = Compressor(model, X, 0.0, bits=8)
    inputs = [X[:2], X[2:4], X[4:] + 1]
    compressor.reestimate(inputs)
    made = [model[0][0](x) for x in inputs]
    means = torch.stack([y.mean((0, 2, 3)) for y in made]).mean(0)
    torch.testing.assert_close(model[0][1].running_mean, means)
    assert model[0][1].momentum == 0.1
    assert model.training


@pytest.mark.parametrize("loader", [[], iter(())])
def test_a_loader_without_batches_is_refused(loader: Any) -> None:
    model: Any = nn.Sequential(block(3, 4), nn.Flatten(), nn.Linear(256, 2))
    compressor = Compressor(model, X, 0.0, bits=8)
    model(X)
    before = model[0][1].running_mean.clone()
    with pytest.raises(ValueError, match="no batch"):
        compressor.finish(loader)
    assert torch.equal(model[0][1].running_mean, before)
    assert model[0][1].momentum == 0.1


def test_batches_of_another_kind_are_refused() -> None:
    compressor = Compressor(nn.Sequential(block(3, 4)), X, 0.0)
    with pytest.raises(ValueError, match="not dict"):
        compressor.finish([{"x": X}])


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = block(3, 4)

    def forward(self, batch: dict[str, Tensor]) -> Any:
        return self.body(batch["x"])


@pytest.mark.parametrize("tupled", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_a_model_of_a_dict_is_finished_on_dicts(labelled: bool, tupled: bool) -> None:
    model: Any = Named()
    example: Any = ({"x": X},) if tupled else {"x": X}
    compressor = Compressor(model, example, 0.0)
    batch = {"x": X + 1}
    compressor.finish([(batch, torch.zeros(6))] if labelled else [batch])
    made = model.body[0](X + 1).mean((0, 2, 3))
    torch.testing.assert_close(model.body[1].running_mean, made)


# --- what steps count and warn of -----------------------------------------------------------------


class Query(nn.Module):
    """Layers on a learnt vector, on a sequence with its batch dimension second, and on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 4))
        # `tokens` reads as many features as the example has samples: not a batch dimension.
        self.ask, self.read, self.tokens = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Any:
        y = self.read(x.flatten(2).permute(2, 0, 1))  # (pixels, batch, channels)
        y = self.tokens((y + self.ask(self.query)).flatten(0, 1))
        return y.view(-1, x.shape[0], 8).sum(0)


def test_samples_are_told_from_queries_sequences_and_tokens() -> None:
    """`samples` counts the images that a layer sees, and is 0 where no dimension counts them."""
    model: Any = Query()
    Compressor(model, X, 0.0)
    model(X[:5])
    seen = {name: getattr(model, name).samples for name in ("ask", "read", "tokens")}
    assert seen == {"ask": 0, "read": 5, "tokens": 0}


class Tables(nn.Module):
    """Layers on constant tensors without samples, of sizes that are multiples of the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.grid, self.vector = torch.ones(1, 2, 6, 6), torch.ones(12)
        self.table = torch.ones(36, 2)
        self.a, self.b, self.c = nn.Conv2d(2, 4, 1), nn.Linear(12, 4), nn.Linear(2, 4)
        self.body = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Any:
        place = self.a(self.grid) + self.b(self.vector).view(4, 1, 1)
        place = place + self.c(self.table).T.reshape(4, 6, 6)
        return self.body(x) + place


def test_samples_are_not_counted_in_tables() -> None:
    model = Tables()
    compressor = Compressor(model, X, 0.0)
    model(X[:5])
    assert {name: layer.samples for name, layer in compressor.layers.items()} == {
        "a": 0, "b": 0, "c": 0, "body": 5,
    }  # fmt: skip


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)

    def forward(self, edges: Tensor, nodes: Tensor) -> Any:
        return self.body(nodes)[edges[0]]


class Experts(nn.Module):
    """A model in which one layer sees only the samples whose first pixel is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expert, self.head = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.stem(x.mean((2, 3))))
        chosen = x[:, 0, 0, 0] > 0
        more = torch.zeros_like(h)
        more[chosen] = self.expert(h[chosen])
        return self.head(h + more)


@pytest.mark.filterwarnings("ignore:torch.fx cannot trace")
def test_an_expert_that_saw_the_whole_example_does_not_say_how_many_samples_there_are() -> None:
    """The sample count of a batch is what most layers see, not what an expert sees."""
    worths = []
    for example in (X.abs(), torch.cat([X.abs()[:3], -X.abs()[:3]])):
        torch.manual_seed(0)
        compressor = Compressor(Experts(), example, 0.1, bits=8)
        one_step(compressor, sgd(compressor), torch.cat([X.abs()[:1], -X.abs()]))
        worths.append(compressor.formats.adam.state[compressor.layers["stem"].bit_depth]["worth"])
    assert worths[0].sum() > 0
    torch.testing.assert_close(worths[0], worths[1], rtol=1e-5, atol=0)


def test_nodes_of_a_graph_are_samples() -> None:
    model: Any = Graph()
    edges = torch.zeros(2, 7, dtype=torch.int64)
    Compressor(model, (edges, torch.ones(100, 3)), 0.0)
    model(edges, torch.ones(80, 3))
    assert model.body.samples == 80


def test_a_layer_of_windows_alone_counts_their_images() -> None:
    """A layer that sees 12 windows of each image counts images, with no other layer to go by."""
    model: Any = nn.Sequential(nn.Unflatten(1, (12, 16)), nn.Flatten(0, 1), nn.Linear(16, 4))
    Compressor(model, X.flatten(1), 0.0)
    model(X.flatten(1)[:5])
    assert model[2].samples == 5


def test_a_layer_that_is_thawed_is_compressed() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    model[0].requires_grad_(False)
    compressor = Compressor(model, X, 100.0, bits=4, interval=1000)
    optimizer = sgd(compressor)
    before = model[0].bit_depth.detach().clone()
    for _ in range(3):
        one_step(compressor, optimizer)
    assert torch.equal(model[0].bit_depth, before)
    model.requires_grad_(True)
    for _ in range(3):
        one_step(compressor, optimizer)
    assert (model[0].bit_depth < before).any()


def test_gradients_that_were_not_seen_are_missed() -> None:
    """torch.autograd.grad() accumulates no gradients, so hooks see none, and step() warns."""
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 3))
    compressor = Compressor(model, X, 0.1, bits=4)
    optimizer = sgd(compressor)
    compressor.penalty().backward()
    weights = compressor.weights()
    found = torch.autograd.grad(model(X).square().mean(), weights)
    for weight, gradient in zip(weights, found, strict=True):
        weight.grad = gradient
    with pytest.warns(UserWarning, match="no gradient of a weight was seen"):
        compressor.step(optimizer)


@pytest.mark.parametrize("taken", [0, 5])
def test_a_schedule_that_is_not_over_is_said(taken: int) -> None:
    """finish() warns if step() was called less often than the schedule has steps."""
    compressor = Compressor(nn.Sequential(block(3, 4)), X, 0.1, bits=8, schedule=Schedule(20))
    optimizer = sgd(compressor)
    for _ in range(taken):
        one_step(compressor, optimizer)
    with pytest.warns(UserWarning, match=f"of 20 steps, .* called {taken} times"):
        compressor.finish([X])


def test_options_of_the_wrong_kind_leave_the_model_alone() -> None:
    model: Any = nn.Sequential(block(3, 4), nn.Conv2d(4, 2, 1))
    with pytest.raises(ValueError, match="Schedule, not 240"):
        Compressor(model, X, 0.1, schedule=240)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="whole number"):
        Schedule(10.5)  # type: ignore[arg-type]
    lazy: Any = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    with pytest.raises(ValueError, match="run the model once"):
        Compressor(lazy, X, 0.1)
    compressor = Compressor(model, X, 0.1, exclude="1")
    assert compressor.layers.keys() == {"0.0"}


# --- hooks, attributes and modes of the user's ----------------------------------------------------


def test_hooks_and_notes_on_a_parameter_survive_a_cut() -> None:
    model: Any = nn.Sequential(block(3, 9), nn.Flatten(), nn.Linear(9 * 64, 4))
    compressor = Compressor(model, X, 0.0)
    seen: list[torch.Size] = []
    weight = model[0][0].weight
    weight.no_decay = True
    handle = weight.register_hook(lambda gradient: seen.append(gradient.shape))
    model[2].weight.register_hook(lambda gradient: gradient.clamp(-1e-9, 1e-9))
    kill(compressor)
    assert compressor.cut() is not None
    assert model[0][0].weight is not weight
    model(X).square().sum().backward()
    assert seen == [model[0][0].weight.shape]
    assert model[0][0].weight.no_decay
    assert model[2].weight.grad.abs().max() <= 1e-9
    handle.remove()
    model(X).sum().backward()
    assert len(seen) == 1


def test_hooks_after_accumulation_survive_a_cut() -> None:
    model: Any = nn.Sequential(block(3, 9), nn.Flatten(), nn.Linear(9 * 64, 4))
    compressor = Compressor(model, X, 0.0)
    optimizer = sgd(compressor)
    seen: list[torch.Size] = []
    model[0][0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    kill(compressor)
    assert compressor.cut(optimizer) is not None
    one_step(compressor, optimizer)
    assert seen == [model[0][0].weight.shape]
    assert len(model[0][0].weight._post_accumulate_grad_hooks) == 2  # the user's and ours


def test_a_dense_copy_keeps_hooks_on_layers() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    compressor = Compressor(model, X, 0.0)
    torch.testing.assert_close(to_dense(compressor.model)(X), model(X))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_formats_stay_exact_in_half_precision(dtype: torch.dtype) -> None:
    model: Any = nn.Sequential(block(3, 4), nn.Flatten(), nn.Linear(256, 2))
    compressor = Compressor(model, X, 0.0, bits=8)
    layer = compressor.layers["0.0"]
    assert isinstance(layer, QuantizedLayer)
    with torch.no_grad():
        layer.bit_depth.fill_(4.0005)  # 5 bits; in half precision it would be 4
        layer.exponent.fill_(-3.0003)
    before = layer.bit_depth.clone(), layer.exponent.clone()
    model.to(dtype)
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.bit_depth, before[0])
    assert torch.equal(layer.exponent, before[1])
    assert model.double()[0][0].bit_depth.dtype == torch.float64
    assert model.float()[0][0].bit_depth.dtype == torch.float32


class Dropped(nn.Module):
    """A model that replaces a buffer at every call, with dropout in training mode or `always`."""

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.body, self.head, self.always = block(3, 9), nn.Linear(9, 4), always
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.calls = self.calls + 1
        y = self.body(x).mean((2, 3))
        return self.head(F.dropout(y, training=self.always or self.training))


def test_indices_stay_whole_numbers_when_the_type_of_all_is_set() -> None:
    """model.type() casts all tensors of a module, but a layer's indices of channels stay int64."""
    compressor = Compressor(nn.Sequential(block(3, 9), nn.Conv2d(9, 2, 1)), X, 0.0)
    kill(compressor)
    compressor.cut()
    compressor.model.type(torch.float64)
    kill(compressor)
    compressor.example_input = X.double()
    assert compressor.cut() is not None


def test_a_feature_extractor_stays_in_its_mode() -> None:
    """A feature extractor has a graph per mode, which train() swaps: that must be undone."""
    model: Any = create_feature_extractor(Dropped(), ["head"]).train()
    compressor = Compressor(model, X, 0.0, bits=4)
    kill(compressor)
    for _ in range(2):
        assert not torch.equal(model(X)["head"], model(X)["head"])
        compressor.cut()


def test_a_buffer_that_forward_replaces_is_put_back() -> None:
    model: Any = Dropped()
    compressor = Compressor(model, X, 0.0)
    kill(compressor)
    compressor.cut()
    assert model.calls == 0


def test_a_network_that_is_random_in_evaluation_is_cut_unchecked() -> None:
    compressor = Compressor(Dropped(always=True), X, 0.0)
    kill(compressor)
    with pytest.warns(UserWarning, match="cannot be checked"):
        assert compressor.cut() is not None
    assert compressor.model(X).shape == (6, 4)


class Spread(nn.Module):
    """A model that also returns the deviation over the batch, which is NaN for a single image."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = block(3, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.head(self.body(x).mean((2, 3)))
        return y, y.std(0)


@pytest.mark.filterwarnings("ignore:std", "error:cuts cannot be checked")
def test_nan_before_and_after_is_no_difference() -> None:
    compressor = Compressor(Spread(), X[:1], 0.0)
    kill(compressor)
    assert compressor.cut() is not None


class Tasks(nn.Module):
    """A model with two heads, of which a call without `task` reaches only one."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b = block(3, 9), nn.Conv2d(9, 4, 1), nn.Conv2d(9, 2, 1)

    def forward(self, x: Tensor, task: str = "a") -> Any:
        return getattr(self, task)(self.trunk(x))


class Both(nn.Module):
    """A wrapper that reaches both heads of `Tasks`."""

    def __init__(self, tasks: Tasks) -> None:
        super().__init__()
        self.tasks = tasks

    def forward(self, x: Tensor) -> Any:
        return self.tasks(x), self.tasks(x, "b")


def test_heads_that_the_example_does_not_reach_are_named_and_a_wrapper_helps() -> None:
    tasks: Any = Tasks()
    with pytest.warns(UserWarning, match="not called on example_input: b. "):
        Compressor(copy.deepcopy(tasks), X, 0.0)
    compressor = Compressor(Both(tasks), X, 0.0)
    kill(compressor)
    assert compressor.cut() is not None
    assert tasks(X).shape[1] == 4
    assert tasks(X, "b").shape[1] == 2
    assert len(tasks.trunk[0].weight) == 6


def test_the_parts_of_an_attention_are_not_missed(recwarn: pytest.WarningsRecorder) -> None:
    """Attention reads the weight of its out_proj without calling it, which is no reason to warn."""
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 4))
    Compressor(model, torch.randn(2, 5, 16), 0.0)
    assert not [warning for warning in recwarn if "not called" in str(warning.message)]


def test_an_average_of_the_compiled_model_is_cut_along() -> None:
    model: Any = nn.Sequential(block(3, 9), nn.Flatten(), nn.Linear(9 * 64, 4))
    compressor = Compressor(model, X, 0.0)
    compiled: Any = torch.compile(model)  # not run, so nothing is compiled
    average = AveragedModel(compiled)
    kill(compressor)
    assert compressor.cut(sgd(compressor), [average]) is not None
    average.update_parameters(model)


def test_the_number_of_cuts_is_saved() -> None:
    compressor = Compressor(nn.Sequential(block(3, 9), nn.Conv2d(9, 2, 1)), X, 0.0)
    optimizer = sgd(compressor)
    kill(compressor)
    compressor.cut(optimizer)
    fresh = Compressor(nn.Sequential(block(3, 9), nn.Conv2d(9, 2, 1)), X, 0.0)
    fresh.load_state_dict(compressor.state_dict(optimizer), sgd(fresh))
    assert fresh.cuts == compressor.cuts == 1


class Kept(nn.Module):
    """A model that keeps features in attributes, for a loss of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = block(3, 9), block(9, 9), nn.Conv2d(9, 4, 1)
        self.features: Any = None
        self._private: Any = None

    def forward(self, x: Tensor) -> Any:
        self.features = [self.one(x)]
        self._private = self.two(self.features[0])
        return self.head(self._private)


def test_what_a_hook_on_a_block_sees_keeps_its_channels() -> None:
    model: Any = nn.Sequential(block(3, 9), block(9, 9), nn.Conv2d(9, 4, 1))
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    compressor = Compressor(model, X, 0.0)
    kill(compressor)
    assert compressor.cut() is not None
    seen.clear()
    model(X)
    assert [s.shape[1] for s in seen] == [9]
    assert any("hooks on 0 see it" in why for why in compressor.graph.reasons.values())
    assert len(model[1][0].weight) == 6


def test_features_that_a_module_keeps_keep_their_channels() -> None:
    model: Any = Kept()
    compressor = Compressor(model, X, 0.0)
    assert not model.features
    kill(compressor)
    assert compressor.cut() is not None
    model(X)
    assert model.features[0].shape[1] == 9
    assert any("kept as features" in why for why in compressor.graph.reasons.values())
    assert any("kept as _private" in why for why in compressor.graph.reasons.values())
    assert model._private.shape[1] == 9


# --- evaluations in between, and mistakes in loops ------------------------------------------------


class TwoHeads(nn.Module):
    """A model that is called for one of its heads in training, and for both in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 4), nn.Linear(32, 4)

    def forward(self, x: Tensor, which: str = "") -> Any:
        h = F.relu(self.body(x))
        heads = {"a": self.a, "b": self.b}
        return heads[which](h) if which else (self.a(h), self.b(h))


@pytest.mark.parametrize("evaluated", [False, True])
def test_an_evaluation_does_not_tell_how_large_batches_are(evaluated: bool) -> None:
    """A forward pass without gradients before a step must not change the step's sample count."""
    torch.manual_seed(0)
    x, labels = torch.randn(64, 16), torch.randint(4, (64,))
    compressor = Compressor(TwoHeads(), x, 1e-3, bits=8)
    for _ in range(3):
        if evaluated:
            with torch.no_grad():
                compressor.model(x[:1])
        (F.cross_entropy(compressor.model(x, "a"), labels) + compressor.penalty()).backward()
        compressor.step(sgd(compressor))
    worth = compressor.formats.adam.state[compressor.layers["body"].bit_depth]["worth"]
    assert 1e-3 < worth.sum() < 1e-2  # 64 times less if one image were the batch


def test_a_validation_loss_with_the_penalty_holds_no_norms() -> None:
    """A penalty without backward() must not record that norms are in eval mode during training."""
    compressor = Compressor(nn.Sequential(block(3, 4)), X, 0.0, bits=8)
    one_step(compressor, sgd(compressor))
    compressor.model.eval()
    compressor.model(X).square().mean() + compressor.penalty()
    compressor.model.train()
    mean = compressor.model.get_buffer("0.1.running_mean").clone()
    compressor.finish([X + 5])
    assert not torch.equal(compressor.model.get_buffer("0.1.running_mean"), mean)


def test_norms_in_eval_mode_stay_before_anything_was_differentiated_too() -> None:
    """Modes are recorded in backward(); before any, reestimate() goes by the current modes."""
    compressor = Compressor(nn.Sequential(block(3, 4)), X, 0.0)
    compressor.model.train()
    norm = compressor.model.get_submodule("0.1").eval()
    mean = norm.get_buffer("running_mean").clone()
    compressor.reestimate([X + 5])
    assert torch.equal(norm.get_buffer("running_mean"), mean)
    assert not norm.training


def test_an_evaluation_between_backward_and_step_holds_no_norms() -> None:
    """The modes of batch norms that count are those in backward(), whatever they are in step()."""
    compressor = Compressor(nn.Sequential(block(3, 4)), X, 0.0)
    optimizer = sgd(compressor)
    (compressor.model(X).square().mean() + compressor.penalty()).backward()
    compressor.model.eval()(X)
    compressor.step(optimizer)
    mean = compressor.model.get_buffer("0.1.running_mean").clone()
    compressor.finish([X + 5])
    assert not torch.equal(compressor.model.get_buffer("0.1.running_mean"), mean)


@pytest.mark.filterwarnings("error")
def test_a_penalty_in_every_other_loss_is_no_mistake() -> None:
    compressor = Compressor(nn.Sequential(block(3, 4)), X, 0.01, bits=4)
    for penalised in (True, False, True, False):
        loss = compressor.model(X).square().mean()
        (loss + compressor.penalty() if penalised else loss).backward()
        compressor.step(sgd(compressor))


def test_a_model_may_hold_its_compressor() -> None:
    """`stored_percent` has the model copied, but the compressor in it refuses to be copied."""
    model = nn.Sequential(block(3, 4), nn.Conv2d(4, 2, 1))
    compressor = Compressor(model, X, stored_percent=15, bits=8, schedule=Schedule(20))
    model.compressor = compressor  # type: ignore[assignment]
    optimizer = sgd(compressor)
    for _ in range(20):
        one_step(compressor, optimizer)
    compressor.finish([X], optimizer)


def test_a_loss_without_the_penalty_is_told() -> None:
    compressor = Compressor(nn.Sequential(block(3, 4)), X, 0.01)
    compressor.model(X).square().mean().backward()
    with pytest.warns(UserWarning, match=r"penalty\(\) was not in the loss"):
        compressor.step(sgd(compressor))


def test_an_evaluation_of_other_batches_before_the_step_changes_nothing() -> None:
    worth = []
    for evaluates in (False, True):
        torch.manual_seed(0)
        compressor = Compressor(nn.Sequential(block(3, 4), nn.Conv2d(4, 2, 1)), X, 0.1, bits=4)
        (compressor.model(X).square().mean() + compressor.penalty()).backward()
        if evaluates:
            with torch.no_grad():
                compressor.model.eval()(X[:1])
        compressor.step(sgd(compressor))
        worth.append(compressor.formats.wanted(1.0))
    torch.testing.assert_close(*worth, rtol=0, atol=0)


@pytest.mark.parametrize("first", [0, 5])
def test_a_layer_may_be_frozen_for_a_while(first: int) -> None:
    """Once a layer is thawed, its exponents change at every step, even if it began frozen."""
    compressor = Compressor(nn.Sequential(block(3, 4), nn.Conv2d(4, 2, 1)), X, 0.1, bits=8)
    layer, optimizer = compressor.layers["1"], sgd(compressor)
    moved = []
    for i in range(20):
        layer.requires_grad_(not first <= i < 10)
        optimizer.zero_grad()
        before = layer.exponent.detach().clone()
        (compressor.model(X).square().mean() + compressor.penalty()).backward()
        compressor.step(optimizer)
        moved.append(not torch.equal(layer.exponent, before))
    assert all(moved[11:])


def test_nothing_is_collected_once_formats_are_frozen() -> None:
    compressor = Compressor(nn.Sequential(block(3, 4), nn.Conv2d(4, 2, 1)), X, 0.0)
    optimizer = sgd(compressor)
    kill(compressor)
    compressor.freeze()
    compressor.model(X).square().mean().backward()
    assert not compressor.formats.collected.norms
    assert compressor.cut(optimizer)
    compressor.model(X).square().mean().backward()
    assert not compressor.formats.collected.norms


def test_a_cut_wants_the_optimiser_of_the_weights() -> None:
    compressor = Compressor(nn.Sequential(block(3, 4), nn.Conv2d(4, 2, 1)), X, 0.0)
    kill(compressor)
    before = copy.deepcopy(compressor.model.state_dict())
    with pytest.raises(ValueError, match="optimiser does not hold"):
        compressor.cut(SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    with pytest.raises(ValueError, match="optimiser does not hold"):
        compressor.finish([X], SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    assert not compressor.frozen
    after = compressor.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_model_may_be_cast_after_its_compressor_was_made() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(block(3, 8), block(8, 4)).double()
    compressor = Compressor(model, X.double(), 1.0, interval=5, bit_step=0.5, bits=4)
    model.float()
    compressor.reestimate([X.double()])
    optimizer = SGD(compressor.weights(), lr=0.1)
    for _ in range(10):
        (model(X.float()).square().mean() + compressor.penalty()).backward()
        optimizer.step()
        compressor.step(optimizer)
    compressor.finish([X.double()], optimizer)
    assert compressor.cuts and model(X.float()).dtype == torch.float32


def test_only_floats_are_cast_with_a_model_and_only_if_all_of_it_was_cast() -> None:
    inputs = (torch.arange(3), torch.zeros(2, dtype=torch.float16))
    cpu, meta = torch.device("cpu"), torch.device("meta")
    was = Place(cpu, torch.float32)
    for now, expected in (
        (was, torch.float16),
        (Place(cpu, torch.float64), torch.float64),
        (Place(cpu, None), torch.float16),  # a part of it
        (Place(meta, torch.float32), torch.float16),
    ):
        moved = moved_with(inputs, was, now)
        assert [tensor.dtype for tensor in moved] == [torch.int64, expected]
        assert {tensor.device for tensor in moved} == {now.device}
    assert moved_with(inputs, Place(cpu, None), was)[1].dtype == torch.float16


def test_a_part_of_a_model_may_be_cast_after_its_compressor_was_made() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 4)  # the first of its parameters
            self.body = block(3, 8)

        def forward(self, x: Tensor) -> Any:
            features = self.body(x).mean((2, 3))
            return self.head(features.to(self.head.weight.dtype))

    model = Half()
    compressor = Compressor(model, X, 0.1)
    model.head.bfloat16()
    with torch.no_grad():
        compressor.layers["body.0"].bit_depth[:3] = 0
    compressor.finish([X])
    assert model.body[0].weight.shape[0] == 5  # type: ignore[index]


def test_a_model_may_be_cast_in_the_middle_of_its_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(block(3, 8), block(8, 4))
    compressor = Compressor(model, X, 0.1, interval=5)
    for dtype in (torch.float32, torch.float64, torch.float32):
        model.to(dtype)
        optimizer = SGD(compressor.weights(), lr=0.01)
        for _ in range(6):
            optimizer.zero_grad()
            (model(X.to(dtype)).square().mean() + compressor.penalty()).backward()
            optimizer.step()
            compressor.step(optimizer)
        kept = compressor.formats.state_dict()["state"].values()
        assert {t.dtype for state in kept for n, t in state.items() if n != "step"} == {dtype}


def test_a_parameter_that_was_replaced_since_is_named() -> None:
    def another(model: nn.Sequential) -> None:
        model[1][0].weight = nn.Parameter(torch.zeros(4, 4, 3, 3))  # type: ignore[index]

    def assigned(model: nn.Sequential) -> None:
        model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)

    def normed(model: nn.Sequential) -> None:
        nn.utils.parametrizations.weight_norm(model[1][0])  # type: ignore[index]

    for replace in (another, assigned, normed):
        model = nn.Sequential(block(3, 4), block(4, 4))
        compressor = Compressor(model, X, 0.01)
        replace(model)
        with pytest.raises(ValueError, match=r"is another parameter|is not the module"):
            compressor.step(SGD(model.parameters(), lr=0.1))
        if replace is not normed:
            compressor.freeze()  # nothing is collected any more
            compressor.step(SGD(model.parameters(), lr=0.1))


def test_a_layer_whose_rows_are_all_zero_keeps_one_and_so_does_an_average() -> None:
    """They are given up as idle at a cut, which must not leave a network of width 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    compressor = Compressor(model, torch.randn(4, 6), 0.1, interval=5, bits=4)
    average = AveragedModel(model)
    optimizer = SGD(compressor.weights(), lr=0.0)
    with torch.no_grad():
        model.get_parameter("0.weight").zero_()
    for _ in range(10):
        (model(torch.randn(4, 6)).square().sum() + compressor.penalty()).backward()
        optimizer.step()
        compressor.step(optimizer, averages=[average])
    layer = compressor.layers["0"]
    assert len(layer.rows) == 1 and bool(layer.live_rows().all())
    for name in ("0.bit_depth", "0.exponent"):
        torch.testing.assert_close(average.module.get_parameter(name), model.get_parameter(name))


@pytest.mark.parametrize("name", ["0.0", "0.1"])
def test_a_module_that_was_replaced_since_is_named(name: str) -> None:
    model = nn.Sequential(block(3, 4), block(4, 4))
    compressor = Compressor(model, X, 0.01)
    if name == "0.1":
        model[0] = nn.SyncBatchNorm.convert_sync_batchnorm(model[0])
    else:
        model[0] = torch.compile(model[0])  # type: ignore[assignment]
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=f"^{name} is not the module that it was"):
        compressor.step(SGD(model.parameters(), lr=0.1))
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="several processes"):
        Compressor(nn.Sequential(block(3, 4)), X, 0.01)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    Compressor(nn.Sequential(block(3, 4)), X, 0.01)


@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, pickle.dumps])
def test_a_compressor_is_not_copied(way: Any) -> None:
    compressor = Compressor(nn.Sequential(block(3, 4)), X, 0.0)
    with pytest.raises(TypeError, match="state_dict"):
        way(compressor)


def test_a_training_that_goes_on_otherwise_is_told() -> None:
    """Loading a state warns of options that differ; options that are NumPy numbers can be saved."""

    def compressor(**changes: Any) -> Compressor:
        return Compressor(nn.Sequential(block(3, 4)), X, 0.01, **changes)

    state = compressor(schedule=Schedule(100)).state_dict()
    compressor(schedule=Schedule(100)).load_state_dict(state)
    with pytest.warns(UserWarning, match=r"had schedule=Schedule\(steps=100.*has None"):
        compressor().load_state_dict(state)
    with pytest.warns(UserWarning, match=r"had bits=8\.0, this one has 4\.0"):
        compressor(schedule=Schedule(100), bits=4).load_state_dict(state)
    numbers: Any = Schedule(np.int64(100), begin=np.float64(0.1))  # type: ignore[arg-type]
    options: Any = {"min_channels": np.int64(2), "integer_bits": np.bool_(True)}
    torch.save(compressor(schedule=numbers, **options).state_dict(), file := io.BytesIO())
    file.seek(0)
    assert torch.load(file, weights_only=True)


def test_a_state_of_other_excluded_layers_is_refused_by_their_name() -> None:
    def compressor(**changes: Any) -> Compressor:
        model = nn.Sequential(block(3, 4), block(4, 4))
        return Compressor(model, X, 0.01, **changes)

    state = compressor(exclude="1.0").state_dict()
    with pytest.raises(ValueError, match=r"1\.0 is quantised and followed in this one alone"):
        compressor().load_state_dict(state)
    with pytest.raises(ValueError, match=r"1\.0 is quantised and followed in the saved one alone"):
        compressor(exclude="1.0").load_state_dict(compressor().state_dict())


def test_another_gamma_asked_for_is_what_a_training_goes_on_with() -> None:
    """The saved γ is loaded, unless this compressor was made with another γ than the saved one."""

    def compressor(gamma: float) -> Compressor:
        return Compressor(nn.Sequential(block(3, 4)), X, gamma)

    before = compressor(0.01)
    before.gamma = 0.02  # by a schedule of the user's own
    again, other = compressor(0.01), compressor(0.1)
    again.load_state_dict(before.state_dict())
    assert again.gamma == 0.02
    with pytest.warns(UserWarning, match=r"had gamma=0\.01, this one has 0\.1"):
        other.load_state_dict(before.state_dict())
    assert other.gamma == 0.1


def test_a_schedule_in_epochs_is_told() -> None:
    """A schedule given in epochs instead of steps is over long before the training is."""
    compressor = Compressor(nn.Sequential(block(3, 4)), X, 0.0, schedule=Schedule(4), bits=4)
    optimizer = sgd(compressor)
    for _ in range(5):
        one_step(compressor, optimizer)
    with pytest.warns(UserWarning, match=r"was of 4 steps, but training goes on: .*epochs \* len"):
        one_step(compressor, optimizer)


def test_a_module_with_a_state_of_its_own_goes_on() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.seen = nn.Sequential(block(3, 4)), {"steps": 0}

        def forward(self, x: Tensor) -> Any:
            return self.layers(x)

        def get_extra_state(self) -> Any:
            return self.seen

        def set_extra_state(self, state: Any) -> None:
            self.seen = state

    model, again = Counts(), Counts()
    model.seen = {"steps": 3}
    Compressor(again, X, 0.0).load_state_dict(Compressor(model, X, 0.0).state_dict())
    assert again.seen == {"steps": 3}


def test_an_optimiser_in_another_order_is_refused() -> None:
    def fresh(order: int) -> tuple[Compressor, Optimizer]:
        compressor = Compressor(nn.Sequential(block(3, 4), block(4, 5)), X, 0.0)
        return compressor, AdamW(compressor.weights()[::order])

    compressor, optimizer = fresh(1)
    one_step(compressor, optimizer)
    again, reversed_ = fresh(-1)
    with pytest.raises(ValueError, match="in another order"):
        again.load_state_dict(compressor.state_dict(optimizer), reversed_)


def test_gradients_that_are_thrown_away_do_not_count() -> None:
    """Gradients zeroed before the step, of adversarial attacks or skipped batches, do not count."""
    ended = []
    for discards in (False, True):
        torch.manual_seed(0)
        compressor = Compressor(nn.Sequential(block(3, 4)), X, 0.003, bits=8)
        optimizer = sgd(compressor)
        for _ in range(5):
            if discards:
                (-100 * compressor.model(X).square().mean()).backward()
                for _ in range(3):
                    (compressor.model(2 * X).mean() + compressor.penalty()).backward()
            one_step(compressor, optimizer)
        ended.append(compressor.formats.state_dict()["state"])
    torch.testing.assert_close(*ended, rtol=0, atol=0)


def test_what_a_discarded_batch_alone_has_used_does_not_count() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)])

        def forward(self, x: Tensor, which: int | None = None) -> Any:
            return sum(h(x) for i, h in enumerate(self.heads) if which in (i, None))

    model = TwoHeads()
    compressor = Compressor(model, X, 0.01)
    model(X, 0).square().mean().backward()
    model.zero_grad()
    (model(X, 1).square().mean() + compressor.penalty()).backward()
    assert set(compressor.formats.collected.norms) == {compressor.layers["heads.1"]}


def test_gradients_that_backward_did_not_leave_are_missed() -> None:
    """With torch.autograd.grad no hooks run, so nothing would shrink."""
    compressor = Compressor(nn.Sequential(block(3, 4)), X, 0.01)
    loss = compressor.model(X).square().mean() + compressor.penalty()
    for parameter, gradient in zip(
        compressor.weights(), torch.autograd.grad(loss, compressor.weights()), strict=True
    ):
        parameter.grad = gradient
    with pytest.warns(UserWarning, match="no gradient of a weight was seen"):
        compressor.step(sgd(compressor))


def test_batches_may_hold_their_inputs_together() -> None:
    """Batches of a model with two inputs may be (x, y, ...) or ((x, y, ...), ...)."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(block(3, 4))

        def forward(self, x: Tensor, y: Tensor) -> Any:
            return self.layers(x + y)

    found = []
    for batch in ((X, X + 1, "labels"), ((X, X + 1, "more"), "labels")):
        torch.manual_seed(0)
        model: Any = Sum()
        Compressor(model, (X, X), 0.0, bits=8).reestimate([batch])
        found.append(model.layers[0][1].running_mean)
    assert torch.equal(*found)


def test_columns_that_went_without_their_channel_are_gone_after_resuming_too() -> None:
    """The stem of a residual network loses a row; the branch that reads it need not read that."""

    def fresh() -> Compressor:
        torch.manual_seed(0)
        return compressor_of(Residual(relu_after=False), X)

    def kill(compressor: Compressor, row: int) -> None:
        position = compressor.layers["stem.0"].rows.tolist().index(row)
        with torch.no_grad():
            compressor.layers["stem.0"].bit_depth[position] = 0
            compressor.model.get_parameter("stem.1.bias")[position] = -1
        assert compressor.cut()

    before, after = fresh(), fresh()
    kill(before, 3)
    assert before.layers["one.0"].weight.shape == (5, 5, 3, 3)
    after.load_state_dict(before.state_dict())
    for row in (None, 1):
        if row is not None:
            kill(before, row)
            kill(after, row)
        shapes = [[p.shape for p in c.model.parameters()] for c in (before, after)]
        assert shapes[0] == shapes[1]
        assert torch.equal(before.model.eval()(X), after.model.eval()(X))
    assert after.layers["one.0"].weight.shape == (5, 4, 3, 3)
    assert after.layers["one.0"].in_width == 6


def test_a_resumed_training_drives_the_same_biases_to_zero() -> None:
    def fresh() -> Compressor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
        nn.init.ones_(model.get_parameter("0.bias"))
        return Compressor(model, X, 0.0)

    compressor, resumed = fresh(), fresh()
    kill(compressor)
    compressor.cut()
    resumed.load_state_dict(copy.deepcopy(compressor.state_dict()))
    one_step(resumed, sgd(resumed))
    bias = resumed.model.get_parameter("0.bias")
    gone = torch.arange(6) % 3 == 0
    assert (bias[gone] < 0.991).all() and (bias[~gone] > 0.995).all()


class Dropping(nn.Module):
    """A network that skips residual blocks at random; with `alone`, only in training."""

    def __init__(self, draw: Any, alone: bool) -> None:
        super().__init__()
        self.draw, self.alone = draw, alone
        self.stem, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
        self.blocks = nn.ModuleList(block(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for one in self.blocks:
            if (self.alone and not self.training) or self.draw() < 0.8:
                x = x + one(x)
        return self.head(x)


def drawn() -> list[Any]:
    """Return the states of the random number generators of Python, NumPy and torch."""
    numpy: Any = np.random.get_state()
    return [random.getstate(), numpy[1].tolist(), numpy[2], torch.get_rng_state().tolist()]


@pytest.mark.filterwarnings("ignore:torch.fx cannot trace")
@pytest.mark.parametrize(
    "draw",
    [random.random, np.random.rand, lambda: torch.rand(()).item()],
    ids=["python", "numpy", "torch"],
)
@pytest.mark.parametrize("alone", [True, False])
def test_a_random_forward_is_followed_in_one_way_and_draws_nothing(draw: Any, alone: bool) -> None:
    """All seeds lead to the same graph, which states need, and generators continue undisturbed."""
    compressors = []
    for seed in range(6):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        model = Dropping(draw, alone)
        due = drawn()
        compressors.append(Compressor(model, X, 0.0, bits=8))
        assert drawn() == due
    first = compressors.pop(0)
    kill(first)
    first.cut()
    for other in compressors:
        other.load_state_dict(first.state_dict())


def test_a_number_that_has_changed_since_the_trace_leaves_measured_statistics() -> None:
    """What finish() measures counts more than a constant computed with an outdated attribute."""

    class Faded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
            self.head = nn.Conv2d(6, 2, 1)
            self.share = 0.1

        def forward(self, x: Tensor) -> Any:
            return self.head(self.norm(self.conv(x) * self.share))

    torch.manual_seed(0)
    model = Faded()
    compressor = Compressor(model, X, 0.0, bits=8)
    model.share = 1.0
    with torch.no_grad():
        model.norm.bias.fill_(0.5)
        layer = compressor.layers["conv"]
        assert layer.bias is not None
        layer.bias.fill_(3.0)
        layer.bit_depth[:2] = 0
    compressor.finish([X], sgd(compressor))
    torch.testing.assert_close(model.eval()(X), model.train()(X), rtol=0.05, atol=0.05)


def test_a_constant_that_autocast_has_rounded_is_what_it_is_in_evaluation() -> None:
    """finish() measures a dead row's bias in bfloat16; the norm's mean must be the exact bias."""
    model: Any = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1))
    compressor = Compressor(model, X, 0.0, bits=8)
    with torch.no_grad():
        model[0].bias.fill_(1.2345)
        model[1].bias.fill_(0.5)
        compressor.layers["0"].bit_depth[0] = 0
    with torch.autocast("cpu", torch.bfloat16):
        compressor.finish([X], sgd(compressor))
    assert model[1].running_mean[0] == model[0].bias[0]


def test_a_size_below_that_of_frozen_layers_is_refused() -> None:
    model = nn.Sequential(block(3, 16), block(16, 32), nn.Conv2d(32, 2, 1))
    model[:2].requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen and the rows that have to stay store 2\d\.\d %"):
        Compressor(model, X, stored_percent=8, bits=8, schedule=Schedule(20))


def test_finish_takes_the_loader_of_a_network_in_half_precision() -> None:
    model = nn.Sequential(block(3, 9), nn.Conv2d(9, 2, 1)).bfloat16()
    compressor = Compressor(model, X.bfloat16(), 0.0)
    compressor.finish([(X, torch.zeros(len(X)))])
    assert model(X.bfloat16()).isfinite().all()


def test_inputs_of_several_types_keep_theirs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = block(3, 9), nn.Linear(3, 9).double()

        def forward(self, x: Tensor, t: Tensor) -> Any:
            return self.a(x).mean((2, 3)) * self.b(t)

    inputs = X, X.double().mean((2, 3))
    compressor = Compressor(Two(), inputs, 0.0)
    compressor.finish([(*inputs, torch.zeros(len(X)))])
    compressor.reestimate([(X.double(), inputs[1].float())])


@pytest.mark.parametrize("thawed", [True, False])
def test_formats_that_are_frozen_keep_no_gradient_though_they_are_thawed(thawed: bool) -> None:
    """A loop that freezes and thaws the whole model, such as a GAN's, also thaws frozen formats."""
    compressor = Compressor(nn.Sequential(block(3, 9), nn.Conv2d(9, 2, 1)), X, 0.1, bits=4)
    compressor.model.requires_grad_(thawed)
    compressor.freeze()
    kill(compressor)
    assert compressor.cut(sgd(compressor))
    compressor.model.requires_grad_(True)
    (compressor.model(X).square().mean() + compressor.penalty()).backward()
    for layer in compressor.layers.values():
        assert layer.weight.grad is not None
        assert layer.exponent.grad is layer.bit_depth.grad is None


def test_a_model_that_keeps_its_features_has_a_dense_copy_after_a_step() -> None:
    """Features kept from a training step have a gradient history, which cannot be deep-copied."""
    compressor = Compressor(Kept(), X, 0.0)
    one_step(compressor, sgd(compressor))
    dense = to_dense(compressor.model).eval()
    torch.testing.assert_close(dense(X), compressor.model.eval()(X), rtol=1e-4, atol=1e-5)


def test_a_bias_that_is_frozen_is_not_driven_to_zero() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    nn.init.constant_(model[0].bias, 0.5)
    model[0].bias.requires_grad_(False)
    compressor = Compressor(model, X, 0.0, interval=2, bits=4)
    optimizer = sgd(compressor)
    with torch.no_grad():
        model[0].bit_depth[2] = 0
    for _ in range(8):
        one_step(compressor, optimizer)
    assert torch.equal(model[0].bias, torch.full((6,), 0.5))
