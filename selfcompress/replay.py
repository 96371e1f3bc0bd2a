"""Record the kernels that a function launches on a GPU as a CUDA graph, and replay them.

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
_WAITS = "called a synchronizing CUDA operation"  # in torch's warning
_OF_TORCH = "Synchronization debug mode is a prototype feature"


class Replay(Generic[T]):
    """A function of tensors that, on a GPU, is called once, then recorded, and then replayed.

    A replay runs the recorded kernels on the tensors that it is given and on the present contents
    of all others that the function reads, and writes to the same tensors as before. No Python code
    runs again: what it noted stays as it was at the recording, so results have to be returned.

    A function that waits for the GPU, because it depends on computed values, cannot be recorded: it
    is called normally, after a warning. So it is with tensors that are not on the current GPU, but
    without a warning.
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
            version: returns a value that changes when something changes that is not in `args` and
                that a recording fixes, such as the address of a tensor (see `addresses`). Then, or
                when shapes or other values in `args` change, the function is called once and
                recorded anew.
            args: tensors in lists and dicts, perhaps with other values among them.
        """
        leaves, spec = pytree.tree_flatten(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not self._able or not tensors or not all(map(_on_current_gpu, tensors)):
            return self.function(*args)
        if torch.cuda.is_current_stream_capturing():  # the caller records
            return self.function(*args)
        others = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        kinds = [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors]
        key = version(), spec, others, kinds
        # A recording must not be in the default stream. Gradients are accumulated in the stream in
        # which the function runs, so the calls that are not replayed run in this stream too.
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
            self._key, self._recorded, self._inputs = key, None, []  # this frees their memory
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
        """Call the function, and give up recording it if it waits for the GPU."""
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
            # Other threads, such as one that reads images, may use the GPU meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                return graph, self.function(*args)
        except RuntimeError as error:
            self._able, self._inputs = False, []
            _warn(first_line(error))
            return None


def _on_current_gpu(tensor: Tensor) -> bool:
    # Kernels that are launched on any other GPU would be missing from the recording.
    return tensor.is_cuda and tensor.get_device() == torch.cuda.current_device()


def addresses(tensors: Iterable[Tensor]) -> object:
    """Return the memory addresses and shapes of `tensors`, for use in a `version`."""
    return [(tensor.data_ptr(), tensor.shape) for tensor in tensors]


def _warn(reason: str) -> None:
    warnings.warn(
        f"a step cannot be recorded as a CUDA graph ({reason}), so its kernels are launched one by "
        "one",
        stacklevel=5,
    )
