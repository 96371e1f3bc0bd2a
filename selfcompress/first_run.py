"""Run a model on its example input before compression, to check it and set up its layers."""

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from selfcompress.graph.channels import ChannelGraph
from selfcompress.graph.observe import Observed, observe
from selfcompress.inputs import Inputs
from selfcompress.layers.attention import QuantAttention
from selfcompress.layers.own_forward import OwnForward
from selfcompress.layers.quantized import QuantizedLayer, quantized_layers
from selfcompress.layers.recurrent import QuantRecurrent
from selfcompress.text import first_line


def observe_float(model: nn.Module, example_input: Inputs) -> Observed:
    """Run the float model once on `example_input` and return what was observed.

    This separates an input that the model does not accept from a model that cannot be traced.

    Raises:
        ValueError: the model does not accept `example_input`.
    """
    try:
        return observe(model, example_input)
    except Exception as error:  # whatever the user's forward() does
        reason = first_line(error)
        if isinstance(example_input, dict):
            reason += " (a dict is one argument: give a tuple of forward()'s arguments, in order)"
        raise ValueError(f"the model does not accept example_input: {reason}") from error


def observe_quantised(model: nn.Module, example_input: Inputs) -> Observed:
    """Run the quantised model once on `example_input` and return what was observed.

    Layers of users' own classes may fail once they are quantised.

    Raises:
        ValueError: the model has such layers and does not run, or it calls a layer that a quantised
            one has replaced.
        Exception: of any kind, if it does not run and has no such layers.
    """
    own = [n for n, layer in quantized_layers(model).items() if isinstance(layer, OwnForward)]
    try:
        observed = observe(model, example_input)
    except Exception as error:  # whatever a user's forward() does
        if not own:
            raise
        raise ValueError(
            f"with quantised layers the model does not run: {first_line(error)}; build it anew and "
            f"exclude those of your own classes ({', '.join(own[:3])}{' …' if own[3:] else ''})"
        ) from error
    if observed.bypassed:
        raise ValueError(
            f"{min(observed.bypassed)} is called past the model, from a list or as torch.compile "
            "has made it: put it into an nn.ModuleList, compile it later, or exclude it"
        )
    return observed


def expect_samples(layers: Mapping[str, QuantizedLayer], observed: Observed, batch: int) -> None:
    """Set, for each of the layers, which dimension of its input counts samples.

    Args:
        layers: the quantised layers by name.
        observed: a run of the model on `batch` samples.
        batch: with fewer than two samples nothing can be found out, and nothing is set.
    """
    if batch < 2:
        return
    shapes = {}
    for name in layers:
        args, kwargs = observed.arguments.get(name, ((), {}))
        read = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)]
        shapes[name] = read[0].shape if read else torch.Size()
    for name, layer in layers.items():
        layer.expect(shapes[name], batch)
    if all(layer.batch_dim is None for layer in layers.values()):
        for name, layer in layers.items():
            layer.expect_rows(shapes[name], batch)
    if all(layer.batch_dim is None for layer in layers.values()):
        for layer in layers.values():
            layer.batch_dim = 0


def warn_of_idle(
    model: nn.Module, graph: ChannelGraph, layers: Iterable[str], observed: Observed
) -> None:
    """Warn of `layers` that the example does not call, as they would miss cuts in front of them."""
    followed = {node.module for node in graph.nodes}
    modules = dict(model.named_modules())
    idle = []
    for name in layers:
        owner = name.rpartition(".")[0]
        if isinstance(modules[owner], QuantAttention | QuantRecurrent):  # they call no parts
            name = owner
        apart = any(not o or name.startswith(f"{o}.") for o in graph.untraceable)
        if not observed.counts[name] and name not in followed and not apart:
            idle.append(name)
    if idle and followed:
        warnings.warn(
            f"not called on example_input: {', '.join(idle[:3])}{' …' if idle[3:] else ''}. If "
            "your loop calls it, it may miss channels that were cut: then wrap the model in a "
            "module that calls all of it, and compress that one",
            stacklevel=3,
        )
