"""Dense copies: plain torch that computes the same, exports, and compiles, without selfcompress."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, Cut, kill, outputs, prepare, randomise_norms
from random_kills import compressed, kill_at_random, told
from torch import nn
from torch.utils import _pytree as pytree

from selfcompress import to_dense
from selfcompress.convert import quantize_layers
from selfcompress.layers.batch_norms import PlacedBatchNorm2d
from selfcompress.layers.placing import Placed
from selfcompress.layers.quantized import quantized_layers
from selfcompress.surgery import Wiring, rewire


@torch.no_grad()
def cut_some(name: str, seed: int = 0) -> Cut:
    """Return one of NETWORKS after a third of its rows have been killed and cut."""
    cut = prepare(name, torch.float64, seed)
    generator = torch.Generator().manual_seed(seed)
    for layer_name, layer in quantized_layers(cut.model).items():
        kill(cut.model, layer_name, torch.randperm(len(layer.rows), generator=generator)[::3])
        if layer.bias is not None:
            layer.bias.zero_()
    cut.cut()
    return cut


def is_plain(model: nn.Module) -> bool:
    modules = [type(m).__module__ for m in model.modules()]
    return not any(name.startswith("selfcompress") for name in modules)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_dense_copy_of_any_network_computes_the_same(seed: int) -> None:
    with told(seed):
        compressor = compressed(seed)
        kill_at_random(compressor, seed)
        compressor.cut()
        model, x = compressor.model.eval(), compressor.example_input
        dense = to_dense(model)
        assert not any(isinstance(m, Placed) for m in dense.modules())
        inputs = x if isinstance(x, tuple) else (x,)
        with torch.no_grad():
            want, got = (pytree.tree_leaves(m(*inputs)) for m in (model, dense))
        for a, b in zip(got, want, strict=True):
            scale = float(b.abs().amax().clamp(min=1e-3)) if b.numel() else 1.0
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize("name", NETWORKS)
def test_dense_copies_are_plain_and_train_alike(name: str) -> None:
    cut = cut_some(name)
    dense = to_dense(cut.model)
    assert is_plain(dense)
    for training in (True, False):
        want, got = (outputs(model, cut.x, training) for model in (cut.model, dense))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", NETWORKS)
def test_dense_copies_export(name: str) -> None:
    cut = cut_some(name)
    dense = to_dense(cut.model.eval())
    exported = torch.export.export(dense, (cut.x,))
    torch.testing.assert_close(exported.module()(cut.x), dense(cut.x))


def test_dense_copies_compile_whole() -> None:
    cut = cut_some("depthwise")
    dense = to_dense(cut.model.eval())
    with torch.no_grad():
        compiled = torch.compile(dense, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(cut.x), dense(cut.x))


def test_the_model_stays_as_it_was() -> None:
    cut = cut_some("residual")
    before = {n: t.clone() for n, t in cut.model.state_dict().items()}
    layers = quantized_layers(cut.model)
    to_dense(cut.model)
    assert quantized_layers(cut.model) == layers
    for name, tensor in cut.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_groups_that_stay_groups_are_not_spread_out() -> None:
    """A depthwise convolution that lost whole channels stays depthwise, without more weights."""
    cut = cut_some("depthwise")
    deep = to_dense(cut.model).get_submodule("deep.0")
    weights = sum(p.numel() for p in deep.parameters() if p.dim() > 1)
    assert weights <= 12 * 9


@pytest.mark.parametrize(
    ("name", "layer", "dead"), [("residual", "two.1", "two.0"), ("grouped", "b", "b")]
)
def test_what_a_user_has_put_on_a_layer_is_on_what_takes_its_place(
    name: str, layer: str, dead: str
) -> None:
    """Attributes, parameters and hooks that a user adds to a layer are on its dense copy too."""
    cut = prepare(name, torch.float64)
    calls: list[str] = []
    plain = cut.model.get_submodule(layer)
    plain.note, plain.extra = "mine", nn.Parameter(torch.ones(3))  # type: ignore[assignment]
    plain.register_forward_hook(lambda *args: calls.append("hook"))
    kill(cut.model, dead, [0])
    cut.cut()
    dense = to_dense(cut.model)
    new = dense.get_submodule(layer)
    assert isinstance(new, torch.fx.GraphModule)
    assert getattr(new, "note", None) == "mine"
    assert len(new.get_parameter("extra")) == 3
    assert sum("extra" in key for key in dense.state_dict()) == 1
    dense(cut.x)
    assert calls == ["hook"]


def test_a_layer_with_two_names_stays_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    model.add_module("again", model[0])
    quantize_layers(model, bits=4)
    dense = to_dense(model)
    assert dense.get_submodule("again") is dense.get_submodule("0")
    assert is_plain(dense)


def test_a_dense_copy_needs_no_selfcompress(tmp_path: Path) -> None:
    cut = cut_some("residual-relu-after")  # its norms read other channels than they make
    dense = to_dense(cut.model.eval())
    code = (
        "import sys, torch\n"
        "sys.modules['selfcompress'] = None\n"
        "model = torch.export.load(sys.argv[1] + '/dense.pt2').module()\n"
        "x, want = torch.load(sys.argv[1] + '/want.pt', weights_only=True)\n"
        "torch.testing.assert_close(model(x), want)\n"
    )
    torch.export.save(torch.export.export(dense, (cut.x,)), tmp_path / "dense.pt2")
    torch.save((cut.x, dense(cut.x).detach()), tmp_path / "want.pt")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("rows", [[0, 1], [0, 2], [1, 2], []])
@pytest.mark.parametrize("columns", [[0, 1], [0, 2], [1, 2]])
def test_norms_read_and_make_the_channels_that_they_should(
    rows: list[int], columns: list[int]
) -> None:
    """A norm can read as many channels as it computes without their being the same ones."""
    norm = PlacedBatchNorm2d.from_float(nn.BatchNorm2d(3))
    randomise_norms(norm)
    kept = columns[: len(rows)]
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(norm, name).detach()[kept].clone()
        setattr(norm, name, nn.Parameter(tensor) if name in norm._parameters else tensor)
    rewire(norm, Wiring(3, 3, rows, kept))
    x = torch.randn(2, 3, 4, 4)
    dense = to_dense(nn.Sequential(norm.eval()))
    assert is_plain(dense)
    torch.testing.assert_close(dense(x), norm(x))
