"""Random networks cut at random compute the same; channels are tied where NaN travels."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_networks import build, source
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from selfcompress import Compressor
from selfcompress.channels import ChannelGraph, Node
from selfcompress.layers import PlacedBatchNorm, QuantizedLayer
from selfcompress.liveness import analyse, settle_statistics
from selfcompress.ops import Kind
from selfcompress.surgery import Plan

TOLERANCE = 1e-10  # of the scale of what is compared, in float64


@contextlib.contextmanager
def told(seed: int) -> Iterator[None]:
    """Name the seed and show the network of whatever fails inside."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"seed {seed}:\n{source(seed)}")
        raise


# --- cuts change nothing --------------------------------------------------------------------------


def compressed(seed: int) -> Compressor:
    """A quantised network of which a layer may have been left in float."""
    generator = torch.Generator().manual_seed(seed)
    model, x = build(seed)
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    some = int(torch.randint(len(layers), (), generator=generator))
    exclude = [layers[some]] if len(layers) > 1 and below(0.15, 1, generator) else []
    compressor = Compressor(model, x, gamma=0.0, bits=8, exclude=exclude)
    model.double()  # the formats too, so that their gradients are exact
    return compressor


def below(chance: float, n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator) < chance


@torch.no_grad()
def kill_at_random(compressor: Compressor, seed: int) -> None:
    """Kill rows of every layer, some layers whole; of biases, some become 0, some negative."""
    generator = torch.Generator().manual_seed(seed)
    for layer in compressor.layers.values():
        chance = (0.0, 0.3, 0.7, 1.0)[int(torch.randint(4, (), generator=generator))]
        layer.bit_depth[below(chance, len(layer.bit_depth), generator)] = 0
        if layer.bias is not None:
            layer.bias[below(0.4, len(layer.bias), generator)] *= -1
            layer.bias[below(0.5, len(layer.bias), generator)] = 0
    for norm in compressor.model.modules():
        if isinstance(norm, _BatchNorm) and norm.affine:
            norm.bias[below(0.3, len(norm.bias), generator)] *= -1
            norm.bias[below(0.3, len(norm.bias), generator)] = 0
    # What a cut does before it cuts: rows that are nothing but zeros die, vital ones come back.
    for name, idle in compressor._idle.items():
        compressor.layers[name].bit_depth[idle] = 0
    compressor.keep_connected()
    avoid_ties(compressor)
    settle_statistics(compressor.graph, compressor.model)


Before = Callable[[PlacedBatchNorm, Tensor, Tensor], Tensor | None]


@contextlib.contextmanager
def watched_norms(compressor: Compressor, before: Before) -> Iterator[None]:
    """Inside, `before(norm, x, known)` runs before every norm and may replace its input x.

    `known` is a bool for every channel of x: it is known to be constant.
    """

    def with_known(known: Tensor) -> Any:
        return lambda norm, args: before(norm, args[0], known)

    graph, model = compressor.graph, compressor.model
    constant = analyse(graph, model).constant
    hooks = []
    for node in graph.of_kind(Kind.NORM):
        norm = model.get_submodule(node.module)
        known = ~np.isnan(constant[node.inputs[0]][graph.sources[node.name][0]])
        known &= sum(other.module == node.module for other in graph.nodes) == 1
        hooks.append(norm.register_forward_pre_hook(with_known(torch.from_numpy(known))))
    yield
    for hook in hooks:
        hook.remove()


def avoid_ties(compressor: Compressor) -> None:
    """Let no norm with a bias of 0 make ±1e-17 of a constant, of which a ReLU takes the sign.

    Constants that are known to be constants do no harm: those norms compute nothing any more.
    """

    def before(norm: PlacedBatchNorm, x: Tensor, known: Tensor) -> None:
        if norm.affine:
            low, high = x.index_select(1, norm.columns).transpose(0, 1).flatten(1).aminmax(dim=1)
            norm.bias[(high - low < 1e-6) & ~known[norm.columns] & (norm.bias == 0)] = 0.125

    with watched_norms(compressor, before):
        compute(compressor, training=True)


def detach_constants(norm: PlacedBatchNorm, x: Tensor, known: Tensor) -> Tensor:
    """In training a norm passes no gradient to a constant; in evaluation it would, but for this."""
    return torch.where(known.view(-1, *[1] * (x.dim() - 2)), x.detach(), x)


Result = tuple[list[Tensor], dict[str, Tensor]]


def compute(compressor: Compressor, training: bool) -> Result:
    """All outputs, and gradients of an arbitrary loss; modes and buffers are put back."""
    model = compressor.model
    was_training = model.training
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train(training)
    tree = model(compressor.example_input)
    outputs = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    weighted = [
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum()
        for y in outputs
        if y.requires_grad  # a network that is dead all through has constant outputs
    ]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients: dict[str, Tensor] = {}
    if weighted:
        # Not .backward(): the compressor takes the gradients of formats away.
        loss = torch.stack(weighted).sum()
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        gradients = {n: g for n, g in zip(parameters, grads, strict=True) if g is not None}
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.train(was_training)
    return [y.detach() for y in outputs], gradients


def check_cut(compressor: Compressor) -> Plan | None:
    """Cut; outputs and gradients in both modes must stay as they were."""
    with watched_norms(compressor, detach_constants):
        before = {training: compute(compressor, training) for training in (False, True)}
    plan = compressor.cut()
    with watched_norms(compressor, detach_constants):
        after = {training: compute(compressor, training) for training in (False, True)}
    keep = plan.keep if plan is not None else {}
    silent = zero_biases(compressor)
    for training, (outputs, gradients) in before.items():
        mode = "training" if training else "evaluation"
        outputs_now, gradients_now = after[training]
        for now, was in zip(outputs_now, outputs, strict=True):
            # Constants can cancel to almost nothing; rounding is still that of the terms.
            scale = max(float(was.abs().max()), 0.1)
            assert_same(now, was, scale, f"an output in {mode}")
        scale = max([1.0] + [float(g.abs().max()) for g in gradients.values() if g.numel()])
        for name, parameter in compressor.model.named_parameters():
            want = gradients.get(name)
            if want is None:
                continue
            for dim, kept in keep.get(name, []):
                want = want.index_select(dim, torch.tensor(kept, dtype=torch.int64))
            assert want.shape == parameter.shape, name
            now = gradients_now.get(name, torch.zeros_like(want))
            if name in silent:
                want, now = want[~silent[name]], now[~silent[name]]
            assert_same(now, want, scale, f"the gradient of {name} in {mode}")
    return plan


def assert_same(now: Tensor, was: Tensor, scale: float, what: str) -> None:
    torch.testing.assert_close(
        now, was, rtol=0, atol=TOLERANCE * scale, msg=lambda m: f"{what}: {m}"
    )


def zero_biases(compressor: Compressor) -> dict[str, Tensor]:
    """Name of a bias → (channels,) bool: exactly 0, and no row computes the channel.

    Such a channel counts as silent: what reads nothing but zeros goes, though the bias may stay
    for somebody else who reads it, and then it misses a part of its gradient.
    """
    found = {}
    for name, layer in compressor.layers.items():
        if layer.bias is not None:
            found[f"{name}.bias"] = layer.bias.detach() == 0
            found[f"{name}.bias"][layer.rows] = False
    return found


def assert_nothing_left(compressor: Compressor) -> None:
    compressor._idle = {}  # of rows that lost columns, all that is left may be rounded to zeros
    assert compressor.cut() is None, "a cut right after a cut"


def check_cuts(seed: int) -> None:
    with told(seed):
        compressor = compressed(seed)
        kill_at_random(compressor, seed)
        check_cut(compressor)
        assert_nothing_left(compressor)
        kill_at_random(compressor, seed + 1)
        check_cut(compressor)
        assert_nothing_left(compressor)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
@example(seed=1130)  # what a split left is joined with something new, and viewed
@example(seed=2002)  # both operands of a product are zero
@example(seed=2197)  # a norm's entry goes with the partner of a product
def test_a_cut_of_any_network_is_exact_and_so_is_the_next(seed: int) -> None:
    check_cuts(seed)


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(20))
def test_two_thousand_networks_are_cut_exactly(hundred: int) -> None:
    for seed in range(100 * hundred, 100 * (hundred + 1)):
        check_cuts(seed)


# --- ties -----------------------------------------------------------------------------------------

Place = tuple[str, str, int]
"""A graph node, "out" or "in", and a channel of what its module makes or reads."""


def follow_nan(
    model: nn.Module, graph: ChannelGraph, example_input: Tensor
) -> dict[Place, set[Place]]:
    """For every row or norm entry, the input channels of modules that its NaN arrives at.

    The rows travel side by side, each in a sample of its own, through the operations between the
    modules. A module is given finite inputs, so that nothing travels through it.
    """
    nodes: dict[str, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if isinstance(modules_of(model).get(node.module), QuantizedLayer | _BatchNorm):
            nodes[node.module].append(node)
    rows = [
        (node.name, "out", row)
        for calls in nodes.values()
        for node in calls
        for row in range(out_width(model, node))
    ]
    samples: dict[str, list[int]] = defaultdict(list)
    for sample, (name, _, _) in enumerate(rows):
        samples[name].append(sample)
    arrived: dict[Place, set[Place]] = {row: set() for row in rows}

    def before(module: nn.Module, args: tuple[Tensor, ...], calls: list[Node]) -> tuple[Tensor]:
        (x,) = args
        nan = channels_second(module, x).isnan()
        seen = nan.reshape(*nan.shape[:2], -1).any(2)
        for sample, column in seen.nonzero().tolist():
            arrived[rows[sample]].add((calls[0].name, "in", column))
        return (x.nan_to_num(nan=0.5),)

    def after(module: nn.Module, args: Any, y: Tensor, calls: list[Node]) -> Tensor:
        y = y.clone()
        for row, sample in enumerate(samples[calls.pop(0).name]):
            channels_second(module, y)[sample, row] = torch.nan
        return y

    hooks = []
    for name, calls in nodes.items():
        module = model.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(lambda m, a, c=calls: before(m, a, c)))
        hooks.append(module.register_forward_hook(lambda m, a, y, c=calls: after(m, a, y, c)))
    with torch.no_grad():
        model.eval()(example_input[:1].expand(len(rows), -1, -1, -1).clone())
    for hook in hooks:
        hook.remove()
    assert not any(nodes.values()), "a module runs less often than the graph says"
    return arrived


def channels_second(module: nn.Module, tensor: Tensor) -> Tensor:
    """A view of what `module` reads or makes, its channels on axis 1."""
    dim = module.channel_dim if isinstance(module, QuantizedLayer) else 1
    return tensor.movedim(dim, 1)


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def out_width(model: nn.Module, node: Node) -> int:
    module = model.get_submodule(node.module)
    if isinstance(module, QuantizedLayer):
        return module.out_width
    assert isinstance(module, _BatchNorm)
    return module.num_features


def check_ties(seed: int) -> None:
    with told(seed):
        model, x = build(seed)
        compressor = Compressor(model, x, gamma=0.0, bits=8)
        graph = compressor.graph
        assert graph.nodes
        arrived = follow_nan(model, graph, x)
        ids = ids_of_places(compressor, arrived)
        group = {place: place for place in ids}

        def root(place: Place) -> Place:
            while group[place] != place:
                group[place] = place = group[group[place]]
            return place

        # One channel may be broadcast to many: it stays, as no tensor loses its last channel.
        alone = {int(own[0]) for own in graph.ids.values() if len(set(own.tolist())) == 1}
        links = [(row, column) for row, columns in arrived.items() for column in columns]
        for a, b in links + between_calls(graph, list(ids)):
            if ids[a] == ids[b]:
                group[root(a)] = root(b)
            elif not (ids[a] in alone or (is_frozen(graph, ids[a]) and is_frozen(graph, ids[b]))):
                raise AssertionError(f"not tied: {a} and {b}")
        first: dict[int, Place] = {}
        reached = set().union(*arrived.values())
        for place, i in ids.items():
            # A column that no row reaches is the zeros around a padded map, flattened.
            known = place[1] == "out" or place in reached
            if known and i is not None and not is_frozen(graph, i):
                assert root(place) == root(first.setdefault(i, place)), (
                    f"tied without need: {place} and {first[i]}"
                )


def between_calls(graph: ChannelGraph, places: list[Place]) -> list[tuple[Place, Place]]:
    """Where a module is called several times, its rows and columns are the same in each call."""
    module = {node.name: node.module for node in graph.nodes}
    first: dict[Place, Place] = {}
    return [
        (first.setdefault((module[name], end, i), p), p) for p in places for name, end, i in [p]
    ]


def ids_of_places(
    compressor: Compressor, arrived: dict[Place, set[Place]]
) -> dict[Place, int | None]:
    """The channel id of every row and column; None (frozen) for those of opaque modules."""
    graph = compressor.graph
    ids: dict[Place, int | None] = dict.fromkeys(arrived)
    for columns in arrived.values():
        ids.update(dict.fromkeys(columns))
    for node in graph.of_kind(Kind.LAYER, Kind.GROUPED, Kind.NORM):
        for end, numbers in (("in", graph.reads(node)), ("out", graph.ids[node.name])):
            ids.update({(node.name, end, k): i for k, i in enumerate(numbers.tolist())})
    return ids


def is_frozen(graph: ChannelGraph, i: int | None) -> bool:
    return i is None or bool(graph.frozen[i])


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_channels_are_tied_where_nan_travels_and_nowhere_else(seed: int) -> None:
    check_ties(seed)


@pytest.mark.slow
def test_channels_of_a_thousand_networks_are_tied_where_nan_travels() -> None:
    for seed in range(1000):
        check_ties(seed)
