"""Random networks: cuts are exact, and channels are tied exactly where a NaN propagates."""

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from networks import copied
from random_kills import compressed, compute, hold_norms, kill_at_random, told, watched_norms
from random_networks import build
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfcompress import Compressor
from selfcompress.graph.channels import ChannelGraph, Node
from selfcompress.graph.liveness import constants
from selfcompress.graph.ops import Kind
from selfcompress.layers.quantized import QuantizedLayer
from selfcompress.surgery import Plan

TOLERANCE = 1e-10  # of the scale of what is compared, in float64

# --- cuts change nothing --------------------------------------------------------------------------


def detach_constants(norm: _BatchNorm, x: Tensor, known: Tensor) -> Tensor:
    """Detach channels known to be constant: in eval mode too, they are to get no gradient."""
    return torch.where(known.view(-1, *[1] * (x.dim() - 2)), x.detach(), x)


def check_cut(compressor: Compressor) -> Plan | None:
    """Cut, and check that outputs and gradients in both modes stay as they were."""
    with watched_norms(compressor, detach_constants):
        before = {training: compute(compressor, training) for training in (False, True)}
    plan = compressor.cut()
    with watched_norms(compressor, detach_constants):
        after = {training: compute(compressor, training) for training in (False, True)}
    keep = plan.keep if plan is not None else {}
    silent = silent_biases(compressor)
    for training, (outputs, gradients) in before.items():
        mode = "training" if training else "evaluation"
        outputs_now, gradients_now = after[training]
        for now, was in zip(outputs_now, outputs, strict=True):
            # Constants may cancel to almost nothing, but rounding errors scale with the terms.
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


def silent_biases(compressor: Compressor) -> dict[str, Tensor]:
    """Return name of a bias → (channels,) bool: the entries whose gradient a cut may change.

    An entry is one of these if its channel has no row and is exactly 0: layers that read only zeros
    are cut, but the channel may stay for another reader, and then a part of the gradient is lost.
    Channels kept to round a width up (silent ones) lose all of it, unless a layer that is grouped
    or in float still reads them.
    """
    graph, found = compressor.graph, {}
    still_read = np.zeros_like(graph.silent)
    for node in graph.of_kind(Kind.LAYER, Kind.GROUPED):
        if node.kind is Kind.GROUPED or node.module not in compressor.layers:
            still_read[graph.reads(node)] = True
    for node in graph.nodes:
        layer = compressor.layers.get(node.module)
        if layer is not None and layer.bias is not None:
            zero = layer.bias.detach() == 0
            zero[layer.rows] = False
            kept = (graph.silent & ~still_read)[graph.ids[node.name]]
            found[f"{node.module}.bias"] = zero | torch.from_numpy(kept)
    constant = constants(graph, compressor.model)
    for node in graph.of_kind(Kind.OWN_NORM):  # whose entries stay as long as their channels
        nothing = (constant[node.name] == 0) | graph.silent[graph.ids[node.name]]
        found[f"{node.module}.bias"] = torch.from_numpy(nothing)
    return found


def assert_nothing_left(compressor: Compressor) -> None:
    compressor.idle.load({})  # a row that lost columns may quantise to zeros now, and would go
    assert compressor.cut() is None, "a cut right after a cut"


def check_cuts(seed: int, own_classes: bool = False) -> None:
    """Check three cuts of a random network: two after random kills, and one with `multiple` 1."""
    with told(seed, own_classes), copied(seed % 2 > 0):
        compressor = compressed(seed, own_classes)
        kill_at_random(compressor, seed)
        check_cut(compressor)
        assert_nothing_left(compressor)
        kill_at_random(compressor, seed + 1)
        check_cut(compressor)
        assert_nothing_left(compressor)
        compressor.multiple = 1
        compressor.idle.load({})
        check_cut(compressor)
        assert_nothing_left(compressor)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
@example(seed=1130)  # what a split left is joined with something new, and viewed
@example(seed=2002)  # both operands of a product are zero
@example(seed=2197)  # a norm's entry goes with the partner of a product
def test_a_cut_of_any_network_is_exact_and_so_is_the_next(seed: int) -> None:
    check_cuts(seed)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_cut_among_batch_norms_of_own_classes_is_exact(seed: int) -> None:
    check_cuts(seed, own_classes=True)


def check_held(seed: int, own_classes: bool = False) -> None:
    """Check cuts of a random network whose batch norms are in eval mode during training."""
    with told(seed, own_classes), copied(seed % 2 > 0):
        compressor = compressed(seed, own_classes)
        hold_norms(compressor, seed)
        for kills in (seed, seed + 1):
            kill_at_random(compressor, kills, settle=False)
            before, _ = compute(compressor, training=False)
            compressor.cut()
            after, _ = compute(compressor, training=False)
            for now, was in zip(after, before, strict=True):
                assert_same(now, was, max(float(was.abs().max()), 0.1), "an output")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_cut_among_norms_that_are_held_is_exact(seed: int) -> None:
    check_held(seed)


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
    """Return, for every row or norm entry, the input channels of modules that its NaN reaches.

    All rows are followed at once, each in a sample of its own, through the operations between the
    modules. NaN in the input of a module is replaced first, so that none passes through a module.
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
    """Return a view of an input or output of `module`, with its channels in dimension 1."""
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
    """Check that places of a random network share an id just where a NaN links them.

    Frozen ids and single channels that are broadcast, which are never removed, are exceptions.
    """
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
    """Return pairs of places that are the same row or column in different calls of a module."""
    module = {node.name: node.module for node in graph.nodes}
    first: dict[Place, Place] = {}
    return [
        (first.setdefault((module[name], end, i), p), p) for p in places for name, end, i in [p]
    ]


def ids_of_places(
    compressor: Compressor, arrived: dict[Place, set[Place]]
) -> dict[Place, int | None]:
    """Return the channel id of every row and column, None (frozen) for those of opaque modules."""
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
