"""Cut every classification model of torchvision twice, and check that its outputs stay the same.

    python benchmarks/zoo.py                         every model up to 250 M parameters
    python benchmarks/zoo.py resnet mnasnet0_5       those whose name contains one of these
    python benchmarks/zoo.py --large vit_h           the largest ones too
    python benchmarks/zoo.py --markdown --why        a table to paste; what keeps its place, and why

Each model is built without trained weights, for small inputs in a batch of 2, with dropout and
stochastic depth at 0; all its parameters and batch-norm statistics are drawn anew, so that every
part of it affects its output (torchvision starts some heads and norms at zero). Then, twice: 30 %
of the rows of every quantised layer lose their bits, what is left of them (biases, and β of the
batch norms that read nothing else) is set to 0, and compressor.cut() removes them from the model
and from SGD's momentum. Half of the 30 % is the same choice for all layers of one width, so that
residual streams lose channels too. The model is trained for a step before the first cut and for two
steps between the cuts.

Columns:

    px          height and width of the input
    dtype       float64 where memory allows; float32 above 150 M parameters
    traced      yes; parts: some of it is opaque to the tracer; no: nothing can be removed
    quantised   weights in quantised layers, in percent of all weights of layers
    removable   channels that can be removed, in percent of all that layers with weights compute
    conv        the same for convolutions alone
    cut         parameters that two cuts removed, in percent
    Δ eval      largest difference between the outputs before and after a cut, relative to the
                scale of the output, in eval mode
    Δ train     the same in train mode, where models may return more outputs
    trace s     CPU seconds to build the Compressor
    cut s       CPU seconds for one cut, its own check included (mean of two)

Exits with 1 if a model fails or differs by more than 1e-10 (float32: 1e-5, and in eval mode only,
as batch norms over few numbers amplify its rounding errors too much).
"""

import argparse
import gc
import math
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.optim import SGD
from torch.utils import _pytree as pytree
from torchvision import models, ops

from selfcompress import Compressor
from selfcompress.graph.liveness import settle_statistics

BATCH = 2
DEAD = 0.3  # of the rows of every layer, at each of the two cuts
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
FLOAT64_LIMIT = 150e6  # parameters; larger models are measured in float32
BACKWARD_LIMIT = 100e6  # parameters; above, made-up gradients: autograd needs 10 times the memory
LARGE = 250e6  # parameters; larger models are measured only with --large

# Height and width of the input by family, at which a model works in both modes and train mode is
# meaningful: at 32 px many models end in tensors of 1 × 1, and a batch norm over the two numbers
# of a batch of 2 amplifies rounding errors up to 10⁹ times (measured with perturbed inputs).
# (inception_v3's second head, which only runs in train mode, needs 299.)
_PX: dict[str, int] = {
    "vgg|squeezenet|convnext|swin|vit_._16": 32, "vit_h_14": 28, "maxvit": 224, "inception": 299,
}  # fmt: skip
_DEFAULT_PX = 64
_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet|inception": {"init_weights": False},
    "vit_._16": {"image_size": 32},
    "vit_._32": {"image_size": 64},
    "vit_h_14": {"image_size": 28},
}
_FORMATS = {"bit_depth", "exponent"}  # parameters that belong to the compressor, not to the network


@dataclass(frozen=True)
class Layer:
    """One entry of the compressor's report, and what kind of layer it is.

    Attributes:
        mlp: whether it is the first linear layer of an MLP block, with its hidden channels as rows.
    """

    name: str
    conv: bool
    mlp: bool
    quantized: bool
    channels: int
    removable: int
    why: str


@dataclass(frozen=True)
class Result:
    """What was measured on one model; see the module's docstring."""

    name: str
    px: int
    dtype: torch.dtype
    traced: str
    parameters: int
    left: int
    quantized_percent: float
    layers: tuple[Layer, ...]
    difference_eval: float
    difference_train: float
    trace_seconds: float
    cut_seconds: float
    warned: tuple[str, ...] = field(default=())

    @property
    def exact(self) -> bool:
        """Whether no cut changed an output by more than rounding.

        Train mode counts in float64 only: batch norms over few numbers amplify rounding errors
        up to 10⁵ times in deep networks.
        """
        counts = [self.difference_eval]
        if self.dtype is torch.float64:
            counts.append(self.difference_train)
        return max(counts) <= TOLERANCE[self.dtype]

    @property
    def removable_percent(self) -> float:
        """Channels that can be removed, in percent of all channels."""
        return _percent(self.layers)

    @property
    def conv_removable_percent(self) -> float:
        """Channels of convolutions that can be removed, in percent; NaN without convolutions."""
        return _percent(layer for layer in self.layers if layer.conv)

    @property
    def cut_percent(self) -> float:
        """Parameters that the cuts removed, in percent."""
        return 100 * (1 - self.left / self.parameters)

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of the table for this model."""
        return (
            self.name,
            str(self.px),
            str(self.dtype).removeprefix("torch."),
            self.traced,
            f"{self.quantized_percent:.1f}",
            f"{self.removable_percent:.1f}",
            f"{self.conv_removable_percent:.1f}",
            f"{self.cut_percent:.1f}",
            f"{self.difference_eval:.0e}",
            f"{self.difference_train:.0e}",
            f"{self.trace_seconds:.1f}",
            f"{self.cut_seconds:.1f}",
        )


HEADER = (
    "model", "px", "dtype", "traced", "quantised %", "removable %", "conv %", "cut %", "Δ eval",
    "Δ train", "trace s", "cut s",
)  # fmt: skip


def names(wanted: Iterable[str] = ()) -> list[str]:
    """Return torchvision's classification models, or those whose name contains one of `wanted`."""
    every: list[str] = models.list_models(module=models)
    wanted = list(wanted)
    return [n for n in every if not wanted or any(w in n for w in wanted)]


def parameters(name: str) -> int:
    """Return a model's number of parameters from torchvision's metadata, without building it."""
    weights = next(iter(models.get_model_weights(name)))
    return int(weights.meta["num_params"])


def dtype_for(name: str) -> torch.dtype:
    """Return float64, or float32 for models that are too large for it."""
    return torch.float64 if parameters(name) <= FLOAT64_LIMIT else torch.float32


def build(name: str, dtype: torch.dtype, seed: int = 0, **options: Any) -> tuple[nn.Module, Tensor]:
    """Build a model with parameters drawn anew, in train mode, and an input of its size."""
    torch.manual_seed(seed)
    for family, extra in _OPTIONS.items():
        if re.match(family, name):
            options = extra | options
    model: nn.Module = models.get_model(name, weights=None, **options)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd | ops.StochasticDepth):
            module.p = 0.0
    model.to(dtype).train()
    x = torch.randn(BATCH, 3, px_of(name), px_of(name), dtype=dtype)
    randomise(model, x)
    return model, x


def px_of(name: str) -> int:
    """Return the height and width of a model's input in pixels."""
    return next((px for family, px in _PX.items() if re.match(family, name)), _DEFAULT_PX)


@torch.no_grad()
def randomise(model: nn.Module, x: Tensor) -> None:
    """Draw all parameters and batch-norm statistics anew, at scales that keep signals in range.

    The statistics are those of `x`, perturbed, so that activations keep their scale in eval mode
    however deep the network is.
    """
    done: set[int] = set()
    for module in model.modules():
        if isinstance(module, _ConvNd | nn.Linear):
            module.weight.normal_(0, math.sqrt(2 / module.weight[0].numel()))
            done.add(id(module.weight))
            if module.bias is not None:
                module.bias.normal_(0, 0.2)
                done.add(id(module.bias))
        elif isinstance(module, nn.MultiheadAttention):
            module.in_proj_weight.normal_(0, math.sqrt(1 / module.embed_dim))
            done.add(id(module.in_proj_weight))
        elif isinstance(module, _BatchNorm | nn.LayerNorm | nn.GroupNorm):
            if module.weight is not None:
                module.weight.uniform_(0.5, 1.5)
            if module.bias is not None:
                module.bias.normal_(0, 0.3)
            done |= {id(module.weight), id(module.bias)}
    for parameter in model.parameters():  # tokens, positions, layer scales, attention biases
        if id(parameter) not in done:
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    settle(model, x)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_var.mul_(torch.rand_like(norm.running_var) + 0.5).add_(0.01)
            shift = torch.randn_like(norm.running_mean) * norm.running_var.sqrt()
            norm.running_mean.add_(shift, alpha=0.2)


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> None:
    """Set all batch norms' statistics to those of `x`; leaves a model with norms in train mode."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def kill(compressor: Compressor, seed: int) -> None:
    """Set the bit depths of 30 % of the rows of every quantised layer to 0.

    Half of them are chosen by output channel, in the same way for all layers of equal width, so
    that the layers that add to one residual stream lose these channels together.
    """
    generator = torch.Generator().manual_seed(seed)
    own_share = 1 - (1 - DEAD) / (1 - DEAD / 2)
    for layer in compressor.layers.values():
        rows, width = layer.rows.cpu(), int(layer.out_width)
        agreed = torch.rand(width, generator=torch.Generator().manual_seed(seed + width))
        own = torch.rand(len(rows), generator=generator)
        dead = (agreed[rows] < DEAD / 2) | (own < own_share)
        dead &= torch.arange(len(rows)) != int(own.argmax()) if len(rows) else True
        layer.bit_depth[dead] = 0


@torch.no_grad()
def silence(compressor: Compressor, x: Tensor) -> None:
    """Set to 0 what rows without bits leave behind: biases, and β of norms of constant channels.

    Constant channels are found from values, not from the channel graph, which is under test: hooks
    see the inputs of batch norms in the order in which these run, and where a channel has a single
    value all over the batch, β is set to 0 before the norm computes. The norms' statistics are
    settled before and after, as a cut would do first, so that a comparison of outputs before and
    after the cut shows the effect of the cut alone.
    """
    model = compressor.model
    for layer in compressor.layers.values():
        if layer.bias is not None:
            computed = torch.zeros(len(layer.bias), dtype=torch.bool)
            computed[layer.rows[layer.live_rows()]] = True
            layer.bias[~computed] = 0

    def watch(norm: nn.Module, args: Any) -> None:
        assert isinstance(norm, _BatchNorm)
        read: Tensor = args[0]
        columns = getattr(norm, "columns", None)
        if columns is not None and len(columns) != read.shape[1]:
            read = read.index_select(1, columns)
        values = read.transpose(0, 1).flatten(1)
        norm.bias[values.amax(1) == values.amin(1)] = 0

    settle_statistics(compressor.graph, model)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.num_features]
    hooks = [norm.register_forward_pre_hook(watch) for norm in norms]
    model.eval()(x)
    for hook in hooks:
        hook.remove()
    settle_statistics(compressor.graph, model)


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    """Return all tensors that the model returns in a mode; restores buffers and random state."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        found = pytree.tree_leaves(model.train(training)(x))
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.train()
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


def difference(before: list[Tensor], after: list[Tensor]) -> float:
    """Return the largest difference between two lists of outputs, relative to a tensor's scale."""
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
            return math.inf
        gap, scale = float((a - b).abs().max()), float(a.abs().max())
        worst = max(worst, gap / scale if scale else math.inf * gap if gap else 0.0)
    return worst


def train_step(model: nn.Module, x: Tensor, optimizer: SGD, made_up: bool) -> None:
    """Do one small training step; with `made_up` gradients if autograd takes too much memory."""
    optimizer.zero_grad()
    if made_up:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = parameter.detach() * 1e-3
    else:
        leaves = [t for t in pytree.tree_leaves(model.train()(x)) if isinstance(t, Tensor)]
        torch.stack(
            [t.square().mean() / t.detach().square().mean() for t in leaves]
        ).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def measure(name: str, dtype: torch.dtype | None = None, seed: int = 0, *, cuts: int = 2) -> Result:
    """Cut a model of torchvision `cuts` times and compare outputs; see the module's docstring."""
    return measure_model(name, *build(name, dtype or dtype_for(name), seed), seed, cuts=cuts)


def measure_model(
    name: str, model: nn.Module, x: Tensor, seed: int = 0, *, cuts: int = 2
) -> Result:
    """Measure, as `measure` does, a model in train mode whose parameters `randomise` has drawn."""
    kinds = {n: m for n, m in model.named_modules() if isinstance(m, _ConvNd | nn.Linear)}
    conv = {n for n, m in kinds.items() if isinstance(m, _ConvNd)}
    mlp = set(mlp_layers(model))
    count = count_parameters(model)
    del kinds

    start = time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compressor = Compressor(model, x, gamma=0.0, bits=8)
    trace_seconds = time.process_time() - start
    warned = tuple(str(w.message) for w in caught)
    traced = traced_of(compressor)
    quantized = sum(layer.weight.numel() for layer in compressor.layers.values())
    layers = tuple(
        Layer(item.name, item.name in conv, item.name in mlp, item.quantized, item.channels,
              item.removable, item.why)
        for item in compressor.report().layers
    )  # fmt: skip

    optimizer = SGD(compressor.weights(), lr=1e-4, momentum=0.9)
    made_up = count > BACKWARD_LIMIT
    train_step(model, x, optimizer, made_up)
    differences = {False: 0.0, True: 0.0}
    cut_seconds = []
    for cut in range(1, cuts + 1):
        kill(compressor, seed + cut)
        silence(compressor, x)
        before = {mode: outputs(model, x, mode) for mode in differences}
        start = time.process_time()
        compressor.cut(optimizer)
        cut_seconds.append(time.process_time() - start)
        for mode, was in before.items():
            differences[mode] = max(differences[mode], difference(was, outputs(model, x, mode)))
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held != {id(p) for p in compressor.weights()}:
            raise AssertionError("the optimiser holds other parameters than the model")
        if cut < cuts:
            for _ in range(2):
                train_step(model, x, optimizer, made_up)
    return Result(
        name=name,
        px=x.shape[-1],
        dtype=next(model.parameters()).dtype,
        traced=traced,
        parameters=count,
        left=count_parameters(model),
        quantized_percent=100 * quantized / compressor.starting_weights,
        layers=layers,
        difference_eval=differences[False],
        difference_train=differences[True],
        trace_seconds=trace_seconds,
        cut_seconds=sum(cut_seconds) / len(cut_seconds),
        warned=warned,
    )


def traced_of(compressor: Compressor) -> str:
    """Say whether the tracer followed the model: yes, in parts, or no."""
    if not compressor.graph.nodes:
        return "no"
    return "parts" if compressor.graph.untraceable else "yes"


def mlp_layers(model: nn.Module) -> Iterator[str]:
    """Yield the names of linear layers that another one follows, with an activation in between."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential):
            children = [
                (f"{name}.{key}".lstrip("."), child)
                for key, child in module.named_children()
                if not isinstance(child, nn.Dropout)
            ]
            for (first, a), (_, b), (_, c) in zip(
                children, children[1:], children[2:], strict=False
            ):
                if (
                    isinstance(a, nn.Linear)
                    and isinstance(c, nn.Linear)
                    and not list(b.parameters())
                ):
                    yield first


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, without bit depths and exponents."""
    return sum(
        p.numel() for n, p in model.named_parameters() if n.rpartition(".")[2] not in _FORMATS
    )


def reasons(layers: Iterable[Layer]) -> Counter[str]:
    """Count channels that stay by reason; numbers in reasons become #, to sum over layers."""
    found: Counter[str] = Counter()
    for layer in layers:
        if layer.removable < layer.channels:
            found[re.sub(r"\d+", "#", layer.why) or "(no reason given)"] += (
                layer.channels - layer.removable
            )
    return found


def _percent(layers: Iterable[Layer]) -> float:
    layers = list(layers)
    channels = sum(layer.channels for layer in layers)
    return 100 * sum(layer.removable for layer in layers) / channels if channels else math.nan


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread inside a `with` block: small inputs run fastest, and repeatably, on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def format_row(cells: Iterable[str]) -> str:
    """Format a line of the table for a terminal."""
    first, *others = cells
    return f"{first:<30}" + "".join(f"{cell:>12}" for cell in others)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format the table as markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(header), *lines[1:]])


def main() -> int:
    """Measure what the command line asks for, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="parts of model names; none: all models")
    parser.add_argument("--large", action="store_true", help="also models above 250 M parameters")
    parser.add_argument("--float32", action="store_true", help="all of them in float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", action="store_true", help="the table again, as markdown")
    parser.add_argument("--why", action="store_true", help="why channels have to stay, by model")
    args = parser.parse_args()
    dtype = torch.float32 if args.float32 else None
    found = names(args.names)
    skipped = [name for name in found if parameters(name) > LARGE and not args.large]
    chosen = [name for name in found if name not in skipped]
    code = tell(
        {name: partial(measure, name, dtype, args.seed) for name in chosen}, args.why, args.markdown
    )
    if skipped:
        print("skipped without --large:", *skipped)
    return code


def tell(measurements: Mapping[str, Callable[[], Result]], why: bool, as_markdown: bool) -> int:
    """Measure all models, print the table, and return the exit code."""
    results: list[Result] = []
    failed: dict[str, str] = {}
    print(format_row(HEADER), flush=True)
    with one_thread():
        for name, measured in measurements.items():
            try:
                result = measured()
            except Exception as error:  # the error of one model must not stop the others
                failed[name] = f"{type(error).__name__}: {error}"
                print(f"{name:<30}  FAILED {failed[name]}", flush=True)
                continue
            finally:
                gc.collect()
            results.append(result)
            print(format_row(result.cells) + ("" if result.exact else "  INEXACT"), flush=True)
            if why:
                for reason, channels in reasons(result.layers).most_common():
                    print(f"{channels:>42} channels: {reason}", flush=True)
    inexact = [r.name for r in results if not r.exact]
    print(f"\n{len(results)} models measured, {len(results) - len(inexact)} of them exact")
    if inexact:
        print("inexact:", *inexact)
    if failed:
        print("failed:", *failed)
    if as_markdown:
        print("\n" + markdown(HEADER, (r.cells for r in results)))
    return 1 if failed or inexact else 0


if __name__ == "__main__":
    sys.exit(main())
