"""The `selfcompress` command: what it prints about a network, and how it reports mistakes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sweep_runs import make_sweep
from torch import Tensor, nn

from models import build
from selfcompress import About, Architecture, Compressor, save
from selfcompress.command import main
from selfcompress.convert import quantize_layers
from selfcompress.training.config import Config
from selfcompress.training.loop import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a small network on digits for two epochs and return the folder of the run."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    config = Config(
        gamma=0.1, dataset="digits", width=4, epochs=2, image_size=8, run_dir=folder, device="cpu"
    )
    run(config, 64, build)
    return folder


def call(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: str | Path) -> tuple[int, Any]:
    """Run the command and return its exit code, and stdout if that is 0, else stderr.

    Assert that an error is a single line.
    """
    monkeypatch.setattr(sys, "argv", ["selfcompress", *map(str, arguments)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    capsys.readouterr()
    code = main()
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    if code:
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
    return code, printed.err if code else printed.out


def test_info_says_what_the_summary_and_the_disk_say(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    net = trained / "net.scnn"
    code, text = call(monkeypatch, capsys, "info", net, "--json")
    assert code == 0
    facts, summary = json.loads(text), json.loads((trained / "summary.json").read_text())
    assert facts["file_bytes"] == summary["file_bytes"] == net.stat().st_size
    assert facts["file_bytes"] == sum(facts["file_bytes_of"].values())
    for name in ("stored_bits", "q_bits", "test_accuracy", "gamma"):
        assert facts[name] == summary[name], name
    layers = {layer["name"]: layer for layer in facts["layers"]}
    assert {n: layer["channels"] for n, layer in layers.items()} == summary["channels_end"]
    assert {n: layer["channels_at_start"] for n, layer in layers.items()} == (
        summary["channels_start"]
    )
    assert sum(layer["macs"] for layer in layers.values()) == summary["macs_end"]
    assert sum(layer["q_bits"] for layer in layers.values()) == summary["q_bits"]
    code, text = call(monkeypatch, capsys, "info", net)
    assert code == 0
    assert f"file {net.stat().st_size:,} bytes" in text
    assert f"test accuracy {100 * summary['test_accuracy']:.2f} %" in text
    assert "4 → " in text


def test_eval_finds_the_accuracy_of_the_run(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    code, text = call(monkeypatch, capsys, "eval", trained / "net.scnn", "--json")
    assert code == 0
    accuracy = json.loads((trained / "summary.json").read_text())["test_accuracy"]
    assert json.loads(text)["accuracy"] == accuracy
    assert json.loads(text)["images"] == 360
    code, text = call(monkeypatch, capsys, "eval", trained / "net.scnn")
    assert f"{100 * accuracy:.2f} % of 360 test images of digits" in text
    code, text = call(
        monkeypatch, capsys, "eval", trained / "net.scnn", "--data-dir", trained.parent
    )
    assert code == 2 and "--dataset folder" in text


def test_eval_needs_the_test_images_alone(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    for name in "0123456789":
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "test" / name / "black.png")
    arguments: list[str | Path] = [
        "eval",
        trained / "net.scnn",
        "--dataset",
        "folder",
        "--data-dir",
        tmp_path,
    ]
    code, text = call(monkeypatch, capsys, *arguments)
    assert code == 0
    assert "10.00 % of 10 test images" in text  # the images are all the same, one in each class
    (tmp_path / "test").rename(tmp_path / "train")
    code, text = call(monkeypatch, capsys, *arguments)
    assert code == 2
    assert f"no folder {tmp_path / 'test'}" in text


def test_predict_names_classes_likeliest_first(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    pixels = (load_digits().images[0] * (255 / 16)).round().astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "zero.png")
    Image.fromarray(pixels).resize((40, 40)).save(tmp_path / "big.png")
    images = [tmp_path / "zero.png", tmp_path / "big.png"]
    code, text = call(monkeypatch, capsys, "predict", trained / "net.scnn", *images, "--json")
    assert code == 0
    found = json.loads(text)
    assert list(found) == list(map(str, images))
    for best in found.values():
        chances = [entry["probability"] for entry in best]
        assert len(best) == 5
        assert chances == sorted(chances, reverse=True)
        assert all(entry["class"] in "0123456789" for entry in best)
    code, text = call(monkeypatch, capsys, "predict", trained / "net.scnn", images[0])
    assert text.splitlines()[0] == str(images[0])
    assert len(text.splitlines()) == 6


def make_network() -> nn.Module:
    """Return a small classifier; tests name this function with --model."""
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 10))


def test_networks_of_ones_own(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    """A network that is not one of ours needs --model, and mistakes in that are named."""
    model = make_network()
    quantize_layers(model, bits=4)
    about = About(image_size=8, mean=[0.5] * 3, std=[0.5] * 3, dataset_kind="digits")
    save(model, tmp_path / "net.scnn", about)
    code, text = call(monkeypatch, capsys, "eval", tmp_path / "net.scnn")
    assert code == 2
    assert "give the starting model" in text
    for wrong, says in (
        ("test_command", "MODULE:CALLABLE"),
        ("no_such_module:make", "no_such_module"),
        ("test_command:no_such", "no_such"),
        ("json:dumps", "dumps"),
        ("builtins:dict", "not a torch module"),
    ):
        code, text = call(monkeypatch, capsys, "eval", tmp_path / "net.scnn", "--model", wrong)
        assert code == 2
        assert says in text
    maker = "test_command:make_network"
    code, text = call(monkeypatch, capsys, "eval", tmp_path / "net.scnn", "--model", maker)
    assert code == 0


class Named(nn.Module):
    """A network that returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_network()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(x)}


class Squeezed(Named):
    """A network that drops the dimension of a batch of one image."""

    def forward(self, x: Tensor) -> Any:
        return self.inner(x).squeeze()


def test_eval_takes_a_network_that_needs_more_than_one_image(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    about = About(image_size=8, mean=[0.5] * 3, std=[0.5] * 3, dataset_kind="digits")
    save(Squeezed(), tmp_path / "net.scnn", about)
    maker = ["--model", "test_command:Squeezed"]
    code, text = call(monkeypatch, capsys, "eval", tmp_path / "net.scnn", *maker)
    assert code == 0 and "of 360 test images" in text


@pytest.mark.parametrize(
    ("make", "image_size", "commands", "says"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), 8, ["eval"], "digits has 10"),
        (Named, 8, ["eval", "predict"], "returns dict"),
        (lambda: nn.Conv2d(3, 10, 3), 8, ["eval", "predict"], ", 10, 6, 6) for"),
        (make_network, 9, ["eval", "predict"], "does not accept RGB images of 9 pixels"),
    ],
)
def test_networks_that_do_not_classify_the_images_are_refused(
    make: Callable[[], nn.Module],
    image_size: int,
    commands: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    tmp_path: Path,
) -> None:
    about = About(image_size=image_size, mean=[0.5] * 3, std=[0.5] * 3, dataset_kind="digits")
    net, image = tmp_path / "net.scnn", tmp_path / "image.png"
    save(make(), net, about)
    Image.new("RGB", (8, 8)).save(image)
    monkeypatch.setattr(sys.modules[__name__], "made", make, raising=False)
    for command in commands:
        arguments = [image] if command == "predict" else []
        maker = ["--model", "test_command:made"]
        code, text = call(monkeypatch, capsys, command, net, *arguments, *maker)
        assert code == 2
        assert says in text


def test_memory_that_does_not_suffice_is_told(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """An error of torch about too little memory is reported in one line."""

    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")

    monkeypatch.setattr("models.resnet9.ResNet9.forward", fail)
    code, text = call(monkeypatch, capsys, "eval", trained / "net.scnn")
    assert code == 1
    assert text.startswith("error: not enough memory for this (DefaultCPUAllocator")


def test_export_writes_what_onnx_runtime_runs(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    """`export` prints the size of the ONNX file, and puts class names and normalisation in it."""
    import onnx

    target = tmp_path / "net.onnx"
    code, text = call(monkeypatch, capsys, "export", trained / "net.scnn", "--onnx", target)
    assert code == 0
    assert f"{target.stat().st_size:,} bytes" in text
    notes = {p.key: json.loads(p.value) for p in onnx.load(target).metadata_props}
    assert notes["class_names"] == list("0123456789")
    assert len(notes["mean"]) == len(notes["std"]) == 3


def test_mistakes_are_told_in_one_line(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    net = trained / "net.scnn"
    (tmp_path / "text.scnn").write_text("no network")
    (tmp_path / "image.png").write_text("no image")
    bare = tmp_path / "bare.scnn"
    save(build("resnet9", 10, 2), bare, About(architecture=Architecture("resnet9", 10, 2, 8)))
    other = tmp_path / "other.scnn"
    save(build("resnet9", 10, 2), other, About(architecture=Architecture("nonet", 10, 2, 8)))
    for arguments, says in (
        (["info", tmp_path / "text.scnn"], "no safetensors file"),
        (["info", tmp_path], "it is a folder: give the net.scnn in it"),
        (["info", tmp_path / "absent.scnn"], "No such file"),
        (["predict", net], "no image"),
        (["predict", net, tmp_path / "absent.png"], "absent.png"),
        (["predict", net, tmp_path / "image.png"], "image.png"),
        (["predict", bare, tmp_path / "image.png"], "how RGB images are prepared"),
        (["eval", other], "nonet"),
        (["eval", net, "--dataset", "folder", "--data-dir", tmp_path / "no"], "no folder"),
        (["export", net, "--onnx", tmp_path / "no" / "net.onnx"], "No such file"),
    ):
        code, text = call(monkeypatch, capsys, *arguments)  # type: ignore[arg-type]
        assert code in (1, 2)
        assert says in text, text


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def build(:", "invalid syntax"),
        ("raise RuntimeError('no GPU here\\nnor there')", "no GPU here"),
        ("", "cannot import name 'build'"),
    ],
)
def test_a_package_models_that_cannot_be_imported_is_told_in_one_line(
    code: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    about = About(
        architecture=Architecture("resnet9", 10, 2, 8), image_size=8, mean=[0.5] * 3, std=[0.5] * 3
    )
    save(build("resnet9", 10, 2), tmp_path / "net.scnn", about)
    (tmp_path / "models.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "models")
    exit_code, text = call(monkeypatch, capsys, "eval", tmp_path / "net.scnn")
    assert exit_code == 2
    assert "resnet9 of the package 'models'" in text
    assert says in text


def test_a_float_network_is_described_too(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    compressor = Compressor(nn.Sequential(nn.Linear(4, 3)), torch.zeros(2, 4), 0.1)
    for network in (model, compressor.model):
        save(network, tmp_path / "net.scnn")
        code, text = call(monkeypatch, capsys, "info", tmp_path / "net.scnn")
        assert code == 0
        assert "bytes" in text


def test_the_command_is_installed() -> None:
    command = Path(sys.executable).parent / "selfcompress"
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "predict" in done.stdout


def test_pick_names_the_best_run_and_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    make_sweep(tmp_path, [0.003, 0.03, 0.3])
    code, text = call(monkeypatch, capsys, "pick", tmp_path, "--max-bytes", "3%")
    assert code == 0
    file = Path(text.splitlines()[-1])
    assert file.stat().st_size <= 30_000  # of 250,000 weights
    assert f"{file.stat().st_size:,} bytes" in text
    code, text = call(monkeypatch, capsys, "pick", tmp_path, "--min-accuracy", "0.96", "--json")
    assert code == 0
    facts = json.loads(text)
    assert facts["test_accuracy"] >= 0.96
    assert facts["file_bytes"] == Path(facts["file"]).stat().st_size

    for arguments, part in (
        ([], "--max-bytes"),
        (["--max-bytes", "much"], "'much' is no size"),
        (["--max-bytes", "1"], "none of 8 runs"),
    ):
        code, text = call(monkeypatch, capsys, "pick", tmp_path, *arguments)
        assert code == 2
        assert part in text


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """If stdout is closed early, as by `head`, a program exits with 141 and prints no error."""
    program = """
import sys
from selfcompress.training.errors import exit_code
sys.exit(exit_code(lambda: print("line\\n" * 100_000) or 0))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
