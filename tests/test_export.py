"""ONNX files: checked, small, and computing in ONNX Runtime what the network computes."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import NETWORKS
from onnx import TensorProto
from test_dense import cut_some
from torch import Tensor, nn

from models import build
from selfcompress import Compressor, ExportError, export_onnx
from selfcompress.convert import quantize_layers
from selfcompress.file.write import pack
from selfcompress.layers.quantized import quantized_layers


def run(path: Path, x: Tensor) -> Tensor:
    """Return the only output of an ONNX file for `x` in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(path), options)
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.float().numpy()})
    return torch.from_numpy(logits)


def integer_layers(path: Path) -> int:
    """Return how many weights of an ONNX file are integers that are dequantised."""
    return sum(n.op_type == "DequantizeLinear" for n in onnx.load(path).graph.node)


QUICK = ("residual-relu-after", "depthwise", "transformer")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS]
)
def test_onnx_runtime_computes_the_same(name: str, tmp_path: Path) -> None:
    cut = cut_some(name)
    model = cut.model.eval()
    size = export_onnx(model, cut.x, tmp_path / "net.onnx")
    assert size == (tmp_path / "net.onnx").stat().st_size
    onnx.checker.check_model(tmp_path / "net.onnx", full_check=True)
    assert integer_layers(tmp_path / "net.onnx") == len(quantized_layers(model))
    for batch in (1, 5):
        x = torch.randn(batch, *cut.x.shape[1:], dtype=torch.float64)
        got = run(tmp_path / "net.onnx", x)
        with torch.no_grad():
            torch.testing.assert_close(got, model(x).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("bits", "kind"), [(4, TensorProto.INT4), (5, TensorProto.INT8), (12, TensorProto.INT16)]
)
def test_integers_are_as_narrow_as_they_can_be(bits: int, kind: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.Flatten())
    quantize_layers(model, bits=bits)
    x = torch.randn(2, 3, 6, 6)
    export_onnx(model, x, tmp_path / "net.onnx")
    initializers = onnx.load(tmp_path / "net.onnx").graph.initializer
    kinds = [i.data_type for i in initializers if i.name.endswith(".integers")]
    assert kinds == [kind, kind]
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "net.onnx", x), model(x))


def test_a_compressed_network_makes_a_small_file(tmp_path: Path) -> None:
    model = build("resnet9", 10, 16)
    x = torch.randn(2, 3, 16, 16)
    Compressor(model, x, 0.01, bits=4)
    size = export_onnx(model, x, tmp_path / "net.onnx")
    plain = sum(p.numel() for p in model.parameters()) * 4
    # Half a byte per weight; the graph and the folded batch norms are small beside it.
    assert size < 0.16 * plain
    assert size < 1.1 * len(pack(model, entropy_coding=False))


def test_negative_batch_norms_are_folded_into_positive_scales(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.Flatten())
    quantize_layers(model, bits=4)
    with torch.no_grad():
        model.get_parameter("1.weight").copy_(torch.tensor([-1.0, 2.0, -0.5, 1.0, 0.0]))
    x = torch.randn(2, 3, 6, 6)
    export_onnx(model.eval(), x, tmp_path / "net.onnx")
    initializers = {i.name: i for i in onnx.load(tmp_path / "net.onnx").graph.initializer}
    (scale,) = [i for name, i in initializers.items() if name.endswith(".scale")]
    assert (onnx.numpy_helper.to_array(scale) >= 0).all()
    with torch.no_grad():
        np.testing.assert_allclose(run(tmp_path / "net.onnx", x), model(x), atol=1e-5)


def test_attention_keeps_its_integers(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.out = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(x + self.attention(x, x, x)[0])
            return y

    model = Model().eval()
    quantize_layers(model, bits=6)
    x = torch.randn(3, 6, 8)
    export_onnx(model, x, tmp_path / "net.onnx")
    assert integer_layers(tmp_path / "net.onnx") == 3
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "net.onnx", x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head_first", [False, True])
def test_a_weight_that_is_shared_keeps_its_integers(head_first: bool, tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if head_first:
                self.head = nn.Linear(8, 50)
            self.words, self.inner = nn.Embedding(50, 8), nn.Linear(8, 8)
            if not head_first:
                self.head = nn.Linear(8, 50)
            self.head.weight = self.words.weight

        def forward(self, tokens: Tensor) -> Tensor:
            y: Tensor = self.head(torch.relu(self.inner(self.words(tokens))))
            return y

    model = Model().eval()
    quantize_layers(model, bits=4)
    tokens = torch.randint(50, (3, 6))
    export_onnx(model, tokens, tmp_path / "net.onnx")
    floats = [t for t in onnx.load(tmp_path / "net.onnx").graph.initializer if t.data_type == 1]
    assert max(np.prod(t.dims) for t in floats) == 50  # a bias: no matrix is in float
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    (logits,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
    with torch.no_grad():
        want = model(tokens)
    torch.testing.assert_close(torch.from_numpy(logits), want, rtol=0.02, atol=0.02)


def test_a_float_model_exports_too(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(2, 4)
    export_onnx(model, x, tmp_path / "net.onnx", notes={"classes": "a b"})
    network = onnx.load(tmp_path / "net.onnx")
    assert {(p.key, p.value) for p in network.metadata_props} == {("classes", "a b")}
    assert [o.name for o in network.graph.output] == ["logits"]
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "net.onnx", x), model(x))


def test_a_batch_size_that_would_be_fixed_is_refused(tmp_path: Path) -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2)
            return torch.cat([self.layer(a), b[:, :3]])

    with pytest.raises(ExportError, match="would have fixed at 4"):
        export_onnx(Halves(), torch.randn(4, 4), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_told_in_one_line(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"torch cannot export the model to ONNX: .+") as error:
        export_onnx(Odd(), torch.randn(2, 3), tmp_path / "net.onnx")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
