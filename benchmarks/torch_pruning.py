"""Cut torchvision's models with Torch-Pruning and with selfcompress, side by side.

    pip install torch-pruning                               (for this benchmark alone)
    python -m benchmarks.torch_pruning                      every model up to 250 M parameters
    python -m benchmarks.torch_pruning resnet mnasnet0_5    those whose name contains one of these
    python -m benchmarks.torch_pruning --layer-norm         groups with layer norms too
    python -m benchmarks.torch_pruning --markdown           a table to paste

(Use -m, from the repository's root: run as a script, this file would be imported in place of the
library of the same name.)

The question is the same for both: when 30 % of the channels of every layer compute nothing, does
taking them out leave the output as it was? Both get the same model and input from
benchmarks/zoo.py, in float64 (float32 above 150 M parameters), so that a difference is an error of
the cut and not of rounding. Each runs in its own process, for at most --limit CPU seconds.

Torch-Pruning is used as its README recommends: `tp.pruner.BasePruner` with a pruning ratio of
0.3, random importance, the classifier in `ignored_layers`, no `round_to`, defaults for all other
options (auxiliary heads off, as in its own torchvision example), and `step(interactive=True)`. All
the groups it proposes are first silenced: the rows, batch-norm weights and biases that a group
says belong to its channels are set to 0. The network now computes nothing on these channels; its
batch norms get new statistics, so that activations stay bounded; its output is recorded;
and each group is cut with `DG.get_pruning_group`, `DG.check_pruning_group` and `group.prune()`.
Removing a channel from a layer norm changes its mean and variance even if the channel is 0, so
groups that a layer norm is part of are left out, unless --layer-norm is given (then with
`round_to` = number of heads for ViTs, whose attention needs it).

Columns for Torch-Pruning: the verdict; groups cut of groups proposed; parameters cut, in percent;
the largest difference, relative to the output's scale (exact: up to 1e-5); CPU seconds to build the
graph and to prune. For selfcompress they are as in zoo.py, for one cut; its seconds to cut include
its own check of the output.
"""

import argparse
import multiprocessing
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import VisionTransformer

from benchmarks import zoo

TOLERANCE = zoo.TOLERANCE[torch.float32]
CLASSES = 1000


@dataclass(frozen=True)
class Pruned:
    """What Torch-Pruning did to one model.

    Attributes:
        groups: groups proposed by Torch-Pruning.
        skipped: groups left out because of a layer norm.
        cut: groups pruned without an exception.
        error: the first exception, and where it was raised.
    """

    name: str
    built: bool = False
    groups: int = 0
    skipped: int = 0
    cut: int = 0
    cut_percent: float = 0.0
    difference: float = 0.0
    trace_seconds: float = 0.0
    prune_seconds: float = 0.0
    error: str = ""

    @property
    def verdict(self) -> str:
        """One word for the model as a whole."""
        if not self.built:
            return "not built"
        if self.error:
            return "error"
        if not self.cut:
            return "nothing cut"
        return "exact" if self.difference <= TOLERANCE else "inexact"


@dataclass(frozen=True)
class Ours:
    """What selfcompress did to one model."""

    cut_percent: float = 0.0
    difference: float = 0.0
    trace_seconds: float = 0.0
    cut_seconds: float = 0.0
    traced: str = "no"
    error: str = ""

    @property
    def verdict(self) -> str:
        """One word for the model as a whole."""
        if self.error:
            return "error"
        if not self.cut_percent:
            return "nothing cut"
        return "exact" if self.difference <= TOLERANCE else "inexact"


def prune(name: str, layer_norm: bool, seed: int = 0) -> Pruned:
    """Let Torch-Pruning cut 30 % of the channels of every group it finds."""
    import torch_pruning as tp  # type: ignore[import-not-found]

    options = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    model, x = zoo.build(name, zoo.dtype_for(name), seed, **options)
    model.eval()
    count = zoo.count_parameters(model)
    ignored = [
        m
        for m in model.modules()
        if (isinstance(m, nn.Linear) and m.out_features == CLASSES)
        or (isinstance(m, nn.Conv2d) and m.out_channels == CLASSES)
    ]
    heads = [m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    round_to = heads[0] if heads and layer_norm else None
    start = time.process_time()
    try:
        pruner = tp.pruner.BasePruner(
            model,
            x,
            importance=tp.importance.RandomImportance(),
            pruning_ratio=zoo.DEAD,
            ignored_layers=ignored,
            round_to=round_to,
        )
    except Exception as error:
        seconds = time.process_time() - start
        return Pruned(name, trace_seconds=seconds, error=f"building: {_short(error)}")
    traced = time.process_time() - start
    groups: list[tuple[nn.Module, Any, list[int]]] = []
    proposed, cut, difference, seconds = 0, 0, 0.0, 0.0
    where, problem = "step()", ""
    try:
        start = time.process_time()
        for group in pruner.step(interactive=True):
            proposed += 1
            if layer_norm or not any(isinstance(d.target.module, nn.LayerNorm) for d, _ in group):
                groups.append((group[0].dep.target.module, group[0].dep.handler, group[0].idxs))
                silence(group, pruner.DG)
        seconds += time.process_time() - start
        zoo.settle(model, x)
        before = zoo.outputs(model, x, training=False)
        model.eval()
        start = time.process_time()
        for module, function, idxs in groups:
            where = str(pruner.DG._module2name[module])
            group = pruner.DG.get_pruning_group(module, function, idxs)
            if pruner.DG.check_pruning_group(group):
                group.prune()
                cut += 1
        if isinstance(model, VisionTransformer):  # forward() checks hidden_dim
            model.hidden_dim = model.conv_proj.out_channels
        seconds += time.process_time() - start
        where = "running the pruned model"
        difference = zoo.difference(before, zoo.outputs(model, x, training=False))
    except Exception as error:
        problem = f"{where}: {_short(error)}"
    left = zoo.count_parameters(model)
    return Pruned(
        name, True, proposed, proposed - len(groups), cut, 100 * (1 - left / count), difference,
        traced, seconds, problem,
    )  # fmt: skip


@torch.no_grad()
def silence(group: Any, graph: Any) -> None:
    """Set to 0 all weights and biases that, according to `group`, compute its channels."""
    for dep, idxs in group:
        module = dep.target.module
        if isinstance(module, nn.Conv2d | nn.Linear):
            if graph.is_out_channel_pruning_fn(dep.handler):
                module.weight[idxs] = 0
                if module.bias is not None:
                    module.bias[idxs] = 0
        elif isinstance(module, _BatchNorm | nn.LayerNorm):
            module.weight[idxs] = 0
            module.bias[idxs] = 0


def compress(name: str, seed: int = 0) -> Ours:
    """Let selfcompress cut 30 % of the rows of every quantised layer of a model."""
    try:
        result = zoo.measure(name, seed=seed, cuts=1)
    except Exception as error:
        return Ours(error=_short(error))
    return Ours(
        result.cut_percent,
        result.difference_eval,
        result.trace_seconds,
        result.cut_seconds,
        result.traced,
    )


def apart(limit: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function` in a process of its own; return its result, or why there is none as a str."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, limit, function, *args), daemon=True)
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            return f"not done after {limit} s"
        return f"its process ended with code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _send(there: Connection, limit: int, function: Callable[..., Any], *args: Any) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    there.send(function(*args))


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


HEADER = (
    "model", "Torch-Pruning", "groups cut", "cut %", "Δ", "trace s", "prune s",
    "selfcompress", "cut %", "Δ", "trace s", "cut s", "first error",
)  # fmt: skip


def cells(theirs: Pruned, ours: Ours) -> tuple[str, ...]:
    """Return the row of the table for one model."""
    return (
        theirs.name,
        theirs.verdict,
        f"{theirs.cut}/{theirs.groups}",
        f"{theirs.cut_percent:.1f}",
        f"{theirs.difference:.0e}",
        f"{theirs.trace_seconds:.1f}",
        f"{theirs.prune_seconds:.1f}",
        ours.verdict,
        f"{ours.cut_percent:.1f}",
        f"{ours.difference:.0e}",
        f"{ours.trace_seconds:.1f}",
        f"{ours.cut_seconds:.1f}",
        theirs.error or ours.error,
    )


def totals(pairs: list[tuple[Pruned, Ours]]) -> Iterable[str]:
    """Yield lines with the counts over all models."""
    theirs, ours = [t for t, _ in pairs], [o for _, o in pairs]
    yield (
        f"Torch-Pruning: {len(theirs)} models, {sum(t.built for t in theirs)} traced, "
        f"{sum(t.cut > 0 for t in theirs)} changed at all, "
        f"{sum(t.verdict == 'exact' for t in theirs)} cut exactly, "
        f"{sum(t.verdict == 'inexact' for t in theirs)} inexactly, "
        f"{sum(bool(t.error) for t in theirs)} with an error; "
        f"{sum(t.cut for t in theirs)} of {sum(t.groups for t in theirs)} groups cut, "
        f"{sum(t.skipped for t in theirs)} left out for a layer norm; "
        f"{sum(t.trace_seconds for t in theirs):.0f} s to trace, "
        f"{sum(t.prune_seconds for t in theirs):.0f} s to prune"
    )
    yield (
        f"selfcompress:  {len(ours)} models, {sum(o.traced != 'no' for o in ours)} traced, "
        f"{sum(o.cut_percent > 0 for o in ours)} changed at all, "
        f"{sum(o.verdict == 'exact' for o in ours)} cut exactly, "
        f"{sum(o.verdict == 'inexact' for o in ours)} inexactly, "
        f"{sum(bool(o.error) for o in ours)} with an error; "
        f"{sum(o.trace_seconds for o in ours):.0f} s to trace, "
        f"{sum(o.cut_seconds for o in ours):.0f} s to cut, check included"
    )


def main() -> int:
    """Measure what the command line asks for, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="parts of model names; none: all models")
    parser.add_argument("--large", action="store_true", help="also models above 250 M parameters")
    parser.add_argument("--layer-norm", action="store_true", help="groups with layer norms too")
    parser.add_argument("--theirs", action="store_true", help="Torch-Pruning alone")
    parser.add_argument("--limit", type=int, default=300, help="CPU seconds for a model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", action="store_true", help="the table again, as markdown")
    args = parser.parse_args()
    pairs: list[tuple[Pruned, Ours]] = []
    print(zoo.format_row(HEADER), flush=True)
    for name in zoo.names(args.names):
        if zoo.parameters(name) > zoo.LARGE and not args.large:
            continue
        theirs = apart(args.limit, prune, name, args.layer_norm, args.seed)
        if isinstance(theirs, str):
            theirs = Pruned(name, error=theirs)
        ours = Ours() if args.theirs else apart(args.limit, compress, name, args.seed)
        if isinstance(ours, str):
            ours = Ours(error=ours)
        pairs.append((theirs, ours))
        print(zoo.format_row(cells(theirs, ours)), flush=True)
    print()
    for line in totals(pairs):
        print(line)
    if args.markdown:
        print("\n" + zoo.markdown(HEADER, (cells(*pair) for pair in pairs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
