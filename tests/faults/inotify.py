"""What happens to the files under a folder, the moment it happens: Linux's inotify, without a package for it."""

from __future__ import annotations

import ctypes
import os
import select
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MODIFY, MOVED_TO, CREATE = 0x2, 0x80, 0x100
_IS_FOLDER, _OVERFLOW = 0x40000000, 0x4000
_NAMES = {CREATE: "create", MODIFY: "modify", MOVED_TO: "moved"}
_HEAD = struct.Struct("iIII")


@dataclass(frozen=True)
class Event:
    """`kind` (create, modify, moved: something was renamed to it) of `path`, relative to the folder watched."""

    kind: str
    path: str


class Watch:
    """Watches a folder that exists, and every folder that is made in it."""

    def __init__(self, root: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._handle = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._handle < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self.root = root
        self.last: Event | None = None
        """The newest event seen."""
        self._folders: dict[int, Path] = {}
        for _ in self._add(root):
            pass

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._handle)

    def events(self, timeout: float) -> Iterator[Event]:
        """Those there are; waits up to `timeout` seconds for the first."""
        if not select.select([self._handle], [], [], max(0.0, timeout))[0]:
            return
        buffer = os.read(self._handle, 1 << 16)
        while buffer:
            watch, mask, _, length = _HEAD.unpack_from(buffer)
            name = buffer[_HEAD.size : _HEAD.size + length].rstrip(b"\0").decode()
            buffer = buffer[_HEAD.size + length :]
            if mask & _OVERFLOW:
                raise RuntimeError("inotify: events were lost")
            if watch not in self._folders:
                continue
            path = self._folders[watch] / name
            if mask & _IS_FOLDER:
                if mask & (CREATE | MOVED_TO):
                    yield from self._add(path)
                continue
            for bit, kind in _NAMES.items():
                if mask & bit:
                    self.last = Event(kind, str(path.relative_to(self.root)))
                    yield self.last

    def _add(self, folder: Path) -> Iterator[Event]:
        watch = self._libc.inotify_add_watch(self._handle, os.fsencode(folder), MODIFY | MOVED_TO | CREATE)
        if watch < 0:
            return  # gone again
        self._folders[watch] = folder
        # What was made before the watch was there.
        for entry in sorted(folder.iterdir()):
            if entry.is_dir():
                yield from self._add(entry)
            else:
                yield Event("create", str(entry.relative_to(self.root)))
