"""Keep the memory that a training step on a CPU frees, for the next step to use.

glibc returns every large block to the system when it is freed, and the next step, which needs the
same again, gets it back by page faults: a quarter of the time of an epoch, see docs/results.md.
The price is that the memory of the process never shrinks.
"""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # as in malloc.h


def keep_freed() -> None:
    """Make glibc return no memory to the system before the process ends; a no-op without glibc."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)
