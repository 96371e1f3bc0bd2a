"""What tests of train.py and sweep.py share: how a command is called, and how it refuses."""

from collections.abc import Callable

Cli = Callable[..., tuple[int, str, str]]  # arguments → exit code, stdout, stderr


def assert_refused(result: tuple[int, str, str], *parts: str) -> None:
    """Non-zero exit and one line on stderr (after warnings) that has all `parts`."""
    code, _, err = result
    assert code != 0
    (line,) = [line for line in err.splitlines() if not line.startswith("warning")]
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
