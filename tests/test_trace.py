"""What a forward() may do while it is traced, and what keeps channels in their places then."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import kill
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision.ops import FrozenBatchNorm2d

from selfcompress import Compressor

X = torch.randn((4, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Two(nn.Module):
    """Two convolutions and a way of its own between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: Any) -> Any:
        return self.b(self.between(torch.relu(self.a(x))))

    def between(self, x: Tensor) -> Tensor:
        return x


def removable(model: nn.Module, example: Any = X) -> int:
    """How many channels of `a` can go from a network that is traced whole, having done so."""
    torch.manual_seed(0)
    model.double()
    compressor = Compressor(model, example, 0.0, bits=8)
    assert compressor.graph.untraceable == {}
    found = {layer.name: layer.removable for layer in compressor.report().layers}["a"]
    before = outputs(model, example)
    kill(model, "a", [1, 4])
    nn.init.constant_(compressor.layers["a"].get_parameter("bias"), -0.1)
    before = outputs(model, example)
    assert compressor.cut()
    for was, now in zip(before, outputs(model, example), strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=1e-12)
    assert compressor.layers["a"].out_width == (4 if found else 6)
    return found


@torch.no_grad()
def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    returned = model.eval()(*(example if isinstance(example, tuple) else (example,)))
    return [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, Tensor)]


# --- numbers that forward() goes by ---------------------------------------------------------------


class PadsOdd(Two):
    def between(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height % 2 or width % 2:
            x = F.pad(x, (0, width % 2, 0, height % 2))
        return x


class TensorFlowPads(Two):
    def between(self, x: Tensor) -> Tensor:
        height, width = int(x.shape[-2]), int(x.size(3))
        down = max(math.ceil(height / 2) * 2 - height, 0)
        return F.pad(x, (0, max(math.ceil(width / 2) * 2 - width, 0), 0, down))


class Refuses(Two):
    def forward(self, x: Any) -> Any:
        if x.dim() != 4 or x.shape[1] != 3:
            raise ValueError("images, please")
        if x.dtype not in (torch.float32, torch.float64) or x.device.type == "meta":
            raise ValueError("floats, please")
        return super().forward(x)


class Loops(Two):
    def between(self, x: Tensor) -> Tensor:
        for index in range(x.shape[2]):
            x = x * (index + 1)
        sizes = [size for size in x.shape]  # noqa: C416
        return x / len(sizes) / float(sizes[0])


class Unpacks(Two):
    def between(self, x: Tensor) -> Tensor:
        first, *others = x.split(2, 1)
        return torch.cat([first, *others], 1)


class MadeOfSizes(Two):
    def between(self, x: Tensor) -> Tensor:
        ones = torch.ones(x.shape[0], 1, x.shape[2], 1, dtype=x.dtype)
        return x * ones * torch.full((x.size(0), 1, 1, 1), 2.0)


@pytest.mark.parametrize("model", [PadsOdd, TensorFlowPads, Refuses, Loops, MadeOfSizes])
def test_forward_may_go_by_sizes(model: Callable[[], nn.Module]) -> None:
    assert removable(model()) == 6


class AsksForWidth(Two):
    """Goes another way when channels are gone."""

    def between(self, x: Tensor) -> Tensor:
        return x if x.shape[1] == 6 else x * 2


class CountsWidth(Two):
    def between(self, x: Tensor) -> Tensor:
        return x * sum(1 for _ in range(x.shape[1]))


class IteratesChannels(Two):
    def between(self, x: Tensor) -> Tensor:
        return torch.stack(list(x.transpose(0, 1)), 1)


@pytest.mark.parametrize("model", [AsksForWidth, CountsWidth, IteratesChannels, Unpacks])
def test_channels_stay_where_forward_goes_by_how_many_there_are(
    model: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    network = model().double()
    compressor = Compressor(network, X, 0.0, bits=8)
    kill(network, "a", [0])
    nn.init.constant_(compressor.layers["a"].get_parameter("bias"), -0.1)
    before = outputs(network, X)
    compressor.cut()
    assert compressor.layers["a"].out_width == 6
    torch.testing.assert_close(outputs(network, X), before, rtol=0, atol=1e-12)


class GoesByValues(Two):
    def between(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class GoesByItem(Two):
    def between(self, x: Tensor) -> Tensor:
        return x * 2 if x.mean().item() > 0 else x


class CountsNonzero(Two):
    def between(self, x: Tensor) -> Tensor:
        return x * (1 + len(x.nonzero()))


class AsksForGradients(Two):
    def between(self, x: Tensor) -> Tensor:
        return x * 2 if x.requires_grad else x


@pytest.mark.filterwarnings("ignore:torch.fx cannot trace")
@pytest.mark.parametrize("model", [GoesByValues, GoesByItem, CountsNonzero, AsksForGradients])
def test_forward_may_not_go_by_values(model: Callable[[], nn.Module]) -> None:
    compressor = Compressor(model(), X.float(), 0.0, bits=8)
    assert "its way depends on the values of a tensor" in compressor.graph.untraceable[""]
    assert all(layer.removable == 0 for layer in compressor.report().layers)


class Pyramid(nn.Module):
    """Calls a part with two sizes, from a forward() that cannot be traced."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            raise ValueError("too much")
        y: Tensor = self.part(x).mean() + self.part(x[:, :, :7]).mean()
        return y


@pytest.mark.filterwarnings("ignore:torch.fx cannot trace")
def test_a_part_that_goes_by_sizes_is_called_with_one() -> None:
    compressor = Compressor(Pyramid(PadsOdd()).double(), X, 0.0, bits=8)
    assert "goes by sizes, and is called with several" in compressor.graph.untraceable["part"]
    compressor = Compressor(Pyramid(Two()).double(), X, 0.0, bits=8)
    assert compressor.graph.untraceable.keys() == {""}


# --- arguments and results ------------------------------------------------------------------------


def decorated(forward: Any) -> Any:
    @functools.wraps(forward)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return inner


class Decorated(Two):
    @decorated
    def forward(self, x: Tensor, scale: float = 2.0, **options: Any) -> Tensor:
        y: Tensor = super().forward(x) * options.get("more", scale)
        return y


class Nested(Two):
    def forward(self, x: Any) -> Any:
        return super().forward(x["images"][0] + x["images"][1])


class Cache:
    def __init__(self) -> None:
        self.kept: list[Tensor] = []


class Caches(Two):
    """Changes what it is given, and returns it."""

    def forward(self, x: Tensor, cache: Cache | None = None) -> Any:  # type: ignore[override]
        y = super().forward(x)
        if cache is not None:
            cache.kept.append(y)
        return y, cache


@dataclass
class Answer:
    logits: Tensor
    name: str = "answer"


class Answers(Two):
    def forward(self, x: Any) -> Any:
        return [Answer(super().forward(x))]


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (Decorated(), X),
        (Nested(), ({"images": [X, X]},)),
        (Caches(), (X, Cache())),
        (Answers(), X),
    ],
)
def test_forward_takes_and_returns_what_it_likes(model: nn.Module, example: Any) -> None:
    compressor = Compressor(model.double(), example, 0.0, bits=8)
    assert compressor.graph.untraceable == {}
    layers = {layer.name: layer for layer in compressor.report().layers}
    assert layers["a"].removable == 6
    assert "it is an output of the model" in layers["b"].why
    if isinstance(model, Caches):
        assert all(type(kept) is Tensor for kept in example[1].kept)


class Slotted:
    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Hides(Two):
    def forward(self, x: Any) -> Any:
        return Slotted(super().forward(x))


@pytest.mark.filterwarnings("ignore:torch.fx cannot trace")
def test_what_cannot_be_looked_into_is_no_answer() -> None:
    compressor = Compressor(Hides().double(), X, 0.0, bits=8)
    assert compressor.graph.untraceable[""] == "it returns a Slotted"
    assert all(layer.removable == 0 for layer in compressor.report().layers)


def test_the_forward_that_is_put_on_an_object_is_the_one_that_counts() -> None:
    model = Two().double()
    model.forward = (  # type: ignore[method-assign]
        lambda x: model.b(torch.tanh(model.a(x)).cumsum(1))
    )
    compressor = Compressor(model, X, 0.0, bits=8)
    assert compressor.report().layers[0].removable == 0


# --- buffers, and modules that are none of the model's --------------------------------------------


class Frozen(Two):
    def __init__(self) -> None:
        super().__init__()
        self.norm = FrozenBatchNorm2d(6)
        for buffer in self.norm.buffers():
            buffer.uniform_(0.5, 2)
        self.norm.bias.fill_(-0.05)

    def between(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x))


def test_entries_of_a_frozen_batch_norm_go_with_their_channels() -> None:
    model = Frozen()
    assert removable(model) == 6
    assert [len(buffer) for buffer in model.norm.buffers()] == [4] * 4


class Positions(nn.Module):
    """Reads as much of a vector and of whole numbers as its input is long."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 6, 3, padding=1), nn.Conv1d(6, 2, 1)
        self.shift = nn.Parameter(torch.randn(16))
        self.register_buffer("numbers", torch.arange(16))
        self.table = nn.Embedding(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-1]
        at = self.table(self.get_buffer("numbers")[:length])[:, 0]
        y: Tensor = self.b(torch.relu(self.a(x)) + self.shift[:length] + at)
        return y


def test_a_vector_of_which_only_a_part_is_read_stays_whole() -> None:
    model = Positions().double()
    compressor = Compressor(model, X[:, :, 0], 0.0, bits=8)
    assert compressor.graph.untraceable == {}
    kill(model, "a", [0])
    compressor.cut()
    assert model.shift.shape == (16,) and model.get_buffer("numbers").shape == (16,)
    assert model(torch.randn(2, 3, 12).double()).shape == (2, 2, 12)


class Counts(Two):
    """Has a flag and a count for buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ready", torch.tensor(True))

    def between(self, x: Tensor) -> Tensor:
        return x * 2 if self.ready else x


class Tables(Two):
    """Calls a module that is none of its own."""

    OTHERS: dict[str, nn.Module] = {"hardswish": nn.Hardswish()}  # noqa: RUF012

    def between(self, x: Tensor) -> Tensor:
        y: Tensor = self.OTHERS["hardswish"](x)
        return y


@pytest.mark.parametrize("model", [Counts, Tables])
def test_flags_and_activations_from_elsewhere_are_traced(model: Callable[[], nn.Module]) -> None:
    assert removable(model()) == 6
