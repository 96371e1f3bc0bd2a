"""Errors that the user can correct, and the messages and exit codes with which commands end."""

import os
import sys
from collections.abc import Callable

import torch

from selfcompress.text import first_line

_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # in torch's messages


class UserError(ValueError):
    """An error that the user can correct; one line says what is wrong, where, and what to do."""


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory could not be allocated, on a GPU or a CPU."""
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
    """Run `command` and return its exit code, or, after one line on stderr, that of its error.

    Args:
        command: returns its own exit code.
        mistakes: further errors beside `UserError` that the user can correct; code 2.
        failures: further errors beside OSError whose message is enough; code 1.
        stopped: the message after Ctrl-C; code 130.
        smaller: what to suggest when there is not enough memory; code 1.

    If the reader of the output has gone, the code is 141, without a message. Any other error is
    raised.
    """
    mistakes = (UserError, *mistakes)
    try:
        code = command()
        if sys.stdout is not None:  # it is None when closed by `>&-`
            sys.stdout.flush()
        return code
    except mistakes as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except failures as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, such as `head`, has gone: end as SIGPIPE would
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = os.fsdecode(error.filename or "a file")  # TensorBoard's file names are bytes
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
