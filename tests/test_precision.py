"""Cuts are compared in full float32, and the precision that the user allows is restored after."""

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
import os, sys, warnings
import torch
import torch.backends as b
from selfcompress.precision import full_precision

warnings.simplefilter("ignore")  # of autocast without a GPU
KINDS = {
    "cpu": (b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn),
    "cuda": (b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn),
}
GENERAL = (b, b.cudnn, b.mkldnn)

def read(get):
    try:
        return get()
    except RuntimeError:  # old and new ways to say it contradict each other
        return "a contradiction"

def old():
    matmul = torch.get_float32_matmul_precision, lambda: b.cuda.matmul.allow_tf32
    return [read(get) for get in (*matmul, lambda: b.cudnn.allow_tf32)]

def now():
    kinds = (*GENERAL, *KINDS["cpu"], *KINDS["cuda"])
    return [kind.fp32_precision for kind in kinds], old()

def check(allowed, device):
    exec(allowed)
    before = now()
    with full_precision(torch.device(device)):
        inside = [kind.fp32_precision for kind in KINDS[device]]
        readable = old()
    assert {*inside} <= {"ieee", "none"}, inside
    for was, value in list(zip(before[1], readable))[: 3 if device == "cuda" else 1]:
        assert value != "a contradiction" or was == value, readable
    assert now() == before, (before, now())

def check_after(allowed, device):
    # What is set later is followed as if nothing had been compared in between.
    found = []
    for compares in (False, True):
        reading, writing = os.pipe()
        if not os.fork():
            exec(allowed)
            if compares:
                with full_precision(torch.device(device)):
                    pass
            b.fp32_precision = "ieee"
            os.write(writing, repr(now()).encode())
            os._exit(0)
        os.wait()
        found.append(os.read(reading, 10_000))
    assert found[0] == found[1], found

for allowed in sys.argv[1:]:
    for device in KINDS:
        for checks in (check, check_after):
            if checks is check_after and device == "cuda":
                continue  # cuDNN's TensorFloat-32, allowed in the old way, stays so
            process = os.fork()  # torch cannot be brought back from all of these states
            if not process:
                checks(allowed, device)
                os._exit(0)
            assert os.waitpid(process, 0)[1] == 0, (allowed, device, checks)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_precision_is_full_inside_and_as_it_was_after() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM, *ALLOWED], check=True)
