"""The example networks: what they compute, their sizes, and that all of them can be trained."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import NAMES, UnknownModelError, build, default_width
from models.resnet import ResNet
from models.resnet9 import ResNet9
from models.vit import ViT
from selfcompress import Compressor

# name → default width; then parameters, and multiply-accumulates at 32x32 pixels, at that width
FACTS = {
    "resnet9": (64, 6_573_120, 379_261_952),
    "resnet20": (16, 272_474, 40_813_184),
    "resnet56": (16, 855_770, 125_747_840),
    "vgg16": (64, 14_724_042, 313_201_664),
    "mobilenetv2": (32, 2_236_682, 87_976_448),
    "vit": (192, 2_693_194, 170_461_056 + 9_437_184),  # layers and attention
}


@pytest.mark.parametrize("name", NAMES)
def test_sizes_at_the_default_width(name: str) -> None:
    width, parameters, macs = FACTS[name]
    assert default_width(name) == width
    model = build(name).eval()
    # Some versions of torch do not count the operations of the CPU's fused attention.
    plain = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), plain, FlopCounterMode(display=False) as flops:
        model(torch.zeros(1, 3, 32, 32))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert flops.get_total_flops() == 2 * macs


@pytest.mark.parametrize("name", NAMES)
def test_any_image_size_and_width(name: str) -> None:
    for size in (8, 13):
        model = build(name, classes=7, width=5, image_size=size).eval()
        x = torch.randn(2, 3, size, size)
        logits = model(x)
        assert logits.shape == (2, 7)
        assert torch.equal(torch.fx.symbolic_trace(model)(x), logits)
    with pytest.raises(ValueError, match="width must be at least 1"):
        build(name, width=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_training_reaches_every_weight(name: str) -> None:
    model, x = build(name, width=4, image_size=8), torch.randn(4, 3, 8, 8)
    compressor = Compressor(model, x, gamma=0.01)
    optimizer = torch.optim.SGD(compressor.weights(), lr=0.1)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    loss = F.cross_entropy(model(x), torch.arange(4)) + compressor.penalty()
    loss.backward()
    optimizer.step()
    compressor.step(optimizer)
    same = [key for key, p in model.named_parameters() if torch.equal(p, before[key])]
    # Exponents are fitted every twentieth step.
    assert [key for key in same if not key.endswith(("exponent", "bias"))] == []


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 32), ("googlenet", 32), ("inception_v3", 96), ("vit_b_16", 32)],
)
def test_torchvision_models(name: str, size: int) -> None:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("error")
        model = build(f"torchvision:{name}", classes=7, image_size=size)
        assert model(torch.empty(2, 3, size, size)).shape == (2, 7)  # one tensor in training too
    assert default_width(f"torchvision:{name}") is None


@pytest.mark.parametrize("name", ["resnet18", "torchvision:resnet19", "torchvision:nothing", ""])
def test_unknown_names_are_refused_with_the_choices(name: str) -> None:
    with pytest.raises(UnknownModelError) as error:
        build(name)
    message = str(error.value)
    assert "\n" not in message
    for known in (*NAMES, "torchvision:NAME"):
        assert known in message
    assert ("torchvision:resnet18" in message) == ("resnet" in name)  # if anything comes close


def test_models_refuse_what_they_cannot_build() -> None:
    with pytest.raises(ValueError, match="depth must be"):
        ResNet(depth=18)
    with pytest.raises(ValueError, match="image_size must be at least 8"):
        ViT(image_size=7)
    with pytest.raises(ValueError, match=r"layer9\.conv"):
        ResNet9(widths={"layer9.conv": 3})


def test_resnet9_is_rebuilt_from_the_widths_of_a_cut_one() -> None:
    torch.manual_seed(0)
    model, x = ResNet9(width=4), torch.randn(2, 3, 16, 16)
    compressor = Compressor(model, x, gamma=0.01)
    with torch.no_grad():  # one channel of the first layer, and one inside a residual
        for name in ("prep", "res3.block1"):
            model.get_parameter(f"{name}.conv.bit_depth")[0] = 0
    compressor.cut()
    widths = {layer.name: layer.out_width for layer in compressor.size().layers if layer.out_width}
    assert (widths["prep.conv"], widths["res3.block1.conv"]) == (3, 31)

    again = ResNet9(widths=widths)
    for name, weight in again.named_parameters():
        assert weight.shape == model.get_parameter(name).shape, name
