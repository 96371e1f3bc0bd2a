"""Run a script that must not outlive the process that started it: python leash.py SCRIPT ARGS …

The parent holds the write end of the script's standard input and never writes to it. However the
parent ends, even by kill -9, the operating system closes that end; then the read here returns, and
this process exits.
"""

import os
import runpy
import sys
import threading
from pathlib import Path


def _end_with_the_parent() -> None:
    os.read(0, 1)  # sys.stdin would be locked by this thread when the interpreter shuts down
    os._exit(1)  # at once, as by kill -9: the files of a run are complete at any time


if __name__ == "__main__":
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as if the script had been started
    runpy.run_path(sys.argv[0], run_name="__main__")
