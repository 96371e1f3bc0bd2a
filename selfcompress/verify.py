"""Compare what a network computes before and after a cut, and name the layer where it differs."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selfcompress.inputs import Inputs, device_of
from selfcompress.layers.own_forward import OwnForward
from selfcompress.layers.quantized import QuantizedLayer, quantized_layers
from selfcompress.look import called, leaves_of, undisturbed
from selfcompress.precision import full_precision
from selfcompress.surgery import Plan

_SHAKE, _SHAKES = 4, 5  # units in the last place, and how often
_AS_MUCH = 3  # times what that changes, a cut may change


class CutError(RuntimeError):
    """A cut changed what the network computes by more than rounding."""


@dataclass(frozen=True)
class Snapshot:
    """The outputs of a network on one batch, and what the rows of each quantised layer computed.

    Attributes:
        outputs: every tensor the model returned.
        rows: layer name → (rows, ...) its output at the channels it has rows for, in the order
            layers ran.
        largest: the largest magnitude that any quantised layer made.
    """

    outputs: list[Tensor]
    rows: dict[str, Tensor]
    largest: float


@torch.no_grad()
def snapshot(model: nn.Module, inputs: Inputs) -> Snapshot:
    """Run `model` on `inputs` in eval mode and full precision; modes, buffers and RNG stay."""
    rows: dict[str, Tensor] = {}
    largest = [0.0]

    def record(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> None:
            assert isinstance(layer, QuantizedLayer)
            if isinstance(layer, OwnForward):
                return  # it may do more than to compute its rows
            output = output.detach()  # a forward() may ask for gradients
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
    """All tensors in what a model returned; a parameter is cut, and no output."""
    for leaf in leaves_of(returned):
        if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter):
            yield torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf


def compare(before: Snapshot, after: Snapshot, plan: Plan, tolerance: float) -> None:
    """Raise CutError if any output differs by more than `tolerance` of its largest element."""
    # Rounding is relative to what was summed up, and an output can be a small difference of that.
    # An object may hold more each time.
    pairs = zip(before.outputs, after.outputs, strict=False)
    worst = 0.0
    for a, b in pairs:
        # Of a half-precision network no more can be asked than its own rounding.
        rounding = 8 * torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0
        difference = _difference(a, b, 0.01 * before.largest)
        if difference > max(tolerance, rounding):
            worst = max(worst, difference)
    if worst == 0:
        return
    guilty = "no single layer"
    for name, was in before.rows.items():  # in the order they ran
        if name in plan.rows:
            was = was[plan.rows[name]]
        is_now = after.rows.get(name)
        if is_now is None or was.shape != is_now.shape or _difference(was, is_now) > tolerance:
            guilty = f"layer {name}"
            break
    raise CutError(
        f"a cut changed the network's output by {worst:.1e} of its scale, first seen in {guilty}; "
        "unless forward() goes by a number that was another one when the Compressor was made, "
        "please report this"
    )


def _difference(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """max |a - b| in units of max |a| or of `floor`; infinite where only one is finite."""
    if a.shape != b.shape:
        return math.inf
    differs = (a != b) & ~(a.isnan() & b.isnan())  # equal infinities do not
    if not differs.any():
        return 0.0
    if not a.is_floating_point():
        return math.inf
    scale = a[a.isfinite()].abs().amax().clamp(min=max(floor, 1e-30)) if a.isfinite().any() else 1.0
    return float(((a - b)[differs].abs().amax() / scale).nan_to_num(nan=math.inf))


def is_random(model: nn.Module, inputs: Inputs, tolerance: float) -> bool:
    """Whether `model` computes something else each time: dropout that eval mode leaves on, say."""
    one, other = _runs(model, inputs, 2)
    return len(one) != len(other) or any(
        _difference(a, b) > tolerance for a, b in zip(one, other, strict=True)
    )


def jumps(
    model: nn.Module, inputs: Inputs, before: Snapshot, after: Snapshot, tolerance: float
) -> bool:
    """Whether all that a cut has changed changes as much when layers are rounded otherwise.

    So it is where a forward() sorts, compares or rounds. What layers make is changed by some units
    in the last place, at random; `after` is of `model` as it is. In half precision these are large,
    and nothing can be told by them.
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
    """What `model` returns in as many runs, each with random numbers of its own."""
    device = device_of(inputs)
    runs = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for seed in range(count):
            torch.manual_seed(seed)
            runs.append(snapshot(model, inputs).outputs)
    return runs
