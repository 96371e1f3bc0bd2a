"""Write files atomically, and recognise the temporary files that killed processes left."""

import errno
import os
import re
import tempfile
from collections.abc import Collection
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, or to the file it links to, completely or not at all.

    Raises:
        OSError: the file cannot be written; what was there before is unchanged.
    """
    path = Path(os.path.realpath(path))
    # Otherwise errors would name the temporary file, which nobody has chosen.
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():  # a device, a pipe
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
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
    """Return whether `path` is what a process left that was killed writing one of `names`."""
    match = re.fullmatch(r"\.(.+)\.\w{8}", path.name)  # as mkstemp names them
    return match is not None and match[1] in names


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask
