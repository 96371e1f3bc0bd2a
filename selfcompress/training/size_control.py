"""--target-size: make the file of a network in training end at a given size, not at a given γ.

While formats change, γ is set so that the size follows a path to the target (see
`selfcompress/size_path.py`). Once they are frozen, `trim.Fitter` removes the remaining difference;
it does so again whenever training changes the entropy of the integers, and in the final network.
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from selfcompress.compressor import Compressor
from selfcompress.size import Size
from selfcompress.size_path import SizePath
from selfcompress.training.trim import Fitter

TOLERANCE = 0.01  # fraction of the target by which a file may be smaller before rows get more bits
LANDING = 1.02  # the path ends at this multiple of the target, as removed rows do not come back


class SizeControl:
    """Makes the file of a network in training end at `target` bytes, or slightly below.

    Args:
        compressor, optimizer: those of the run.
        target: bytes of the file.
        smallest: bytes of the smallest file that the network can have.
        start: all sizes of the network at the start.
        most_bits: bit depth up to which rows may grow to fill the file up.
        bytes_of: returns the bytes of a network's file.
        losses: yields the task's loss on a few batches, one after the other, with gradients.
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
        """Return the bytes that the file would have if the network were cut now."""
        return self.bytes_of(self.compressor.preview())

    def settle(self, last: bool = False) -> None:
        """Bring the file back to the target, if formats are frozen and it has left the target.

        The `last` time, formats are frozen and dead channels cut first, so that the size is exact;
        batch-norm statistics have to be re-estimated after that.
        """
        if last:
            self.compressor.freeze()
            self.compressor.idle.look()  # rows of zeros are cut first, as `finish` will cut them
            self.compressor.cut(self.fitter.optimizer)
        if not self.compressor.frozen:
            return
        least = round((1 - TOLERANCE) * self.target)
        self.fitter.fit(self.target, least, self.most_bits)
