"""The example networks: what they compute, and that they can be rebuilt from cut-down widths."""

import pytest
import torch

from models.resnet9 import ResNet9
from selfcompress import Compressor


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


def test_resnet9_refuses_what_it_cannot_build() -> None:
    with pytest.raises(ValueError, match="width must be at least 1"):
        ResNet9(width=0)
    with pytest.raises(ValueError, match=r"layer9\.conv"):
        ResNet9(widths={"layer9.conv": 3})
