"""Files that are either whole or absent: written beside their place, flushed to disk, renamed.

A process that is killed while it writes leaves its temporary file behind; `sweep` removes those of processes gone.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.system.errors import UserError

OLD = 24 * 3600.0
"""Seconds without a write after which the temporary file of a process on another host is a leftover."""

_OWN = re.compile(r"\.(.+)\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.tmp")
_LIBRARY = re.compile(r"\.tmp\w{6}")
"""What safetensors writes to before it renames that to the path it was given."""

_MENDS = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space of your quota and run the same command again",
    errno.EROFS: "make it writable and run the same command again",
    errno.EACCES: "permit writing there and run the same command again",
    errno.EPERM: "permit writing there and run the same command again",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f) and run the same command again",
}


@contextlib.contextmanager
def replacing(path: str | Path, mend: str | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and renamed to `path`, on error removed.

    Raises UserError naming `path`, the reason and the `mend` (by default one for the reason) when it cannot be written.
    """
    path = Path(path)
    with explaining(path, mend):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_of(path)
        try:
            yield temporary
            with open(temporary, "rb+") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):  # a disk that cannot be written may refuse this too
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def explaining(path: Path, mend: str | None = None) -> Iterator[None]:
    """Around whatever writes `path`: an OSError becomes a UserError of one line, with the mend."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or f"{error}" or type(error).__name__
        mend = mend or _MENDS.get(error.errno or 0, "mend that and run the same command again")
        raise UserError(f"{path}: cannot be written ({reason}); {mend}") from error


def temporary_of(path: Path) -> Path:
    """A name beside `path` that no other process uses, and that `sweep` knows."""
    return path.with_name(f".{path.name}.{_here()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


def sweep(folder: Path, owned: bool = False) -> None:
    """Remove the temporary files that killed processes left in `folder`; folders in it are not looked at.

    owned: nobody else writes there (locks apart, which others ask for), so that all are leftovers. Otherwise those of
    processes of this host that are gone, and those untouched for `OLD` seconds.
    """
    try:
        entries = list(folder.iterdir())
    except OSError:
        return
    for path in entries:
        with contextlib.suppress(OSError):
            if _leftover(path, owned):
                path.unlink()


def _leftover(path: Path, owned: bool) -> bool:
    match = _OWN.fullmatch(path.name)
    if match is None and _LIBRARY.fullmatch(path.name) is None:
        return False
    if match is not None and match[2] == _here():
        return not _runs(int(match[3]))
    if owned and not path.name.startswith(".lock."):
        return True
    return time.time() - path.stat().st_mtime > OLD


@functools.cache
def _here() -> str:
    """The processes a process id is one of: host, boot and container, as eight hex digits."""
    told = [socket.gethostname()]
    with contextlib.suppress(OSError):
        told.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    with contextlib.suppress(OSError):
        told.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:8]


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    # A rename is durable only once the folder is; some file systems refuse to sync one, which loses nothing else.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(handle)


def _sha256(handle: Any) -> str:
    digest = hashlib.sha256()
    while block := handle.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
