"""Compression that starts from a network which is trained already."""

# mypy: disable-error-code="no-untyped-call"

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from models.resnet9 import ResNet9
from selfcompress import Compressor, Schedule

BATCH = 128


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images and labels of scikit-learn's digits, for training and for testing."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.from_numpy(data.images).float()[:, None].expand(-1, 3, -1, -1) / 8 - 1
    y = torch.from_numpy(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order].contiguous(), y[order]
    return x[:1400], y[:1400], x[1400:], y[1400:]


def right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the percentage of images that are classified correctly."""
    training = model.training
    with torch.no_grad():
        correct = (model.eval()(x).argmax(1) == y).float().mean()
    model.train(training)
    return 100 * float(correct)


def train(
    model: nn.Module, epochs: int, lr: float, x: Tensor, y: Tensor, compressor: Compressor | None
) -> None:
    parameters = model.parameters() if compressor is None else compressor.weights()
    optimizer = AdamW(parameters, lr=lr)
    model.train()
    for _ in range(epochs):
        for some in torch.randperm(len(x)).split(BATCH):
            loss = F.cross_entropy(model(x[some]), y[some])
            if compressor is not None:
                loss = loss + compressor.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if compressor is not None:
                compressor.step(optimizer)
    if compressor is not None:
        compressor.finish(x.split(BATCH), optimizer)


@pytest.mark.slow
def test_a_trained_network_starts_as_good_as_it_was_and_gets_small() -> None:
    torch.manual_seed(0)
    x, y, test_x, test_y = digits()
    model = ResNet9(width=8)
    train(model, 12, 5e-3, x, y, None)
    was = right(model, test_x, test_y)
    assert was > 97
    with torch.no_grad():
        outputs = model.eval()(test_x)

    schedule = Schedule(24 * math.ceil(len(x) / BATCH), begin=0.0)  # the model is trained already
    compressor = Compressor(model, x[:8], 0.003, bits=8, interval=25, schedule=schedule)
    assert abs(right(model, test_x, test_y) - was) <= 0.1
    with torch.no_grad():
        difference = (model.eval()(test_x) - outputs).abs().max() / outputs.abs().max()
    assert difference < 0.05
    start = compressor.size()
    assert start.q_percent == pytest.approx(25)

    train(model, 24, 3e-3, x, y, compressor)
    size = compressor.size()
    now = right(model, test_x, test_y)
    print(
        f"{was:.2f} % to {now:.2f} %; {start.stored_percent:.2f} % to {size.stored_percent:.2f} %"
    )
    assert now >= was - 1.5
    assert size.stored_percent < 0.3 * start.stored_percent
    assert size.parameters < start.parameters


def test_at_eight_bits_a_network_computes_almost_what_it_did() -> None:
    torch.manual_seed(0)
    model = ResNet9(width=8).eval()
    x = torch.randn(16, 3, 16, 16)
    with torch.no_grad():
        model.train()(x)
        was = model.eval()(x)
        Compressor(model, x, gamma=0.0, bits=8)
        now = model(x)
    assert (now - was).abs().max() < 0.05 * was.abs().max()
