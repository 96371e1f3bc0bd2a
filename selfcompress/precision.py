"""Have float32 be float32 for a while: no autocast, no TensorFloat-32, no bfloat16 in its place."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Inside, whatever the user has allowed, float32 is computed with as it is."""
    # Torch has an old and a new way to say so. It refuses to read the old one where it contradicts
    # the new one, so the old one is set as well; unless the user has them contradict each other.
    backends: Any = torch.backends  # not all of it has types
    matmul, convolutions = None, None
    with suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        convolutions = backends.cudnn.allow_tf32
    kinds = (
        backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn,
        backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn,
    )  # fmt: skip
    allowed = [kind.fp32_precision for kind in kinds]
    try:
        if matmul is not None:
            torch.set_float32_matmul_precision("highest")
        if convolutions is not None:
            backends.cudnn.allow_tf32 = False
        for kind in kinds:
            kind.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if convolutions is not None:
            backends.cudnn.allow_tf32 = convolutions
        for kind, precision in zip(kinds, allowed, strict=True):
            kind.fp32_precision = precision
