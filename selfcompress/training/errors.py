"""Mistakes that the user can put right, and how a command ends on these and other errors."""

import os
import sys
from collections.abc import Callable

import torch

from selfcompress.text import first_line

_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # says torch


class UserError(ValueError):
    """A mistake of the user's, told in one line: what was wrong, where, and what to do."""


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory could not be had, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(t in str(error).lower() for t in _NO_MEMORY)


def exit_code(
    command: Callable[[], int],
    *,
    mistakes: tuple[type[Exception], ...] = (),
    failures: tuple[type[Exception], ...] = (),
    stopped: str = "",
    smaller: str = "",
) -> int:
    """What `command` returns, or, after one line on stderr, the code for the error it raised.

    Args:
        mistakes: errors beside `UserError` that are the user's: 2.
        failures: others that a line tells enough of, beside OSError: 1.
        stopped: what to say after Ctrl-C: 130.
        smaller: what to try where memory does not suffice: 1.

    141, without a line, if nobody reads its output any more.
    """
    mistakes = (UserError, *mistakes)
    try:
        code = command()
        if sys.stdout is not None:  # closed: `>&-`
            sys.stdout.flush()
        return code
    except mistakes as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except failures as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `| head` has seen enough: end as SIGPIPE would have it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = os.fsdecode(error.filename or "a file")  # TensorBoard's are bytes
        print(f"error: {where}: {error.strerror or error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        advice = f": try {smaller}" if smaller else ""
        print(f"error: not enough memory for this ({first_line(error)}){advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if stopped:
            print(f"\n{stopped}", file=sys.stderr)
        return 130
