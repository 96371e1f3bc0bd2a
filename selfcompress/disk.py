"""Write files so that they are there whole or not at all."""

import errno
import os
import re
import tempfile
from collections.abc import Collection
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, or the file it links to, so that it is there whole or not at all.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    path = Path(os.path.realpath(path))
    # Else errors would name a file that nobody has chosen.
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def is_left_over(path: Path, names: Collection[str]) -> bool:
    """Whether a process was killed that wrote one of `names`, and left `path` behind."""
    match = re.fullmatch(r"\.(.+)\.\w{8}", path.name)  # as mkstemp makes them
    return match is not None and match[1] in names


def _umask() -> int:
    """What the user lets no new file have; to read it is to set it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask
