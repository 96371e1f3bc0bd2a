"""--target-size: has the file of a network in training end at a size, instead of a given γ.

While formats move, γ keeps the network on its way to the target (see `selfcompress/size_path.py`).
Once they are frozen `trim.Fitter` makes up for what is missing, and again whenever training moves
the entropy of the integers away from the target, for the last time in the finished network.
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from selfcompress.compressor import Compressor
from selfcompress.size import Size
from selfcompress.size_path import SizePath
from selfcompress.training.trim import Fitter

TOLERANCE = 0.01  # of the target, by which a file may be below it before it is filled up
LANDING = 1.02  # times the target is where the path ends: what was taken off does not come back


class SizeControl:
    """Has a network in training end in a file of at most `target` bytes, and hardly less.

    Args:
        compressor, optimizer: of the run.
        target: bytes of the file.
        smallest: bytes of the smallest file that the network can have.
        start: all sizes of the network at the start.
        most_bits: that a row may be given where there is room.
        bytes_of: the size of a network's file.
        losses: the task's loss on a few batches, one after the other, with gradients.
    """

    def __init__(
        self,
        compressor: Compressor,
        optimizer: Optimizer,
        target: int,
        smallest: int,
        start: Size,
        most_bits: int,
        bytes_of: Callable[[nn.Module], int],
        losses: Callable[[], Iterable[Tensor]],
    ) -> None:
        self.compressor, self.target, self.most_bits = compressor, target, most_bits
        self.bytes_of = bytes_of
        self.fitter = Fitter(compressor, optimizer, losses, self.file_bytes)
        schedule = compressor.schedule
        assert schedule is not None and not schedule.rise
        compressor.path = SizePath(
            LANDING * target,
            smallest,
            start,
            schedule,
            compressor.formats,
            measure=lambda: bytes_of(compressor.preview(settled=True)),
        )

    def file_bytes(self) -> int:
        """The size of the network's file, were it cut now."""
        return self.bytes_of(self.compressor.preview())

    def settle(self, last: bool = False) -> None:
        """Once formats are frozen: back to the target, if the file has left it.

        The `last` time, this is exact: batch-norm statistics have to be estimated anew after it.
        """
        if last:
            self.compressor.freeze()
            self.compressor.idle.look()  # rows that are zero now go first, as they do in the end
            self.compressor.cut(self.fitter.optimizer)
        if not self.compressor.frozen:
            return
        least = round((1 - TOLERANCE) * self.target)
        self.fitter.fit(self.target, least, self.most_bits)
