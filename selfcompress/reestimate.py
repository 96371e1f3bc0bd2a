"""Re-estimate batch-norm statistics for a network as it is now."""

from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfcompress.inputs import Inputs, moved_with, place_of, positional
from selfcompress.undisturbed import kept_modes


@torch.no_grad()
def reestimate(
    models: Sequence[nn.Module], batches: Iterable[Inputs], eval_norms: Collection[str]
) -> None:
    """Average the statistics of batch norms over `batches`, in place, with equal weights.

    Like torch's `update_bn`, but norms that are in eval mode while the network trains keep their
    statistics: those in `eval_norms`, and those that the model's own train() leaves in eval mode.

    Args:
        models: a network and averages of it.
        batches: inputs of the network, read once for all models.
        eval_norms: names of the norms that the training loop keeps in eval mode.

    Raises:
        ValueError: there is no batch. After any error the statistics are as they were before.
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
        places = [place_of(model) for model in models]
        seen = 0
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average, in which all batches count the same
            for inputs in batches:
                for model, place in zip(models, places, strict=True):  # averages may be elsewhere
                    model(*positional(moved_with(inputs, places[0], place)))
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
