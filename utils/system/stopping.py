"""Requests to stop: signals are noted, and all ranks agree on the step after which they end.

A signal handler of Python's own runs only between two instructions of the main thread, which may wait in a collective
or a backward pass. So a small thread reads the signal numbers that the interpreter's C handler writes into a socket:
a request is noted at once, and a second one ends the process whatever the main thread does.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask for a stop. SIGINT stays what Python makes of it, KeyboardInterrupt."""

LAUNCHER_GONE = "the loss of its launcher"

REASONS = ("", *(number.name for number in SIGNALS), LAUNCHER_GONE)
"""Why a run stops, as the ranks tell each other: by its place here."""

SAME_REQUEST = 2.0
"""Seconds in which further signals belong to the first: who signals a whole process group reaches a worker twice,
directly and through its launcher."""


class Stopped(Exception):
    """All ranks agreed to stop at a point where there is nothing to store."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"stopped by {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Poll:
    """What the ranks agreed on: why to stop (None: go on), and whether something is due on any of them."""

    stop: str | None = None
    due: bool = False


class Never:
    """Stands in for `Stopping` where nothing asks for a stop: notebooks, tests, commands of one process."""

    requested: str | None = None

    def poll(self, due: bool = False) -> Poll:
        """Nobody asks for a stop; what is due is due, in one process (several need `Stopping` to agree on it)."""
        return Poll(None, due and not (dist.is_available() and dist.is_initialized()))

    def drain(self) -> Poll:
        """Nothing is in flight."""
        return Poll()


class Stopping(Never):
    """Requests to stop of this process, and the answers all ranks agree on.

    group: a group of CPU tensors (gloo) that nothing else uses, or None for one process.
    late: answer in the call after the question, so that no rank waits for another one's step; for devices that run
        behind the host. Otherwise at once.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, late: bool = False) -> None:
        self.requested: str | None = None
        self._group, self._late = group, late
        self._votes = torch.zeros(2, dtype=torch.int32)
        self._work: dist.Work | None = None
        self._agreed: str | None = None
        self._undo: list[Callable[[], object]] = []

    # Asking -------------------------------------------------------------------------------------------------------

    def request(self, reason: str) -> None:
        """Ask for a stop; the first reason stays. Any thread may call it."""
        if reason not in REASONS:
            raise ValueError(f"unknown reason {reason!r}")
        self.requested = self.requested or reason

    def install(self) -> None:
        """Let `SIGNALS` ask for a stop, from now to `uninstall`. Only the main thread may call it."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        before = {number: signal.signal(number, _noted) for number in SIGNALS}
        fileno = signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
        forked = _Forked()
        threading.Thread(target=self._listen, args=(theirs,), name="signals", daemon=True).start()

        def undo() -> None:
            forked.active = False
            signal.set_wakeup_fd(fileno)
            for number, handler in before.items():
                signal.signal(number, handler)
            ours.close()  # ends the thread

        self._undo.append(undo)

    def uninstall(self) -> None:
        """Give the signals back to what handled them before `install`."""
        while self._undo:
            self._undo.pop()()

    def _listen(self, numbers: socket.socket) -> None:
        first: float | None = None
        with numbers:
            while received := numbers.recv(64):
                for number in received:
                    if number not in SIGNALS:
                        continue
                    now = time.monotonic()
                    if first is not None and now - first > SAME_REQUEST:
                        os._exit(128 + number)
                    first = now if first is None else first
                    self.request(signal.Signals(number).name)

    # Agreeing -----------------------------------------------------------------------------------------------------

    def poll(self, due: bool = False) -> Poll:
        """What all ranks agree on; every rank calls it at the same points of its work.

        `due` asks for something on all ranks (a checkpoint by the clock); it is answered once. A stop stays agreed on.
        Raises RuntimeError when a rank is gone.
        """
        if self._group is None:
            self._agreed = self._agreed or self.requested
            return Poll(self._agreed, due)
        answer = self._answer() if self._late else Poll(self._agreed)
        if answer.stop:
            return answer
        # What is being answered is not asked for again.
        self._ask(due and not answer.due)
        return answer if self._late else self._answer()

    def drain(self) -> Poll:
        """The answer to what is still in flight, which stays agreed on; nothing is in flight afterwards."""
        return self._answer() if self._group is not None else Poll(self._agreed)

    def _ask(self, due: bool) -> None:
        self._votes[0], self._votes[1] = REASONS.index(self.requested or ""), int(due)
        self._work = dist.all_reduce(self._votes, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _answer(self) -> Poll:
        if self._work is None:
            return Poll(self._agreed)
        self._work.wait()
        self._work = None
        reason, due = self._votes.tolist()
        self._agreed = self._agreed or REASONS[reason] or None
        return Poll(self._agreed, bool(due))


class _Forked:
    """Children of a fork (loader workers) do not speak for this process: they leave its socket and signals alone."""

    def __init__(self) -> None:
        self.active = True
        os.register_at_fork(after_in_child=self._in_child)

    def _in_child(self) -> None:
        if self.active:
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                # Who signals the whole group means the process that works out when to stop, and then ends them.
                signal.signal(number, signal.SIG_IGN)


def _noted(number: int, frame: FrameType | None) -> None:
    """The thread that reads the socket has seen it."""
