"""Networks that compress themselves while they train (Cséfalvay & Imber, arXiv 2301.13142)."""

from selfcompress.compressor import Compressor
from selfcompress.dense import to_dense
from selfcompress.export import ExportError, export_onnx
from selfcompress.file.header import About, Architecture, FileError
from selfcompress.file.load import load
from selfcompress.file.write import save
from selfcompress.quantizer import fake_quantize
from selfcompress.report import LayerReport, Report
from selfcompress.schedule import Schedule
from selfcompress.size import LayerSize, Size
from selfcompress.surgery import Plan, apply_plan
from selfcompress.verify import CutError

__all__ = [
    "About",
    "Architecture",
    "Compressor",
    "CutError",
    "ExportError",
    "FileError",
    "LayerReport",
    "LayerSize",
    "Plan",
    "Report",
    "Schedule",
    "Size",
    "apply_plan",
    "export_onnx",
    "fake_quantize",
    "load",
    "save",
    "to_dense",
]
