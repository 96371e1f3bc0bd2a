"""Keep a GPU busy: replay what a step launches as one CUDA graph, and read its numbers late.

Hundreds of small kernels take a CPU longer to launch one by one than they take a GPU to run.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

from selfcompress.text import first_line

T = TypeVar("T")
_WAITS = "called a synchronizing CUDA operation"  # as torch warns


class Replay(Generic[T]):
    """A function of a batch of images and labels that is recorded, and from then on replayed.

    Every replay computes the function anew, from the new batch and from what the tensors that it
    reads hold by then, into the same tensors as before. Nothing else of it happens again, such as
    what Python notes or prints: all that others need to see must be in what it returns.

    A function that waits for the GPU, to go by what it has computed, cannot be recorded; it is
    called as ever, after a warning.

    Args:
        function: (images, labels) → what it computes, as it was at the recording. All batches are
            of the same shape.
        version: of the network: whenever it returns something else, the function is called once,
            and then recorded again.
    """

    def __init__(
        self, function: Callable[[Tensor, Tensor], T], version: Callable[[], object]
    ) -> None:
        self.function, self.version = function, version
        # A graph can only be recorded in a stream that is not the default one.
        self.stream = torch.cuda.Stream()
        self._recorded: tuple[torch.cuda.CUDAGraph, T] | None = None
        self._version: object = None
        self._able = True

    def __call__(self, images: Tensor, labels: Tensor) -> T:
        outside = torch.cuda.current_stream()
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            computed = self._compute(images, labels)
        outside.wait_stream(self.stream)
        return computed

    def _compute(self, images: Tensor, labels: Tensor) -> T:
        version = self.version()
        if not self._able:
            return self.function(images, labels)
        if version != self._version:
            self._version, self._recorded = version, None  # its memory is free from here on
            return self._call_and_watch(images, labels)
        if self._recorded is None:
            self._images, self._labels = images.clone(), labels.clone()
            try:
                self._recorded = self._record()
            except RuntimeError as error:
                self._give_up(first_line(error))
                return self.function(images, labels)
        else:
            self._images.copy_(images)
            self._labels.copy_(labels)
        graph, computed = self._recorded
        graph.replay()
        return computed

    def _call_and_watch(self, images: Tensor, labels: Tensor) -> T:
        """Call the function, and find out whether it waits for the GPU."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                computed = self.function(images, labels)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        told = [warning for warning in caught if _WAITS not in str(warning.message)]
        for warning in told:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
        if len(told) < len(caught):
            self._give_up("it reads what the GPU has computed")
        return computed

    def _record(self) -> tuple[torch.cuda.CUDAGraph, T]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that reads images, go on with what they do.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            computed = self.function(self._images, self._labels)
        return graph, computed

    def _give_up(self, reason: str) -> None:
        self._able = False
        print(
            f"warning: a step cannot be recorded as a CUDA graph ({reason}), so it is launched "
            "kernel by kernel",
            file=sys.stderr,
        )


def late(computed: Iterable[Tensor]) -> Iterator[list[float]]:
    """The numbers of each tensor, on a GPU once the next one is on its way: none is waited for."""
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
