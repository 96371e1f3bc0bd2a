"""Formats are stepped alike if the loss is scaled, by a GradScaler or to accumulate gradients."""

# mypy: disable-error-code="no-untyped-call"

import pytest
import torch
import torch.nn.functional as F
from networks import Residual, compressor_of
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from selfcompress import Compressor

BOTH = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
        ),
    ],
)


def batch(i: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(size, 3, 8, 8, generator=generator)
    return x.to(device), torch.randint(5, (size,), generator=generator).to(device)


def tensors(compressor: Compressor) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in compressor.model.named_parameters()}


def trained(scaled: bool, device: str, kind: type[Optimizer], clip: bool) -> Compressor:
    """Return the compressor of a residual network after 30 steps, with a penalty that cuts it."""
    torch.manual_seed(0)
    model = Residual(relu_after=False).to(device)
    x, _ = batch(0, 8, device)
    compressor = compressor_of(model, x, 0.3, interval=10, bit_step=0.1)
    optimizer = kind(compressor.weights(), lr=1e-2)  # type: ignore[call-arg]
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10, enabled=scaled)
    for i in range(30):
        x, y = batch(i, 16, device)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y) + compressor.penalty()).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        compressor.step(optimizer)
    assert not scaled or scaler.get_scale() == 2.0**10
    return compressor


@BOTH
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_a_grad_scaler_changes_nothing(device: str, kind: type[Optimizer], clip: bool) -> None:
    plain, scaled = (trained(s, device, kind, clip) for s in (False, True))
    assert plain.cuts == scaled.cuts >= 1
    # Scaling by a power of two is exact. But runs on a GPU are not deterministic, and weights that
    # differ in the last place are sometimes quantised to other levels.
    tolerance = 0.0 if device == "cpu" else 1e-2
    torch.testing.assert_close(tensors(scaled), tensors(plain), rtol=tolerance, atol=tolerance)


@BOTH
def test_a_batch_that_the_scaler_skips_leaves_the_weights_and_finite_formats(device: str) -> None:
    torch.manual_seed(0)
    model = Residual(relu_after=False).to(device)
    x, y = batch(0, 8, device)
    compressor = compressor_of(model, x, 0.01)
    optimizer = SGD(compressor.weights(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=1)
    weights = [p.detach().clone() for p in compressor.weights()]
    depths = {n: m.bit_depth.detach().clone() for n, m in compressor.layers.items()}
    loss = F.cross_entropy(model(x), y) + compressor.penalty()
    scaler.scale(loss * torch.tensor(torch.inf, device=device)).backward()
    scaler.step(optimizer)
    scaler.update()
    compressor.step(optimizer)
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, w) for p, w in zip(compressor.weights(), weights, strict=True))
    for name, layer in compressor.layers.items():
        assert layer.bit_depth.isfinite().all()
        assert (layer.bit_depth - depths[name]).abs().max() <= 0.011
    for i in range(3):  # training goes on, at a scale that changes with every step
        x, y = batch(i, 8, device)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y) + compressor.penalty()).backward()
        scaler.step(optimizer)
        scaler.update()
        compressor.step(optimizer)
    assert scaler.get_scale() == 2.0**12
    assert all(t.isfinite().all() for t in tensors(compressor).values())


def without_norms() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)
    ).double()


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_accumulated_batches_step_formats_as_one_batch(
    parts: int, averaged: bool, scale: float
) -> None:
    """The parts of a batch count as one, whether the loop averages their losses or sums them."""
    results = []
    for pieces in (1, parts):
        model = without_norms()
        x, _ = batch(0, 8, "cpu")
        compressor = Compressor(model, x.double(), 0.1, interval=10, bit_step=0.1, bits=4)
        optimizer = AdamW(compressor.weights(), lr=1e-3)
        for i in range(25):
            optimizer.zero_grad()
            x, y = batch(i, 8, "cpu")
            for some, labels in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
                loss = F.cross_entropy(model(some.double()), labels) + compressor.penalty()
                (scale * loss / (pieces if averaged else 1)).backward()
            for parameter in compressor.weights():
                assert parameter.grad is not None
                parameter.grad /= scale * (1 if averaged else pieces)
            optimizer.step()
            compressor.step(optimizer)
        results.append(tensors(compressor) | {"wanted": compressor.formats.wanted(0.1)})
    depths = [n for n in results[0] if n.endswith("bit_depth")]
    assert any((results[0][n] < 3.4).any() for n in depths)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("penalised", [0, 1, 3])
def test_a_penalty_in_one_of_the_parts_alone_steps_formats_as_one_batch(penalised: int) -> None:
    results = []
    for pieces in (1, 4):
        model = without_norms()
        x, _ = batch(0, 8, "cpu")
        compressor = Compressor(model, x.double(), 0.1, interval=10, bit_step=0.1, bits=4)
        optimizer = AdamW(compressor.weights(), lr=1e-3)
        for i in range(25):
            optimizer.zero_grad()
            x, y = batch(i, 8, "cpu")
            parts = zip(x.chunk(pieces), y.chunk(pieces), strict=True)
            for part, (some, labels) in enumerate(parts):
                loss = F.cross_entropy(model(some.double()), labels) / pieces
                if part == min(penalised, pieces - 1):
                    loss = loss + compressor.penalty()
                loss.backward()
            optimizer.step()
            compressor.step(optimizer)
        results.append(tensors(compressor) | {"wanted": compressor.formats.wanted(0.1)})
    depths = [n for n in results[0] if n.endswith("bit_depth")]
    assert any((results[0][n] < 3.4).any() for n in depths)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_losses_that_are_differentiated_one_by_one_count_their_batch_once() -> None:
    """Two losses of one forward pass, each with a backward() of its own, are of the same images."""
    results = []
    for apart in (False, True):
        model = without_norms()
        x, _ = batch(0, 8, "cpu")
        compressor = Compressor(model, x.double(), 0.1, bit_step=0.1, bits=4)
        optimizer = AdamW(compressor.weights(), lr=1e-3)
        for i in range(25):
            optimizer.zero_grad()
            x, y = batch(i, 8, "cpu")
            logits = model(x.double())
            task = F.cross_entropy(logits, y) + compressor.penalty()
            other = logits.square().mean()
            if apart:
                other.backward(retain_graph=True)
                task.backward()
            else:
                (other + task).backward()
            optimizer.step()
            compressor.step(optimizer)
        results.append(tensors(compressor) | {"wanted": compressor.formats.wanted(0.1)})
    depths = [n for n in results[0] if n.endswith("bit_depth")]
    assert any((results[0][n] < 3.4).any() for n in depths)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("s", [0.125, 16.0])
def test_of_a_loss_times_s_and_a_gamma_times_s_squared_rows_want_as_many_bits(s: float) -> None:
    """Worth grows with the square of the loss's scale, and so must γ for the same bit depths."""
    results = []
    for scale, gamma in ((1.0, 0.01), (s, 0.01 * s**2)):
        model = without_norms()
        x, y = batch(0, 8, "cpu")
        compressor = Compressor(model, x.double(), gamma, bits=4)
        (scale * F.cross_entropy(model(x.double()), y) + compressor.penalty()).backward()
        compressor.step(AdamW(compressor.weights(), lr=1e-3))
        results.append(compressor.formats.wanted(gamma))
    assert len(results[0].ceil().unique()) > 2
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["create_graph", "clipped", "evaluated"])
def test_accumulated_gradients_may_become_other_tensors(way: str) -> None:
    """They are added out of place with create_graph; a loop may clip those of each part.

    And an evaluation between forward() and backward() is of other samples.
    """
    samples = []
    for odd in (False, True):
        model = without_norms()
        x, y = batch(0, 8, "cpu")
        compressor = Compressor(model, x.double(), 0.1)
        for some, labels in zip(x.chunk(4), y.chunk(4), strict=True):
            loss = (F.cross_entropy(model(some.double()), labels) + compressor.penalty()) / 4
            if odd and way == "evaluated":
                with torch.no_grad():
                    model(x[:1].double())
            loss.backward(create_graph=odd and way == "create_graph")
            for parameter in compressor.weights() if odd and way == "clipped" else ():
                parameter.grad = parameter.grad.clamp(-1, 1)  # type: ignore[union-attr]
        samples.append(list(compressor.formats.collected.samples.values()))
    assert samples[0] == samples[1] == [8, 8, 8]
