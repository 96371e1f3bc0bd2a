"""Compare a network's outputs before and after a cut, and name the layer where they differ."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selfcompress.inputs import Inputs, device_of
from selfcompress.layers.own_forward import OwnForward
from selfcompress.layers.quantized import QuantizedLayer, quantized_layers
from selfcompress.precision import full_precision
from selfcompress.surgery import Plan
from selfcompress.undisturbed import called, leaves_of, undisturbed

TOLERANCE = 1e-4  # of the output's scale: well above float32 rounding, far below a mistake
_SHAKE, _SHAKES = 4, 5  # noise for `jumps`: in units in the last place, and number of runs
_AS_MUCH = 3  # a cut may change an output by this many times what that noise changes


class CutError(RuntimeError):
    """A cut changed what the network computes by more than rounding."""


@dataclass(frozen=True)
class Snapshot:
    """The outputs of a network on one batch, and what the rows of each quantised layer computed.

    Attributes:
        outputs: every tensor that the model returned.
        rows: layer name → (rows, ...) output at the channels that it has rows for, in the order in
            which layers ran. Layers of users' classes with a forward() of their own are left out.
        largest: the largest magnitude in the outputs of these layers.
    """

    outputs: list[Tensor]
    rows: dict[str, Tensor]
    largest: float


@torch.no_grad()
def snapshot(model: nn.Module, inputs: Inputs) -> Snapshot:
    """Run `model` on `inputs` in eval mode and full precision, and record what it computes.

    Modes, buffers and the state of random number generators are as before afterwards.
    """
    rows: dict[str, Tensor] = {}
    largest = [0.0]

    def record(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> None:
            assert isinstance(layer, QuantizedLayer)
            if isinstance(layer, OwnForward):
                return  # its output need not be what its rows compute
            output = output.detach()  # a forward() may enable gradients
            rows[name] = output.movedim(layer.channel_dim, 0).index_select(0, layer.rows)
            largest.append(float(output.abs().amax()) if output.numel() else 0.0)

        return hook

    hooks = [m.register_forward_hook(record(n)) for n, m in quantized_layers(model).items()]
    try:
        with undisturbed(model, inputs), full_precision(device_of(inputs)):
            model.eval()
            outputs = list(_tensors(called(model, inputs)))
    finally:
        for handle in hooks:
            handle.remove()
    return Snapshot(outputs, rows, max(largest))


def _tensors(returned: Any) -> Iterator[Tensor]:
    """Yield the tensors in what a model returned, except parameters, whose shape a cut changes."""
    for leaf in leaves_of(returned):
        if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter):
            yield torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf


def check_cut(model: nn.Module, inputs: Inputs, before: Snapshot, plan: Plan) -> None:
    """Compare the output of `model`, after the cut of `plan`, with the snapshot taken before it.

    Warns if they cannot be compared: there is no output tensor, or it is random or jumps.

    Raises:
        CutError: the outputs differ by more than rounding.
    """
    if not before.outputs:
        warnings.warn(
            "cuts cannot be checked: no tensor is found in what the model returns, though "
            "lists, dicts and objects in it are looked into",
            stacklevel=5,
        )
    after = snapshot(model, inputs)
    try:
        compare(before, after, plan, TOLERANCE)
    except CutError:
        if is_random(model, inputs, TOLERANCE):
            why = "computes something else each time, in eval mode too (dropout that stays on)"
        elif jumps(model, inputs, before, after, TOLERANCE):
            why = "sorts, compares or rounds, so that its output jumps where rounding differs"
        else:
            raise
        warnings.warn(f"cuts cannot be checked: the model {why}", stacklevel=5)


def compare(before: Snapshot, after: Snapshot, plan: Plan, tolerance: float) -> None:
    """Check that outputs before and after a cut agree, but for rounding.

    Args:
        plan: what was cut, to match the rows of layers.
        tolerance: the largest difference allowed, as a fraction of an output's largest element, or
            of 1 % of the largest magnitude in any layer if that is more.

    Raises:
        CutError: an output differs by more; the message names the first layer that differs.
    """
    # Objects that a model returns may collect more tensors with every run.
    pairs = zip(before.outputs, after.outputs, strict=False)
    worst = 0.0
    for a, b in pairs:
        # A half-precision network cannot be more exact than its own rounding.
        rounding = 8 * torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0
        # Rounding errors scale with the terms summed up, and an output may be a small difference.
        difference = _difference(a, b, 0.01 * before.largest)
        if difference > max(tolerance, rounding):
            worst = max(worst, difference)
    if worst == 0:
        return
    guilty = "no single layer"
    for name, was in before.rows.items():  # in the order in which layers ran
        if name in plan.rows:
            was = was[plan.rows[name]]
        is_now = after.rows.get(name)
        if is_now is None or was.shape != is_now.shape or _difference(was, is_now) > tolerance:
            guilty = f"layer {name}"
            break
    raise CutError(
        f"a cut changed the network's output by {worst:.1e} of its scale, first seen in {guilty}; "
        "unless a module was replaced, or forward() goes by a number that was another one, since "
        "the Compressor was made, please report this"
    )


def _difference(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """Return max |a - b| in units of max |a|, or of `floor` if that is larger.

    It is infinite if shapes differ, values that are no floats differ, or only one is finite.
    """
    if a.shape != b.shape:
        return math.inf
    differs = (a != b) & ~(a.isnan() & b.isnan())  # equal infinities do not differ, nor do two NaN
    if not differs.any():
        return 0.0
    if not a.is_floating_point():
        return math.inf
    scale = a[a.isfinite()].abs().amax().clamp(min=max(floor, 1e-30)) if a.isfinite().any() else 1.0
    return float(((a - b)[differs].abs().amax() / scale).nan_to_num(nan=math.inf))


def is_random(model: nn.Module, inputs: Inputs, tolerance: float) -> bool:
    """Return whether `model` is random in eval mode, for example by dropout that stays on."""
    one, other = _runs(model, inputs, 2)
    return len(one) != len(other) or any(
        _difference(a, b) > tolerance for a, b in zip(one, other, strict=True)
    )


def jumps(
    model: nn.Module, inputs: Inputs, before: Snapshot, after: Snapshot, tolerance: float
) -> bool:
    """Return whether rounding noise alone changes the outputs about as much as a cut did.

    That is so where a forward() sorts, compares or rounds. The outputs of all quantised layers are
    changed at random by a few units in the last place. In half precision these units are large and
    prove nothing, so the result is False.

    Args:
        before, after: snapshots from before and after the cut.
        tolerance: relative changes of an output up to this do not count.
    """
    layers = quantized_layers(model).values()
    if any(layer.weight.element_size() < 4 for layer in layers):
        return False

    def shake(layer: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point() or not output.numel():
            return output
        unit = _SHAKE * torch.finfo(output.dtype).eps * output.abs().amax()
        return output + unit * torch.randn_like(output)

    hooks = [layer.register_forward_hook(shake) for layer in layers]
    try:
        shaken = _runs(model, inputs, _SHAKES)
    finally:
        for handle in hooks:
            handle.remove()
    for was, now, *others in zip(before.outputs, after.outputs, *shaken, strict=False):
        moved = max(_difference(now, other) for other in others)
        if _difference(was, now) > max(tolerance, _AS_MUCH * moved):
            return False
    return True


def _runs(model: nn.Module, inputs: Inputs, count: int) -> list[list[Tensor]]:
    """Return the outputs of `count` runs of `model`, each with another random seed."""
    device = device_of(inputs)
    runs = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for seed in range(count):
            torch.manual_seed(seed)
            runs.append(snapshot(model, inputs).outputs)
    return runs
