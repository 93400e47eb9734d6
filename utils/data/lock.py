"""A lock file that leaves nothing behind when what it guards fails."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout


@contextlib.contextmanager
def locked(place: Path, waiting: str = "") -> Iterator[None]:
    """Hold the lock file `place`; when the body fails, it is removed with the empty folders that were made for it.

    The system frees the lock when its holder dies. `waiting` is told on stderr when another process holds it. Raises
    OSError when nothing can be written there.
    """
    lock = FileLock(str(place))
    made = _acquire(lock, place, waiting)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            place.unlink()  # a process that waits for it opens its path anew
            for folder in made:
                folder.rmdir()
        raise
    finally:
        lock.release()


def _acquire(lock: FileLock, place: Path, waiting: str) -> list[Path]:
    """Take the lock. Returns the folders made for it, innermost first."""
    timeout = 0.0
    while True:
        made = [folder for folder in place.parents if not folder.exists()]
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=timeout)
            return made
        except Timeout:
            if waiting:
                print(waiting, file=sys.stderr, flush=True)
            timeout = -1.0
        except FileNotFoundError:  # its holder failed and has removed the folder
            continue
