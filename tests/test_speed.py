"""Cut networks stay fast: memory formats are kept, and channels are not moved without need."""

# mypy: disable-error-code="no-untyped-call"

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import kill
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import build
from selfcompress import Compressor
from selfcompress.graph.fast_widths import fast_multiple
from selfcompress.layers.batch_norms import PlacedBatchNorm
from selfcompress.layers.placing import place, take
from selfcompress.replay import Replay
from selfcompress.training.read_late import late

LAST = torch.channels_last
INDICES = torch.tensor([0, 2, 3, 6])
Move = Callable[[Tensor], Tensor]


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
@pytest.mark.parametrize(
    ("move", "channels"),
    [(lambda x: take(x, INDICES, -3), 8), (lambda x: place(x, INDICES, 8, 1), 4)],
    ids=["take", "place"],
)
def test_channels_are_moved_as_they_lie(
    layout: torch.memory_format, move: Move, channels: int
) -> None:
    """take() and place() keep the memory format, of outputs and of gradients."""
    plain = torch.randn(2, channels, 3, 3, requires_grad=True)
    x = plain.detach().contiguous(memory_format=layout).requires_grad_()
    want, y = move(plain), move(x)
    factors = torch.randn(y.shape).contiguous(memory_format=layout)
    (wanted,) = torch.autograd.grad((want * factors.contiguous()).sum(), plain)
    (gradient,) = torch.autograd.grad((y * factors).sum(), x)
    for got, as_plain in ((y, want), (gradient, wanted)):
        torch.testing.assert_close(got, as_plain, rtol=0, atol=0)
        assert got.is_contiguous(memory_format=layout) and as_plain.is_contiguous()


def test_what_may_lie_either_way_is_taken_for_contiguous() -> None:
    """Otherwise view() would fail on the output of a layer that has a single channel left."""
    for shape in ((2, 4, 1, 1), (2, 1, 3, 3)):
        x = torch.randn(shape).contiguous(memory_format=LAST)
        place(x, torch.arange(shape[1]), 5, 1).view(2, -1)


class Views(nn.Module):
    """Views a channels_last tensor as a matrix of pixels, impossible in other memory formats."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, padding=1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        x = self.branch(x) + x
        return self.head(x.permute(0, 2, 3, 1).view(-1, x.shape[1]))


@pytest.mark.parametrize("live", [0, 1, 2])
def test_a_sum_lies_as_it_did_though_a_branch_has_hardly_any_channels(live: int) -> None:
    """A branch with few channels, or none, must not change the memory format of the sum."""
    model, x = Views().to(memory_format=LAST), torch.randn(2, 3, 4, 4)
    compressor = Compressor(model, x.contiguous(memory_format=LAST), 0.0, bits=8)
    with torch.no_grad():
        compressor.layers["branch"].bit_depth[live:] = 0
        model.branch.bias.zero_()  # type: ignore[union-attr]
    assert compressor.cut() is not None


@pytest.mark.parametrize(("live", "height"), [(0, 4), (1, 4), (1, 1)])
def test_rows_of_a_matrix_lie_in_their_own_way(live: int, height: int) -> None:
    """A linear layer makes a contiguous tensor of a channels_last one, with few rows left too."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mix = nn.Conv2d(3, 8, 1), nn.Linear(16, 16)
            self.head = nn.Linear(8 * height * 16, 5)

        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            return self.head(x.reshape(len(x), -1) + self.mix(x).view(len(x), -1))

    model, x = Rows().to(memory_format=LAST), torch.randn(2, 3, height, 16)
    compressor = Compressor(model, x.contiguous(memory_format=LAST), 0.0, bits=8)
    with torch.no_grad():
        compressor.layers["mix"].bit_depth[live:] = 0
    assert compressor.cut() is not None


class Indexed(TorchDispatchMode):
    """Records the shapes of the tensors that indexing operations are applied to."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "index" in str(func):
            self.shapes.append(args[0].shape)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("name", ["resnet9", "mobilenetv2"])
def test_few_gaps_are_filled_in_weights_and_nowhere_else(name: str, multiple: int) -> None:
    """With a `multiple` above 1, weights are filled with zeros, and no feature map is indexed."""
    model = build(name, 10, 16, 16).to(memory_format=LAST)
    x = torch.randn(67, 3, 16, 16).contiguous(memory_format=LAST)  # no layer has 67 rows
    compressor = Compressor(model, x, 0.01, multiple=multiple, bits=4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for layer_name, layer in list(compressor.layers.items())[:-1]:
            rows = len(layer.rows)
            kill(model, layer_name, torch.randperm(rows, generator=generator)[: rows // 8])
        assert compressor.cut()
    norms = [module for module in model.modules() if isinstance(module, PlacedBatchNorm)]
    assert any(norm.num_features < norm.out_width for norm in norms)
    assert all(norm.in_width == norm.out_width for norm in norms) == (multiple > 1)
    with Indexed() as indexed:
        model(x).sum().backward()
    assert indexed.shapes
    assert any(shape[0] == 67 and len(shape) == 4 for shape in indexed.shapes) == (multiple == 1)


@pytest.mark.parametrize("groups", [1, 100])
@pytest.mark.parametrize(("dead", "copies"), [(70, False), (71, True)])
def test_many_gaps_are_copied_around(dead: int, copies: bool, groups: int) -> None:
    """With over 70 % gaps, selecting and placing channels costs less than computing with zeros."""
    layer = nn.Conv2d(100, 100, 1, groups=groups)
    model = nn.Sequential(nn.Conv2d(3, 100, 1), layer, nn.Sigmoid(), nn.Conv2d(100, 4, 1))
    x = torch.randn(2, 3, 5, 5)
    compressor = Compressor(model, x, 0.01, multiple=100, bits=4)
    kill(model, "1", torch.arange(dead))
    assert compressor.cut()
    cut = compressor.layers["1"]
    assert cut.in_width == cut.out_width == 100
    with Indexed() as indexed:
        cut(torch.randn(2, 100, 5, 5))
    assert any(len(shape) == 4 and shape[0] == 2 for shape in indexed.shapes) == copies


class BranchOf(nn.Module):
    """x + norm(layer(x))."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.stem, self.layer, self.norm = nn.Conv2d(3, 8, 1), layer, nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y: Tensor = self.head(x + self.norm(self.layer(x)))
        return y


@pytest.mark.parametrize(("groups", "kept"), [(1, 8), (2, 6), (8, 8)])
def test_groups_of_several_channels_keep_nothing_for_the_norm_behind_them(
    groups: int, kept: int
) -> None:
    """Grouped convolutions would compute with dead channels, so that none are kept for speed."""
    model = BranchOf(nn.Conv2d(8, 8, 1, groups=groups))
    compressor = Compressor(model, torch.randn(4, 3, 5, 5), 0.01, multiple=4, bits=4)
    kill(model, "layer", torch.tensor([1, 2]))
    assert compressor.cut()
    assert compressor.layers["layer"].out_width == kept


@pytest.mark.parametrize(("live", "kept"), [(17, 20), (13, 16), (9, 16), (3, 16)])
def test_widths_are_rounded_by_what_is_alive_and_alike_behind_each_other(
    live: int, kept: int
) -> None:
    """A channel kept to round one width up is no reason to round the next one further up."""
    model = nn.Sequential(
        nn.Conv2d(3, 20, 1), nn.BatchNorm2d(20), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(20, 4, 1)
    )
    compressor = Compressor(model, torch.randn(4, 3, 6, 6), 0.01, multiple=16, bits=4)
    kill(model, "0", torch.arange(live, 20))
    with torch.no_grad():
        model.get_parameter("1.bias")[live:] = 0
    assert compressor.cut()
    assert compressor.layers["0"].out_width == compressor.layers["4"].in_width == kept


class Joined(nn.Module):
    """A batch norm over the concatenated outputs of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 1), nn.BatchNorm2d(32)
        self.head = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(torch.cat([self.one(x), self.two(x)], 1)))
        return y


@pytest.mark.parametrize(("live", "kept"), [(10, 32), (9, 32), (8, 16)])
def test_norms_make_all_that_they_read_if_half_of_it_lives(live: int, kept: int) -> None:
    """A norm outputs all channels that it reads, unless more than half of them are dead."""
    model = Joined()
    compressor = Compressor(model, torch.randn(4, 3, 5, 5), 0.01, multiple=8, bits=4)
    for name in ("one", "two"):
        kill(model, name, torch.arange(live, 16))
        with torch.no_grad():
            model.get_parameter(f"{name}.bias").zero_()
    assert compressor.cut()
    norm = model.norm
    assert isinstance(norm, PlacedBatchNorm) and norm.num_features == 2 * live
    assert norm.in_width == norm.out_width == kept


class Beside(nn.Module):
    """Concatenates the input and the output of a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 1, groups=32, bias=False)
        self.head = nn.Conv2d(64, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y: Tensor = self.head(torch.cat([x, self.layer(x)], 1))
        return y


@pytest.mark.parametrize(("live", "kept"), [(16, 32), (15, 15)])
def test_depthwise_convolutions_make_all_that_they_read_if_half_lives(live: int, kept: int) -> None:
    """Depthwise convolutions output all channels they read, unless more than half are dead."""
    model = Beside()
    compressor = Compressor(model, torch.randn(4, 3, 5, 5), 0.01, multiple=8, bits=4)
    kill(model, "layer", torch.arange(live, 32))
    assert compressor.cut()
    layer = compressor.layers["layer"]
    assert (layer.in_width, layer.out_width) == (32, kept)
    assert layer.keeps_places == (kept == 32)


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_depthwise_convolutions_compute_the_same_among_zeros(padding: Any) -> None:
    layer = nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode=padding)
    model, x = BranchOf(layer), torch.randn(4, 3, 5, 5)
    compressor = Compressor(model, x, 0.01, multiple=4, bits=4)
    kill(model, "layer", torch.tensor([1, 2]))
    assert compressor.cut()  # which checks that outputs are as before
    model(x[:3])
    assert compressor.layers["layer"].samples == 3


class Below(nn.Conv2d):
    """A convolution that pads only at the bottom."""

    def forward(self, input: Tensor) -> Any:
        return self._conv_forward(F.pad(input, (0, 0, 0, 1)), self.weight, self.bias)


def test_depthwise_convolutions_of_own_classes_stay_depthwise_among_zeros() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 20, 1), Below(20, 20, 3, groups=20), nn.BatchNorm2d(20), nn.Conv2d(20, 4, 1)
    )
    x = torch.randn(4, 3, 5, 5)
    compressor = Compressor(model, x, 0.01, multiple=8, bits=4)
    kill(model, "1", torch.tensor([1, 2, 4, 6, 7, 9, 13]))
    with torch.no_grad():
        model.get_parameter("1.bias").zero_()
    assert compressor.cut()
    layer, macs = compressor.layers["1"], compressor.size().macs
    assert len(layer.rows) == 13 and layer.dense_groups == layer.out_width == 16
    assert macs == 25 * 3 * 13 + 12 * 16 * 9 + 12 * 13 * 4


@pytest.mark.parametrize(("layout", "kept"), [(torch.contiguous_format, 19), (LAST, 32)])
def test_widths_are_multiples_of_16_where_channels_are_last(
    layout: torch.memory_format, kept: int
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 4, 3)).to(memory_format=layout)
    compressor = Compressor(model, torch.randn(4, 3, 7, 7), 0.01, bits=4)
    kill(model, "0", torch.arange(19, 40))
    with torch.no_grad():
        model.get_parameter("0.bias").zero_()
    assert compressor.cut()
    assert compressor.layers["0"].out_width == kept
    compressor.finish([torch.randn(4, 3, 7, 7)])
    assert compressor.layers["0"].out_width == 19


def test_weights_of_convolutions_alone_tell_where_channels_are_last() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    model.register_parameter("table", nn.Parameter(torch.randn(4, 4, 4, 4).to(memory_format=LAST)))
    assert fast_multiple(model) == fast_multiple(nn.Linear(3, 4)) == 1
    model[1].to(memory_format=LAST)
    assert fast_multiple(model) == 16


def test_elsewhere_than_on_a_gpu_nothing_is_recorded() -> None:
    """Without a GPU, Replay calls its function every time instead of recording a CUDA graph."""
    calls: list[int] = []
    replay = Replay(lambda tensors, number: calls.append(number) or 2 * tensors["x"])  # type: ignore[func-returns-value]
    for i in range(3):
        assert replay(lambda: 0, {"x": torch.full((), i)}, i) == 2 * i
    assert calls == [0, 1, 2]


def test_numbers_on_a_cpu_are_told_at_once() -> None:
    """late() holds numbers back only on a GPU."""
    told: list[str] = []

    def tensors() -> Any:
        for i in range(3):
            told.append(f"made {i}")
            yield torch.tensor([float(i)])

    for (number,) in late(tensors()):
        told.append(f"read {number:.0f}")
    assert told == ["made 0", "read 0", "made 1", "read 1", "made 2", "read 2"]
