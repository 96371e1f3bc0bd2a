"""On a GPU networks train, are cut, saved and resumed as on a CPU."""

# mypy: disable-error-code="no-untyped-call"

import copy
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import check_exact, images
from exact import started as started_exactly
from networks import Chain, Depthwise, Grouped, Residual, Transformer, kill
from test_embedding import Sentences
from test_own_layers import OwnLayers
from test_recurrent import TOKENS, Reader, Stepping
from torch import Tensor, nn
from torch.optim import AdamW

import selfcompress
from models import build as build_model
from selfcompress import Compressor, Schedule
from selfcompress.formats import _given_up
from selfcompress.precision import full_precision
from selfcompress.quantizer import fake_quantize, fit_exponent
from selfcompress.replay import Replay
from selfcompress.training.config import Config
from selfcompress.training.data import load
from selfcompress.training.loop import Run
from selfcompress.training.read_late import late
from selfcompress.training.runs import RunFolder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
Build = Callable[[], nn.Module]
IMAGES = [Chain, lambda: Residual(True), Grouped, Depthwise]


def batch(i: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (size,), generator=generator)


def started(build: Build, device: str, **options: Any) -> tuple[Compressor, AdamW]:
    torch.manual_seed(0)
    model = build().double().to(device)
    options = {"interval": 10, "bit_step": 0.1, "gamma": 0.3} | options
    compressor = Compressor(model, batch(0)[0].to(device), **options)
    return compressor, AdamW(compressor.weights(), lr=1e-2)


def train(compressor: Compressor, optimizer: AdamW, first: int, last: int, device: str) -> None:
    for i in range(first, last):
        x, y = (tensor.to(device) for tensor in batch(i))
        optimizer.zero_grad()
        (F.cross_entropy(compressor.model(x), y) + compressor.penalty()).backward()
        optimizer.step()
        compressor.step(optimizer)


def on_cpu(state: Any) -> Any:
    """Return `state` as it is when saved to a file and read on a machine without a GPU."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True, map_location="cpu")


def close(got: Any, want: Any, part: str) -> None:
    """Compare two states loosely: in float32, a GPU's exp2 and log2 differ in the last digit."""
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3, msg=lambda text: f"{part}: {text}")


def test_the_quantiser_and_its_gradients() -> None:
    weight = torch.randn(8, 500)
    depth = torch.tensor([0.0, 0.5, 1, 2, 2.5, 3, 5, 8])
    exponent = fit_exponent(weight, depth)
    torch.testing.assert_close(fit_exponent(weight.cuda(), depth.cuda()).cpu(), exponent)
    found = []
    for device in ("cpu", "cuda"):
        leaves = [t.to(device).detach().requires_grad_() for t in (weight, depth, exponent)]
        quantized = fake_quantize(*leaves)
        quantized.square().sum().backward()
        found.append([quantized.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)])  # type: ignore[union-attr]
    torch.testing.assert_close(*found)


def test_which_rows_are_given_up() -> None:
    """The same rows are given up on a GPU as on a CPU."""
    wanted, depth = torch.randn(1000) * 2, torch.randint(0, 9, (1000,)).float()
    layer_of = torch.tensor([1, 2, 4]).repeat_interleave(torch.tensor([1, 399, 600]))
    least = torch.full_like(layer_of, 2)
    there = _given_up(wanted.cuda(), depth.cuda(), layer_of.cuda(), least.cuda(), 5)
    assert torch.equal(there.cpu(), _given_up(wanted, depth, layer_of, least, 5))


@pytest.mark.parametrize("build", IMAGES)
def test_training_goes_as_on_a_cpu(build: Build) -> None:
    ended = []
    for device in ("cpu", "cuda"):
        compressor, optimizer = started(build, device)
        # Before a norm, the gradient of an exponent is nearly 0, so that its sign is chance.
        compressor.formats.adam.param_groups[1]["lr"] = 0.0
        train(compressor, optimizer, 0, 40, device)
        assert compressor.cuts
        ended.append(on_cpu(compressor.state_dict(optimizer)))
    for part in ("removed", "rows", "idle", "model", "formats", "optimizer", "lingering"):
        close(ended[1][part], ended[0][part], part)


@pytest.mark.parametrize(("there", "here"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_a_checkpoint_goes_on_on_either(there: str, here: str) -> None:
    """A checkpoint of a GPU resumes on a GPU or CPU, and one of a CPU on a GPU."""
    compressor, optimizer = started(lambda: Residual(False), there)
    train(compressor, optimizer, 0, 20, there)
    assert compressor.cuts
    state = on_cpu(compressor.state_dict(optimizer))
    train(compressor, optimizer, 20, 30, there)

    other, other_optimizer = started(lambda: Residual(False), here)
    other.load_state_dict(state, other_optimizer)
    train(other, other_optimizer, 20, 30, here)
    want, got = on_cpu(compressor.state_dict(optimizer)), on_cpu(other.state_dict(other_optimizer))
    for part in ("rows", "model", "formats", "optimizer"):
        close(got[part], want[part], part)


@pytest.mark.parametrize("build", [*IMAGES, Transformer])
def test_a_cut_is_exact_and_files_load_on_either(build: Build, tmp_path: Path) -> None:
    model = build().cuda()
    x = torch.randn(4, 3, 8, 8, device="cuda")
    compressor = Compressor(model, x, 0.1, bits=4)
    for name, layer in compressor.layers.items():
        kill(model, name, torch.arange(0, len(layer.rows) - 1, 3))
    assert compressor.cut()  # compares outputs before and after
    compressor.finish([(x,)])
    compressor.size()
    with torch.no_grad():
        want = model.eval()(x)
    selfcompress.save(compressor.model, tmp_path / "net.scnn")
    for device in ("cpu", "cuda"):
        loaded = selfcompress.load(tmp_path / "net.scnn", build()).to(device).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(x.to(device)).cpu(), want.cpu(), atol=2e-3, rtol=2e-3)
    dense = selfcompress.to_dense(compressor.model).eval()
    with torch.no_grad():
        torch.testing.assert_close(dense(x), want, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("build", "x"),
    [
        (lambda: Reader(nn.LSTM, num_layers=2, bidirectional=True), TOKENS),
        (lambda: Reader(nn.GRU), TOKENS),
        (lambda: Stepping(nn.LSTMCell), TOKENS),
        (Sentences, TOKENS),
        (OwnLayers, images()),
        (Transformer, images()),
    ],
    ids=["lstm", "gru", "cell", "embedding", "own", "transformer"],
)
def test_cuts_of_other_layers_are_exact(build: Build, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="RNN module weights are not part of")
        check_exact(started_exactly(build().cuda(), x.cuda()), x.cuda())


def test_a_step_of_the_compressor_waits_for_nothing() -> None:
    """`penalty` and `step` do not synchronise with the GPU."""
    compressor, optimizer = started(lambda: Residual(True), "cuda", interval=10**6)
    train(compressor, optimizer, 0, 3, "cuda")
    x, y = (tensor.cuda() for tensor in batch(3))
    loss = F.cross_entropy(compressor.model(x), y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        penalty = compressor.penalty()
        torch.cuda.set_sync_debug_mode("default")
        (loss + penalty).backward()
        torch.cuda.set_sync_debug_mode("error")
        compressor.step(optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_half_precision_with_a_schedule() -> None:
    torch.manual_seed(0)
    model = Residual(True).cuda()
    x, y = (tensor.cuda() for tensor in batch(0, 64))
    x = x.float()
    schedule = Schedule(steps=60)
    compressor = Compressor(model, x, 0.01, bits=8, interval=10, schedule=schedule)
    optimizer = AdamW(compressor.weights(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(x)
        (F.cross_entropy(logits.float(), y) + compressor.penalty()).backward()
        optimizer.step()
        compressor.step(optimizer)
    compressor.finish([(x, y)], optimizer)
    size = compressor.size()
    assert size.q_percent < 20 and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_compiled_networks_train_and_are_cut() -> None:
    torch.manual_seed(0)
    model = Chain().cuda()
    compiled: Any = torch.compile(model)
    x, y = (tensor.cuda() for tensor in batch(0, 64))
    x = x.float()
    compressor = Compressor(compiled, x, 0.3, interval=20, bit_step=0.1, bits=4)
    optimizer = AdamW(compressor.weights(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        (F.cross_entropy(compiled(x), y) + compressor.penalty()).backward()
        optimizer.step()
        compressor.step(optimizer)
    assert compressor.cuts
    eager = copy.deepcopy(model).eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(x), eager(x), atol=2e-3, rtol=2e-3)


def test_train_py_resumes_and_its_file_is_what_it_says(
    tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    args = (
        "--dataset digits --width 8 --image-size 8 --epochs 4 --batch-size 128 --gamma 0.01 "
        "--device cuda --run-dir"
    ).split()
    run = tmp_path / "run"
    code, out, err = cli(*args, run)
    assert code == 0, err
    assert torch.cuda.get_device_name() in out
    summary = json.loads((run / "summary.json").read_text())
    code, out, _ = cli(*args, run)
    assert code == 0 and "finished" in out
    (run / "summary.json").unlink()
    code, out, err = cli(*args, run)
    assert code == 0 and "going on after epoch 4" in out, err
    again = json.loads((run / "summary.json").read_text())
    assert again["file_bytes"] == summary["file_bytes"]
    assert again["test_accuracy"] == pytest.approx(summary["test_accuracy"], abs=1 / 180)


class Accumulates:
    """A function for `Replay`: counts its calls, and adds up all tensors that it gets on the GPU.

    Args:
        waits: whether it waits for the GPU.
    """

    def __init__(self, waits: bool = False) -> None:
        self.sum, self.calls, self.waits = torch.zeros((), device="cuda"), 0, waits

    def __call__(self, tensors: dict[str, Tensor], factor: float) -> Tensor:
        self.calls += 1
        self.sum += sum(tensor.sum() for tensor in tensors.values())
        if self.waits:
            self.sum.item()
        return factor * self.sum


def test_what_is_recorded_is_replayed_until_something_else_is_asked_for() -> None:
    """`Replay` calls and records its function again for another version, number or shape."""
    function = Accumulates()
    replay, total = Replay(function), 0.0
    for i in range(30):
        version, factor, size = i // 20, 2 if i < 15 else 3, 4 if i < 10 else 5
        tensors = {"a": torch.full((size,), float(i)), "b": torch.ones(2)}
        told = replay(lambda v=version: v, {n: t.cuda() for n, t in tensors.items()}, factor)  # type: ignore[misc]
        total += size * i + 2
        assert told.item() == factor * total
    assert function.calls == 8  # four times, it is called once and recorded once


def test_what_is_recorded_elsewhere_is_not_recorded_by_itself() -> None:
    """While the caller records a CUDA graph, `Replay` only calls its function."""
    function = Accumulates()
    replay, one = Replay(function), {"one": torch.ones((), device="cuda")}
    for _ in range(3):
        replay(lambda: 0, one, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replay(lambda: 0, one, 1)
    assert function.sum.item() == 3
    graph.replay()
    assert function.sum.item() == 4


def test_what_waits_for_the_gpu_is_not_recorded() -> None:
    function = Accumulates(waits=True)
    replay = Replay(function)
    ones = {"ones": torch.ones(3, device="cuda")}
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph"):
        assert replay(lambda: 0, ones, 2).item() == 6
    for i in range(2, 5):
        assert replay(lambda: 0, ones, 2).item() == 6 * i
    assert function.calls == 4


@pytest.mark.parametrize("build", IMAGES)
def test_formats_are_stepped_alike_whether_or_not_that_is_recorded(build: Build) -> None:
    ended = []
    for recorded in (True, False):
        compressor, optimizer = started(build, "cuda", interval=50)
        for replay in compressor.formats._replays:
            replay._able = recorded
        train(compressor, optimizer, 0, 110, "cuda")
        assert [r._recorded is not None for r in compressor.formats._replays] == [recorded] * 2
        ended.append(on_cpu(compressor.state_dict(optimizer)))
    for part in ("removed", "rows", "model", "formats", "optimizer"):
        close(ended[1][part], ended[0][part], part)


def test_numbers_come_late_and_in_order() -> None:
    """`late` yields the numbers of a tensor after the next one was made, in order."""
    tensors = [torch.tensor([float(i), -1], device="cuda") for i in range(5)]
    made: list[int] = []
    numbers = late(made.append(i) or tensor for i, tensor in enumerate(tensors))  # type: ignore[func-returns-value]
    assert next(numbers) == [0, -1] and made == [0, 1]
    assert list(numbers) == [[i, -1] for i in range(1, 5)]
    assert list(late([])) == []


@pytest.mark.parametrize("how", [{"gamma": 0.001}, {"float_baseline": True}])
def test_replayed_steps_train_as_those_that_are_launched(
    how: dict[str, Any], tmp_path: Path
) -> None:
    """A run that replays its steps as a CUDA graph trains like one that launches their kernels."""
    device = torch.device("cuda")
    dataset = load("digits", tmp_path, 8, device)
    config = Config(
        dataset="digits", image_size=8, width=8, epochs=6, batch_size=128, precision="fp32",
        penalty_from=0.0, lr=0.05, **how,
    ).resolved("digits", 8, 8)  # fmt: skip
    runs = [Run(config, dataset, device, RunFolder(tmp_path, {}), build_model) for _ in range(2)]
    runs[1].differentiate = lambda _, *batch: runs[1]._differentiate(*batch)
    losses = [[run._epoch(epoch)["train"]["loss"] for epoch in range(6)] for run in runs]
    assert isinstance(runs[0].differentiate, Replay) and runs[0].differentiate._recorded
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0][-1] < 0.9 * losses[0][0]
    if runs[0].compressor and runs[1].compressor:
        assert runs[0].compressor.cuts and runs[1].compressor.cuts


def test_cuts_are_compared_in_float32_though_the_user_allows_less() -> None:
    a, b = torch.randn(2, 256, 256, dtype=torch.float64, device="cuda").unbind()
    image, kernel = a.view(4, 64, 16, 16), b[:64, :64, None, None]

    def error() -> float:
        product = (a.float() @ b.float()).double() - a @ b
        conv = F.conv2d(image.float(), kernel.float()).double() - F.conv2d(image, kernel)
        return max(float(product.abs().max()), float(conv.abs().max()))

    torch.set_float32_matmul_precision("high")
    try:
        assert error() > 1e-3
        with full_precision(torch.device("cuda")):
            assert error() < 1e-3
        assert error() > 1e-3
    finally:
        torch.set_float32_matmul_precision("highest")
