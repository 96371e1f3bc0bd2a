"""Have a CPU keep the memory that a step of training frees, for the next step to use.

glibc hands every large block back to the system when it is freed, and the next step, which wants
the same again, faults it in page by page: a quarter of the time of an epoch, see docs/results.md.
The price is that the process never gets smaller than it once was.
"""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # as in malloc.h


def keep_freed() -> None:
    """Hand nothing back before the process ends; where there is no glibc, this does nothing."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)
