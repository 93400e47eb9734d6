"""Who works on a level: a lock that tells its owner, and that a dead owner's successor takes over.

flock means nothing on many network disks, so the lock is a file made by link(2), which creates it or fails, on NFS
too. Its name carries a number: the owner is the file with the highest one, and a dead owner is succeeded by making the
next, which only one process can. An owner is dead when it ran on this host and its process is gone, when it is an
earlier incarnation of this very job, or when it has not touched its file for `DEAD_AFTER` seconds by the clock of the
file system.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.system import atomic
from utils.system.errors import Busy, UserError

HEARTBEAT = 15.0
"""Seconds between two touches of a lock by its owner."""

DEAD_AFTER = 120.0
"""Seconds without a touch after which an owner elsewhere is taken for dead."""

_NAME = re.compile(r"lock\.(\d+)\.json")
_LIMIT = 65536


class Lock:
    """The lock of one folder; `acquire` it, `check` it before anything is written, `release` it."""

    def __init__(self, folder: Path, what: str) -> None:
        """what: what is locked, in words, for messages."""
        self.folder, self.what = folder, what
        self._token = uuid.uuid4().hex
        self._path: Path | None = None
        self._stop = threading.Event()

    def acquire(self) -> str | None:
        """Own the folder. Returns the description of a dead owner that was succeeded, None where there was none.

        Raises Busy naming the owner when there is one alive.
        """
        with atomic.explaining(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        before = _newest(self.folder)
        if before is not None and self._alive(before):
            raise self._busy(before)
        gone = None if before is None else describe(_read(before))
        self._make(_number(before) + 1 if before is not None else 1)
        # Who made another file meanwhile sees ours, or we see theirs.
        for other in _locks(self.folder):
            if other != self._path and other != before and self._alive(other):
                self.release()
                raise self._busy(other)
        for other in _locks(self.folder):
            if other != self._path:
                other.unlink(missing_ok=True)
        atomic.sweep(self.folder, owned=True)
        threading.Thread(target=self._beat, name="lock", daemon=True).start()
        return gone

    def check(self) -> None:
        """Raise Busy when another process has taken the lock over, as it may after a long pause of this one."""
        if self._path is None:
            raise RuntimeError(f"{self.what}: not locked")
        newest = _newest(self.folder)
        if newest != self._path:
            successor = describe(_read(newest)) if newest is not None else "another process"
            raise Busy(f"{self.what}: lost to {successor} after a pause of this one; nothing written")

    def release(self) -> None:
        """Let others in."""
        self._stop.set()
        if self._path is not None:
            with contextlib.suppress(OSError):  # left on a disk that cannot be written, it names a dead owner
                self._path.unlink(missing_ok=True)
            self._path = None

    def tidy(self) -> None:
        """Remove what dead owners left of their locks, for a folder that nobody needs to own any more."""
        for path in _locks(self.folder):
            if not self._alive(path):
                path.unlink(missing_ok=True)
        atomic.sweep(self.folder)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Owned within, released afterwards, also by an error."""
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def _make(self, number: int) -> None:
        path = self.folder / f"lock.{number}.json"
        temporary = atomic.temporary_of(path)
        try:
            with atomic.explaining(path):
                temporary.write_text(json.dumps(_identity(self._token)), encoding="utf-8")
            os.link(temporary, path)
        except FileExistsError:
            raise self._busy(path) from None
        except OSError:
            # A file system without links.
            with atomic.explaining(path):
                try:
                    with open(path, "x", encoding="utf-8") as handle:
                        handle.write(temporary.read_text(encoding="utf-8"))
                except FileExistsError:
                    raise self._busy(path) from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        self._path = path

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            path = self._path
            with contextlib.suppress(OSError):
                if path is not None:
                    os.utime(path)

    def _alive(self, path: Path) -> bool:
        owner, own = _read(path), _identity(self._token)
        if owner is None:
            return _age(path) < DEAD_AFTER
        if owner.get("boot") == own["boot"] and owner.get("pids") == own["pids"]:
            started = owner.get("started")
            return isinstance(owner.get("pid"), int) and started is not None and _started(owner["pid"]) == started
        if _succeeds(own, owner):
            return False
        return _age(path) < DEAD_AFTER

    def _busy(self, path: Path) -> Busy:
        return Busy(
            f"{self.what}: {describe(_read(path))} is at work on it; wait for it or stop it "
            f"(its lock {path} counts for nothing {DEAD_AFTER:.0f} s after the last heartbeat)"
        )


def describe(owner: dict[str, Any] | None) -> str:
    """An owner in words."""
    if owner is None:
        return "a process that left no name"
    job = f", job {owner['job']}" if owner.get("job") else ""
    age = owner.get("age")
    beat = f", heartbeat {age:.0f} s ago" if isinstance(age, float) else ""
    return f"process {owner.get('pid')} on {owner.get('host')}{job}{beat}"


def owner(folder: Path) -> dict[str, Any] | None:
    """Who owns the folder, dead or alive; None when nobody does."""
    newest = _newest(folder)
    return None if newest is None else _read(newest)


def _identity(token: str) -> dict[str, Any]:
    env = os.environ
    return {
        "token": token,
        "host": socket.gethostname(),
        "boot": _text(Path("/proc/sys/kernel/random/boot_id")),
        "pids": _link(Path("/proc/self/ns/pid")),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "job": "_".join(filter(None, (env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID"))))
        or env.get("SLURM_JOB_ID"),
        "job_start": env.get("SLURM_RESTART_COUNT", "0"),
        "launch": env.get("TORCHELASTIC_RUN_ID"),
        "launch_start": env.get("TORCHELASTIC_RESTART_COUNT", "0"),
    }


def _succeeds(own: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether this process is a later start of the job, or of the torchrun, that `other` belongs to."""
    for name, count in (("job", "job_start"), ("launch", "launch_start")):
        same = own[name] not in (None, "", "none") and own[name] == other.get(name)
        mine, its = str(own[count]), str(other.get(count))
        if same and mine.isdecimal() and its.isdecimal() and int(mine) > int(its):
            return True
    return False


def _started(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None when there is none. A zombie is none."""
    text = _text(Path(f"/proc/{pid}/stat"))
    if text is None:
        return None
    fields = text.rpartition(")")[2].split()
    return None if len(fields) < 20 or fields[0] in "ZX" else int(fields[19])


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _link(path: Path) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _locks(folder: Path) -> list[Path]:
    try:
        return sorted((entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name)), key=_number)
    except FileNotFoundError:
        return []


def _newest(folder: Path) -> Path | None:
    return next(reversed(_locks(folder)), None)


def _number(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _read(path: Path) -> dict[str, Any] | None:
    """What the lock says of its owner, with the heartbeat's `age` in seconds; None when it is not ours to read."""
    try:
        with open(path, encoding="utf-8") as handle:
            content = json.loads(handle.read(_LIMIT))
    except (OSError, ValueError, RecursionError):
        return None
    return {**content, "age": _age(path)} if isinstance(content, dict) else None


def _age(path: Path) -> float:
    """Seconds since the last heartbeat by the clock of the file system, which the hosts share."""
    probe = atomic.temporary_of(path)
    try:
        probe.touch()
        return max(0.0, probe.stat().st_mtime - path.stat().st_mtime)
    except FileNotFoundError:
        return DEAD_AFTER  # released meanwhile
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written ({error.strerror}); mend that and run again") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
