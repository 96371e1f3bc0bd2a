"""Average the statistics of batch norms anew, over the network as it is now."""

from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfcompress.inputs import Inputs, moved_with, positional
from selfcompress.look import kept_modes


@torch.no_grad()
def reestimate(
    models: Sequence[nn.Module], batches: Iterable[Inputs], eval_norms: Collection[str]
) -> None:
    """Average the statistics of batch norms over `batches`, all batches alike, read once.

    As torch's `update_bn` does, but norms that are in eval mode while the network trains keep
    theirs, be they `eval_norms` or left in it by a train() of the model's own.

    Args:
        models: a network and averages of it.
        eval_norms: names of those that the loop has in it.

    Raises:
        ValueError: there is no batch; the statistics are what they were, as after any error.
    """
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(kept_modes(model))
            model.train()
            for name in eval_norms:
                model.get_submodule(name).eval()
        modules = (module for model in models for module in model.modules())
        norms = [m for m in modules if isinstance(m, _BatchNorm) and m.training]
        norms = [norm for norm in norms if norm.track_running_stats]
        if not norms:
            return
        buffers = [buffer for norm in norms for buffer in norm.buffers()]
        before = [buffer.clone() for buffer in buffers]
        momenta = [norm.momentum for norm in norms]
        firsts = [next(model.parameters()) for model in models]
        seen = 0
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the average of all batches
            for inputs in batches:
                for model, first in zip(models, firsts, strict=True):  # averages may be elsewhere
                    model(*positional(moved_with(inputs, firsts[0], first)))
                seen += 1
            if not seen:
                raise ValueError(
                    "no batch to estimate batch-norm statistics from: the loader is empty, or an "
                    "iterator that has been used up"
                )
        except BaseException:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            raise
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
