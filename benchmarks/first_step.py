"""`python benchmarks/first_step.py ARGUMENTS`: harness.py of the current folder with these, to its first step.

Prints wall-clock and CPU seconds from the start of this file to the moment the first optimizer step begins, with its
gradients there, and ends the process. Imports nothing that harness.py would not: what it waits for it looks up among
the modules loaded.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time

START = time.perf_counter()


def watch() -> None:
    """Wait for the trainer, then end at its first step's end. The harness takes seconds from the one to the other."""
    while True:
        module = sys.modules.get("utils.training.trainer")
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            break
        time.sleep(0.005)
    module.Trainer._end_step = finish


def finish(*_: object) -> None:
    """Tell the times and end."""
    print("first step", time.perf_counter() - START, time.process_time(), flush=True)
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=watch, daemon=True).start()
    sys.argv = ["harness.py", *sys.argv[1:]]
    sys.path[0] = os.getcwd()  # not this file's folder, whose names are those of other modules
    runpy.run_path("harness.py", run_name="__main__")
