"""Read a step's numbers after launching the next step, so that a GPU is not waited for."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def late(computed: Iterable[Tensor]) -> Iterator[list[float]]:
    """Yield the numbers in each tensor: on a GPU after the next tensor was made, else at once."""
    before: tuple[Tensor, torch.cuda.Event] | None = None
    for tensor in computed:
        if not tensor.is_cuda:
            yield tensor.tolist()
            continue
        after = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
        after[1].record()
        if before is not None:
            yield _read(*before)
        before = after
    if before is not None:
        yield _read(*before)


def _read(copied: Tensor, event: torch.cuda.Event) -> list[float]:
    event.synchronize()
    numbers: list[float] = copied.tolist()
    return numbers
