"""Mistakes that the user can put right, and how a command ends on these and other errors."""

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake of the user's, told in one line: what was wrong, where, and what to do."""


def exit_code(
    command: Callable[[], int],
    *,
    mistakes: tuple[type[Exception], ...] = (),
    failures: tuple[type[Exception], ...] = (),
    stopped: str = "",
) -> int:
    """What `command` returns, or, after one line on stderr, the code for the error it raised.

    Args:
        mistakes: errors beside `UserError` that are the user's: 2.
        failures: others that a line tells enough of, beside OSError: 1.
        stopped: what to say after Ctrl-C: 130.
    """
    mistakes = (UserError, *mistakes)
    try:
        return command()
    except mistakes as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except failures as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = os.fsdecode(error.filename or "a file")  # TensorBoard's are bytes
        print(f"error: {where}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if stopped:
            print(f"\n{stopped}", file=sys.stderr)
        return 130
