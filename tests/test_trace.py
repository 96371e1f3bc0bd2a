"""What a forward() may do and still be traced, and where channels must keep their places then."""

import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import kill
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision.ops import FrozenBatchNorm2d

from selfcompress import Compressor
from selfcompress.verify import snapshot

X = torch.randn((4, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Two(nn.Module):
    """Two convolutions, and a step between them that subclasses replace."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: Any) -> Any:
        return self.b(self.between(torch.relu(self.a(x))))

    def between(self, x: Tensor) -> Tensor:
        return x


def removable(model: nn.Module, example: Any = X) -> int:
    """Check that `model` is traced and cut exactly; return how many channels of `a` can go."""
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
    """A forward() that computes with sizes, but not with widths, can be traced."""
    assert removable(model()) == 6


class AsksForWidth(Two):
    """Branches on its number of channels."""

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


class GoesByParameter(Two):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def between(self, x: Tensor) -> Tensor:
        return x * 2 if self.scale[0] > 0 else x


class AsksForGradients(Two):
    def between(self, x: Tensor) -> Tensor:
        return x * 2 if x.requires_grad else x


@pytest.mark.filterwarnings("ignore:torch.fx cannot trace")
@pytest.mark.parametrize(
    "model", [GoesByValues, GoesByItem, CountsNonzero, GoesByParameter, AsksForGradients]
)
def test_forward_may_not_go_by_values(model: Callable[[], nn.Module]) -> None:
    """A forward() that branches on the values of a tensor cannot be traced."""
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
    """A part that branches on sizes is not traced if it is called with several of them."""
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
    """Changes one of its arguments, and returns it."""

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


class Wrapped(Two):
    """Returns its output nested in `depth` objects."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth

    def forward(self, x: Any) -> Any:
        y: Any = super().forward(x)
        for _ in range(self.depth):
            y = Answer(y)
        return y


@pytest.mark.filterwarnings("ignore:torch.fx cannot trace")
@pytest.mark.parametrize("depth", range(7))
def test_what_is_cut_is_compared_as_deep_as_it_lies(depth: int) -> None:
    """Outputs are found in up to four nested objects; where they are not, nothing is traced."""
    model = Wrapped(depth).double()
    compressor = Compressor(model, X, 0.0, bits=8)
    assert bool(snapshot(model, X).outputs) == (not compressor.graph.untraceable) == (depth <= 4)


class Context:
    """An argument of blocks that holds the model, and a lock, which cannot be copied."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.lock = model, threading.Lock()


class GivesContext(nn.Module):
    class Block(Two):
        def forward(self, x: Tensor, context: Context) -> Any:  # type: ignore[override]
            assert context.model is not self
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(12))
        self.up, self.context = nn.Conv2d(2, 3, 1), [Context(self)]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.up(block(x, self.context[0]))
        return x


def test_arguments_may_refer_to_the_model_and_to_what_cannot_be_copied() -> None:
    model = GivesContext().double()
    compressor = Compressor(model, X, 0.0, bits=8)
    found = {layer.name: layer.removable for layer in compressor.report().layers}
    assert [found[f"blocks.{index}.a"] for index in range(12)] == [6] * 12


class Slotted:
    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Hides(Two):
    def forward(self, x: Any) -> Any:
        return Slotted(super().forward(x))


@pytest.mark.filterwarnings("ignore:torch.fx cannot trace")
def test_what_cannot_be_looked_into_is_no_answer() -> None:
    """Tensors are not found in an object with __slots__, so no channel can be removed."""
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
    """Reads as many entries of a vector and of an integer buffer as its input is long."""

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
    """Branches on a flag in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ready", torch.tensor(True))

    def between(self, x: Tensor) -> Tensor:
        return x * 2 if self.ready else x


class Tables(Two):
    """Calls a module that is not one of its submodules."""

    OTHERS: dict[str, nn.Module] = {"hardswish": nn.Hardswish()}  # noqa: RUF012

    def between(self, x: Tensor) -> Tensor:
        y: Tensor = self.OTHERS["hardswish"](x)
        return y


@pytest.mark.parametrize("model", [Counts, Tables])
def test_flags_and_activations_from_elsewhere_are_traced(model: Callable[[], nn.Module]) -> None:
    assert removable(model()) == 6


# --- other ways for other sizes -------------------------------------------------------------------


class NormsBatches(nn.Module):
    """Applies a batch norm only if there is more than one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y: Tensor = self.b(torch.relu(self.norm(x) if x.shape[0] > 1 else x))
        return y


class ScalesLarge(Two):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((6, 1, 1), 2.0))

    def between(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 8:
            x = x * self.scale
        return x


class ScalesBatches(ScalesLarge):
    def between(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            x = x * self.scale
        return x


class ViewsLarge(Two):
    def between(self, x: Tensor) -> Tensor:
        if int(x.shape[-1]) > 8:
            x = x.view(-1, 6, x.shape[2], x.shape[3])
        return x


class AddsEqual(nn.Module):
    """Adds the outputs of two layers if their sizes are the same, as they are for single pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.other = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(3, 6, 1)
        self.b = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        u, v = torch.relu(self.a(x)), torch.relu(self.other(x))
        if u.shape == v.shape:
            y: Tensor = self.b(u + v).mean((2, 3))
            return y
        y = self.b(u).mean((2, 3)) + v.mean()
        return y


class Heads(Two):
    """Has a layer for each size of image, one of which is far from that of the example."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"8": nn.Conv2d(6, 6, 1), "64": nn.Conv2d(6, 6, 1)})

    def between(self, x: Tensor) -> Tensor:
        y: Tensor = self.heads[str(int(x.shape[-1]))](x)
        return y


@pytest.mark.filterwarnings("ignore:torch.fx cannot trace")
@pytest.mark.parametrize(
    ("model", "example", "other"),
    [
        (NormsBatches(), X[0, :1, 0, :5], X[0, :, 0, :5]),
        (ScalesLarge(), X, X.repeat(1, 1, 2, 2)),
        (ScalesBatches(), X[:1], X),
        (ViewsLarge(), X, X.repeat(1, 1, 2, 2)),
        (AddsEqual(), X, X[:, :, :1, :1]),
        (Heads(), X, X.repeat(1, 1, 8, 8)),
    ],
)
def test_inputs_of_other_sizes_may_take_another_way(
    model: nn.Module, example: Tensor, other: Tensor
) -> None:
    """A forward() that calls other things at other sizes is not traced, so that cuts stay exact."""
    torch.manual_seed(0)
    compressor = Compressor(model.double(), example, 0.0, bits=8)
    why = compressor.graph.untraceable[""]
    assert why.startswith(("it goes by sizes, and does not call", "at other sizes it calls other"))
    kill(model, "a", [0, 3])
    nn.init.constant_(compressor.layers["a"].get_parameter("bias"), -0.1)
    before = outputs(model, example) + outputs(model, other)
    compressor.cut()
    torch.testing.assert_close(outputs(model, example) + outputs(model, other), before)


class Inside(nn.Module):
    """Contains a part that branches on sizes, and layers around it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 3, 1)
        self.part, self.head = ScalesLarge(), nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.part(self.c(torch.relu(self.a(x)))))
        return y


def test_only_the_part_that_has_two_ways_is_left_alone() -> None:
    compressor = Compressor(Inside().double(), X, 0.0, bits=8)
    assert compressor.graph.untraceable.keys() == {"part"}
    found = {layer.name: layer.removable for layer in compressor.report().layers}
    assert found == {"a": 6, "c": 0, "part.a": 0, "part.b": 0, "head": 0}


class ByLengths(nn.Module):
    """Shortens or lengthens sequences by `lengths`, and branches on how long they are then."""

    def __init__(self, cut: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.cut = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 2, 1), cut
        self.scale = nn.Parameter(torch.full((6, 1), 2.0))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = self.cut(torch.relu(self.a(x)), lengths)
        if x.shape[2] > 6:
            x = x * self.scale
        y: Tensor = self.b(x).mean(2)
        return y


@pytest.mark.filterwarnings("ignore:torch.fx cannot trace")
@pytest.mark.parametrize(
    "cut",
    [
        lambda x, n: x[:, :, : n.max()],
        lambda x, n: x.narrow(2, 0, n.max()),
        lambda x, n: x[:, :, torch.arange(n.max())],
        lambda x, n: torch.repeat_interleave(x, n, dim=2),
        lambda x, n: x @ F.one_hot(n).to(x),
        lambda x, n: x[:, :, n > 2],
    ],
)
def test_sizes_that_depend_on_values_are_values(cut: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A branch on a size that is computed from a tensor's values is a branch on values."""
    lengths = torch.tensor([1, 3, 0, 5, 1, 1, 0, 2])
    example = X[0, :, 0][None].repeat(8, 1, 1), lengths
    compressor = Compressor(ByLengths(cut).double(), example, 0.0, bits=8)
    assert compressor.graph.untraceable[""] == "its way depends on the values of a tensor"


class SlicesMask(Two):
    """Slices a mask of flags to its input's size, and does not index with it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(1, 1, 16, 16, dtype=torch.bool))

    def between(self, x: Tensor) -> Tensor:
        mask = self.get_buffer("mask")[..., : x.shape[2], : x.shape[3]]
        return x * mask if mask.shape[-1] == x.shape[-1] else x


def test_a_slice_of_flags_has_sizes_of_its_own() -> None:
    """The size of a slice of flags does not depend on their values, unlike what they select."""
    assert removable(SlicesMask()) == 6


# --- numbers out of buffers, and buffers that forward() replaces ----------------------------------


class ReadsBuffer(Two):
    def __init__(self, numbers: Tensor, between: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("numbers", numbers)
        self.use = between

    def between(self, x: Tensor) -> Tensor:
        return self.use(x, self.get_buffer("numbers"))


def doubled(x: Tensor, numbers: Tensor) -> Tensor:
    """Use a number to which 2^40 paths lead from the buffer, too many to follow one by one."""
    total = numbers
    for _ in range(40):
        total = total * 2 - total
    return x * (int(total[0]) > 0)


@pytest.mark.parametrize(
    ("numbers", "between"),
    [
        (torch.tensor([1, 1]), doubled),
        (torch.tensor([-0.5, 1.5]), lambda x, n: x.clamp(float(n[0]), float(n[1]))),
        (torch.tensor([3, 3]), lambda x, n: F.avg_pool2d(x, int(n[0]), 1)),
        (torch.tensor([4, 4]), lambda x, n: F.adaptive_avg_pool2d(x, (int(n[0]), int(n[1])))),
        (torch.linspace(0, 1, 6), lambda x, n: x * 2 if n[3] > 0.2 else x),
        (torch.tensor([2.0, 3.0]), lambda x, n: x * n.tolist()[1]),
        (torch.tensor([True, False, True, True, False, True]).view(6, 1, 1), torch.mul),
    ],
)
def test_forward_may_read_numbers_out_of_buffers(
    numbers: Tensor, between: Callable[[Tensor, Tensor], Tensor]
) -> None:
    assert removable(ReadsBuffer(numbers, between)) == 6


def test_a_buffer_that_numbers_are_read_of_is_not_cut() -> None:
    def between(x: Tensor, numbers: Tensor) -> Tensor:
        return x * numbers[:, None, None] * len(numbers)

    torch.manual_seed(0)
    model = ReadsBuffer(torch.linspace(0.1, 1, 6), between).double()
    compressor = Compressor(model, X, 0.0, bits=8)
    kill(model, "a", [0, 3])
    nn.init.constant_(compressor.layers["a"].get_parameter("bias"), -0.1)
    before = outputs(model, X)
    compressor.cut()
    assert model.get_buffer("numbers").shape == (6,)
    torch.testing.assert_close(outputs(model, X), before)


class Outside(nn.Module):
    """Contains a module that cannot be traced, inside another one that cannot."""

    class Middle(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.last = inner, nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            y: Tensor = self.last(x if x.sum() < 1e9 else -x)
            return y

    def __init__(self) -> None:
        super().__init__()
        two = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
        self.middle = self.Middle(self.Middle(two))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.middle(x)
        return y


def test_what_fails_inside_of_what_fails_is_traced_once() -> None:
    """What can be traced inside two modules that cannot is in the graph once."""
    model = Outside().double()
    compressor = Compressor(model, X, 0.0, bits=8)
    names = [node.name for node in compressor.graph.nodes]
    assert len(names) == len(set(names))
    inner = "middle.inner.inner.0"
    assert {e.name: e.removable for e in compressor.report().layers}[inner] == 6
    kill(model, inner, [1, 4])
    nn.init.zeros_(model.get_parameter(f"{inner}.bias"))
    before = outputs(model, X)
    compressor.cut()
    torch.testing.assert_close(outputs(model, X), before, rtol=0, atol=1e-12)
    assert compressor.layers[inner].out_width == 4


class Notes(Two):
    """Keeps its features in an object that is one of its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.notes = SimpleNamespace()

    def between(self, x: Tensor) -> Tensor:
        self.notes.seen = x
        return x


def test_no_proxy_is_left_in_objects_of_the_model() -> None:
    model = Notes().double()
    Compressor(model, X, 0.0, bits=8)
    assert type(model.notes.seen) is Tensor


class KeepsMean(Two):
    """Keeps the mean of its features in a buffer, and adds that of the last call if `used`."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(6))
        self.used = used

    def between(self, x: Tensor) -> Tensor:
        y = x + self.get_buffer("last")[:, None, None] if self.used else x
        self.last = x.detach().mean((0, 2, 3)).roll(1)
        return y


@pytest.mark.parametrize("used", [False, True])
def test_channels_stay_that_are_kept_in_a_buffer(used: bool) -> None:
    def calls(model: nn.Module) -> list[Tensor]:
        nn.init.zeros_(model.get_buffer("last"))
        return [outputs(model, X)[0] for _ in range(3)]

    torch.manual_seed(0)
    model = KeepsMean(used).double()
    compressor = Compressor(model, X, 0.0, bits=8)
    kill(model, "a", [0, 3])
    nn.init.constant_(compressor.layers["a"].get_parameter("bias"), -0.1)
    before = calls(model)
    for _ in range(2):
        compressor.cut()
        torch.testing.assert_close(calls(model), before)
    assert model.get_buffer("last").shape == (6,)


class Window(nn.Module):
    """Replaces its window, a buffer, if the input has another length."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 2, 1)
        self.register_buffer("window", torch.linspace(0.1, 1, 6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.get_buffer("window").shape[0] != x.shape[2]:
            self.window = torch.linspace(0.1, 1, x.shape[2], dtype=x.dtype)
        y: Tensor = self.b(torch.relu(self.a(x)) * self.window)
        return y


@pytest.mark.filterwarnings("ignore:torch.fx cannot trace")
@pytest.mark.parametrize("length", [6, 8])
def test_a_window_that_is_made_anew_is_not_cut(length: int) -> None:
    model = Window().double()
    compressor = Compressor(model, X[:, :, 0, :length], 0.0, bits=8)
    model(X[:, :, 0])
    kill(model, "a", [0, 3])
    before = outputs(model, X[:, :, 0, :6])
    model(X[:, :, 0])
    compressor.cut()
    assert model.get_buffer("window").shape == (8,)
    torch.testing.assert_close(outputs(model, X[:, :, 0, :6]), before)


class NormsPooled(nn.Module):
    """Has a batch norm on pooled features, which fails in training with a single sample."""

    class Norm(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
        self.norm, self.head = self.Norm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.b(torch.relu(self.a(x))).mean((2, 3))))
        return y


def test_a_norm_that_refuses_one_sample_keeps_its_own_channels_alone() -> None:
    compressor = Compressor(NormsPooled().double(), X[:1], 0.0, bits=8)
    assert compressor.graph.untraceable.keys() == {"norm"}
    assert [layer.removable for layer in compressor.report().layers] == [6, 0, 0]


class SetsData(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(6))

    def between(self, x: Tensor) -> Tensor:
        self.get_buffer("last").data = x.detach().mean((0, 2, 3))
        return x


@pytest.mark.filterwarnings("ignore:torch.fx cannot trace")
def test_the_data_of_a_buffer_may_be_set() -> None:
    model = SetsData().double()
    compressor = Compressor(model, X, 0.0, bits=8)
    assert compressor.graph.untraceable[""] == "it sets .data of a tensor"
    kill(model, "a", [0, 3])
    compressor.cut()
    assert model(X).shape == (4, 2, 8, 8)


class Gate(Two):
    """Multiplies some channels by 0 for now, in a buffer or a parameter that is frozen."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        closed = torch.tensor([1.0, 1, 0, 0, 0, 0])[:, None, None]
        if frozen:
            self.gate = nn.Parameter(closed, requires_grad=False)
        else:
            self.register_buffer("gate", closed)

    def between(self, x: Tensor) -> Tensor:
        return x * self.gate


@pytest.mark.parametrize("frozen", [False, True])
def test_what_a_closed_gate_holds_back_stays(frozen: bool) -> None:
    model = Gate(frozen).double()
    compressor = Compressor(model, X, 0.0, bits=8)
    compressor.cut()
    assert compressor.layers["a"].out_width == 6 and len(compressor.layers["a"].rows) == 6


def test_forward_may_put_hooks_on_modules() -> None:
    class Captures(Two):
        installed = False

        def forward(self, x: Any) -> Any:
            if not self.installed:
                self.installed = True
                self.a.register_forward_hook(lambda *seen: self.seen.append(seen[2].shape))
            self.seen: list[torch.Size] = []
            super().forward(x)
            return len(self.seen)

    model = Captures().double()
    Compressor(model, X, 0.0, bits=8)
    assert not model.installed and not model.a._forward_hooks
    assert [model(X) for _ in range(2)] == [1, 1]


class Sized(Two):
    def between(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return flat.view_as(x) + flat.reshape_as(x)


def test_views_as_another_tensor_are_followed() -> None:
    assert removable(Sized()) == 6


@pytest.mark.filterwarnings("ignore:torch.fx cannot trace")
def test_cuts_of_a_model_that_hides_what_it_returns_are_said_to_be_unchecked() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))

        def forward(self, x: Tensor) -> Any:
            return Slotted(self.body(x))

    compressor = Compressor(Outer().double(), X, 0.0, bits=8)
    kill(compressor.model, "body.0", [1, 4])
    with pytest.warns(UserWarning, match="cannot be checked: no tensor is found"):
        assert compressor.cut() is not None


class Output(dict):  # type: ignore[type-arg]
    """A user's subclass of dict, as libraries return."""


class Outputs(list):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize("kind", [lambda y: Output(box=y), lambda y: Outputs([y])])
def test_what_is_returned_in_a_subclass_of_a_container_is_not_cut(kind: Any) -> None:
    class Boxes(Two):
        def forward(self, x: Any) -> Any:
            return kind(super().forward(x))

    compressor = Compressor(Boxes().double(), X, 0.0, bits=8)
    layers = {layer.name: layer for layer in compressor.report().layers}
    assert layers["b"].removable == 0
    assert snapshot(compressor.model, X).outputs


class Side(nn.Module):
    """Leaves a second output for the training loop in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.main, self.turn = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        h = self.a(x).relu()
        self.side = self.turn(h)
        return self.main(h)


def test_a_layer_whose_output_is_only_kept_keeps_what_has_bits() -> None:
    """A layer whose output does not reach the model's outputs must not lose rows with bits."""
    model = Side().double()
    compressor = Compressor(model, torch.randn(8, 6, dtype=torch.float64), 0.0, bits=8)
    kill(model, "turn", [1])
    kill(model, "a", [0])
    assert compressor.cut() is not None
    assert len(compressor.layers["turn"].rows) == 2
    model(torch.randn(8, 6, dtype=torch.float64))
    assert model.side.shape == (8, 3)
