"""Time a compressed network beside the float one it started as, in torch and in ONNX Runtime.

    python -m benchmarks.inference RUN/net.scnn

Takes a packed network of the package `models`, builds the float network it started as, and times
both on random images, in turn, in one process: as torch modules and as ONNX files, in float32, on
the CPU, and on a GPU (torch only) where there is one. Times are medians; the results to compare are
the ratios to the float network in the same engine.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import onnxruntime
import torch
import tyro
from torch import Tensor, nn

from models import build
from selfcompress import export_onnx, to_dense
from selfcompress.file.header import FileError
from selfcompress.file.load import load_described

Call = Callable[[], object]


@dataclass(frozen=True)
class Options:
    """Time a compressed network against the float one it started as."""

    file: tyro.conf.Positional[Path]
    """A packed network of the package models."""
    batches: tuple[int, ...] = (1, 256)
    """Images per call."""
    seconds: float = 3.0
    """How long to measure each of the networks, for each batch size."""
    threads: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Threads of both engines; None is torch's default."""


@torch.no_grad()
def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    try:
        model, about = load_described(options.file)
    except (FileError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    start = about.architecture
    assert start is not None  # load_described() has built it
    original = build(start.name, start.classes, start.width, start.image_size).eval()
    dense = to_dense(model)
    share = sum(about.macs.values()) / max(1, sum(about.macs_at_start.values()))
    print(
        f"{start.name} of width {start.width}, {start.image_size} pixels: {100 * share:.0f} % of "
        f"its MACs left; torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}, "
        f"{torch.get_num_threads()} threads"
    )
    print("| device | images | network | ms | times the float one's speed |\n|---|---|---|---|---|")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        for batch in options.batches:
            images = torch.randn(batch, 3, start.image_size, start.image_size, device=device)
            calls = _torch_calls({"float": original, "compressed": dense}, images)
            if device == "cpu":
                calls |= _onnx_calls(original, model, images)
            times = _medians(calls, options.seconds * len(calls), device)
            for name, seconds in times.items():
                base = times["ONNX Runtime, float" if name.startswith("ONNX") else "torch, float"]
                print(
                    f"| {device} | {batch} | {name} | {1000 * seconds:.2f} | {base / seconds:.2f} |"
                )
    return 0


def _torch_calls(networks: dict[str, nn.Module], images: Tensor) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    for name, network in networks.items():
        network.to(images.device).to(memory_format=torch.channels_last)
        wide = images.contiguous(memory_format=torch.channels_last)
        calls[f"torch, {name}"] = lambda network=network, wide=wide: network(wide)  # type: ignore[misc]
    return calls


def _onnx_calls(original: nn.Module, model: nn.Module, images: Tensor) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    example = torch.zeros(2, *images.shape[1:])
    with tempfile.TemporaryDirectory() as folder:
        for name, network, unpack in (
            ("float", original, "0"),
            ("compressed, dequantised at every call", model, "0"),
            ("compressed, dequantised once", model, "1"),
        ):
            path = Path(folder) / "net.onnx"
            export_onnx(network, example, path)
            settings = onnxruntime.SessionOptions()
            settings.intra_op_num_threads = torch.get_num_threads()
            settings.add_session_config_entry("session.disable_quant_qdq", unpack)
            # Its threads would otherwise go on spinning while torch is timed.
            settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
            session = onnxruntime.InferenceSession(
                str(path), settings, providers=["CPUExecutionProvider"]
            )
            feed = {session.get_inputs()[0].name: images.numpy()}
            calls[f"ONNX Runtime, {name}"] = lambda session=session, feed=feed: session.run(  # type: ignore[misc]
                None, feed
            )
    return calls


def _medians(calls: dict[str, Call], seconds: float, device: str) -> dict[str, float]:
    """Return the median seconds of each call; all take turns until `seconds` have passed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # the first call is slower
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(taken) for name, taken in times.items()}


if __name__ == "__main__":
    sys.exit(main())
