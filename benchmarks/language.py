"""Compare a self-compressing language model with narrower ones at uniform bits, without train.py.

    python -m benchmarks.language                                         two hours on one core
    python -m benchmarks.language --steps 60 --widths 32 --gammas 0.003   a quick trial

A GPT of four blocks learns to predict the next character of Python's own library as installed on
this machine; every tenth file is held out. The training loop is the README's; the model is defined
here and not one of those in `models`.

The peers are those of benchmarks/peers.py: *float*, the full width; *uniform*, narrower networks
all of whose weights have 2, 3 or 4 bits, after 60 % of the run in 8 bits. Every network is trained
for the same number of steps with the same AdamW, and evaluated as loaded from its file. Files that
exist already are evaluated again but not trained again, so the command resumes where it was
stopped.
"""

import itertools
import math
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import selfcompress
from benchmarks.peers import LEARN, Point, bar, height, number, set_bits
from benchmarks.zoo import markdown

CHARACTERS = 128  # ASCII; all other bytes are mapped to the last one
CONTEXT = 128  # characters
BATCH = 32  # windows of CONTEXT characters
BLOCKS, HEADS = 4, 4
RATE = 2e-3  # peak learning rate
MEASURED = 100  # batches of held-out text per evaluation


@dataclass(frozen=True)
class Args:
    """Train the peers and print a table."""

    width: int = 128
    """Width of our network and of the float one."""
    gammas: tuple[float, ...] = (0.0001, 0.0003, 0.001, 0.003, 0.01)
    """γ of our networks."""
    widths: tuple[int, ...] = (48, 64, 96, 128)
    """Widths of the uniform networks: multiples of 4."""
    bits: tuple[int, ...] = (2, 3, 4)
    """Bits per weight of the uniform networks."""
    steps: int = 1500
    """Training steps of every network."""
    seed: int = 0
    """Seed of weights and batches."""
    runs: Path = Path("runs/language")
    """Where the files of the networks go."""


class Block(nn.Module):
    """A transformer block: causal self-attention, then an MLP, each with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        normed = self.norm1(x)
        q, k, v = (
            layer(normed).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        added: Tensor = self.contract(F.gelu(self.expand(self.norm2(x))))
        return x + added


class GPT(nn.Module):
    """A transformer that predicts the logits of the next character."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(CHARACTERS, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CHARACTERS)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Map (batch, time) int64 characters to (batch, time, CHARACTERS) logits."""
        x = self.token(text) + self.place(torch.arange(text.shape[1], device=text.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    for width in (args.width, *args.widths):
        if width < 1 or width % HEADS:
            sys.exit(f"error: a width has to be a multiple of {HEADS}, not {width}")
    args.runs.mkdir(parents=True, exist_ok=True)
    print("\n" + table(list(train_all(args))))


def train_all(args: Args) -> Iterator[Point]:
    """Yield the point of every network, training those whose file does not exist."""
    learnt, held_out = text()
    for kind, width, pressure in [
        ("float", args.width, 0.0),
        *(("uniform", *both) for both in itertools.product(args.widths, args.bits)),
        *(("ours", args.width, gamma) for gamma in args.gammas),
    ]:
        name = {
            "float": f"width {width}",
            "uniform": f"width {width}, {pressure:g} bits",
            "ours": f"γ = {pressure:g}",
        }[kind]
        path = args.runs / f"{kind}-w{width}-{pressure:g}-{args.steps}-seed{args.seed}.scnn"
        if not path.exists():
            torch.manual_seed(args.seed)
            model, start = GPT(width), time.perf_counter()
            train(model, kind, pressure, args, learnt)
            selfcompress.save(model, path, half=kind != "float")
            print(f"{path}: {time.perf_counter() - start:.0f} s")
        loss = evaluate(selfcompress.load(path, GPT(width)), held_out)
        yield Point(kind, name, path.stat().st_size, -loss / math.log(2))


def text() -> tuple[Tensor, Tensor]:
    """Return Python's library as training and held-out text, each (characters,) int64."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in library.rglob("*.py") if "site-packages" not in p.parts)
    files = [path.read_bytes() for path in paths if "test" not in path.parts]
    random.Random(0).shuffle(files)
    sides = [b"".join(files[len(files) // 10 :]), b"".join(files[: len(files) // 10])]
    learnt, held_out = (
        torch.frombuffer(bytearray(side), dtype=torch.uint8).long().clamp(max=CHARACTERS - 1)
        for side in sides
    )
    return learnt, held_out


def windows(characters: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a batch of inputs and of the characters that follow, each (BATCH, CONTEXT) int64."""
    starts = torch.randint(len(characters) - CONTEXT, (BATCH, 1), generator=generator)
    window = characters[starts + torch.arange(CONTEXT + 1)]
    return window[:, :-1], window[:, 1:]


def train(model: nn.Module, kind: str, pressure: float, args: Args, learnt: Tensor) -> None:
    """Train `model` from scratch; `pressure` is γ for "ours" and the bit depth for "uniform"."""
    generator = torch.Generator().manual_seed(args.seed)
    compressor = None
    if kind != "float":
        compressor = selfcompress.Compressor(
            model,
            windows(learnt, generator)[0],
            gamma=pressure if kind == "ours" else 0.0,
            bits=8,
            schedule=selfcompress.Schedule(args.steps, end=0.85 if kind == "ours" else 1.0),
        )
    weights = compressor.weights() if compressor else model.parameters()
    optimizer = torch.optim.AdamW(weights, RATE, betas=(0.9, 0.98), weight_decay=0.05)
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=args.steps, pct_start=0.1, cycle_momentum=False
    )
    for step in range(args.steps):
        if kind == "uniform" and compressor and step == round(LEARN * args.steps):
            set_bits(compressor, int(pressure))
        loss = loss_of(model, *windows(learnt, generator))
        if compressor:
            loss = loss + compressor.penalty()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if compressor:
            compressor.step(optimizer)
    if compressor:
        compressor.finish([windows(learnt, generator)], optimizer)


def loss_of(model: nn.Module, read: Tensor, following: Tensor) -> Tensor:
    """Return the cross-entropy in nats per character, a scalar."""
    logits: Tensor = model(read)
    return F.cross_entropy(logits.flatten(0, 1), following.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, held_out: Tensor) -> float:
    """Return the mean cross-entropy in nats per character; every network gets the same batches."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    batches = [windows(held_out, generator) for _ in range(MEASURED)]
    return mean(loss_of(model, *batch).item() for batch in batches)


def table(points: list[Point]) -> str:
    """Return a markdown table by kind and size of networks scored by minus bits per character."""
    hull = bar(points)
    full = next(p for p in points if p.kind == "float")
    header = "", "", "file KB", "of float", "bits a character", "the bar", "of the way to float"
    rows = []
    for p in sorted(points, key=lambda p: (p.kind, p.size)):
        at = height(p.size, hull)
        way = 100 * (p.accuracy - at) / (full.accuracy - at)
        cells = (
            p.kind, p.name, f"{p.size / 1000:.1f}", f"{100 * p.size / full.size:.2f} %",
            f"{-p.accuracy:.3f}", number(-at, ".3f"), number(way, ".0f", " %"),
        )  # fmt: skip
        rows.append(cells)
    return markdown(header, rows) + "\n"


if __name__ == "__main__":
    main()
