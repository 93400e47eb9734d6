"""A level owned: skipped when it is done, locked while a process works on it, and left resumable by a stop."""

from __future__ import annotations

import functools
from collections.abc import Callable

from utils.system import distributed
from utils.system.console import Console
from utils.system.distributed import World
from utils.system.errors import Preempted
from utils.system.locks import Lock
from utils.system.rundir import RunDir
from utils.system.stopping import Stopped


def own_level(
    number: int, run: RunDir, world: World, console: Console, done: Callable[[bool], bool], work: Callable[[Lock], None]
) -> None:
    """Do the `work` of a level that is not done, which no other process works on meanwhile; all ranks call it.

    done: whether the level's result is there, asked on rank 0; told whether the level is locked by this process, which
    may then clear what is out of date. Raises Busy when another process owns the level; Preempted when a stop was
    asked for where there was nothing to store.
    """
    if distributed.from_main(functools.partial(done, False)):
        console.line(f"level {number}: done already")
        return
    lock = Lock(run.level(number).path, f"level {number} of {run.path}")
    if gone := distributed.from_main(lock.acquire):
        console.line(f"level {number}: taken over from {gone}, which is gone")
    try:
        # Another process may have finished it since we looked.
        if not distributed.from_main(functools.partial(done, True)):
            work(lock)
    except Stopped as stopped:
        reason = f"stopped by {stopped.reason} before level {number} began to train"
        raise Preempted(f"{reason}; the same command goes on from there") from None
    finally:
        if world.main:
            lock.release()
