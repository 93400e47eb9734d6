"""The launcher of this process: a worker whose torchrun is gone ends itself. Imports no torch.

A killed agent leaves its workers behind, which would go on training beside the rerun of the same command, or wait for
ever for one another.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from utils.system.errors import EXIT_PREEMPTED

INTERVAL = 0.5
"""Seconds between two looks."""

GRACE = 7.0
"""Seconds a worker has to store its state once its launcher is gone."""


class Launcher:
    """Watches the process that started this one. Make it as early as possible: it goes by the parent of that moment."""

    def __init__(self, parent: int | None = None) -> None:
        """parent: process id of the launcher; by default the parent this process has now."""
        self._parent = os.getppid() if parent is None else parent
        self._on_loss: Callable[[], object] | None = None

    def watch(self) -> None:
        """Look after the launcher from now on, in a thread of its own. Nothing to do where torchrun started nothing."""
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=self._watch, name="launcher", daemon=True).start()

    def on_loss(self, ask: Callable[[], object]) -> None:
        """Call `ask` once the launcher is gone, and give what it asks for `GRACE` seconds; without it the end is at
        once."""
        self._on_loss = ask

    @property
    def gone(self) -> bool:
        """Whether another process has adopted this one."""
        return os.getppid() != self._parent or _is_adopter(self._parent)

    def _watch(self) -> None:
        while not self.gone:
            time.sleep(INTERVAL)
        if self._on_loss is not None:
            self._on_loss()
            time.sleep(GRACE)
        # Whatever the main thread waits for will not come any more.
        os._exit(EXIT_PREEMPTED)


def _is_adopter(parent: int) -> bool:
    """Whether `parent` is an init that runs no Python: then the launcher was gone before it could be looked at."""
    if parent != 1:
        return False
    try:
        init = Path("/proc/1/cmdline").read_bytes()
        return b"python" not in init and b"torchrun" not in init
    except OSError:
        return False
