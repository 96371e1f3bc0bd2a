"""Record what a function launches on a GPU as a CUDA graph, and replay that.

Hundreds of small kernels take a CPU longer to launch one by one than they take a GPU to run.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from selfcompress.text import first_line

T = TypeVar("T")
_WAITS = "called a synchronizing CUDA operation"  # as torch says it
_OF_TORCH = "Synchronization debug mode is a prototype feature"


class Replay(Generic[T]):
    """A function of tensors that, on a GPU, is called, then recorded, and from then on replayed.

    A replay computes the same from the tensors that it is given and from what all others that the
    function reads hold by then, into the same tensors as before. Nothing else happens again: what
    Python notes meanwhile is as it was at the recording, so what others need is to be returned.

    A function that waits for the GPU, to go by what it has computed, cannot be recorded: it is
    called as ever, after a warning. So it is on any but the current GPU, without one.
    """

    def __init__(self, function: Callable[..., T]) -> None:
        self.function = function
        self._key: object = None
        self._inputs: list[Tensor] = []
        self._recorded: tuple[torch.cuda.CUDAGraph, T] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._able = torch.cuda.is_available()

    def __call__(self, version: Callable[[], object], *args: Any) -> T:
        """Compute `function(*args)`.

        Args:
            version: tells of all that is not in `args` whether it is what it was. If not, as with
                other shapes, the function is called once and then recorded anew.
            args: tensors in lists and dicts, perhaps with other values among them.
        """
        leaves, spec = pytree.tree_flatten(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not self._able or not tensors or not all(map(_on_current_gpu, tensors)):
            return self.function(*args)
        if torch.cuda.is_current_stream_capturing():  # it is recorded by somebody else
            return self.function(*args)
        others = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        kinds = [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors]
        key = version(), spec, others, kinds
        # What is recorded must not be in the default stream; where it runs is where its gradients
        # are accumulated, so the calls in between are there too.
        outside = torch.cuda.current_stream()
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            computed = self._compute(key, args, tensors)
        outside.wait_stream(self._stream)
        return computed

    def _compute(self, key: object, args: tuple[Any, ...], tensors: list[Tensor]) -> T:
        if key != self._key:
            self._key, self._recorded, self._inputs = key, None, []  # their memory is free now
            return self._call_and_watch(args)
        if self._recorded is None:
            self._inputs = [tensor.clone() for tensor in tensors]
            self._recorded = self._record(args)
            if self._recorded is None:
                return self.function(*args)
        else:
            torch._foreach_copy_(self._inputs, tensors)
        graph, computed = self._recorded
        graph.replay()
        return computed

    def _call_and_watch(self, args: tuple[Any, ...]) -> T:
        """Call the function, and find out whether it waits for the GPU."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                computed = self.function(*args)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        for warning in caught:
            said = str(warning.message)
            if _WAITS in said:
                self._able = False
            elif _OF_TORCH not in said:
                where = warning.filename, warning.lineno
                warnings.warn_explicit(warning.message, warning.category, *where)
        if not self._able:
            _warn("it reads what the GPU has computed")
        return computed

    def _record(self, args: tuple[Any, ...]) -> tuple[torch.cuda.CUDAGraph, T] | None:
        inputs = iter(self._inputs)
        args = pytree.tree_map_only(Tensor, lambda _: next(inputs), args)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as one that reads images, go on with what they do.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                return graph, self.function(*args)
        except RuntimeError as error:
            self._able, self._inputs = False, []
            _warn(first_line(error))
            return None


def _on_current_gpu(tensor: Tensor) -> bool:
    # What is launched on another than the current one would be left out of the recording.
    return tensor.is_cuda and tensor.get_device() == torch.cuda.current_device()


def addresses(tensors: Iterable[Tensor]) -> object:
    """What tells whether `tensors` are where they were, and as large: part of a version."""
    return [(tensor.data_ptr(), tensor.shape) for tensor in tensors]


def _warn(reason: str) -> None:
    warnings.warn(
        f"a step cannot be recorded as a CUDA graph ({reason}), so its kernels are launched one by "
        "one",
        stacklevel=5,
    )
