"""Every test starts from the same random state; small tensors run fastest on one thread."""

from collections.abc import Iterator

import pytest
import torch
from commands import Cli
from hypothesis import settings

import train


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """Seed torch and use one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run train.py in this process: its exit code, and what it printed."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, args)])
        code = train.main()
        out, err = capsys.readouterr()
        return code, out, err

    return call


# The same examples in every run: a new failing one is an issue to work on, not a broken build.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
