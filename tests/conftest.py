"""Fixtures of all tests: a fixed seed, one thread (fastest for small tensors), and `cli`."""

from collections.abc import Iterator

import pytest
import torch
from commands import Cli
from hypothesis import settings

import train


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """Seed torch and run the test on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Return a function that runs train.py in this process with the given arguments.

    It returns the exit code, stdout and stderr.
    """

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, args)])
        code = train.main()
        out, err = capsys.readouterr()
        return code, out, err

    return call


# Hypothesis tries the same examples in every run: a new failing example should become an issue to
# work on, and not break a build by chance.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
