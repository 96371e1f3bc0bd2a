"""A bounded pool of processes that share a machine's cores and GPUs and never outlive their parent.

Every process runs under leash.py, so that it ends when its parent does, however that ends.
"""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from selfcompress.sweeping import leash

POLL = 0.2  # seconds between two looks at the processes


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its exit code, and the last lines that it printed."""

    name: str
    code: int
    lines: list[str]


def run_all(
    scripts: Mapping[str, Sequence[str]], jobs: int, logs: Path, gpus: Sequence[str] = ()
) -> Generator[tuple[set[str], list[Ended]], None, None]:
    """Run Python scripts, at most `jobs` at a time, in order; closing the generator kills them.

    Args:
        scripts: by name, the script's path and its arguments.
        jobs: how many processes run at a time; they share the cores.
        logs: folder for their output, in NAME.log.
        gpus: GPUs as CUDA_VISIBLE_DEVICES names them; processes take turns on them.

    Yields:
        Several times a second, the names of running processes, and the processes that just ended.
    """
    jobs = min(jobs, len(scripts)) or 1
    waiting, free = deque(scripts), list(range(jobs))
    running: dict[str, tuple[subprocess.Popen[bytes], int, int]] = {}  # process, slot, log's start
    share = max(1, cores() // jobs)
    environment = dict(os.environ)
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        text = environment.get(variable, "")
        asked = int(text) if text.isdecimal() else 0
        environment[variable] = str(min(share, asked or share))
    try:
        while waiting or running:
            while waiting and free:
                name, slot = waiting.popleft(), free.pop(0)
                own = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
                with (logs / f"{name}.log").open("ab") as log:
                    running[name] = (
                        subprocess.Popen(
                            [sys.executable, leash.__file__, *scripts[name]],
                            stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                            env=environment | own,
                        ),
                        slot,
                        log.tell(),
                    )  # fmt: skip
            ended = []
            for name, (process, slot, start) in list(running.items()):
                code = process.poll()
                if code is not None:
                    del running[name]
                    _let_go(process)
                    free.append(slot)
                    ended.append(Ended(name, code, _last_lines(logs / f"{name}.log", start, code)))
            yield set(running), ended
            time.sleep(POLL)
    finally:
        for process, _, _ in running.values():
            process.kill()  # the files of a run are complete at any time
        for process, _, _ in running.values():
            _let_go(process)


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _let_go(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def _last_lines(log: Path, start: int, code: int, count: int = 3) -> list[str]:
    """Return at most `count` of the last lines that a process logged from byte `start` on.

    If there are lines that begin with "error: ", only those count. If a signal ended the process,
    a line that names it is added.
    """
    content = log.read_bytes()[start:] if log.exists() else b""
    lines = [line for line in content.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    ending = [f"ended by {signal.Signals(-code).name}"] if code < 0 else []
    return (errors or lines)[-count:] + ending
