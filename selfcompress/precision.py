"""Compute in full float32 for a while, without autocast, TensorFloat-32 or bfloat16."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

_FULL = ("ieee", "none")


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Within the block, compute in full float32 on `device`, whatever the user has allowed."""
    # torch has an old and a new API for this. It refuses to read the old one where it contradicts
    # the new one, so the old one is set as well, unless the user's settings contradict already.
    backends: Any = torch.backends  # not all of it has types
    matmul, convolutions = None, None
    with suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        with suppress(RuntimeError):
            convolutions = backends.cudnn.allow_tf32
    # In order from the general settings to the particular ones.
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    on_gpus = [cudnn, backends.cuda.matmul, cudnn.conv, cudnn.rnn]
    on_cpus = [mkldnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
    kinds = [backends, *on_gpus, *on_cpus]
    allowed = [kind.fp32_precision for kind in kinds]
    changed = []
    try:
        if matmul not in (None, "highest"):
            torch.set_float32_matmul_precision("highest")
        if convolutions:
            backends.cudnn.allow_tf32 = False
        # Set only what needs it: a setting that is set no longer follows the more general one.
        for kind in (backends, *(on_gpus if device.type == "cuda" else on_cpus)):
            if kind.fp32_precision not in _FULL:
                changed.append((kind, kind.fp32_precision))
                kind.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if matmul not in (None, "highest"):
            torch.set_float32_matmul_precision(matmul)
        if convolutions:
            backends.cudnn.allow_tf32 = True
        for kind, precision in reversed(changed):
            kind.fp32_precision = precision
        for kind, precision in zip(kinds, allowed, strict=True):
            if kind.fp32_precision != precision:
                kind.fp32_precision = precision
