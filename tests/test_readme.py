"""The README's example on a torchvision model runs, and shrinks the model."""

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_example_on_a_torchvision_model_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "torchvision" in block]
    assert "range(10)" in example
    # One epoch is enough to see it work, if the network shrinks at once.
    example = example.replace("range(10)", "range(1)")
    example = example.replace("Schedule(10 *", "Schedule(1 *")
    example = example.replace("gamma=0.003", "gamma=10, interval=5")
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    out = capsys.readouterr().out
    assert "54 of 54 layers are quantised" in out
    assert "features.0.0" in out
    size = names["compressor"].size()
    assert f"stored {size.stored_percent:.2f} %" in out
    assert size.parameters < 1_500_000
