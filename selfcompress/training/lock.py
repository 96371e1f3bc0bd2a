"""A folder that one process at a time works in; the lock goes when that process does, however."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from selfcompress.training.errors import UserError

LOCK = ".lock"


@contextmanager
def hold(folder: Path, who: str, seconds: float = 0) -> Iterator[None]:
    """Keep `folder`, which is made if need be, to this process for the length of a `with` block.

    Args:
        who: what another process that holds it must be, for the message.
        seconds: how long to wait for it.

    Raises:
        UserError: another process holds the folder.
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
