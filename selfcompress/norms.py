"""Average the statistics of batch norms anew, over the network as it is now."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfcompress.layers import PlacedBatchNorm
from selfcompress.look import Inputs, kept_modes, positional


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Inputs]) -> None:
    """Average the statistics of `model`'s batch norms over `batches`, all batches alike.

    As torch's `update_bn` does, but norms that are in eval mode while the network trains keep
    theirs, be they `held` or left in it by a train() of the model's own.

    Raises:
        ValueError: there is no batch; the statistics are what they were.
    """
    with kept_modes(model):
        model.train()
        norms = []
        for module in model.modules():
            if isinstance(module, PlacedBatchNorm) and module.held:
                module.eval()
            elif isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
                norms.append(module)
        if not norms:
            return
        buffers = [buffer for norm in norms for buffer in norm.buffers()]
        before = [buffer.clone() for buffer in buffers]
        momenta = [norm.momentum for norm in norms]
        seen = 0
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the average of all batches
            for inputs in batches:
                model(*positional(inputs))
                seen += 1
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            if not seen:
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)
    if not seen:
        raise ValueError(
            "no batch to estimate batch-norm statistics from: the loader is empty, or an iterator "
            "that has been used up"
        )
