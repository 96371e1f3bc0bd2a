"""Lock a folder for one process at a time; the lock ends with the process, however that ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from selfcompress.training.errors import UserError

LOCK = ".lock"


@contextmanager
def hold(folder: Path, who: str, seconds: float = 0) -> Iterator[None]:
    """Lock `folder`, which is created if need be, for the length of a `with` block.

    Args:
        who: the program that another holder of the lock must be, for the error message.
        seconds: how long to wait for the lock.

    Raises:
        UserError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=seconds)
    except Timeout as error:
        raise UserError(
            f"another {who} is at work in {folder}; wait for it, or choose another --run-dir"
        ) from error
    try:
        yield
    finally:
        lock.release()
