"""Helpers for tests of train.py and sweep.py: the type of a command, and a check for refusals."""

from collections.abc import Callable

Cli = Callable[..., tuple[int, str, str]]  # arguments → exit code, stdout, stderr


def assert_refused(result: tuple[int, str, str], *parts: str) -> None:
    """Assert a non-zero exit and a single "error: " line on stderr that contains all `parts`.

    Lines on stderr that start with "warning" are ignored.
    """
    code, _, err = result
    assert code != 0
    (line,) = [line for line in err.splitlines() if not line.startswith("warning")]
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
