"""How long it takes to pack a network into a file and to load it, and how large the file is.

    python -m benchmarks.packing                     ResNet-9 of width 64, and ResNet-50
    python -m benchmarks.packing --repeats 9

Weights are random. 30 % of the rows of every layer have no bits; the others have 1 to 6, with
exponents fitted to them, and nothing has been cut, which makes the network as large as it can be.

Columns, in milliseconds, medians over the repeats, in this process and on this machine as it is:

    coded      whether integers are entropy coded
    pack       from the network to the bytes of the file
    unpack     from these bytes to integers and floats
    set up     from those to the network; building the starting network is not counted
    bytes      of the file
    stored     the network's stored bits in bytes, see selfcompress/size.py
    entropy    bytes that the file would have if its integers were coded ideally
"""

import statistics
import time
from collections.abc import Callable

import torch
import tyro
from torch import nn

from models import build
from selfcompress.convert import quantize_layers
from selfcompress.file.load import set_up
from selfcompress.file.read import unpack
from selfcompress.file.write import pack
from selfcompress.layers.quantized import quantized_layers
from selfcompress.quantizer import fit_exponent
from selfcompress.size import measure

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet9 (6.6 M)": lambda: build("resnet9", 10, 64),
    "resnet50 (25.6 M)": lambda: build("torchvision:resnet50", 1000),
}


def main(repeats: int = 5) -> None:
    """Time packing and loading.

    Args:
        repeats: how often every measurement is repeated.
    """
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':18} coded  pack  unpack  set up       bytes      stored     entropy")
    for name, build_network in NETWORKS.items():
        torch.manual_seed(0)
        model = build_network()
        quantize_layers(model, bits=4)
        mix_bits(model)
        for coded in (False, True):
            times, size, entropy = measured(model, build_network, coded, repeats)
            stored = measure(model, None, 1).stored_bits / 8
            milliseconds = [1000 * statistics.median(column) for column in zip(*times, strict=True)]
            print(
                f"{name:18} {'yes' if coded else 'no':>5}{{:6.0f}}{{:8.0f}}{{:8.0f}}".format(
                    *milliseconds
                )
                + f"{size:12,}{stored:12,.0f}{entropy:12,.0f}"
            )


@torch.no_grad()
def mix_bits(model: nn.Module) -> None:
    torch.manual_seed(0)
    for layer in quantized_layers(model).values():
        bits = torch.randint(1, 7, layer.bit_depth.shape)
        layer.bit_depth.copy_(bits * (torch.rand(bits.shape) > 0.3))
        layer.exponent.copy_(fit_exponent(layer.weight_by_row(), layer.bit_depth))


def measured(
    model: nn.Module, build_network: Callable[[], nn.Module], coded: bool, repeats: int
) -> tuple[list[tuple[float, float, float]], int, float]:
    """Return seconds to pack, unpack and set up, by repeat; the file's bytes, as is and ideal."""
    times = []
    for _ in range(repeats):
        fresh = build_network()
        start = time.perf_counter()
        data = pack(model, entropy_coding=coded)
        packed = time.perf_counter()
        contents = unpack(data)
        unpacked = time.perf_counter()
        set_up(contents, fresh)
        done = time.perf_counter()
        times.append((packed - start, unpacked - packed, done - unpacked))
    size = contents.size
    return times, size.total, size.total - size.integers + contents.entropy_bits() / 8


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
