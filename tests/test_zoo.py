"""torchvision's classification models survive cuts unchanged, and can lose almost all channels."""

import math
import re

import pytest
import torch

from benchmarks import zoo

# One of each kind of wiring, the cheapest there is.
QUICK = [
    "resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "regnet_y_400mf",
    "googlenet",
]  # fmt: skip
# The others up to 30 M parameters, and one of each family that starts above.
REST = [n for n in zoo.names() if n not in QUICK and zoo.parameters(n) < 30e6]
REST += ["alexnet", "vgg11_bn", "vit_b_16", "wide_resnet50_2"]

# Families of which nearly all channels of convolutions can go, and those with MLP blocks.
CONVOLUTIONAL = (
    "vgg|resnet|resnext|wide_resnet|regnet|densenet|googlenet|inception|mobilenet|efficientnet|"
    "mnasnet|shufflenet"
)
WITH_MLPS = "vit|swin|convnext|maxvit"


def check(name: str) -> None:
    """Measure one model, and check the result against what its family should reach."""
    large = zoo.parameters(name) > 50e6
    result = zoo.measure(name, torch.float32 if large else torch.float64)
    assert result.exact, (result.difference_eval, result.difference_train)
    assert result.traced == "yes"
    assert 0 < result.cut_percent < 100
    for layer in result.layers:
        assert 0 <= layer.removable <= layer.channels, layer
        assert layer.why or layer.removable == layer.channels, layer
    if re.match(CONVOLUTIONAL, name):
        assert result.conv_removable_percent >= 90, zoo.reasons(result.layers)
    if re.match(WITH_MLPS, name):
        hidden = [layer for layer in result.layers if layer.mlp]
        assert hidden
        for layer in hidden:
            assert layer.quantized and layer.removable == layer.channels, layer


@pytest.mark.parametrize("name", QUICK)
def test_a_cut_is_exact(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_a_cut_of_every_other_model_is_exact(name: str) -> None:
    check(name)


def test_every_model_is_measured() -> None:
    assert len(zoo.names()) >= 80
    assert set(QUICK) < set(zoo.names())


def test_a_difference_is_seen() -> None:
    ones, tens = torch.ones(3), torch.full((2, 2), 10.0)
    assert zoo.difference([ones, tens], [ones.clone(), tens.clone()]) == 0
    assert zoo.difference([ones, tens], [ones, tens + torch.eye(2)]) == pytest.approx(0.1)
    assert zoo.difference([torch.zeros(2)], [torch.zeros(2)]) == 0
    assert zoo.difference([torch.zeros(2)], [torch.tensor([0, 1e-9])]) == math.inf
    assert zoo.difference([ones], [ones * math.nan]) == math.inf
    assert zoo.difference([ones], [torch.ones(2)]) == math.inf
