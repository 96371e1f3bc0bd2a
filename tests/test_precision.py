"""Cuts are compared in full precision, whatever the user allows, and what they allow is kept."""

import os
import subprocess
import sys

import pytest

ALLOWED = [
    "pass",
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "b.cuda.matmul.allow_tf32 = True",
    "b.cudnn.allow_tf32 = False",
    "b.fp32_precision = 'tf32'",
    "b.cudnn.conv.fp32_precision = 'ieee'",
    "b.mkldnn.matmul.fp32_precision = 'bf16'",
    "b.cuda.matmul.fp32_precision = 'tf32'",
]

PROGRAM = """
import os, sys
import torch
import torch.backends as b
from selfcompress.precision import full_precision

def read(get):
    try:
        return get()
    except RuntimeError:  # old and new ways to say it contradict each other
        return "a contradiction"

def now():
    kinds = (b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn)
    old = (torch.get_float32_matmul_precision, lambda: b.cudnn.allow_tf32)
    return [kind.fp32_precision for kind in kinds], [read(get) for get in old]

def check(allowed):
    exec(allowed)
    before = now()
    with full_precision(torch.device("cpu")):
        inside, old = now()
    assert inside == ["ieee"] * 6, (allowed, inside)
    for was, value, safe in zip(before[1], old, ("highest", False)):
        assert value == safe or was == "a contradiction", (allowed, old)
    assert now() == before, (allowed, before, now())

for allowed in sys.argv[1:]:
    process = os.fork()  # torch cannot be brought back from all of these states
    if not process:
        check(allowed)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0, allowed
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_precision_is_full_inside_and_as_it_was_after() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM, *ALLOWED], check=True)
