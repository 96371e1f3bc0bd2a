"""Networks that compress themselves while they train (Cséfalvay & Imber, arXiv 2301.13142)."""

from selfcompress.compressor import Compressor
from selfcompress.quantizer import fake_quantize
from selfcompress.size import LayerSize, Size
from selfcompress.verify import CutError

__all__ = ["Compressor", "CutError", "LayerSize", "Size", "fake_quantize"]
