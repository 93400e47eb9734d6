"""Freed memory stays with the process: asking for it again costs no page faults."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from utils.system import memory

PROGRAM = """
import ctypes, resource, sys
from utils.system import memory
if sys.argv[1] == "keep":
    assert memory.keep_freed()
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.memset.argtypes, c.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]
def touch():
    block = c.malloc(64 << 20)
    c.memset(block, 1, 64 << 20)
    c.free(block)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_was_freed_is_there_at_once() -> None:
    faults = {}
    for how in ("keep", "plain"):
        command = [sys.executable, "-c", PROGRAM, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        faults[how] = int(done.stdout)
    # Four times 64 MiB, in pages of 4 KiB or of 2 MiB.
    assert faults["keep"] < 16 < faults["plain"]


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert memory.keep_freed() is False
